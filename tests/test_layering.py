"""Who may import whom. Read from the source, so that imports inside of functions count too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import horcrux_nbd

ROOT = Path(horcrux_nbd.__file__).parent.parent

# A part is a package or a module directly in horcrux_nbd. It may import itself, BASE, and what is
# named here: nothing else of ours.
BASE = {"closing", "errors", "units", "names", "files", "progress", "paths", "identity"}
MAY_IMPORT: dict[str, set[str]] = {
    "chunkstore": set(),
    "repository": {"chunkstore"},
    "source": set(),
    "attach": set(),
    "native": set(),
    "volume": {"chunkstore", "repository", "native"},
    "config": {"chunkstore"},
    "generate": {"chunkstore", "repository", "source"},
    "refresh": {"chunkstore", "repository", "source", "volume"},
    "mirrors": {"chunkstore", "repository"},
    "containers": set(),
    "control": set(),
    "peer": set(),
    "tcp": {"server", "attach"},
    "serving": {"peer", "attach", "chunkstore", "repository", "volume", "control"},
    "plugin": {"serving"},
    "server": {"attach", "native"},
    "filesystem": set(),
    "host": {"chunkstore", "repository", "volume", "attach", "server", "control", "config"}
    | {"mirrors"},
}
MAY_IMPORT["supervise"] = {"host", "server", "attach"}
MAY_IMPORT["versions"] = MAY_IMPORT["host"] | {"host", "generate", "filesystem"}
MAY_IMPORT["blank"] = MAY_IMPORT["host"] | {"host", "generate", "source"}
MAY_IMPORT["contents"] = MAY_IMPORT["versions"] | {"versions"}
MAY_IMPORT["cli"] = set(MAY_IMPORT) - {"plugin", "serving", "control"}


def part_of(module: str) -> str:
    """`horcrux_nbd.volume.cache` → `volume`; `horcrux_driver.main` → `horcrux_driver`."""
    names = module.split(".")
    return names[0] if names[0] != "horcrux_nbd" else (names[1] if len(names) > 1 else "")


def imports(path: Path, module: str, package: bool) -> Iterator[tuple[int, str]]:
    """(line, full name) of everything of ours that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = module.split(".")[: len(module.split(".")) - node.level + package]
                base = ".".join([*up, *([node.module] if node.module else [])])
            found = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in found:
            if name.split(".")[0] in ("horcrux_nbd", "horcrux_driver"):
                yield node.lineno, name


def files() -> Iterator[tuple[Path, str, bool]]:
    for top in ("horcrux_nbd", "horcrux_driver"):
        for path in sorted((ROOT / top).rglob("*.py")):
            names = list(path.relative_to(ROOT).with_suffix("").parts)
            package = names[-1] == "__init__"
            yield path, ".".join(names[:-1] if package else names), package


def violations(path: Path, module: str, package: bool) -> list[str]:
    part = part_of(module)
    if part == "horcrux_driver":  # on top of everything, the command line apart
        allowed = (set(MAY_IMPORT) | BASE | {"horcrux_driver", "__version__"}) - {"cli", "plugin"}
    elif part in BASE:
        allowed = set(BASE)
    else:
        allowed = MAY_IMPORT[part] | BASE | {part, "__version__"}
    return [
        f"{path.name}:{line} ({module}) imports {name}"
        for line, name in imports(path, module, package)
        if part_of(name) not in allowed
    ]


def test_nothing_imports_upwards() -> None:
    unknown = {part_of(module) for _, module, _ in files()}
    unknown -= BASE | set(MAY_IMPORT) | {"", "horcrux_driver"}
    assert not unknown, f"say in MAY_IMPORT what these may import: {unknown}"
    found = [
        line
        for path, module, package in files()
        if part_of(module)
        for line in violations(path, module, package)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("chunkstore.local", "from ..volume.cache import Cache"),
        ("chunkstore.local", "import horcrux_nbd.repository.refs"),
        ("repository.refs", "from .. import volume"),
        ("volume.base", "def f():\n    from ..attach import mount"),
        ("volume.base", "from ..cli.main import main"),
        ("plugin", "from horcrux_nbd.chunkstore import open_store"),
        ("units", "from .chunkstore import open_store"),
        ("host", "from .cli import main"),
    ],
)
def test_the_check_sees_it(tmp_path: Path, module: str, line: str) -> None:
    """Each kind of a wrong import is found: the test above can fail."""
    path = tmp_path / "wrong.py"
    path.write_text(line + "\n")
    assert violations(path, f"horcrux_nbd.{module}", package=False)


def test_modules_stay_small() -> None:
    for path, _, _ in files():
        lines = len(path.read_text().splitlines())
        assert lines <= 500, f"{path} has {lines} lines: one topic each"
    plugin = ROOT / "horcrux_nbd" / "plugin.py"
    assert len(plugin.read_text().splitlines()) <= 200


def test_objects_go_by_the_form_of_their_repository() -> None:
    """The plain form's functions are for tests: an object of an encrypted repository that was
    written with them would be in the clear, under an id that tells what is in it.
    """
    plain = {"object_id", "encode", "decode", "max_stored"}
    found = [
        f"{path.name}:{line} imports {name}: use the repository's form"
        for path, module, package in files()
        for line, name in imports(path, module, package)
        if name.rpartition(".")[0].endswith("repository.objects") and name.split(".")[-1] in plain
    ]
    assert not found, "\n".join(found)

"""What `pip install` gives: programs that run, a plugin that nbdkit loads, dependencies that are
all named.
"""

from __future__ import annotations

import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from horcrux_driver.main import main as driver
from horcrux_nbd import __version__

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 120.0  # seconds
SYSTEM_PYTHON = "/usr/bin/python3"  # the one that Debian's nbdkit embeds

# What a distribution is imported as, where that is not its name.
IMPORTED = {"pytest-timeout": None, "setuptools": None, "ruff": None, "mypy": None}
# Debian's own, for tests only, or nbdkit's; and what the named ones bring along.
OTHERS = {"nbd", "nbdkit", "botocore", "urllib3", "cryptography", "nacl", "werkzeug"}


def configuration() -> configparser.ConfigParser:
    found = configparser.ConfigParser()
    found.read(ROOT / "setup.cfg")
    return found


def named(*lists: str) -> set[str]:
    """The distributions in lists of requirements, as modules."""
    lines = [line for text in lists for line in text.split("\n") if line.strip()]
    names = {re.split(r"[\[><=;]", line)[0].strip().lower() for line in lines}
    return {module for name in names if (module := IMPORTED.get(name, name.replace("-", "_")))}


def imported(*folders: str) -> Iterator[tuple[Path, str]]:
    for folder in folders:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    yield from ((path, alias.name.split(".")[0]) for alias in node.names)
                elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                    yield path, node.module.split(".")[0]


def test_every_import_is_named() -> None:
    """What is imported comes from Python, from us, or from a requirement in setup.cfg."""
    config = configuration()
    needed = named(config["options"]["install_requires"])
    extras = config["options.extras_require"]
    known = (
        set(sys.stdlib_module_names)
        | OTHERS
        | {"horcrux_nbd", "horcrux_driver", "tests", "scripts"}
    )
    # The command line asks Docker too, where the extra is there.
    found = {(str(p), m) for p, m in imported("horcrux_nbd") if p.name != "containers.py"}
    missing = {(p, m) for p, m in found if m not in known | needed}
    assert not missing
    driving = known | needed | named(extras["driver"])
    missing = {(str(p), m) for p, m in imported("horcrux_driver") if m not in driving}
    assert not missing
    testing = known | needed | named(extras["test"], extras["driver"], extras["bench"])
    missing = {(str(p), m) for p, m in imported("tests", "scripts") if m not in testing}
    assert not missing


def test_every_requirement_is_used() -> None:
    config = configuration()
    used = {module for _, module in imported("horcrux_nbd")}
    assert named(config["options"]["install_requires"]) <= used
    used = {module for _, module in imported("horcrux_nbd", "horcrux_driver")}
    assert named(config["options.extras_require"]["driver"]) <= used


def test_the_driver_says_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert driver(["--version"]) == 0
    assert __version__ in capsys.readouterr().out
    assert driver(["--help"]) == 0
    assert "Usage: horcrux-dv" in capsys.readouterr().out


# ---- a wheel, in a virtual environment of its own


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of what is under version control, as a release is."""
    source = tmp_path_factory.mktemp("source")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "horcrux_nbd", "horcrux_driver", "setup.cfg", "pyproject.toml",
         "LICENSE", "README.md"],
        cwd=ROOT, check=True, capture_output=True, text=True, timeout=LIMIT,
    ).stdout.split("\0")  # fmt: skip
    for name in filter(None, listed):
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--disable-pip-version-check", "--no-deps",
         "--no-build-isolation", "--wheel-dir", out, source],
        check=True, timeout=LIMIT,
    )  # fmt: skip
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh virtual environment with the wheel, and the dependencies of this one: no network."""
    folder = tmp_path_factory.mktemp("fresh") / "venv"
    subprocess.run(
        [SYSTEM_PYTHON, "-m", "venv", "--without-pip", folder], check=True, timeout=LIMIT
    )
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "-q",
         "--disable-pip-version-check", "--no-deps", "--no-index", wheel],
        check=True, timeout=LIMIT,
    )  # fmt: skip
    packages = site_packages(folder)
    for item in Path(sysconfig.get_path("platlib")).iterdir():
        if "horcrux" not in item.name and not (packages / item.name).exists():
            (packages / item.name).symlink_to(item)
    return folder


def site_packages(venv: Path) -> Path:
    (found,) = venv.glob("lib/python*/site-packages")
    return found


def run(
    venv: Path, *words: str | Path, program: str = "horcrux-cli"
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [venv / "bin" / program, *words],
        cwd="/",  # not in the source tree, whose packages would be found
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )


def test_what_is_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {"horcrux_nbd/plugin.py", "horcrux_nbd/py.typed", "horcrux_driver/main.py"} <= names
    assert {"horcrux_nbd/native/filter.c", "horcrux_nbd/native/core.h"} <= names, "to be built"
    assert any(name.endswith("LICENSE") for name in names)
    tops = {name.split("/")[0] for name in names}
    assert tops == {"horcrux_nbd", "horcrux_driver", f"horcrux_nbd-{__version__}.dist-info"}


def test_an_installation_works(installed: Path, tmp_path: Path) -> None:
    """Generated, served by the plugin that it names, and read by another program."""
    told = run(installed, "plugin-path")
    assert told.returncode == 0, told.stderr
    plugin = Path(told.stdout.strip())
    assert plugin == site_packages(installed) / "horcrux_nbd" / "plugin.py"
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "file").write_text("x")
    made = run(installed, "generate", "-q", "A", tmp_path / "in", tmp_path / "repo")
    assert made.returncode == 0, made.stderr
    assert run(installed, "create", "v", tmp_path / "repo", "A").returncode == 0
    served = run(installed, "serve", "v")
    try:
        assert served.returncode == 0, served.stderr
        size = subprocess.run(
            ["nbdinfo", "--size", served.stdout.strip()],
            capture_output=True, text=True, timeout=LIMIT, check=True,
        )  # fmt: skip
        assert int(size.stdout) > 1 << 30
    finally:
        assert run(installed, "detach", "v").returncode == 0
    found = run(installed, "doctor")
    assert f"loads ({plugin})" in found.stdout
    assert __version__ in run(installed, "--version", program="horcrux-dv").stdout


def test_a_python_that_does_not_match(installed: Path, tmp_path: Path) -> None:
    """As if the environment were of another Python than the one that nbdkit embeds: its compiled
    packages have another name, and nothing loads them. One line that says what to do.
    """
    packages = tmp_path / "site-packages"
    packages.mkdir()
    for item in site_packages(installed).iterdir():
        if item.name in ("blake3", "horcrux_nbd"):
            shutil.copytree(item, packages / item.name)
        else:
            (packages / item.name).symlink_to(item)
    (library,) = (packages / "blake3").glob("*.so")
    library.rename(library.with_name(library.name.replace("cpython-3", "cpython-9")))
    done = subprocess.run(
        ["nbdkit", "python", packages / "horcrux_nbd" / "plugin.py", "--dump-plugin"],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if "horcrux:" in line]
    assert len(said) == 1, done.stderr
    assert "cannot load Horcrux's packages" in said[0]
    assert "/usr/bin/python3 -m venv" in said[0]
    assert "Traceback" not in done.stderr

"""What holds for every test: its own Horcrux host, and nothing left behind at the end.

Everything that a test starts inherits $HORCRUX_TESTS, so that the check at the end finds what is
left among the processes of a machine that others use too.
"""

from __future__ import annotations

import itertools
import os
import secrets
import time
from pathlib import Path

import pytest

from horcrux_nbd.native import build, library

MARK = "HORCRUX_TESTS"
ENDING = 5.0  # seconds for processes that were told to end to be gone

_numbers = itertools.count(1)
_session = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than 20 s; scripts/test runs it last")
    config.addinivalue_line("markers", "long: minutes; only with --long")
    # Workers of pytest-xdist have their parent's mark: it looks when all of them have ended.
    token = os.environ[MARK] if _is_worker(config) else secrets.token_hex(8)
    config.stash[_session] = os.environ[MARK] = token
    # For what fixtures of a wider scope start. Never a real place, so a test that forgets to set
    # its own up fails instead of touching this host's state.
    for name in ("ROOT", "RUN", "CONFIG"):
        os.environ[f"HORCRUX_{name}"] = f"/nonexistent/horcrux-tests/{name.lower()}"
    os.environ["HORCRUX_AUTHOR"] = "Test <test@example.org>"


def _is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="also run what takes minutes")
    parser.addoption(
        "--encrypted", action="store_true", help="every repository that a test makes is encrypted"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--long"):
        skip = pytest.mark.skip(reason="takes minutes: run it with --long")
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(skip)
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


@pytest.fixture(autouse=True)
def horcrux_host(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host of its own: state, sockets and configuration in a folder that is made on use.

    Its path is short (a socket's has at most 107 bytes), which `tmp_path` is not.
    """
    host = tmp_path_factory.getbasetemp() / f"h{next(_numbers)}"
    monkeypatch.setenv("HORCRUX_ROOT", str(host / "root"))
    monkeypatch.setenv("HORCRUX_RUN", str(host / "run"))
    monkeypatch.setenv("HORCRUX_CONFIG", str(host / "config.toml"))
    return host


@pytest.fixture(autouse=True)
def encrypted_repositories(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, horcrux_host: Path
) -> None:
    """With `--encrypted`: what holds for a repository holds for an encrypted one."""
    if request.config.getoption("--encrypted"):
        from .encrypted import encrypt_all

        encrypt_all(monkeypatch)


# ---- nothing is left behind ---------------------------------------------------------------------


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if _is_worker(session.config):
        return
    token = session.config.stash[_session]
    base = str(session.config._tmp_path_factory.getbasetemp())  # type: ignore[attr-defined]
    deadline = time.monotonic() + ENDING
    while (left := [*_processes(token), *_mounts(base), *_devices(base)]) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.1)
    if left:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            reporter.section("the tests left behind", red=True)
            for line in left:
                reporter.line(line)


def _processes(token: str) -> list[str]:
    """Processes that this session started, and their children, which still run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        if int(folder.name) == os.getpid():
            continue
        try:
            if f"{MARK}={token}".encode() not in (folder / "environ").read_bytes():
                continue
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # gone, or not ours to look at
            continue
        if command:  # a zombie has none
            found.append(f"process {folder.name}: {command}")
    return found


def _mounts(base: str) -> list[str]:
    text = Path("/proc/self/mountinfo").read_text()
    return [f"mount {line.split()[4]}" for line in text.splitlines() if f" {base}" in line]


def _devices(base: str) -> list[str]:
    found = []
    for file in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            backing = file.read_text().strip()
        except OSError:  # released just now
            continue
        if backing.startswith(base):
            found.append(f"/dev/{file.parts[3]} on {backing}")
    return found


@pytest.fixture(scope="session")
def shared_object(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The filter, built from the sources as they are."""
    if reason := build.why_not():
        pytest.skip(reason)
    return build.compiled(tmp_path_factory.mktemp("native") / library.NAME)

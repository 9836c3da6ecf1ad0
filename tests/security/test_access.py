"""Other users of the machine get at nothing: no socket, no cache, no overlay, no key."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from horcrux_nbd import server

from ..cli.support import make_directory, run
from .support import as_nobody, open_host

__all__ = ["open_host"]


@pytest.fixture
def served(open_host: Path, tmp_path: Path) -> Iterator[Path]:
    """A volume of an encrypted repository that was read and written to, under the widest umask."""
    key, source = tmp_path / "key", make_directory(tmp_path / "source")
    before = os.umask(0)
    try:
        run("key", "make", key)
        words = ["-q", "--size", "32M", "--encrypt", "--key-file", key]
        run("generate", *words, "AMCC", source, tmp_path / "repository")
        run("key", "unlock", "--keep", tmp_path / "repository")
        run("create", "v", tmp_path / "repository", "AMCC")
        run("cat", "v", "small")
        run("serve", "v")
        yield open_host
    finally:
        os.umask(before)
        run("detach", "v", ok=False)


def test_nobody_gets_in(served: Path) -> None:
    tries = []
    for folder, _, names in os.walk(served):
        if Path(folder) != served:
            tries += [f"folder {folder}", f"write {folder}"]
        for name in names:
            path = Path(folder, name)
            is_socket = stat.S_ISSOCK(path.lstat().st_mode)
            tries.append(f"{'socket' if is_socket else 'file'} {path}")
    kinds = [one.partition(" ")[0] for one in tries]
    assert kinds.count("socket") == 2  # NBD and control
    assert kinds.count("file") > 8  # cache, overlay, state, keys
    may = as_nobody(*tries)
    # The three folders at the top may be seen, and nothing in them.
    top = {f"folder {served / name}" for name in ("root", "run")}
    assert set(may) <= top | {f"folder {served / 'root' / 'volumes'}"}, may


def test_the_sockets_folder(served: Path) -> None:
    folder = server.folder_of("v")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "control.sock").stat().st_mode) == 0o600


def test_the_probe_can_tell(open_host: Path) -> None:
    """What is open to all, nobody does get into: the tests above can fail."""
    (open_host / "open").mkdir(mode=0o777)
    (open_host / "open").chmod(0o777)
    (open_host / "open" / "file").write_text("x")
    (open_host / "open" / "file").chmod(0o644)
    path = open_host / "open" / "socket"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        path.chmod(0o666)
        folder = open_host / "open"
        tries = [f"socket {path}", f"folder {folder}", f"file {folder / 'file'}", f"write {folder}"]
        assert as_nobody(*tries) == tries

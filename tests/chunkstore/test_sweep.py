"""What killed writers left: gone after a day, on a disk and behind an SSH server."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from horcrux_nbd.chunkstore import open_store, walk
from horcrux_nbd.chunkstore.retry import RetryStore

from ..servers.sshd import Sshd


@pytest.mark.parametrize("kind", ["cp", "scp"])
def test_old_temporary_files_go(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    root = tmp_path / "store"
    url = f"cp://{root}"
    if kind == "scp":
        ssh: Sshd = request.getfixturevalue("ssh")
        url = ssh.url(root)
    with open_store(url, create=True) as store:
        assert isinstance(store, RetryStore)
        assert store.sweep() == 0
        store.put("a/b/key", b"1")
        store.sync()
        old = time.time() - walk.STALE - 60
        for name, age in ((".tmp-1", old), ("a/.tmp-2", old), ("a/b/.tmp-3", old), ("a/.x", old)):
            (root / name).write_bytes(b"half")
            os.utime(root / name, (age, age))
        os.utime(root / "a/b/key", (old, old))
        (root / "a/b/.tmp-new").write_bytes(b"somebody writes it")
        assert store.sweep() == 3
        left = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
        assert left == ["a/.x", "a/b/.tmp-new", "a/b/key"]

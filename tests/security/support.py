"""A host whose folders lie where every user of the machine could look, if their modes let him."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

_AS_NOBODY = """
import os, socket, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
for path in sys.stdin.read().splitlines():
    kind, _, path = path.partition(" ")
    try:
        if kind == "socket":
            socket.socket(socket.AF_UNIX).connect(path)
        elif kind == "folder":
            os.listdir(path)
        elif kind == "write":
            open(os.path.join(path, "x"), "w")
        else:
            open(path).read(1)
    except OSError as error:
        if error.errno not in (1, 13):
            print(kind, path, "failed otherwise:", error)
    except UnicodeDecodeError:
        print(kind, path)
    else:
        print(kind, path)
"""


@pytest.fixture
def open_host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that root's state and sockets are made in; all may look into it itself."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user: run as root (sudo)")
    folder = Path(tempfile.mkdtemp(prefix="hsec-"))
    folder.chmod(0o755)
    monkeypatch.setenv("HORCRUX_ROOT", str(folder / "root"))
    monkeypatch.setenv("HORCRUX_RUN", str(folder / "run"))
    monkeypatch.setenv("HORCRUX_CONFIG", str(folder / "config.toml"))
    yield folder
    shutil.rmtree(folder)


def as_nobody(*tries: str) -> list[str]:
    """Which of `tries` ("socket PATH", "folder PATH", "write PATH", "file PATH") user nobody can
    do.
    """
    done = subprocess.run(
        [sys.executable, "-c", _AS_NOBODY],
        input="\n".join(tries), capture_output=True, text=True, timeout=60, check=True, cwd="/",
    )  # fmt: skip
    return done.stdout.splitlines()

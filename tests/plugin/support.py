"""What the tests of the plugin share: an image, nbdkit over it, and libnbd's errors."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.servers import nbdkit as servers
from tests.servers.nbdkit import Nbdkit
from tests.volume.support import CHUNK, IMAGE, noise

needs_nbdkit = pytest.mark.skipif(not servers.available(), reason=servers.MISSING)

# 40 chunks and a bit that is no multiple of anything; data in the first half and at the end.
SIZE = 40 * CHUNK + 1234
DATA = {0: noise(20 * CHUNK), 40 * CHUNK: noise(1234, "end")}
HOLE = 20 * CHUNK


def original(offset: int, length: int) -> bytes:
    image = DATA[0] + bytes(20 * CHUNK) + DATA[40 * CHUNK]
    return image[offset : offset + length]


def serve(tmp_path: Path, url: str, **keys: object) -> Nbdkit:
    """An nbdkit over `url`, not started, with overlay and cache in the test's folder."""
    options = keys.pop("options", ())
    env = keys.pop("env", None)
    all_keys = {
        "repo": url, "name": IMAGE, "overlay": tmp_path / "overlay", "cache": tmp_path / "cache",
        **keys,
    }  # fmt: skip
    given = {key: value for key, value in all_keys.items() if value is not None}
    return Nbdkit(env=env, options=options, **given)  # type: ignore[arg-type]


def nbd() -> Any:
    return servers.libnbd()


def errno_of(call: Any, *args: Any) -> int:
    """The errno that a request of libnbd fails with."""
    with pytest.raises(nbd().Error) as caught:
        call(*args)
    return int(caught.value.errnum)


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


def run(*command: str | Path, **options: Any) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{command[0]}: {done.stdout[-1000:]} {done.stderr[-2000:]}"
    return done.stdout


def needs(program: str, package: str) -> None:
    if not shutil.which(program):
        pytest.skip(f"needs {program}: apt-get install {package}")

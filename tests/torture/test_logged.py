"""Each write of the disk below overlay, cache and store is logged.

A disk that the power left at any flush of it holds what was acknowledged until then.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from horcrux_nbd.attach.processes import wait_until
from horcrux_nbd.attach.sockets import listener
from tests.attach.conftest import needs_fuse
from tests.servers.nbdkit import MISSING, available
from tests.servers.process import stop

PROJECT = Path(__file__).parents[2]
STEPS = int(os.environ.get("HORCRUX_STEPS", "4"))
FS_SIZE = 120 << 20
LIMIT = 30.0

pytestmark = [
    pytest.mark.skipif(not available(), reason=MISSING),
    needs_fuse,
    pytest.mark.skipif(
        not shutil.which("qemu-nbd"), reason="needs qemu-nbd: apt-get install qemu-utils"
    ),
]


class Disk:
    """An empty ext4 in `base`, and the same again in `image`, whose writes will be in `log`."""

    def __init__(self, folder: Path) -> None:
        self.base, self.image, self.log = (folder / n for n in ("base.raw", "disk.raw", "log.raw"))
        self.folder = folder / "disk"  # where it is mounted
        self.folder.mkdir()
        os.truncate(os.open(self.base, os.O_CREAT | os.O_WRONLY), FS_SIZE + (1 << 20))
        blocks = str(FS_SIZE // 4096)
        subprocess.run(["mke2fs", "-q", "-t", "ext4", "-b", "4096", self.base, blocks], check=True)
        subprocess.run(["cp", "--sparse=always", self.base, self.image], check=True)
        self.log.touch()
        self.driver = (
            f"driver=blklogwrites,log-sector-size=512,file.driver=file,file.filename={self.image},"
            f"log.driver=file,log.filename={self.log}"
        )


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder whose syncs cost nothing: hundreds of states are mounted."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="horcrux-") as name:
        yield Path(name)


def replayed(disk: Disk, seed: str, steps: int) -> dict[str, object]:
    """What a replay of its log finds."""
    done = subprocess.run(
        [
            "unshare", "--mount", "--propagation", "private", sys.executable,
            "-m", "tests.torture.logged", "replay", seed, str(steps), disk.folder, disk.base,
            disk.log, str(FS_SIZE),
        ],
        cwd=PROJECT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    print(", ".join(f"{value} {name}" for name, value in found.items() if name != "violations"))
    return found


@contextmanager
def logged(disk: Disk, folder: Path) -> Iterator[str]:
    """The disk as a loop device, mounted; gone, and its log complete, at the end."""
    socket, fuse = folder / "q", folder / "fuse"
    fuse.mkdir()
    qemu = subprocess.Popen(
        ["qemu-nbd", "--image-opts", disk.driver, "-k", socket, "--persistent", "--shared", "4"],
        start_new_session=True,
    )
    try:
        assert wait_until(lambda: listener(socket) != 0, LIMIT)
        nbdfuse = subprocess.Popen(
            ["nbdfuse", fuse, "--unix", socket], start_new_session=True, stdin=subprocess.DEVNULL
        )
        try:
            assert wait_until((fuse / "nbd").exists, LIMIT)
            command = ["losetup", "--find", "--show", "--direct-io=on", fuse / "nbd"]
            device = subprocess.run(command, check=True, capture_output=True, text=True)
            loop = device.stdout.strip()
            try:
                subprocess.run(["mount", "-o", "noatime", loop, disk.folder], check=True)
                try:
                    yield loop
                finally:
                    subprocess.run(["umount", disk.folder], check=True)
            finally:
                subprocess.run(["losetup", "-d", loop], check=True)
                subprocess.run(["umount", fuse], check=True)
        finally:
            stop(nbdfuse)
    finally:
        stop(qemu)


@pytest.mark.slow
@pytest.mark.timeout(300 + 60 * STEPS)
def test_a_log_of_writes_replayed_to_every_flush(memory: Path) -> None:
    """HORCRUX_STEPS and HORCRUX_SEED say how long, and repeat what was found."""
    seed = os.environ.get("HORCRUX_SEED") or secrets.token_hex(4)
    print(f"repeat with: HORCRUX_STEPS={STEPS} HORCRUX_SEED={seed}")
    disk = Disk(memory)
    with logged(disk, memory) as device:
        subprocess.run(
            [
                sys.executable, "-m", "tests.torture.logged", "run", seed, str(STEPS),
                disk.folder, device, str(FS_SIZE),
            ],
            cwd=PROJECT, check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
    found = replayed(disk, seed, STEPS)
    assert found["violations"] == []
    assert found["marks"] == STEPS + 1, "not every step was seen"
    assert found["states"] > 3 * STEPS

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from horcrux_nbd.attach import superblock
from horcrux_nbd.errors import UsageError

MAKERS = {
    "ext2": ["mkfs.ext2", "-q"],
    "ext3": ["mkfs.ext3", "-q"],
    "ext4": ["mkfs.ext4", "-q"],
    "xfs": ["mkfs.xfs", "-q"],
    "btrfs": ["mkfs.btrfs", "-q"],
}


@pytest.mark.parametrize("fstype", MAKERS)
def test_what_mkfs_makes_is_recognised(fstype: str, tmp_path: Path) -> None:
    maker = shutil.which(MAKERS[fstype][0])
    if not maker:
        pytest.skip(f"needs {MAKERS[fstype][0]}: apt-get install e2fsprogs xfsprogs btrfs-progs")
    path = tmp_path / "image"
    with open(path, "wb") as file:
        file.truncate(320 << 20)
    subprocess.run([maker, *MAKERS[fstype][1:], str(path)], check=True, capture_output=True)
    head = superblock.read(path, 5)
    assert superblock.filesystem(head, "x") == fstype
    assert not superblock.needs_recovery(head)


@pytest.mark.parametrize("content", [b"", b"\0" * 70000, b"\x55\xaa" * 40000, b"EFI PART" * 9000])
def test_anything_else_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"/dev/x holds no file system .*ext4.*serve"):
        superblock.filesystem(superblock.read(path, 5), "/dev/x")


def test_a_journal_to_replay_is_seen(ext4: Path, tmp_path: Path) -> None:
    path = tmp_path / "image"
    shutil.copy(ext4, path)
    subprocess.run(
        ["debugfs", "-w", "-R", "feature needs_recovery", str(path)],
        check=True,
        capture_output=True,
    )
    assert superblock.needs_recovery(superblock.read(path, 5))

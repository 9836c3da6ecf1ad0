"""A disk that keeps only what was synced, and of the rest whatever it likes: power cuts for tests.

It takes the place of fsync and fdatasync for the files below one folder. A cut leaves each page of
4 KiB of a file as it was synced last or as it was written last, and of an end that grew any part.
Names are taken for durable: what loses those too is a file system of its own (RELIABILITY.md).
"""

from __future__ import annotations

import os
import random
import stat
from pathlib import Path

import pytest

from horcrux_nbd.volume import recent

PAGE = 4096


class Disk:
    """Use it before the files below `folder` are made."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder = str(folder) + os.sep
        self._synced: dict[int, bytes] = {}  # by inode
        self.syncs = 0
        self._boots = 0
        monkeypatch.setattr(recent, "boot_id", lambda: self._boots.to_bytes(16))
        monkeypatch.setattr(os, "fsync", self._sync)
        monkeypatch.setattr(os, "fdatasync", self._sync)

    def _sync(self, fd: int) -> None:
        status = os.fstat(fd)
        path = os.readlink(f"/proc/self/fd/{fd}")
        if stat.S_ISREG(status.st_mode) and path.startswith(self._folder):
            self._synced[status.st_ino] = Path(f"/proc/self/fd/{fd}").read_bytes()
            self.syncs += 1

    def write_back(self, chance: random.Random) -> None:
        """Let some pages reach the disk by themselves, as the kernel does now and then."""
        for _, inode, now in self._files():
            synced = self._synced.get(inode, b"")
            self._synced[inode] = _mixed(synced, now, chance, chance.random())

    def cut(self, chance: random.Random) -> None:
        """The power goes: no file is open any more, and each is what the disk has of it."""
        self._boots += 1
        for path, inode, now in self._files():
            left = _mixed(self._synced.get(inode, b""), now, chance, chance.random())
            if left != now:
                path.write_bytes(left)
            self._synced[inode] = left

    def _files(self) -> list[tuple[Path, int, bytes]]:
        found = []
        for folder, _, names in os.walk(self._folder):
            for name in names:
                path = Path(folder, name)
                found.append((path, path.stat().st_ino, path.read_bytes()))
        return found


def _mixed(synced: bytes, now: bytes, chance: random.Random, part: float) -> bytes:
    """Each page one or the other; `part` is how likely it is the one that was written last."""
    if synced == now:
        return now
    size = len(now) if chance.random() < part else min(len(synced), len(now))
    if len(now) > size and chance.random() < 0.5:
        size = chance.randrange(size, len(now) + 1)
    pages = []
    for at in range(0, size, PAGE):
        end = min(at + PAGE, size)
        old = synced[at:end].ljust(end - at, b"\0")
        new = now[at:end].ljust(end - at, b"\0")
        pages.append(new if chance.random() < part else old)
    return b"".join(pages)

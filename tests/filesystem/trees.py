"""Trees with every kind of entry, made through the kernel."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

ODD = [
    b"new\nline",
    b"\xff\xfe not text",
    "schön".encode(),
    b" ",
    b"-rf",
    b"x" * 255,
    b"\\",
    b"a\tb",
]


def make_tree(root: Path) -> None:
    """A bit of everything that ext4 can hold."""
    base = os.fsencode(root)

    def path(*parts: bytes) -> bytes:
        return os.path.join(base, *parts)

    def put(name: bytes, content: bytes = b"", mode: int = 0o644) -> None:
        fd = os.open(path(name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        os.write(fd, content)
        os.close(fd)

    for name in ODD:
        put(name, name * 3)
    for size in (0, 1, 59, 60, 61, 100, 150, 1024, 4095, 4096, 4097, 70_000):
        put(b"size-%d" % size, bytes(n % 251 for n in range(size)))
    os.mkdir(path(b"modes"))
    for mode in (0, 0o400, 0o777, 0o1755, 0o2755, 0o4755):
        put(b"modes/%o" % mode)
        os.chmod(path(b"modes/%o" % mode), mode)
    put(b"owned")
    os.chown(path(b"owned"), 100_000, 70_000)
    for target in (b"x", b"t" * 59, b"t" * 60, b"t" * 61, b"long/" * 200):
        os.symlink(target, path(b"link-%d" % len(target)))
    os.symlink(b"/size-100", path(b"to-file"))
    os.symlink(b"modes", path(b"to-folder"))
    os.symlink(b"loop", path(b"loop"))
    put(b"hard", b"hard")
    os.link(path(b"hard"), path(b"modes", b"hard-too"))
    os.mknod(path(b"null"), 0o020666, os.makedev(1, 3))
    os.mknod(path(b"disk"), 0o060600, os.makedev(259, 1_000_000))
    os.mkfifo(path(b"fifo"))
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path(b"socket"))
    _holes(path(b"holes"), [(0, 4096), (1 << 20, 5000), (3 << 20, 1)], 5 << 20)
    _holes(path(b"all-hole"), [], 1 << 30)
    _holes(path(b"far"), [((1 << 32) - 4096, 4096)], 1 << 32)
    _holes(path(b"comb"), [(n * 8192, 4096) for n in range(700)], 700 * 8192)
    fd = os.open(path(b"allocated"), os.O_WRONLY | os.O_CREAT, 0o600)
    os.posix_fallocate(fd, 0, 1 << 20)
    os.pwrite(fd, b"middle", 1 << 19)
    os.close(fd)
    for name, value in ((b"user.small", b"v"), (b"user.empty", b""), (b"trusted.t", b"\0" * 20)):
        os.setxattr(path(b"size-100"), name, value)
    os.setxattr(path(b"size-60"), b"user.big", b"B" * 900)
    os.setxattr(path(b"modes"), b"user.on-folder", b"yes")
    acl = struct.pack("<IHHIHHIHHIHHIHHI", 2, 1, 6, 0xFFFFFFFF, 2, 7, 1000, 4, 4, 0xFFFFFFFF,
                      16, 7, 0xFFFFFFFF, 32, 4, 0xFFFFFFFF)  # fmt: skip
    os.setxattr(path(b"size-61"), b"system.posix_acl_access", acl)
    os.setxattr(path(b"modes"), b"system.posix_acl_default", acl)
    times = (
        (0, 0),
        (-1, -999_999_999),
        (1 << 31, 123_456_789),
        (2_000_000_000, 7_000_000_000 * 10**9),
    )
    for number, (_, modified) in enumerate(times):
        put(b"time-%d" % number)
        os.utime(path(b"time-%d" % number), ns=(0, modified))
    os.makedirs(path(b"many"))
    for number in range(600):
        put(b"many/name-%d" % number, b"%d" % number)
    for number in range(0, 600, 7):
        os.unlink(path(b"many", b"name-%d" % number))


def _holes(path: bytes, pieces: list[tuple[int, int]], size: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    for offset, length in pieces:
        os.pwrite(fd, bytes((offset + n) % 255 + 1 for n in range(length)), offset)
    os.ftruncate(fd, size)
    os.close(fd)


def make_deep(root: Path, levels: int, name: str) -> None:
    """Folders in folders, deeper than a path can name."""
    here = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(levels):
        os.mkdir(name, dir_fd=here)
        there = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=here)
        os.close(here)
        here = there
    os.close(os.open("bottom", os.O_WRONLY | os.O_CREAT, 0o600, dir_fd=here))
    os.close(here)

"""A directory with every kind of entry, and the comparison of two directories to the last bit."""

from __future__ import annotations

import os
import socket
import stat
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from horcrux_nbd.source import Source
from horcrux_nbd.source.tools import run_tool

OLD = 1_234_567_890_123_456_789  # nanoseconds; 2009
BEYOND_2038 = 4_500_000_000_987_654_321
BEFORE_1970 = -1_000_000_000_000_000_001 + 5

LONG_NAME = b"n" * 255
ODD_NAMES = [b"new\nline", b"quote'\"`$", b"\xff\xfe not utf-8", b" ", b"-rf", "ünï".encode()]


def open_to_all(folder: Path) -> None:
    """Let other users into a folder of pytest's."""
    temporary = Path(tempfile.gettempdir())
    for one in (folder, *folder.parents):
        if one == temporary or temporary not in one.parents:
            return
        one.chmod(0o755)


def make_tree(root: Path) -> None:
    """Every kind of entry that a user without rights can make, and as root also the others."""
    base = os.fsencode(root)
    os.makedirs(base, exist_ok=True)

    def put(name: bytes, data: bytes = b"content", mode: int = 0o644) -> bytes:
        path = base + b"/" + name
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(data)
        os.chmod(path, mode)
        return path

    for name in [*ODD_NAMES, LONG_NAME]:
        put(b"names/" + name, name)
    for size in (0, 1, 4095, 4096, 4097, 100_000, 5_000_000):
        put(b"sizes/%d" % size, os.urandom(size))
    for mode in (0o000, 0o400, 0o600, 0o755, 0o4755, 0o2755, 0o1777, 0o7777):
        put(b"modes/%o" % mode, mode=mode if os.geteuid() == 0 else mode | 0o400)

    with open(put(b"sparse/large"), "r+b") as file:
        file.truncate(6 << 30)
        for offset in (5000, 3 << 30, (6 << 30) - 3):
            file.seek(offset)
            file.write(b"abc")
    with open(put(b"sparse/all-hole", b""), "r+b") as file:
        file.truncate(1 << 20)
    with open(put(b"sparse/comb", b""), "r+b") as file:
        for number in range(1000):  # more extents than one block of an extent tree has
            file.seek(number * 8192)
            file.write(b"%d" % number)
    with open(put(b"sparse/preallocated", b"begin"), "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, 3 << 20)

    os.link(put(b"links/one"), base + b"/links/two")
    os.link(base + b"/links/one", base + b"/names/three")
    for length in (1, 59, 60, 61, 255, 3000):
        parts = [b"t" * 200] * (length // 200) + [b"t" * (length % 200)]
        os.symlink(b"/".join(parts)[:length] or b"t", base + b"/links/to-%d" % length)
    os.symlink(b"../sizes/1", base + b"/links/relative")

    deep = base + b"/deep"
    os.mkdir(deep)
    fd = os.open(deep, os.O_RDONLY)
    for _ in range(40):  # 40 names of 200 bytes: twice what a path may have
        os.mkdir(b"d" * 200, dir_fd=fd)
        inner = os.open(b"d" * 200, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    bottom = os.open(b"bottom", os.O_WRONLY | os.O_CREAT, 0o644, dir_fd=fd)
    os.write(bottom, b"deep down")
    os.close(bottom)
    os.close(fd)

    os.mkdir(base + b"/empty")
    os.mkdir(base + b"/many")
    for number in range(3000):
        open(base + b"/many/a-name-with-some-length-%d" % number, "wb").close()
    os.mkdir(base + b"/dirs")
    for number in range(100):
        os.mkdir(base + b"/dirs/%d" % number)

    os.mkfifo(base + b"/fifo")
    here = os.getcwd()
    os.chdir(base)  # the path of a socket has 107 bytes at most
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("mysql.sock")
    finally:
        os.chdir(here)

    path = put(b"attributes/small")
    os.setxattr(path, b"user.small", b"value")
    os.setxattr(path, b"user.empty", b"")
    path = put(b"attributes/big")
    os.setxattr(path, b"user.big", os.urandom(3000))
    os.setxattr(path, b"user.small", b"beside")
    os.setxattr(path, "user.ünï".encode(), b"name beyond ascii, long enough for the block" * 3)
    for number in range(3):
        path = put(b"attributes/same-%d" % number)
        os.setxattr(path, b"user.same", b"s" * 500)
    os.setxattr(base + b"/empty", b"user.directory", b"d" * 60)
    acl = struct.pack("<I", 2) + b"".join(
        struct.pack("<HHI", *entry)
        for entry in (
            (0x01, 6, 0xFFFFFFFF),
            (0x02, 7, 70_000),
            (0x04, 4, 0xFFFFFFFF),
            (0x08, 5, 12),
            (0x10, 7, 0xFFFFFFFF),
            (0x20, 4, 0xFFFFFFFF),
        )
    )
    os.setxattr(put(b"attributes/acl"), b"system.posix_acl_access", acl)
    os.setxattr(base + b"/attributes", b"system.posix_acl_default", acl)

    if os.geteuid() == 0:
        path = put(b"owners/large")
        os.chown(path, 100_000, 4_000_000_000)
        os.chown(base + b"/owners", 65536, 65535)
        os.chown(base + b"/links/relative", 99, 99, follow_symlinks=False)
        os.mknod(base + b"/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        os.mknod(base + b"/disk", stat.S_IFBLK | 0o660, os.makedev(259, 70_000))
        os.setxattr(put(b"attributes/trusted"), b"trusted.key", b"root sees it")
        capability = struct.pack("<IIIII", 0x02000001, 0x400, 0, 0, 0)
        os.setxattr(put(b"attributes/ping", mode=0o755), b"security.capability", capability)

    for name, time in ((b"old", OLD), (b"future", BEYOND_2038), (b"past", BEFORE_1970)):
        os.utime(put(b"times/" + name), ns=(time, time))
    os.utime(base + b"/links/to-61", ns=(OLD, OLD), follow_symlinks=False)
    os.utime(base + b"/empty", ns=(OLD, OLD))
    os.utime(base, ns=(OLD + 1, OLD + 1))


def describe(root: Path) -> dict[bytes, tuple[object, ...]]:
    """All that can be seen of a directory: path → kind, attributes, contents, names it shares."""
    found: dict[bytes, tuple[object, ...]] = {}
    inodes: dict[int, bytes] = {}

    def visit(fd: int, path: bytes) -> None:
        for name in sorted(os.listdir(fd)):
            encoded = os.fsencode(name)
            look(b"/proc/self/fd/%d/%s" % (fd, encoded), path + b"/" + encoded)
            if stat.S_ISDIR(os.lstat(encoded, dir_fd=fd).st_mode):
                inner = os.open(encoded, os.O_RDONLY, dir_fd=fd)
                visit(inner, path + b"/" + encoded)
                os.close(inner)

    def look(place: bytes, path: bytes) -> None:
        status = os.lstat(place)
        size: object = status.st_size
        content: object = None
        if stat.S_ISDIR(status.st_mode):
            size = None
        elif stat.S_ISLNK(status.st_mode):
            content = os.readlink(place)
        elif stat.S_ISREG(status.st_mode):
            content = _content(place)
        found[path] = (
            stat.S_IFMT(status.st_mode),
            stat.S_IMODE(status.st_mode),
            (status.st_uid, status.st_gid),
            status.st_nlink,
            status.st_mtime_ns,
            status.st_rdev if stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode) else 0,
            size,
            {
                os.fsencode(name): os.getxattr(place, name, follow_symlinks=False)
                for name in os.listxattr(place, follow_symlinks=False)
                if not name.startswith("trusted.SGI_ACL_")  # XFS shows ACLs twice
            },
            content,
            None if stat.S_ISDIR(status.st_mode) else inodes.setdefault(status.st_ino, path),
        )

    fd = os.open(root, os.O_RDONLY)
    look(b"/proc/self/fd/%d/." % fd, b"")
    visit(fd, b"")
    os.close(fd)
    return found


def _content(place: bytes) -> list[tuple[int, bytes]]:
    """(offset, bytes) of each block of 4 KiB that is not all zeros."""
    blocks = []
    fd = os.open(place, os.O_RDONLY)
    offset = 0
    while True:
        try:
            offset = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError:
            break
        offset -= offset % 4096
        data = os.pread(fd, 1 << 20, offset)
        for at in range(0, len(data), 4096):
            block = data[at : at + 4096]
            if block.count(0) != len(block):
                blocks.append((offset + at, block))
        offset += len(data)
    os.close(fd)
    return blocks


def write_image(source: Source, path: Path, piece: int = 512 << 10) -> None:
    """Read all of `source` in pieces as `generate` does, into a sparse file."""
    with open(path, "wb") as file:
        file.truncate(source.size)
        for offset, length in source.extents():
            for at in range(offset, offset + length, piece):
                file.seek(at)
                file.write(source.read(at, min(piece, offset + length - at)))


@contextmanager
def mounted(image: Path, point: Path, filesystem: str) -> Iterator[Path]:
    """`image` mounted at `point`, read-only, by the kernel. As root only."""
    point.mkdir()
    options = "loop,ro" + (",nouuid" if filesystem == "xfs" else "")
    try:
        result = run_tool(
            ["mount", "-t", filesystem, "-o", options, str(image), str(point)], timeout=60
        )
        assert result.returncode == 0, result.stderr
        yield point
    finally:
        if os.path.ismount(point):  # also after a mount that was interrupted
            result = run_tool(["umount", str(point)], timeout=60)
            assert result.returncode == 0, result.stderr

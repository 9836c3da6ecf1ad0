"""Images that the kernel makes and mounts, and what it sees in them: the oracle of these tests."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from horcrux_nbd.filesystem import Change, Reader, open_filesystem
from horcrux_nbd.units import MiB

needs_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="mounting needs root: run the tests as root in a virtual machine"
)


WHOLE = 8 * MiB  # bytes of a file that are compared as they are; of larger ones what is no hole


class Disk:
    """An image file with a file system in it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def make(cls, path: Path, *options: str, size: int = 32 * MiB, kind: str = "ext4") -> Disk:
        path.unlink(missing_ok=True)
        with open(path, "wb") as file:
            file.truncate(size)
        run("mkfs", "-t", kind, "-q", "-F", *options, str(path))
        return cls(path)

    @contextlib.contextmanager
    def mounted(self, *options: str) -> Iterator[Path]:
        target = self.path.with_suffix(".mnt")
        target.mkdir(exist_ok=True)
        run("mount", "-o", ",".join(["loop", *options]), str(self.path), str(target))
        try:
            yield target
        finally:
            run("umount", str(target))

    def copy(self, name: str) -> Disk:
        """As it is at this moment, mounted or not: then as after a crash."""
        path = self.path.with_name(name)
        run("cp", "--sparse=always", str(self.path), str(path))
        return Disk(path)

    def read(self, offset: int, length: int) -> bytes:
        with open(self.path, "rb") as file:
            return os.pread(file.fileno(), length, offset)

    def reader(self) -> Reader:
        return open_filesystem(self.read, self.path.stat().st_size, self.path.name)

    def write(self, offset: int, data: bytes) -> None:
        with open(self.path, "r+b") as file:
            os.pwrite(file.fileno(), data, offset)


def run(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, f"{argv}: {done.stderr}"
    return done.stdout


class Seen(NamedTuple):
    """A file as the kernel shows it. Directories have no size and no time: both are its own."""

    mode: int
    uid: int
    gid: int
    size: int
    mtime: int
    links: int
    device: int
    content: bytes
    xattrs: tuple[tuple[bytes, bytes], ...]


def seen(root: Path) -> dict[bytes, Seen]:
    """Everything below `root`, read through the kernel."""
    found = {}
    base = os.fsencode(root)
    for folder, directories, names in os.walk(base):
        for name in directories + names:
            path = os.path.join(folder, name)
            found[os.path.relpath(path, base)] = look(path)
    return found


def look(path: bytes) -> Seen:
    info = os.lstat(path)
    content = b""
    if stat.S_ISREG(info.st_mode):
        content = _content(path, info.st_size)
    elif stat.S_ISLNK(info.st_mode):
        content = os.readlink(path)
    xattrs = {
        os.fsencode(name): os.getxattr(path, name, follow_symlinks=False)
        for name in os.listxattr(path, follow_symlinks=False)
    }
    is_dir = stat.S_ISDIR(info.st_mode)
    return Seen(
        info.st_mode,
        info.st_uid,
        info.st_gid,
        0 if is_dir else info.st_size,
        0 if is_dir else info.st_mtime_ns,
        0 if is_dir else info.st_nlink,
        info.st_rdev,
        content,
        tuple(sorted(xattrs.items())),
    )


def _content(path: bytes, size: int) -> bytes:
    with open(path, "rb") as file:
        if size <= WHOLE:
            return file.read()
        pieces, at = [], 0
        while at < size:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:  # ENXIO: a hole up to the end
                break
            end = os.lseek(file.fileno(), at, os.SEEK_HOLE)
            pieces.append((at, os.pread(file.fileno(), end - at, at)))
            at = end
        return _not_zeros(pieces)


def _not_zeros(pieces: Iterable[tuple[int, bytes]]) -> bytes:
    """What a large file holds, in blocks of 512 bytes that are not zeros."""
    found = []
    for start, data in pieces:
        for at in range(0, len(data), 512):
            if any(data[at : at + 512]):
                found.append(b"%d:%s" % (start + at, data[at : at + 512]))
    return b"".join(found)


def read(reader: Reader) -> dict[bytes, Seen]:
    """The same through our reader."""
    found = {}
    for path, inode in reader.walk():
        content = b""
        if inode.is_file:
            if inode.size <= WHOLE:
                content = b"".join(reader.read_file(inode))
            else:
                content = _not_zeros(reader.read_pieces(inode))
        elif inode.is_link:
            content = reader.readlink(inode)
        found[path] = Seen(
            inode.mode,
            inode.uid,
            inode.gid,
            0 if inode.is_dir else inode.size,
            0 if inode.is_dir else inode.mtime,
            0 if inode.is_dir else inode.links,
            os.makedev(*inode.device),
            content,
            tuple(sorted(reader.xattrs(inode).items())),
        )
    return found


def expected(
    before: dict[bytes, Seen], after: dict[bytes, Seen], renamed: dict[bytes, bytes]
) -> dict[bytes, object]:
    """What changed, from two looks of the kernel: path → "added", "deleted", "replaced" or a
    tuple of what. `renamed` (old path → new one) is taken for granted.
    """
    old = {_moved(path, renamed): look for path, look in before.items()}
    found: dict[bytes, object] = {}
    for path in old.keys() | after.keys():
        if path not in old:
            found[path] = "added"
        elif path not in after:
            found[path] = "deleted"
        elif stat.S_IFMT(old[path].mode) != stat.S_IFMT(after[path].mode):
            found[path] = "replaced"
        elif what := _what(old[path], after[path]):
            found[path] = what
    return found


def _moved(path: bytes, renamed: dict[bytes, bytes]) -> bytes:
    """Where a path went: by the longest of what was renamed that it lies in."""
    head, tail = path, b""
    while head:
        if head in renamed:
            return renamed[head] + tail
        head, slash, name = head.rpartition(b"/")
        tail = b"/" + name + tail if slash else tail
        if not slash:
            break
    return path


def _what(a: Seen, b: Seen) -> tuple[str, ...]:
    differs = {
        "content": (a.size, a.content) != (b.size, b.content),
        "mode": a.mode != b.mode,
        "owner": (a.uid, a.gid) != (b.uid, b.gid),
        "times": a.mtime != b.mtime,
        "xattrs": a.xattrs != b.xattrs,
        "device": a.device != b.device,
    }
    return tuple(word for word, yes in differs.items() if yes)


def told(changes: Iterable[Change]) -> tuple[dict[bytes, object], dict[bytes, bytes]]:
    """The same from our comparison, and what it says was renamed."""
    found: dict[bytes, object] = {}
    renamed = {}
    for change in changes:
        if change.kind == "renamed":
            assert change.old_path is not None
            renamed[change.old_path] = change.path
            if change.what:
                found[change.path] = change.what
        elif change.kind in ("added", "deleted"):
            found[change.path] = "replaced" if change.path in found else change.kind
        else:
            found[change.path] = change.what
    return found, renamed


def check_changes(
    changes: list[Change], before: dict[bytes, Seen], after: dict[bytes, Seen]
) -> dict[bytes, bytes]:
    """Assert that `changes` is what the kernel sees; what was renamed."""
    found, renamed = told(changes)
    wanted = expected(before, after, renamed)
    assert found == wanted, {
        path: (found.get(path), wanted.get(path))
        for path in found.keys() | wanted.keys()
        if found.get(path) != wanted.get(path)
    }
    for change in changes:
        if change.type == "file" and change.new_size is not None:
            assert change.changed_bytes <= -(-change.new_size // 4096) * 4096
    return renamed

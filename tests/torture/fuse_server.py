"""The kernel's FUSE protocol (linux/fuse.h, 7.31 and later), as far as our tests need it.

No library: the Python bindings that Debian has know no fallocate, and a simulated disk wants to see
each request as it comes. One thread answers one request after another. Needs root (mount(2)).
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

LOOKUP, FORGET, GETATTR, SETATTR = 1, 2, 3, 4
MKNOD, MKDIR, UNLINK, RMDIR, RENAME, LINK = 8, 9, 10, 11, 12, 13
OPEN, READ, WRITE, STATFS, RELEASE, FSYNC = 14, 15, 16, 17, 18, 20
FLUSH, INIT, OPENDIR, READDIR, RELEASEDIR, FSYNCDIR = 25, 26, 27, 28, 29, 30
CREATE, INTERRUPT, DESTROY, BATCH_FORGET, FALLOCATE, RENAME2 = 35, 36, 38, 42, 43, 45
_SILENT = {FORGET, BATCH_FORGET, INTERRUPT}

_IN = struct.Struct("<IIQQIIIHH")  # length, opcode, unique, node, uid, gid, pid, …
_OUT = struct.Struct("<IiQ")  # length, error, unique
_ATTR = struct.Struct("<QQQQQQIIIIIIIIII")
_ENTRY = struct.Struct("<QQQQII")
_ATTR_OUT = struct.Struct("<QII")
_SETATTR = struct.Struct("<IIQQQQQQIIIIIIII")
_INIT_OUT = struct.Struct("<IIIIHHIIHHI28x")
_MODE, _SIZE = 1, 8  # FATTR_MODE, FATTR_SIZE
_BIG_WRITES, _MAX_PAGES = 1 << 5, 1 << 22
MAX_WRITE = 1 << 20
VALID = 3600  # seconds: nobody but the kernel changes anything; it asks anew for what it changed
PUNCH_HOLE, KEEP_SIZE = 2, 1  # linux/falloc.h
NOREPLACE = 1  # linux/fs.h
_FLAGS = 2 | 4  # MS_NOSUID | MS_NODEV
_DETACH = 2  # MNT_DETACH

_libc = ctypes.CDLL(None, use_errno=True)


class Attributes(Protocol):
    """What the kernel wants to know of a file."""

    number: int
    mode: int
    links: int
    size: int
    changed: int  # seconds since 1970


class FileSystem(Protocol):
    """What is served. Nodes are numbers; 1 is the root. Each may raise OSError."""

    def attributes(self, node: int) -> Attributes: ...
    def lookup(self, node: int, name: bytes) -> int: ...
    def create(self, node: int, name: bytes, mode: int) -> int: ...
    def unlink(self, node: int, name: bytes, *, folder: bool) -> None: ...
    def rename(self, node: int, name: bytes, to: int, new: bytes, *, replace: bool) -> None: ...
    def link(self, node: int, to: int, name: bytes) -> None: ...
    def names(self, node: int) -> list[tuple[bytes, int]]: ...
    def read(self, node: int, offset: int, length: int) -> bytes: ...
    def write(self, node: int, offset: int, data: bytes) -> None: ...
    def truncate(self, node: int, size: int) -> None: ...
    def change_mode(self, node: int, mode: int) -> None: ...
    def allocate(self, node: int, mode: int, offset: int, length: int) -> None: ...
    def sync(self, node: int) -> None: ...


def _check(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


class Mount:
    """A `FileSystem` at a place, until `close`."""

    def __init__(self, system: FileSystem, target: Path) -> None:
        self._system, self._target = system, os.fsencode(target)
        self._fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        options = f"fd={self._fd},rootmode=40000,user_id=0,group_id=0,max_read={MAX_WRITE}"
        _check(
            _libc.mount(b"horcrux-test", self._target, b"fuse", _FLAGS, options.encode()), "mount"
        )
        self._buffer = bytearray(MAX_WRITE + 8192)

    def close(self) -> None:
        """Unmount, lazily; what the kernel has cached of it is gone."""
        _libc.umount2(self._target, _DETACH)
        os.close(self._fd)  # ends the connection: whoever still waits gets an error

    def forget(self) -> None:
        """In a fork: it is the other process's."""
        os.close(self._fd)

    def serve(self, commands: int = -1, command: Callable[[], bool] = lambda: False) -> None:
        """Answer requests until `command`, called when `commands` is readable, returns False or
        the mount has ended.
        """
        poll = select.poll()
        if commands >= 0:
            poll.register(commands, select.POLLIN)
        poll.register(self._fd, select.POLLIN)
        while True:
            for fd, what in poll.poll():
                if fd == commands:
                    if not command():
                        return
                elif what & select.POLLIN:
                    if not self._one():
                        return
                else:
                    return

    def _one(self) -> bool:
        try:
            length = os.readv(self._fd, [self._buffer])
        except OSError as error:
            return error.errno in (errno.EINTR, errno.EAGAIN, errno.ENOENT)
        view = memoryview(self._buffer)[:length]
        _, opcode, unique, node, *_ = _IN.unpack_from(view)
        body = bytes(view[_IN.size :])
        if opcode in _SILENT:
            return True
        try:
            answer, code = self._answer(opcode, node, body), 0
        except OSError as error:
            answer, code = b"", -(error.errno or errno.EIO)
        try:
            os.writev(self._fd, [_OUT.pack(_OUT.size + len(answer), code, unique), answer])
        except OSError as error:
            if error.errno != errno.ENOENT:  # else the request was interrupted
                raise
        return opcode != DESTROY

    def _answer(self, opcode: int, node: int, body: bytes) -> bytes:
        handler = _HANDLERS.get(opcode)
        if handler is None:
            raise OSError(errno.ENOSYS, "")
        return handler(self._system, node, body)


# ---- one function for each request


def _attr(system: FileSystem, node: int) -> bytes:
    a = system.attributes(node)
    blocks = -(-a.size // 512)
    times = (a.changed, a.changed, a.changed, 0, 0, 0)
    return _ATTR.pack(a.number, a.size, blocks, *times, a.mode, a.links, 0, 0, 0, 4096, 0)


def _entry(system: FileSystem, node: int) -> bytes:
    return _ENTRY.pack(node, 0, VALID, VALID, 0, 0) + _attr(system, node)


def _attr_out(system: FileSystem, node: int) -> bytes:
    return _ATTR_OUT.pack(VALID, 0, 0) + _attr(system, node)


def _init(system: FileSystem, node: int, body: bytes) -> bytes:
    _, _, readahead, flags = struct.unpack_from("<IIII", body)
    ours = flags & (_BIG_WRITES | _MAX_PAGES)
    return _INIT_OUT.pack(7, 31, readahead, ours, 16, 12, MAX_WRITE, 1, MAX_WRITE // 4096, 0, 0)


def _setattr(system: FileSystem, node: int, body: bytes) -> bytes:
    valid, _, _, size, *rest = _SETATTR.unpack_from(body)
    if valid & _SIZE:
        system.truncate(node, size)
    if valid & _MODE:
        system.change_mode(node, rest[7])
    return _attr_out(system, node)


def _make(system: FileSystem, node: int, name: bytes, mode: int) -> bytes:
    return _entry(system, system.create(node, name, mode))


def _mkdir(system: FileSystem, node: int, body: bytes) -> bytes:
    mode, umask = struct.unpack_from("<II", body)
    return _make(system, node, body[8:-1], stat.S_IFDIR | (mode & ~umask & 0o7777))


def _mknod(system: FileSystem, node: int, body: bytes) -> bytes:
    mode, _, umask, _ = struct.unpack_from("<IIII", body)
    if not stat.S_ISREG(mode):
        raise OSError(errno.EPERM, "")
    return _make(system, node, body[16:-1], mode & ~umask)


def _create(system: FileSystem, node: int, body: bytes) -> bytes:
    _, mode, umask, _ = struct.unpack_from("<IIII", body)
    made = _make(system, node, body[16:-1], stat.S_IFREG | (mode & ~umask & 0o7777))
    return made + _open(system, node, body)


def _open(system: FileSystem, node: int, body: bytes) -> bytes:
    return struct.pack("<QII", 0, 0, 0)


def _rename(system: FileSystem, node: int, body: bytes) -> bytes:
    (to,) = struct.unpack_from("<Q", body)
    name, new, _ = body[8:].split(b"\0")
    system.rename(node, name, to, new, replace=True)
    return b""


def _rename2(system: FileSystem, node: int, body: bytes) -> bytes:
    to, flags, _ = struct.unpack_from("<QII", body)
    if flags & ~NOREPLACE:
        raise OSError(errno.EINVAL, "")
    name, new, _ = body[16:].split(b"\0")
    system.rename(node, name, to, new, replace=not flags & NOREPLACE)
    return b""


def _link(system: FileSystem, node: int, body: bytes) -> bytes:
    (old,) = struct.unpack_from("<Q", body)
    system.link(old, node, body[8:-1])
    return _entry(system, old)


def _read(system: FileSystem, node: int, body: bytes) -> bytes:
    _, offset, length = struct.unpack_from("<QQI", body)
    return system.read(node, offset, length)


def _write(system: FileSystem, node: int, body: bytes) -> bytes:
    _, offset, length = struct.unpack_from("<QQI", body)
    system.write(node, offset, body[40 : 40 + length])
    return struct.pack("<II", length, 0)


def _readdir(system: FileSystem, node: int, body: bytes) -> bytes:
    _, offset, length = struct.unpack_from("<QQI", body)
    out = bytearray()
    for at, (name, number) in enumerate(system.names(node)):
        if at < offset:
            continue
        kind = system.attributes(number).mode >> 12
        entry = struct.pack("<QQII", number, at + 1, len(name), kind) + name
        entry += bytes(-len(entry) % 8)
        if len(out) + len(entry) > length:
            break
        out += entry
    return bytes(out)


def _statfs(system: FileSystem, node: int, body: bytes) -> bytes:
    free = 1 << 28  # blocks: 1 TiB
    return struct.pack("<QQQQQIIII24x", free, free, free, 1 << 20, 1 << 20, 4096, 255, 4096, 0)


def _fallocate(system: FileSystem, node: int, body: bytes) -> bytes:
    _, offset, length, mode = struct.unpack_from("<QQQI", body)
    if mode not in (0, KEEP_SIZE, PUNCH_HOLE | KEEP_SIZE):
        raise OSError(errno.EOPNOTSUPP, "")
    system.allocate(node, mode, offset, length)
    return b""


def _synced(system: FileSystem, node: int, body: bytes) -> bytes:
    system.sync(node)
    return b""


def _removed(folder: bool) -> Callable[[FileSystem, int, bytes], bytes]:
    def remove(system: FileSystem, node: int, body: bytes) -> bytes:
        system.unlink(node, body[:-1], folder=folder)
        return b""

    return remove


def _nothing(system: FileSystem, node: int, body: bytes) -> bytes:
    return b""


_HANDLERS: dict[int, Callable[[Any, int, bytes], bytes]] = {
    INIT: _init,
    LOOKUP: lambda system, node, body: _entry(system, system.lookup(node, body[:-1])),
    GETATTR: lambda system, node, body: _attr_out(system, node),
    SETATTR: _setattr,
    MKNOD: _mknod,
    MKDIR: _mkdir,
    CREATE: _create,
    UNLINK: _removed(folder=False),
    RMDIR: _removed(folder=True),
    RENAME: _rename,
    RENAME2: _rename2,
    LINK: _link,
    OPEN: _open,
    OPENDIR: _open,
    READ: _read,
    WRITE: _write,
    READDIR: _readdir,
    STATFS: _statfs,
    FALLOCATE: _fallocate,
    FSYNC: _synced,
    FSYNCDIR: _synced,
    RELEASE: _nothing,
    RELEASEDIR: _nothing,
    FLUSH: _nothing,
    DESTROY: _nothing,
}

"""`cp://`: a chunk store in a local folder, or in one that is mounted from elsewhere."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator

from .. import files
from ..errors import (
    KeyExists,
    KeyNotFound,
    NoSpace,
    StoreError,
    StoreFull,
    StoreMissing,
    StoreRefused,
    StoreUnavailable,
)
from . import base, walk
from .base import ChunkStore, Stat
from .pending import PendingFiles
from .url import StoreURL

CONCURRENCY = 8  # enough to keep a disk's queue busy; the page cache needs none

# What network file systems and pulled disks give while they are away.
_AWAY = {
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.ENOTCONN,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.EAGAIN,
}
_NO_OBJECT = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR}


class LocalStore(ChunkStore):
    """Objects are files below one folder, published whole.

    A put waits for the next sync to be durable and to have its name (pending.py). An exclusive put
    is there at once, after a sync of what was put before it: a ref never precedes its objects. It
    is link(2), which fails where the name exists and is atomic on NFS too.
    """

    def __init__(self, url: StoreURL, *, concurrency: int | None = None) -> None:
        self.url = str(url)
        self.concurrency = concurrency or CONCURRENCY
        self._root = url.path
        self._pending = PendingFiles(self._root, self.url)

    def _path(self, key: str) -> str:
        return f"{self._root}/{base.check_key(key)}"

    def _error(self, error: OSError, doing: str) -> StoreError:
        """What `error` means for the caller."""
        why = f"{self.url}: {doing}: {os.strerror(error.errno or errno.EIO)}"
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return StoreRefused(f"{why}: check owner, mode and mount of {self._root}")
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return StoreFull(f"{why}: free some space there")
        if error.errno in _AWAY:
            return StoreUnavailable(why)
        return StoreError(why)

    def check(self) -> None:
        try:
            mode = os.stat(self._root).st_mode
        except (FileNotFoundError, NotADirectoryError):
            raise StoreMissing(
                f"{self.url}: there is no folder {self._root}: check the path"
            ) from None
        except OSError as error:
            raise self._error(error, "cannot look at the folder") from error
        if not stat.S_ISDIR(mode):
            raise StoreMissing(f"{self.url}: {self._root} is not a folder")

    def prepare(self) -> None:
        try:
            files.make_folder(self._root)
            self._pending.sweep()
        except OSError as error:
            raise self._error(error, "cannot make the folder") from error
        self.check()

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        base.check_range(offset, length)
        path = self._path(key)
        pending = self._pending.find(key)
        if pending is not None:
            try:
                rest = max(pending.size - offset, 0)
                return _read(pending.fd, rest if length is None else min(rest, length), offset)
            except OSError as error:
                raise self._error(error, f"cannot read {key}") from error
            finally:
                os.close(pending.fd)
        try:
            # O_NONBLOCK: a FIFO that somebody left there must not hang us; files ignore it.
            with files.opened(path, os.O_RDONLY | os.O_NONBLOCK) as fd:
                status = os.fstat(fd)
                if not stat.S_ISREG(status.st_mode):
                    raise KeyNotFound(self.url, key)
                rest = max(status.st_size - offset, 0)
                return _read(fd, rest if length is None else min(rest, length), offset)
        except OSError as error:
            raise self._no_object(error, key) from error

    def _no_object(self, error: OSError, key: str) -> StoreError:
        if error.errno in _NO_OBJECT or error.errno == errno.ENXIO:  # ENXIO: a socket
            self.check()  # a folder that was unmounted is not a missing object
            return KeyNotFound(self.url, key)
        return self._error(error, f"cannot read {key}")

    def put(self, key: str, data: bytes) -> None:
        path = self._path(key)
        try:
            try:
                is_time = self._pending.add(key, path, data)
            except FileNotFoundError:
                self.check()  # the root itself is never made here
                raise
        except OSError as error:
            raise self._error(error, f"cannot store {key}") from error
        if is_time:
            self.sync()

    def sync(self) -> None:
        self._pending.sync()

    def put_exclusive(self, key: str, data: bytes) -> None:
        self.sync()
        path = self._path(key)
        try:
            try:
                files.publish(path, data, exclusive=True)
            except FileNotFoundError:
                self.check()  # make folders below the root, never the root itself
                files.make_folder(os.path.dirname(path))
                files.publish(path, data, exclusive=True)
        except FileExistsError:
            raise KeyExists(self.url, key) from None
        except NoSpace as error:
            raise StoreFull(f"{self.url}: no space left for {key}: free some there") from error
        except OSError as error:
            raise self._error(error, f"cannot store {key}") from error

    def close(self) -> None:
        self._pending.close()

    def stat(self, key: str) -> Stat:
        path = self._path(key)
        pending = self._pending.stat(key)
        if pending is not None:
            return pending
        try:
            status = os.stat(path)
        except OSError as error:
            raise self._no_object(error, key) from error
        if not stat.S_ISREG(status.st_mode):
            raise KeyNotFound(self.url, key)
        return Stat(key, status.st_size, status.st_mtime)

    def children(self, prefix: str) -> list[str]:
        pending = self._pending.stats()
        (entries,) = self._scan([base.check_folder(prefix)])
        names = {
            entry.name
            for entry in entries
            if base.is_part(entry.name) and (entry.is_folder or entry.look())
        }
        names |= {
            waiting.key[len(prefix) :].split("/")[0]
            for waiting in pending
            if waiting.key.startswith(prefix)
        }
        return sorted(names)

    def delete(self, key: str) -> None:
        path = self._path(key)
        self._pending.remove(key)
        try:
            os.unlink(path)
        except OSError as error:
            if error.errno not in _NO_OBJECT:
                raise self._error(error, f"cannot delete {key}") from error
            self.check()

    def sweep(self) -> int:
        count = self._pending.sweep()
        for path in walk.stale(self._scan):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{self._root}/{path}")
                count += 1
        return count

    def _scan(self, folders: list[str]) -> Iterator[list[walk.Entry]]:
        return map(self._entries, folders)

    def _entries(self, folder: str) -> list[walk.Entry]:
        try:
            with os.scandir(f"{self._root}/{folder}") as entries:
                return [walk.Entry(e.name, e.is_dir(), _Look(e)) for e in entries]
        except (FileNotFoundError, NotADirectoryError):
            self.check()
            return []
        except OSError as error:
            raise self._error(error, f"cannot list {folder or 'the folder'}") from error

    def list(self, prefix: str = "", after: str = "", limit: int | None = None) -> Iterator[Stat]:
        # Before the folder: what is given its name in between shows in both.
        pending = self._pending.stats()
        found = walk.walk(self._scan, base.check_prefix(prefix), after, limit)
        if not pending:
            return found
        waiting = (s for s in pending if s.key.startswith(prefix) and s.key > after)
        return walk.merge(waiting, found, limit)


class _Look:
    """Size and time of a directory entry, when somebody asks."""

    __slots__ = ("_entry",)

    def __init__(self, entry: os.DirEntry[str]) -> None:
        self._entry = entry

    def __call__(self) -> tuple[int, float] | None:
        with contextlib.suppress(FileNotFoundError):
            status = self._entry.stat()
            if stat.S_ISREG(status.st_mode):
                return status.st_size, status.st_mtime
        return None


def _read(fd: int, length: int, offset: int) -> bytes:
    """Up to `length` bytes at `offset`. One call gives 2 GiB at most on Linux."""
    parts: list[bytes] = []
    while length > 0:
        part = os.pread(fd, length, offset)
        if not part:
            break
        parts.append(part)
        length -= len(part)
        offset += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)

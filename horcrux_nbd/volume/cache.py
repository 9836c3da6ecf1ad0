"""The cache: verified chunks, index nodes and commits on this host, shared by all its volumes.

```
<cache>/chunks/ab/abcdef…    plaintext of what an index entry names (patches applied), + trailer
<cache>/meta/ab/abcdef…      index nodes and commits, + trailer
<cache>/usage                bytes in all, 8 bytes; locked while it changes or things are evicted
```

Several processes use one cache. A file is published whole; its trailer carries an XXH3 of the
content and is checked each time the file is opened, so a torn or damaged one (nothing here is
synced) is deleted and fetched again. It never holds the only copy of anything.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import struct
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from .. import files
from ..errors import HorcruxError
from ..units import GiB

log = logging.getLogger(__name__)

TRAILER = struct.Struct("<4sIQ16s")  # magic, 0, length of the content, XXH3-128 of content + id
TRAILER_MAGIC = b"HRCC"
USAGE = struct.Struct("<Q")
CHUNKS, META = "chunks", "meta"

MAX_DEFAULT = 50 * GiB
DEFAULT_PART = 5  # of the file system's size: a fifth, if that is less
# Evicting a tenth at a time: a scan costs about 2 s for a million files.
KEEP_AFTER_EVICTION = 0.9
# A use is noted in the file's mtime when it is older than this (seconds): it orders evictions.
TOUCH_AFTER = 600.0


@dataclass(frozen=True)
class Entry:
    """One cached file: hex id, bytes on disk, when it was last used (seconds since 1970)."""

    area: str
    id: str
    size: int
    used: float
    path: Path


class CachedFile:
    """An open, verified cache file. It stays readable when evicted, and closes when let go."""

    def __init__(self, fd: int, length: int) -> None:
        self.fd, self.length = fd, length

    def read_into(self, offset: int, view: memoryview) -> bool:
        """Fill `view` from `offset`; False if the file has become shorter than it was."""
        got = 0
        while got < len(view):
            count = os.preadv(self.fd, [view[got:]], offset + got)
            if count == 0:
                return False
            got += count
        return True

    def __del__(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self.fd)


class Cache:
    """A bounded cache in `folder`. Any number of threads and processes may use it at once."""

    def __init__(self, folder: Path, limit: int | None = None) -> None:
        """`limit` bytes in all; by default a fifth of the file system, at most 50 GiB."""
        self.folder = folder
        for area in (CHUNKS, META):
            files.make_folder(folder / area, 0o700)
        if limit is None:
            stat = os.statvfs(folder)
            limit = min(MAX_DEFAULT, stat.f_blocks * stat.f_frsize // DEFAULT_PART)
        self.limit = limit
        soft, hard = _raise_file_limit()
        del hard
        self._max_open = max(16, soft // 4)
        self._open: OrderedDict[bytes, CachedFile] = OrderedDict()
        self._lock = threading.Lock()
        self._unaccounted = 0
        self._evicting = threading.Lock()
        self.hits = self.misses = self.damaged = 0

    def _path(self, area: str, oid: bytes) -> Path:
        text = oid.hex()
        return self.folder / area / text[:2] / text

    # ---- use

    def open(self, oid: bytes) -> CachedFile | None:
        """The chunk `oid` as an open file, verified, or None if it is not here."""
        found = self._open.get(oid)
        if found is not None:
            return found
        path = self._path(CHUNKS, oid)
        checked = self._check(path, oid)
        if checked is None:
            return None
        file = CachedFile(checked[0], len(checked[1]))
        self._remember(oid, file)
        return file

    def content(self, oid: bytes, length: int) -> bytes | None:
        """The `length` bytes of the chunk `oid`, verified, or None if it is not here."""
        file = self.open(oid)
        if file is None or file.length != length:
            return None
        content = bytearray(length)
        return bytes(content) if file.read_into(0, memoryview(content)) else None

    def _remember(self, oid: bytes, file: CachedFile) -> None:
        # What is evicted while open keeps its room, so few are kept open of a small cache.
        most = max(2, min(self._max_open, self.limit // 4 // max(file.length, 1)))
        with self._lock:
            self._open[oid] = file
            while len(self._open) > most:
                self._open.popitem(last=False)

    def read(self, oid: bytes) -> bytes | None:
        """The node or commit `oid`, verified, or None if it is not here."""
        checked = self._check(self._path(META, oid), oid)
        if checked is None:
            return None
        os.close(checked[0])
        return checked[1]

    def has(self, oid: bytes) -> bool:
        """Whether the chunk `oid` is here, as far as its name says; nothing is verified."""
        return oid in self._open or self._path(CHUNKS, oid).exists()

    def _check(self, path: Path, oid: bytes) -> tuple[int, bytes] | None:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            self.misses += 1
            return None
        try:
            stat = os.fstat(fd)
            data = files.read_exactly(fd, stat.st_size, 0)
            content = data[: -TRAILER.size] if len(data) >= TRAILER.size else b""
            if data[-TRAILER.size :] != _trailer(content, oid):
                raise ValueError("trailer")
            if time.time() - stat.st_mtime > TOUCH_AFTER:
                os.utime(fd)
        except (OSError, ValueError) as error:
            os.close(fd)
            self.damaged += 1
            log.warning("cache file %s is damaged (%s): it is fetched again", path, error)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            return None
        self.hits += 1
        return fd, content

    def insert(self, oid: bytes, content: bytes, *, meta: bool = False) -> None:
        """Keep a verified object. Never fails: a full or broken disk only means no caching."""
        path = self._path(META if meta else CHUNKS, oid)
        if len(content) + TRAILER.size > self.limit:
            return
        data = content + _trailer(content, oid)
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            files.publish(path, data, durable=False, mode=0o600)
            if not meta:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                self._remember(oid, CachedFile(fd, len(content)))
        except (OSError, HorcruxError) as error:
            log.warning("cannot cache %s: %s", path, error)
            return
        self._account(len(data))

    def drop(self, oid: bytes) -> None:
        """Forget one chunk, here and on disk."""
        with self._lock:
            self._open.pop(oid, None)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path(CHUNKS, oid))

    # ---- bounds

    @contextlib.contextmanager
    def _usage(self, wait: bool) -> Iterator[int | None]:
        """The usage file, locked: its descriptor, or None if somebody else has it now."""
        with files.opened(self.folder / "usage", os.O_RDWR | os.O_CREAT) as fd:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield None
                return
            yield fd

    def _account(self, size: int) -> None:
        with self._lock:
            self._unaccounted += size
        with self._usage(wait=False) as fd:
            if fd is None:
                return  # added up with the next one
            with self._lock:
                size, self._unaccounted = self._unaccounted, 0
            total = _read_usage(fd) + size
            os.pwrite(fd, USAGE.pack(total), 0)
        if total > self.limit and self._evicting.acquire(blocking=False):
            try:
                self.trim(self.limit, KEEP_AFTER_EVICTION)
            finally:
                self._evicting.release()

    def trim(self, limit: int, keep: float = 1.0) -> int:
        """If there is more than `limit`, evict what was not used longest down to `limit * keep`.

        Bytes removed. Chunks go before nodes and commits, which are small and needed first.
        """
        with self._usage(wait=True) as fd:
            assert fd is not None
            found = sorted(self.entries(), key=lambda e: (e.area == META, e.used))
            total = before = sum(entry.size for entry in found)
            if total > limit:
                goal = int(limit * keep)
                for entry in found:
                    if total <= goal:
                        break
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(entry.path)
                    total -= entry.size
                    with self._lock:
                        self._open.pop(bytes.fromhex(entry.id), None)
            os.pwrite(fd, USAGE.pack(total), 0)
        self._close_evicted()
        return before - total

    def _close_evicted(self) -> None:
        """Let go of files that another process evicted, so that their room comes back."""
        for oid, file in list(self._open.items()):
            if os.fstat(file.fd).st_nlink == 0:
                with self._lock:
                    self._open.pop(oid, None)

    def clear(self) -> int:
        """Remove everything; bytes removed."""
        return self.trim(0)

    # ---- figures

    def entries(self) -> Iterator[Entry]:
        """Everything that is here, in no order. Files left by killed writers are removed."""
        for area in (CHUNKS, META):
            for shard in sorted((self.folder / area).iterdir()):
                with os.scandir(shard) as found:
                    for item in found:
                        with contextlib.suppress(FileNotFoundError):
                            stat = item.stat()
                            if item.name.startswith(files.TEMPORARY_PREFIX):
                                if time.time() - stat.st_mtime > 3600:
                                    os.unlink(item.path)
                                continue
                            yield Entry(
                                area, item.name, stat.st_size, stat.st_mtime, Path(item.path)
                            )

    def size(self) -> int:
        """Bytes in all, as accounted."""
        with self._usage(wait=True) as fd:
            assert fd is not None
            return _read_usage(fd)

    def close(self) -> None:
        with self._lock:
            self._open.clear()


def _trailer(content: bytes, oid: bytes) -> bytes:
    digest = xxhash.xxh3_128(content)
    digest.update(oid)  # so that a file under another's name does not pass
    return TRAILER.pack(TRAILER_MAGIC, 0, len(content), digest.digest())


def _read_usage(fd: int) -> int:
    data = os.pread(fd, USAGE.size, 0)
    return int(USAGE.unpack(data)[0]) if len(data) == USAGE.size else 0


def _raise_file_limit() -> tuple[int, int]:
    """Let this process open as many files as it may; (soft, hard) limit then."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = hard if hard != resource.RLIM_INFINITY else 1 << 16
    wanted = min(wanted, 1 << 16)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return soft, hard

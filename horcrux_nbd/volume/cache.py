"""The cache: verified chunks, index nodes and commits on this host, shared by all its volumes.

```
<cache>/chunks/ab/abcdef…    plaintext of what an index entry names (patches applied), + trailer
<cache>/meta/ab/abcdef…      index nodes and commits, + trailer
<cache>/usage                bytes in all; locked while it changes or things are evicted
```

Several processes use one cache. A file is published whole; its trailer carries an XXH3 of the
content and is checked each time the file is opened, so a torn or damaged one (nothing here is
synced) is deleted and fetched again. It never holds the only copy of anything.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import struct
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path

import xxhash

from .. import files
from ..errors import HorcruxError, NoSpace
from ..native import handles, library
from ..repository.commits import MAX_CHUNK
from ..repository.patch import max_patch_size
from ..units import GiB, MiB
from . import pins
from .eviction import Entry, Eviction

log = logging.getLogger(__name__)

TRAILER = struct.Struct("<4sIQ16s")  # magic, 0, length of the content, XXH3-128 of content + id
TRAILER_MAGIC = b"HRCC"
USAGE = struct.Struct("<Q16s")  # bytes in all, as counted since the boot with this id
CHUNKS, META = "chunks", "meta"

LARGEST = max_patch_size(MAX_CHUNK) + TRAILER.size  # bytes that a file can have

MAX_DEFAULT = 50 * GiB
DEFAULT_PART = 5  # of the file system's size: a fifth, if that is less
# Evicting a tenth at a time: a scan costs about 2 s for a million files.
KEEP_AFTER_EVICTION = 0.9
# What was inserted is told to the other processes in steps, of at most so many bytes: the file that
# says it costs as much as the insertion of a small chunk.
ACCOUNT_EACH = 4 * MiB
FREE_PART = 20  # of the disk: a twentieth of it is left to others by what nobody asked for
# A use is noted in the file's mtime when it is older than this (seconds): it orders evictions.
TOUCH_AFTER = 600.0
# Beyond the limit by this part, who inserts waits for the eviction; below, the keeper evicts.
SLACK = 0.05
# How often uses are noted, and what others evicted is let go of, seconds.
KEEP_EVERY = 30.0
# Between two looks at a full disk, and two lines about it, seconds.
FULL_EVERY = 10.0
_NAME = re.compile(r"[0-9a-f]{64}")


class CachedFile:
    """An open, verified cache file. It stays readable when evicted, and closes when let go."""

    __slots__ = ("_used", "fd", "length", "native", "touched")

    def __init__(self, fd: int, length: int) -> None:
        self.fd, self.length = fd, length
        self._used = False
        self.touched = time.monotonic()
        found = library.active()
        # It closes the descriptor, when no native read is under way any more.
        self.native = handles.File(found, fd, length) if found is not None else None

    @property
    def used(self) -> bool:
        """Whether it was read since `touch`."""
        return self._used or (self.native is not None and self.native.was_used())

    def use(self) -> None:
        self._used = True

    def touch(self) -> None:
        """Give the file the time of now, for the next eviction to see. Raises OSError."""
        self._used, self.touched = False, time.monotonic()
        if self.native is not None:
            self.native.was_used(reset=True)
        _touch(self.fd)

    def read_into(self, offset: int, view: memoryview) -> bool:
        """Fill `view` from `offset`; False if it cannot be read any more, or is shorter."""
        if offset + len(view) > self.length:
            return False
        try:
            got = os.preadv(self.fd, [view], offset)
            while 0 < got < len(view):
                count = os.preadv(self.fd, [view[got:]], offset + got)
                if count == 0:
                    return False
                got += count
        except OSError as error:
            log.warning("a cached chunk cannot be read: %s", error)
            return False
        return got == len(view)

    def __del__(self) -> None:
        if self.native is None:
            with contextlib.suppress(OSError):
                os.close(self.fd)


class Cache:
    """A bounded cache in `folder`. Any number of threads and processes may use it at once.

    **Invariant:** a file is verified between the moment it is opened and the first byte read of it
    through `_open`; names are never trusted, and nothing but `insert` and `open` adds to `_open`.
    """

    def __init__(self, folder: Path, limit: int | None = None) -> None:
        """`limit` bytes in all; by default a fifth of the file system, at most 50 GiB."""
        self.folder = folder
        for area in (CHUNKS, META):
            files.make_folder(folder / area, 0o700)
        if limit is None:
            stat = os.statvfs(folder)
            limit = min(MAX_DEFAULT, stat.f_blocks * stat.f_frsize // DEFAULT_PART)
        self.limit = limit
        self.max_open = max(16, files.raise_file_limit() // 4)
        self._open: OrderedDict[bytes, CachedFile] = OrderedDict()
        self._lock = threading.Lock()
        self._unaccounted = 0
        self._evicting = threading.Lock()
        self._boot = _boot_id()
        self._keeper: threading.Thread | None = None
        self._wake = threading.Event()
        self._closed = self._wants_trim = self._disk_full = False
        self._told_full = -FULL_EVERY
        self.hits = self.misses = self.damaged = 0

    def _path(self, area: str, oid: bytes) -> str:
        text = oid.hex()  # no Path: joining its parts takes as long as opening the file
        return f"{self.folder}/{area}/{text[:2]}/{text}"

    # ---- use

    def open(self, oid: bytes) -> CachedFile | None:
        """The chunk `oid` as an open file, verified, or None if it is not here."""
        found = self._open.get(oid)
        if found is not None:
            found.use()
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

    def same_blocks(self, oid: bytes, blocks: Mapping[int, bytes]) -> set[int] | None:
        """The numbers of those 4 KiB `blocks` that the chunk `oid` has as they are; None if the
        chunk is not here. That one differs needs no proof; that one is the same is verified.
        """
        file = self._open.get(oid)
        if file is None:
            try:
                fd = os.open(self._path(CHUNKS, oid), os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                self.misses += 1
                return None
            try:
                if not any(os.pread(fd, len(b), n * len(b)) == b for n, b in blocks.items()):
                    return set()
            except OSError:
                return None
            finally:
                os.close(fd)
            file = self.open(oid)
            if file is None:
                return None
        try:
            return {n for n, b in blocks.items() if os.pread(file.fd, len(b), n * len(b)) == b}
        except OSError:
            return None

    def _remember(self, oid: bytes, file: CachedFile) -> None:
        # What is evicted while open keeps its room, so few are kept open of a small cache.
        most = max(2, min(self.max_open, self.limit // 4 // max(file.length, 1)))
        with self._lock:
            if self._closed:
                return
            self._open[oid] = file
            while len(self._open) > most:
                self._open.popitem(last=False)
            if self._keeper is None:
                self._keeper = threading.Thread(target=self._keep, name="cache", daemon=True)
                self._keeper.start()

    def read(self, oid: bytes) -> bytes | None:
        """The node or commit `oid`, verified, or None if it is not here."""
        checked = self._check(self._path(META, oid), oid)
        if checked is None:
            return None
        os.close(checked[0])
        return checked[1]

    def has(self, oid: bytes) -> bool:
        """Whether the chunk `oid` is here, as far as its name says; nothing is verified."""
        return oid in self._open or os.path.exists(self._path(CHUNKS, oid))

    def size_of(self, oid: bytes) -> int:
        """Bytes on disk of the chunk `oid`; 0 if it is not here."""
        try:
            return os.stat(self._path(CHUNKS, oid)).st_size
        except OSError:
            return 0

    def _check(self, path: str, oid: bytes) -> tuple[int, bytes] | None:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            if error.errno != errno.ENOENT:  # too many open files, a folder of somebody else
                log.warning("cannot open cache file %s: %s", path, error.strerror)
            self.misses += 1
            return None
        try:
            stat = os.fstat(fd)
            if stat.st_size > LARGEST:
                raise ValueError("too long")
            data = files.read_exactly(fd, stat.st_size, 0)
            content = data[: -TRAILER.size] if len(data) >= TRAILER.size else b""
            if data[-TRAILER.size :] != _trailer(content, oid):
                raise ValueError("trailer")
            if time.time() - stat.st_mtime > TOUCH_AFTER:
                _touch(fd)
        except (OSError, ValueError) as error:
            os.close(fd)
            self.damaged += 1
            log.warning("cache file %s is damaged (%s): it is fetched again", path, error)
            with contextlib.suppress(OSError):
                os.unlink(path)
            return None
        self.hits += 1
        return fd, content

    def insert(self, oid: bytes, content: bytes, *, meta: bool = False) -> None:
        """Keep a verified object. Never fails: a full or broken disk only means no caching."""
        path = self._path(META if meta else CHUNKS, oid)
        if len(content) + TRAILER.size > self.limit:
            return
        trailer = _trailer(content, oid)
        try:
            try:
                files.publish(path, content, trailer, durable=False, mode=0o600)
            except FileNotFoundError:  # the first one with these digits
                with contextlib.suppress(FileExistsError):
                    os.mkdir(os.path.dirname(path), 0o700)
                files.publish(path, content, trailer, durable=False, mode=0o600)
            if not meta:
                with contextlib.suppress(FileNotFoundError):  # evicted by somebody else just now
                    # It closes its descriptor, whatever comes next.
                    file = CachedFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC), len(content))
                    _touch(file.fd)
                    self._remember(oid, file)
            self._account(len(content) + len(trailer))
        except (OSError, HorcruxError) as error:
            self._cannot_insert(error)

    def _cannot_insert(self, error: Exception) -> None:
        now = time.monotonic()
        if now - self._told_full >= FULL_EVERY:
            self._told_full = now
            log.warning("chunks are not cached now, and fetched each time: %s", error)
            if isinstance(error, NoSpace):
                self._disk_full = True
                self._wake.set()

    def drop(self, oid: bytes) -> None:
        """Forget one chunk that could not be read as it should, here and on disk."""
        path = self._path(CHUNKS, oid)
        log.warning("cache file %s is damaged: it is fetched again", path)
        self.damaged += 1
        with self._lock:
            self._open.pop(oid, None)
        with contextlib.suppress(OSError):
            os.unlink(path)

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

    def _account(self, size: int, wait: bool = False) -> None:
        with self._lock:
            self._unaccounted += size
            few = self._unaccounted < min(ACCOUNT_EACH, self.limit // 256)
        if few and not wait:
            return
        with self._usage(wait) as fd:
            if fd is None:  # no reader waits for somebody else's eviction
                self._wake.set()
                return
            total = self._read_usage(fd)
            if total is not None:
                with self._lock:
                    total, self._unaccounted = total + self._unaccounted, 0
                self._write_usage(fd, total)
        if total is not None and total <= self.limit:
            return
        much = total is None or total > self.limit * (1 + SLACK)
        if much and self._evicting.acquire(blocking=False):
            try:
                self.trim(self.limit, KEEP_AFTER_EVICTION)
            finally:
                self._evicting.release()
        else:
            self._wants_trim = True
            self._wake.set()

    def _read_usage(self, fd: int) -> int | None:
        """None where nobody counted since the boot: what was not synced before may be gone."""
        data = os.pread(fd, USAGE.size, 0)
        if len(data) != USAGE.size:
            return None
        total, boot = USAGE.unpack(data)
        return int(total) if boot == self._boot else None

    def _write_usage(self, fd: int, total: int) -> None:
        os.pwrite(fd, USAGE.pack(total, self._boot), 0)

    def trim(self, limit: int, keep: float = 1.0) -> int:
        """If there is more than `limit`, evict what was not used longest down to `limit * keep`.

        Bytes removed. Chunks go before nodes and commits, which are small and needed first; what
        is pinned stays.
        """
        with self._usage(wait=True) as fd:
            assert fd is not None
            self._note_uses(0)
            with self._lock:
                self._unaccounted = 0  # what it stands for is counted here
            eviction = Eviction(self.entries, pins.load(self.folder))
            total = before = eviction.total
            if total > limit:
                goal = int(limit * keep)
                for entry in eviction.oldest(total - goal):
                    if total <= goal:
                        break
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(entry.path)
                    total -= entry.size
                    with self._lock:
                        self._open.pop(bytes.fromhex(entry.id), None)
            self._write_usage(fd, total)
        self._close_evicted()
        return before - total

    def _keep(self) -> None:
        """The keeper's thread: what has to be done now and then, and what should not hold up a
        reader."""
        while True:
            self._wake.wait(KEEP_EVERY)
            self._wake.clear()
            if self._closed:
                return
            try:
                self._note_uses(TOUCH_AFTER)
                self._close_evicted()
                if self._unaccounted:
                    self._account(0, wait=True)
                if self._disk_full:
                    # Others need the room too. Chunks can be had again, so the oldest go.
                    self._disk_full = False
                    self.trim(int(sum(e.size for e in self.entries()) * KEEP_AFTER_EVICTION))
                if self._wants_trim:
                    self._wants_trim = False
                    self.trim(self.limit, KEEP_AFTER_EVICTION)
            except OSError as error:
                log.warning("cannot tidy up the cache %s: %s", self.folder, error)

    def _note_uses(self, after: float) -> None:
        """Give files that are open and in use a new time, at most each `after` seconds: who evicts,
        here or in another process, sees only those."""
        now = time.monotonic()
        for file in self._opened().values():
            if file.used and now - file.touched >= after:
                with contextlib.suppress(OSError):
                    file.touch()

    def _close_evicted(self) -> None:
        """Let go of files that another process evicted, so that their room comes back."""
        for oid, file in self._opened().items():
            if os.fstat(file.fd).st_nlink == 0:
                with self._lock:
                    self._open.pop(oid, None)

    def _opened(self) -> dict[bytes, CachedFile]:
        with self._lock:
            return dict(self._open)

    def room(self) -> int:
        """Bytes that still fit before anything is evicted, or a nearly full disk fills up."""
        stat = os.statvfs(self.folder)
        kept_free = stat.f_blocks * stat.f_frsize // FREE_PART
        free = stat.f_bavail * stat.f_frsize - kept_free
        return max(0, min(int(self.limit * KEEP_AFTER_EVICTION) - self.size(), free))

    def clear(self) -> int:
        """Remove everything; bytes removed."""
        return self.trim(0)

    # ---- figures

    def entries(self) -> Iterator[Entry]:
        """Everything that is here, in no order. Files left by killed writers are removed."""
        for area in (CHUNKS, META):
            for shard in sorted((self.folder / area).glob("[0-9a-f][0-9a-f]/")):
                with os.scandir(shard) as found:
                    for item in found:
                        with contextlib.suppress(FileNotFoundError):
                            stat = item.stat()
                            if item.name.startswith(files.TEMPORARY_PREFIX):
                                if time.time() - stat.st_mtime > 3600:
                                    os.unlink(item.path)
                            elif _NAME.fullmatch(item.name):
                                path = Path(item.path)
                                yield Entry(area, item.name, stat.st_size, stat.st_mtime, path)

    def size(self) -> int:
        """Bytes in all, as accounted."""
        with self._usage(wait=True) as fd:
            assert fd is not None
            total = self._read_usage(fd)
        if total is not None:
            total += self._unaccounted
        return total if total is not None else sum(entry.size for entry in self.entries())

    def close(self) -> None:
        """Let go of all files; nothing is kept open any more."""
        with self._lock:
            self._closed = True
            self._open.clear()
        self._wake.set()
        if self._keeper is not None:
            self._keeper.join(5)
        if self._unaccounted:
            with contextlib.suppress(OSError):
                self._account(0, wait=True)


def _trailer(content: bytes, oid: bytes) -> bytes:
    digest = xxhash.xxh3_128(content)
    digest.update(oid)  # so that a file under another's name does not pass
    return TRAILER.pack(TRAILER_MAGIC, 0, len(content), digest.digest())


def _touch(fd: int) -> None:
    # The kernel's own clock of files goes in steps of 4 ms, too coarse to tell what came last.
    now = time.time_ns()
    os.utime(fd, ns=(now, now))


def _boot_id() -> bytes:
    text = Path("/proc/sys/kernel/random/boot_id").read_text()
    return bytes.fromhex(text.strip().replace("-", ""))

"""Files that are written, but not yet durable and not yet under their names.

A put that is made durable by itself waits for the journal and the disk's cache twice; in a batch
they share these waits. 2,000 objects of 200 KiB from 8 threads onto ext4 took 1,021 journal commits
and 3.5 to 4.7 s one by one, 110 and 1.4 to 1.8 s in batches (a loop device; a disk that needs 10 ms
for each commit would need 10 s and 1 s for these alone). What may not happen is a name that a power
cut left on an empty or torn file: the next push would take the object for present. So the names
come last, when all data is on disk.

fdatasync of each file, many at once, and not one syncfs of everything, though that is faster still:
syncfs says nothing to a FUSE file system, hardly anything about errors before Linux 5.8, and waits
for what others wrote. The descriptors stay open until then, because only they are told of a
write-back error for sure.
"""

from __future__ import annotations

import contextlib
import os
import resource
import secrets
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from .. import files
from ..errors import StoreError
from ..units import MiB
from .base import Stat
from .walk import STALE

FOLDER = ".tmp-puts"  # below the root, so that a sweep is one look; its name is no key
OF_FILES = 4  # a batch takes a quarter of the files that the process may open,
MAX_FILES = 2048  # and no more than this
MAX_BYTES = 256 * MiB
SYNCS = 64  # at once: the kernel makes one commit of them (8 at once took five times as many)


@dataclass(frozen=True)
class Pending:
    """One file, open for reading and writing."""

    path: str  # where it will be
    temporary: str
    fd: int
    size: int
    mtime: float


class PendingFiles:
    """The batch below one root. Safe to use from any number of threads.

    **Invariant:** a file is found here until it is found, durable, under its name.
    """

    def __init__(self, root: str, url: str) -> None:
        self._root, self._url = root, url
        self._most = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // OF_FILES
        self._open: dict[str, Pending] = {}  # by key
        self._syncing: dict[str, Pending] = {}
        self._bytes = 0
        self._lock = threading.Lock()  # of the three above
        self._one_sync = threading.Lock()
        self._failure: OSError | None = None

    def add(self, key: str, path: str, data: bytes) -> bool:
        """Write a file that will be at `path`. Whether it is time for a sync.

        Raises OSError, StoreError.
        """
        self._raise_failure()
        temporary = f"{self._root}/{FOLDER}/{secrets.token_hex(12)}"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            fd = os.open(temporary, flags, 0o644)
        except FileNotFoundError:
            with contextlib.suppress(FileExistsError):
                os.mkdir(f"{self._root}/{FOLDER}", 0o755)
            fd = os.open(temporary, flags, 0o644)
        pending = Pending(path, temporary, fd, len(data), time.time())
        try:
            files.write_all(fd, data, 0)
        except BaseException:
            _drop(pending)
            raise
        with self._lock:
            replaced = self._open.pop(key, None)
            self._open[key] = pending
            self._bytes += len(data) - (replaced.size if replaced else 0)
            is_time = len(self._open) >= min(self._most, MAX_FILES) or self._bytes >= MAX_BYTES
        if replaced:
            _drop(replaced)
        return is_time

    def _raise_failure(self) -> None:
        if self._failure is not None:
            # Who put what was lost is not known: nobody may go on as if all were well.
            raise StoreError(
                f"{self._url}: what was stored could not be made durable ({self._failure}): "
                "look at the disk, then begin again"
            )

    def find(self, key: str) -> Pending | None:
        """The file for `key`, with a descriptor of the caller's own to close; or None."""
        with self._lock:
            pending = self._open.get(key) or self._syncing.get(key)
            if pending is None:
                return None
            fd = os.dup(pending.fd)
        return Pending(pending.path, pending.temporary, fd, pending.size, pending.mtime)

    def remove(self, key: str) -> None:
        """Forget the file for `key`."""
        with self._one_sync:  # one that is being synced has a name afterwards, to be deleted
            with self._lock:
                pending = self._open.pop(key, None)
                self._bytes -= pending.size if pending else 0
            if pending:
                _drop(pending)

    def stat(self, key: str) -> Stat | None:
        """Size and time of the file for `key`; None if it is not pending."""
        with self._lock:
            pending = self._open.get(key) or self._syncing.get(key)
            return Stat(key, pending.size, pending.mtime) if pending else None

    def stats(self) -> list[Stat]:
        """Every file, by key in byte order."""
        with self._lock:
            both = {**self._syncing, **self._open}
        return [Stat(key, both[key].size, both[key].mtime) for key in sorted(both)]

    def sync(self) -> None:
        """Make all files durable, then give them their names.

        Raises StoreError where that failed, from then on always: a file whose write-back failed is
        gone, and asking the kernel again would only say that all is well.
        """
        with self._one_sync:
            self._raise_failure()
            with self._lock:
                self._syncing, self._open, self._bytes = self._open, {}, 0
                batch = list(self._syncing.values())
            try:
                self._publish(batch)
            except OSError as error:
                self._failure = error
            finally:
                with self._lock:
                    self._syncing = {}
                for pending in batch:
                    _drop(pending)
            self._raise_failure()

    def close(self) -> None:
        """The last sync, unless one has failed and said so."""
        if self._failure is None:
            self.sync()

    def _publish(self, batch: list[Pending]) -> None:
        if not batch:
            return
        folders = sorted({os.path.dirname(pending.path) for pending in batch})
        with ThreadPoolExecutor(min(SYNCS, len(batch)), "sync") as pool:
            list(pool.map(lambda pending: os.fdatasync(pending.fd), batch))
            for folder in folders:
                files.make_folder(folder)
            for pending in batch:
                os.rename(pending.temporary, pending.path)
            list(pool.map(files.sync_folder, folders))

    def sweep(self) -> int:
        """Remove what killed writers left a day ago or more; how many."""
        count = 0
        with contextlib.suppress(FileNotFoundError), os.scandir(f"{self._root}/{FOLDER}") as there:
            for entry in there:
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - entry.stat(follow_symlinks=False).st_mtime > STALE:
                        os.unlink(entry.path)
                        count += 1
        return count


def _drop(pending: Pending) -> None:
    os.close(pending.fd)
    with contextlib.suppress(OSError):  # it has its name; or a sweep finds it
        os.unlink(pending.temporary)

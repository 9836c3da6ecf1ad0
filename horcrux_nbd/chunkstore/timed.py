"""A store whose operations end in time: for a folder that is mounted from elsewhere.

A system call on the mount of a dead NFS server, or of a FUSE process that hangs, sleeps for as long
as it likes, where no time-out of ours and no signal reaches it. So each operation has a thread of
its own, which is left behind when it takes too long; whoever waits goes on. A thread costs 60 µs,
a mount like that a round trip: folders on disks of this host go without.
"""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import StoreUnavailable
from .base import ChunkStore, Stat
from .wrapper import T, WrapperStore

# Threads that may be left behind at once; beyond, nobody is sent after them.
MOST_LEFT = 64
# Putting and syncing may have 256 MiB to bring there (pending.py): so many times the time-out.
LONGER = 8
PAGE = 1000  # entries of a listing that are waited for together

# Kinds of file systems that somebody else answers for: other hosts, or a process.
_FAR = re.compile(r"nfs4?|cifs|smb3?|smbfs|9p|ceph|glusterfs|lustre|afs|beegfs|gpfs|fuse(\..*)?")


def is_far(path: str, mountinfo: Path = Path("/proc/self/mountinfo")) -> bool:
    """Whether `path` is on a mount from elsewhere, told without touching it."""
    best, kind = "", ""
    for line in mountinfo.read_text(errors="surrogateescape").splitlines():
        before, _, after = line.partition(" - ")
        place = before.split(" ")[4].encode("utf-8", "surrogateescape").decode("unicode_escape")
        # The later of two on one place lies over the earlier.
        if len(place) >= len(best) and (place == "/" or f"{path}/".startswith(f"{place}/")):
            best, kind = place, after.split(" ", 1)[0]
    return bool(_FAR.fullmatch(kind))


class TimedStore(WrapperStore):
    """`store`, with StoreUnavailable for what takes longer than `timeout` seconds.

    What was given up may still happen, as with an answer of a server that got lost.
    """

    def __init__(self, store: ChunkStore, timeout: float) -> None:
        super().__init__(store)
        self._timeout = timeout
        self._left = 0
        self._lock = threading.Lock()

    @property
    def timeout(self) -> float:  # type: ignore[override]
        return self._timeout

    def _do(self, what: str, operation: Callable[[], T]) -> T:
        longer = LONGER if what.startswith(("put ", "sync", "close")) else 1
        return self._in_time(what, operation, self._timeout * longer)

    def _in_time(self, what: str, operation: Callable[[], T], limit: float) -> T:
        if self._left >= MOST_LEFT:
            raise StoreUnavailable(
                f"{self.url}: {self._left} operations hang there: is what it is mounted from away?"
            )
        done = threading.Event()
        results: list[T] = []
        errors: list[BaseException] = []
        given_up = False

        def work() -> None:
            try:
                results.append(operation())
            except BaseException as error:
                errors.append(error)
            with self._lock:
                done.set()
                self._left -= given_up

        threading.Thread(target=work, name="timed", daemon=True).start()
        if not done.wait(limit):
            with self._lock:
                given_up = not done.is_set()
                self._left += given_up
            if given_up:
                raise StoreUnavailable(
                    f"{self.url}: {what}: no answer in {limit:.3g} s: is what it is mounted from "
                    "away?"
                )
        if errors:
            raise errors[0]
        return results[0]

    def list(self, prefix: str = "", after: str = "", limit: int | None = None) -> Iterator[Stat]:
        entries = self.store.list(prefix, after, limit)
        while True:
            page = self._do(f"list {prefix}", lambda: list(itertools.islice(entries, PAGE)))
            yield from page
            if len(page) < PAGE:
                return

    def close(self) -> None:
        self._do("close", self.store.close)

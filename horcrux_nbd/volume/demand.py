"""What readers of a volume ask for: what the background learns from, and gives way to.

One instance for each volume, for all versions that it comes to lie on.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from types import TracebackType

from ..repository.index import FANOUT_BITS

# Chunks whose order is kept: 8 GiB in chunks of 512 KiB, and 2 MB of memory. A profile is of a
# start, not of a day.
MOST_TOUCHED = 16_384
LATELY = 256  # misses that tell where readers are


class Demand:
    """Reads that wait for the store, and the chunks that were read. Any threads may call it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._nobody = threading.Condition(self._lock)
        self._waiting = 0
        self._touched: dict[int, None] = {}
        self._lately: deque[int] = deque(maxlen=LATELY)
        self.missed = 0  # chunks that a reader had to wait for, of those that nobody was fetching

    # ---- what was read

    def touch(self, chunk: int) -> None:
        """A reader wants chunk number `chunk`, which is no hole. Two threads that race in it at
        worst swap places.
        """
        touched = self._touched
        if chunk not in touched and len(touched) < MOST_TOUCHED:
            touched[chunk] = None

    def touched(self) -> list[int]:
        """The chunks that were read since the volume was opened, in the order of their first read;
        no more than MOST_TOUCHED.
        """
        return list(self._touched)

    # ---- who waits

    def miss(self, chunk: int) -> Demand:
        """`with demand.miss(chunk):` a reader fetches a chunk that nobody was fetching."""
        self._lately.append(chunk >> FANOUT_BITS)
        return self

    def __enter__(self) -> None:
        with self._lock:
            self._waiting += 1
            self.missed += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._lock:
            self._waiting -= 1
            if not self._waiting:
                self._nobody.notify_all()

    @property
    def waiting(self) -> int:
        """Readers that wait for the store now."""
        return self._waiting

    def hottest(self, done: set[int], first: int = 0) -> int | None:
        """The leaf of the index (256 chunks) from `first` on and outside of `done` in which readers
        missed most lately; None where they missed nothing. A database misses in an index more
        densely than in a heap.
        """
        lately = tuple(self._lately)
        counts = Counter(leaf for leaf in lately if leaf >= first and leaf not in done)
        return counts.most_common(1)[0][0] if counts else None

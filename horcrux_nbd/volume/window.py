"""How much the background may have under way: what keeps the line busy and makes no queue on it.

As TCP Vegas does it (Brakmo and Peterson, 1995): while fetches take as long as the fastest one did,
there is room for one more; once they take much longer they wait for each other, somewhere, and
whoever reads waits behind them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

FIRST = 4.0  # fetches at once, until something is known
LONGER = 2.5  # times the fastest: there is a queue, and no mere noise
SHRINK = 0.8
MEMORY = 20.0  # seconds until the fastest one is forgotten: another network, another load


class Window:
    """A number of places between 1 and `most`, which follows how long fetches take."""

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._clock = most, clock
        self._size = min(FIRST, float(most))
        self._changed = threading.Condition()
        self._under_way = 0
        self._growing = True  # doubles each round until the first queue
        self._fastest = float("inf")
        self._fastest_at = 0.0
        self._shrunk_at = -1.0
        self._stopped = False

    @property
    def size(self) -> int:
        """How many may be under way now."""
        return max(1, int(self._size))

    def enter(self, waiting: Callable[[], int], alone: float = 1.0) -> float | None:
        """Wait for a place; when it was got (for `leave`). None once stopped.

        While readers wait (`waiting` tells how many), only the part `alone` of the places is given
        out: 0 lets nobody in then.
        """
        with self._changed:
            while not self._stopped:
                room = self._size if not waiting() else self._size * alone
                if self._under_way < int(room) or (not self._under_way and not waiting()):
                    self._under_way += 1
                    return self._clock()
                self._changed.wait(0.02)
            return None

    def leave(self, began: float, counts: bool = True) -> None:
        """The fetch that began then has ended; `counts` if it did go to the store."""
        with self._changed:
            self._under_way -= 1
            if counts:
                self._learn(self._clock() - began)
            self._changed.notify()

    def _learn(self, took: float) -> None:
        now = self._clock()
        if took < self._fastest or now - self._fastest_at > MEMORY:
            self._fastest, self._fastest_at = took, now
        if took <= self._fastest * LONGER:
            self._size = min(self._most, self._size + (1.0 if self._growing else 1 / self._size))
        elif now - self._shrunk_at > took:  # those under way say the same
            self._size = max(1.0, self._size * SHRINK)
            self._growing, self._shrunk_at = False, now

    def stop(self) -> None:
        """Nobody gets a place any more."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

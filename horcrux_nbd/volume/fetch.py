"""Fetching: one request for each object however many wait for it, many objects at once.

A reader that misses fetches in its own thread, so it never queues behind read-ahead; background
fetches have a few threads of their own, fewer than the store takes at once, so that a slot is free
for a reader.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable

from ..errors import HorcruxError

log = logging.getLogger(__name__)

# Wishes of read-ahead and prefetch kept; beyond, the oldest is forgotten: its reader has passed.
MAX_WISHES = 1024


class _Flight:
    def __init__(self) -> None:
        self.done = threading.Event()
        self.result: bytes | None = None
        self.error: BaseException | None = None


class SingleFlight:
    """Runs `fetch(id)` once for all who want the same id at the same time.

    **Invariant:** `fetch` makes its result present (in the cache) before the flight ends, so
    whoever comes later finds it there or starts a flight of its own.
    """

    def __init__(self, fetch: Callable[[bytes], bytes], limit: float) -> None:
        """`limit` seconds is how long a waiter waits; `fetch` should end before."""
        self._fetch, self._limit = fetch, limit
        self._flights: dict[bytes, _Flight] = {}
        self._lock = threading.Lock()

    def get(self, oid: bytes) -> bytes:
        """The content of `oid`; raises what `fetch` raised."""
        with self._lock:
            flight = self._flights.get(oid)
            leader = flight is None
            if flight is None:
                flight = self._flights[oid] = _Flight()
        if not leader:
            if not flight.done.wait(self._limit):
                raise HorcruxError(f"object {oid.hex()} did not come within {self._limit:.0f} s")
            if flight.error is not None:
                raise flight.error
            assert flight.result is not None
            return flight.result
        try:
            flight.result = self._fetch(oid)
            return flight.result
        except BaseException as error:
            flight.error = error
            raise
        finally:
            with self._lock:
                del self._flights[oid]
            flight.done.set()

    def under_way(self, oid: bytes) -> bool:
        return oid in self._flights


class Background:
    """A few threads that work off wishes, the newest first: what was wanted last is wanted next."""

    def __init__(self, work: Callable[[int], None], threads: int) -> None:
        self._work = work
        self._wishes: deque[int] = deque()
        self._wished: set[int] = set()
        self._condition = threading.Condition()
        self._busy = 0
        self._stopped = False
        self._threads = [
            threading.Thread(target=self._run, name=f"prefetch-{n}", daemon=True)
            for n in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def wish(self, numbers: Iterable[int]) -> None:
        """Work on these soon; the first of them first."""
        with self._condition:
            for number in reversed(list(numbers)):
                if number not in self._wished:
                    self._wished.add(number)
                    self._wishes.append(number)
            while len(self._wishes) > MAX_WISHES:
                self._wished.discard(self._wishes.popleft())
            self._condition.notify_all()

    def _run(self) -> None:
        while True:
            with self._condition:
                while not self._wishes and not self._stopped:
                    self._condition.wait()
                if self._stopped:
                    return
                number = self._wishes.pop()
                self._busy += 1
            try:
                self._work(number)
            except Exception as error:  # a wish: whoever needs it will fetch it and see
                log.info("prefetch of chunk %d failed: %s", number, error)
            finally:
                with self._condition:
                    self._busy -= 1
                    self._wished.discard(number)
                    self._condition.notify_all()

    def wait_idle(self, limit: float) -> bool:
        """Wait until there is nothing to do, at most `limit` seconds; whether it is so."""
        with self._condition:
            return self._condition.wait_for(lambda: not self._wishes and not self._busy, limit)

    def stop(self, wait: bool = True) -> None:
        """No more work; with `wait`, what is under way is done when this returns."""
        with self._condition:
            self._stopped = True
            self._wishes.clear()
            self._condition.notify_all()
        for thread in self._threads if wait else ():
            thread.join(timeout=5)

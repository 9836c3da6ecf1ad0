"""Fetching: one request for each object however many wait for it, many objects at once.

A reader that misses fetches in its own thread, so it never queues behind read-ahead; background
fetches have a few threads of their own, fewer than the store takes at once, so that a slot is free
for a reader. They begin when there is something to do: what is opened before nbdkit forks has none.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable

from ..errors import StoreUnavailable

log = logging.getLogger(__name__)

# Wishes of read-ahead and prefetch kept; beyond, the oldest is forgotten: its reader has passed.
MAX_WISHES = 1024
# Whoever joins a flight may have waited but a moment when it fails because the store is away. Who
# waited less than this part of the limit tries once more itself.
PATIENCE = 0.2
STOP_LIMIT = 5.0  # seconds that `Background.stop` waits for fetches that are under way


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
        """The content of `oid`; raises what `fetch` raised, in at most 1.2 times the limit."""
        began, patient = time.monotonic(), True
        while True:
            flight, leader = self._join(oid)
            if leader:
                try:
                    return self._lead(oid, flight)
                finally:
                    del flight  # its error's traceback leads back to this frame
            if not flight.done.wait(self._limit):
                raise StoreUnavailable(
                    f"object {oid.hex()} did not come within {self._limit:.0f} s: try again later"
                )
            if flight.error is None:
                assert flight.result is not None
                return flight.result
            late = time.monotonic() - began < self._limit * PATIENCE
            if patient and late and isinstance(flight.error, StoreUnavailable):
                patient = False
                continue
            try:
                raise flight.error
            finally:
                del flight

    def under_way(self, oid: bytes) -> bool:
        """Whether somebody fetches `oid` now."""
        return oid in self._flights

    def _join(self, oid: bytes) -> tuple[_Flight, bool]:
        with self._lock:
            flight = self._flights.get(oid)
            if flight is not None:
                return flight, False
            flight = self._flights[oid] = _Flight()
            return flight, True

    def _lead(self, oid: bytes, flight: _Flight) -> bytes:
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
            del flight


class Background:
    """A few threads that work off wishes, the newest first: what was wanted last is wanted next."""

    def __init__(self, work: Callable[[int], None], threads: int) -> None:
        self._work = work
        self._wishes: deque[int] = deque()
        self._wished: set[int] = set()
        self._lock = threading.Lock()
        self._wanted, self._idle = (threading.Condition(self._lock) for _ in range(2))
        self._busy = 0
        self._stopped = False
        self._most, self._threads = threads, list[threading.Thread]()

    def wish(self, numbers: Iterable[int]) -> None:
        """Work on these soon; the first of them first. Does nothing once stopped."""
        fresh = [number for number in numbers if number not in self._wished]
        if not fresh:
            return
        with self._lock:
            for number in reversed(fresh):
                if number not in self._wished:
                    self._wished.add(number)
                    self._wishes.append(number)
            while len(self._wishes) > MAX_WISHES:
                self._wished.discard(self._wishes.popleft())
            if self._stopped:
                self._wishes.clear()
                return
            # One thread for each wish that none is free for.
            idle = len(self._threads) - self._busy
            for _ in range(min(len(self._wishes) - idle, self._most - len(self._threads))):
                name = f"prefetch-{len(self._threads)}"
                thread = threading.Thread(target=self._run, name=name, daemon=True)
                self._threads.append(thread)
                thread.start()
            self._wanted.notify(len(self._wishes))

    def _run(self) -> None:
        while True:
            with self._wanted:
                while not self._wishes and not self._stopped:
                    self._wanted.wait()
                if self._stopped:
                    return
                number = self._wishes.pop()
                self._busy += 1
            try:
                self._work(number)
            except Exception as error:  # a wish: whoever needs it will fetch it and see
                log.info("prefetch of chunk %d failed: %s", number, error)
            finally:
                with self._idle:
                    self._busy -= 1
                    self._wished.discard(number)
                    if not self._wishes and not self._busy:
                        self._idle.notify_all()

    def wait_idle(self, limit: float) -> bool:
        """Wait until there is nothing to do, at most `limit` seconds; whether it is so."""
        with self._idle:
            return self._idle.wait_for(lambda: not self._wishes and not self._busy, limit)

    def stop(self, wait: bool = True) -> None:
        """No more work; with `wait`, what is under way is done when this returns."""
        with self._wanted:
            self._stopped = True
            self._wishes.clear()
            self._wanted.notify_all()
        deadline = time.monotonic() + STOP_LIMIT
        for thread in self._threads if wait else ():
            thread.join(max(0.0, deadline - time.monotonic()))

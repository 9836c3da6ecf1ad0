"""Stores that misbehave, each in one way, around a sound one. For tests of what is above."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from horcrux_nbd.chunkstore.base import ChunkStore, Stat
from horcrux_nbd.chunkstore.wrapper import WrapperStore
from horcrux_nbd.errors import StoreError, StoreUnavailable

T = TypeVar("T")


class FlipsLastByte(WrapperStore):
    """Every object that is read has its last bit turned over."""

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        data = super().get(key, offset, length)
        return data[:-1] + bytes([data[-1] ^ 1]) if data else data


class Truncates(WrapperStore):
    """Every object that is read ends `by` bytes early, without an error."""

    def __init__(self, store: ChunkStore, by: int = 1) -> None:
        super().__init__(store)
        self._by = by

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        data = super().get(key, offset, length)
        return data[: max(len(data) - self._by, 0)]


class IsSlow(WrapperStore):
    """Every operation takes `seconds` more."""

    def __init__(self, store: ChunkStore, seconds: float) -> None:
        super().__init__(store)
        self._seconds = seconds

    def _do(self, what: str, operation: Callable[[], T]) -> T:
        time.sleep(self._seconds)
        return operation()


class Counts(WrapperStore):
    """Keeps `calls` ("get KEY", …) and the most operations that were under way at once, `most`."""

    def __init__(self, store: ChunkStore) -> None:
        super().__init__(store)
        self.calls: list[str] = []
        self.most = 0
        self._now = 0
        self._lock = threading.Lock()

    def _do(self, what: str, operation: Callable[[], T]) -> T:
        with self._lock:
            self.calls.append(what)
            self._now += 1
            self.most = max(self.most, self._now)
        try:
            return operation()
        finally:
            with self._lock:
                self._now -= 1


class Fails(WrapperStore):
    """The `nth` operation from now (1: the next), and those after it, `times` in all, fail.

    `times=None`: from then on. `matching`: counts operations only whose "verb KEY" begins so.
    For a sweep of faults: run with nth = 1, 2, … until `failures` stays 0.
    """

    def __init__(
        self,
        store: ChunkStore,
        nth: int = 1,
        times: int | None = 1,
        *,
        error: Callable[[str], StoreError] = lambda what: StoreUnavailable(f"test: {what} fails"),
        matching: str = "",
    ) -> None:
        super().__init__(store)
        self._error, self._matching = error, matching
        self._lock = threading.Lock()
        self.failures = 0
        self.fail(nth, times)

    def fail(self, nth: int = 1, times: int | None = 1) -> None:
        """Begin to count anew."""
        with self._lock:
            self._before = nth - 1
            self._left = float("inf") if times is None else times

    def heal(self) -> None:
        self.fail(1, 0)

    def _turn(self, what: str) -> bool:
        """Whether this operation is one that fails."""
        with self._lock:
            if not what.startswith(self._matching) or self._left <= 0:
                return False
            if self._before > 0:
                self._before -= 1
                return False
            self._left -= 1
            self.failures += 1
            return True

    def _do(self, what: str, operation: Callable[[], T]) -> T:
        if self._turn(what):
            raise self._error(what)
        return operation()

    def list(self, prefix: str = "", after: str = "", limit: int | None = None) -> Iterator[Stat]:
        """Each object that is listed counts as an operation."""
        for stat in super().list(prefix, after, limit):
            if self._turn(f"list {prefix}"):
                raise self._error(f"list {prefix}")
            yield stat


class LosesAnswers(Fails):
    """As Fails, but the operation is done before it fails: as when a connection breaks late."""

    def _do(self, what: str, operation: Callable[[], T]) -> T:
        fails = self._turn(what)
        result = operation()
        if fails:
            raise self._error(what)
        return result

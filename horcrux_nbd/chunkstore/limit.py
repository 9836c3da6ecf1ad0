"""A store with a bound on operations at once and on bandwidth, and with right of way for readers.

Whoever waits for a read (a block device's client) shares the store with read-ahead, prefetch and
uploads. These use `background()`, whose operations leave some places free and start only when
nobody else waits.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from ..errors import StoreError
from .base import ChunkStore
from .wrapper import T, WrapperStore

RESERVED = 4  # one place in so many is never given to the background


class _Places:
    """How many operations are under way, and who may begin one."""

    def __init__(self, total: int) -> None:
        self._total = total
        # With a single place there is nothing to keep free.
        self._for_background = total - min(max(1, total // RESERVED), total - 1)
        self._busy = 0
        self._waiting = 0  # of the foreground
        self._changed = threading.Condition()
        self._closed = False

    @contextlib.contextmanager
    def one(self, url: str, *, background: bool) -> Iterator[None]:
        with self._changed:
            if background:
                self._changed.wait_for(
                    lambda: (
                        self._closed or (self._busy < self._for_background and not self._waiting)
                    )
                )
            else:
                self._waiting += 1
                try:
                    self._changed.wait_for(lambda: self._closed or self._busy < self._total)
                finally:
                    self._waiting -= 1
            if self._closed:
                self._changed.notify_all()
                raise StoreError(f"{url}: the store is closed")
            self._busy += 1
        try:
            yield
        finally:
            with self._changed:
                self._busy -= 1
                self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class Bandwidth:
    """Bytes per second on average. Who takes goes into debt; who comes next waits until it is paid.

    So one object passes at full speed, however large, and the pause comes after it.
    """

    def __init__(self, rate: float) -> None:
        self._rate = rate  # 0: no limit
        self._paid = time.monotonic()  # when all that was taken is paid
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def wait(self) -> None:
        """Return when there is no debt."""
        while self._rate:
            with self._lock:
                pause = self._paid - time.monotonic()
            if pause <= 0 or self._closed.wait(pause):
                return

    def take(self, count: int) -> None:
        """`count` bytes pass now."""
        if self._rate:
            with self._lock:
                self._paid = max(self._paid, time.monotonic()) + count / self._rate

    def close(self) -> None:
        self._closed.set()


class LimitedStore(WrapperStore):
    """`store` with at most `operations` at once, and `download` and `upload` bytes per second.

    `operations`: the store's own `concurrency` by default. 0 bytes per second: no limit. Listings
    are not counted, as whoever reads one sets its pace.
    """

    def __init__(
        self,
        store: ChunkStore,
        operations: int | None = None,
        *,
        download: float = 0.0,
        upload: float = 0.0,
    ) -> None:
        super().__init__(store)
        if operations is not None and operations < 1:
            raise ValueError(f"{operations} operations at once")
        self._operations = operations or store.concurrency
        self._places = _Places(self._operations)
        self._down, self._up = Bandwidth(download), Bandwidth(upload)
        self._is_background = False

    @property
    def concurrency(self) -> int:  # type: ignore[override]
        return self._operations

    def background(self) -> LimitedStore:
        """The same store and the same limits, for work that nobody waits for.

        Closing it closes nothing.
        """
        view = LimitedStore(self.store, self._operations)
        view._places, view._down, view._up = self._places, self._down, self._up
        view._is_background = True
        return view

    def _do(self, what: str, operation: Callable[[], T]) -> T:
        with self._places.one(self.url, background=self._is_background):
            return operation()

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        self._down.wait()
        data = super().get(key, offset, length)
        self._down.take(len(data))
        return data

    def put(self, key: str, data: bytes) -> None:
        self._up.wait()
        self._up.take(len(data))
        super().put(key, data)

    def put_exclusive(self, key: str, data: bytes) -> None:
        self._up.wait()
        self._up.take(len(data))
        super().put_exclusive(key, data)

    def close(self) -> None:
        if self._is_background:
            return
        self._places.close()
        self._down.close()
        self._up.close()
        super().close()

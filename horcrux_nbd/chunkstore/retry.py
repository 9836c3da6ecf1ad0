"""A store that waits for a store. The one place in Horcrux that retries.

Only StoreUnavailable is tried again; every other error is final. The budget is time, not attempts:
a block device that waits has a time-out of its own above us (the kernel's NBD client: 90 s), and
ours must end first, so that a reader gets EIO and not a device that is gone.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator

from ..errors import KeyExists, StoreUnavailable
from .base import ChunkStore, Stat
from .wrapper import T, WrapperStore

LIMIT = 60.0  # seconds
FIRST_PAUSE = 0.1  # seconds; a connection that died while idle is replaced at once
LONGEST_PAUSE = 4.0  # seconds; how long after its return a store may go unnoticed

_log = logging.getLogger("horcrux_nbd.chunkstore")


class RetryStore(WrapperStore):
    """`store`, with what is unavailable tried again for up to `limit` seconds.

    `limit` includes what the last attempt may take (`store.timeout`), so no operation lasts longer,
    but for one attempt that is always made and for bytes that do arrive. `stop`, when set, ends
    all waiting; `close` sets it.
    """

    def __init__(
        self,
        store: ChunkStore,
        limit: float = LIMIT,
        *,
        stop: threading.Event | None = None,
        first_pause: float = FIRST_PAUSE,
        longest_pause: float = LONGEST_PAUSE,
    ) -> None:
        super().__init__(store)
        self.stop = stop or threading.Event()
        self.limit = limit
        self._first, self._longest = first_pause, longest_pause

    @property
    def timeout(self) -> float:  # type: ignore[override]
        return self.limit

    def _do(self, what: str, operation: Callable[[], T]) -> T:
        attempts = _Attempts(self, what)
        while True:
            try:
                result = operation()
            except StoreUnavailable as error:
                attempts.failed(error)
            else:
                attempts.succeeded()
                return result

    def put_exclusive(self, key: str, data: bytes) -> None:
        """As the contract says, and: if an answer got lost, reads back whether we had won.

        So `data` must hold something that no other writer puts (a token), or two would both win.
        """
        uncertain = False

        def attempt() -> None:
            nonlocal uncertain
            try:
                self.store.put_exclusive(key, data)
            except StoreUnavailable:
                uncertain = True
                raise
            except KeyExists:
                # Only what an attempt of ours can have left counts as ours.
                if not uncertain or self.store.get(key) != data:
                    raise

        self._do(f"put {key}", attempt)

    def list(self, prefix: str = "", after: str = "", limit: int | None = None) -> Iterator[Stat]:
        attempts = _Attempts(self, f"list {prefix}")
        while True:
            try:
                for stat in self.store.list(prefix, after, limit):
                    attempts.succeeded()
                    yield stat
                    # Where a failed listing goes on; and what it found is done with.
                    after = stat.key
                    limit = None if limit is None else limit - 1
                    attempts = _Attempts(self, f"list {prefix}")
                return
            except StoreUnavailable as error:
                attempts.failed(error)

    def close(self) -> None:
        self.stop.set()
        self.store.close()


class _Attempts:
    """The failures of one operation so far: how long to wait, how loud to be, when to give up."""

    def __init__(self, store: RetryStore, what: str) -> None:
        self._store, self._what = store, what
        self._began = time.monotonic()
        self._count = 0

    def failed(self, error: StoreUnavailable) -> None:
        """Wait before the next attempt, or raise that there is none."""
        store = self._store
        self._count += 1
        spent = time.monotonic() - self._began
        # The exponent is bounded: 2**1100 is no float. Jitter keeps hosts from coming back as one.
        pause = min(store._first * 2.0 ** min(self._count - 1, 30), store._longest)
        pause *= random.uniform(0.5, 1.0)
        if spent + pause + store.store.timeout > store.limit:
            raise StoreUnavailable(
                f"{error} (gave up after {self._count} "
                f"attempt{'s' if self._count > 1 else ''} in {spent:.0f} s)"
            ) from error
        _log.log(
            self._level(), "%s (%s, attempt %d): again in %.1f s", error, self._what, self._count,
            pause,
        )  # fmt: skip
        if store.stop.wait(pause):
            raise StoreUnavailable(f"{error} (not tried again: shutting down)") from error

    def _level(self) -> int:
        if self._count == 1:
            return logging.DEBUG  # an idle connection that died is nothing to tell
        return logging.INFO if self._count <= 3 else logging.WARNING

    def succeeded(self) -> None:
        if self._count:
            _log.log(
                self._level(),
                "%s: %s works again after %d attempts and %.1f s",
                self._store.url,
                self._what,
                self._count + 1,
                time.monotonic() - self._began,
            )

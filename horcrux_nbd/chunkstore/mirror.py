"""Several stores that hold the same objects. The first is the one that is written to."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from ..errors import KeyNotFound, StoreError, StoreUnavailable
from .base import ChunkStore, Stat
from .wrapper import T, WrapperStore

ASK_AGAIN = 30.0  # seconds that a store which was away is asked last

_log = logging.getLogger("horcrux_nbd.chunkstore")


class MirrorStore(WrapperStore):
    """Reads come from the first of `stores` that can answer; everything else goes to the first.

    A store that was away is asked last for a while, so that each read does not wait for it anew.
    A listing may be a mirror's: whoever wants to know what the first holds asks it (`.store`).
    """

    def __init__(self, stores: Sequence[ChunkStore], *, ask_again: float = ASK_AGAIN) -> None:
        if not stores:
            raise ValueError("no stores")
        super().__init__(stores[0])
        self.stores = tuple(stores)
        self._ask_again = ask_again
        self._away: dict[int, float] = {}  # index: when it may be asked in turn again
        self._lock = threading.Lock()

    @property
    def timeout(self) -> float:  # type: ignore[override]
        return sum(store.timeout for store in self.stores)

    def _order(self) -> list[ChunkStore]:
        now = time.monotonic()
        with self._lock:
            away = {index for index, until in self._away.items() if until > now}
        return [self.stores[i] for i in sorted(range(len(self.stores)), key=lambda i: i in away)]

    def _failed(self, store: ChunkStore, error: StoreError, what: str) -> None:
        if isinstance(error, StoreUnavailable):
            with self._lock:
                self._away[self.stores.index(store)] = time.monotonic() + self._ask_again
        if not isinstance(error, KeyNotFound):
            _log.warning("%s (%s): asking the next mirror", error, what)

    def _first_answer(self, what: str, ask: Callable[[ChunkStore], T]) -> T:
        errors: list[StoreError] = []
        for store in self._order():
            try:
                return ask(store)
            except StoreError as error:
                self._failed(store, error, what)
                errors.append(error)
        # "Not found" is true only if every store said so.
        raise next((e for e in errors if not isinstance(e, KeyNotFound)), errors[0])

    def check(self) -> None:
        self._first_answer("check", lambda store: store.check())

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        return self._first_answer(f"get {key}", lambda store: store.get(key, offset, length))

    def copies(self, key: str, length: int | None = None) -> Iterator[tuple[ChunkStore, bytes]]:
        """Each store that has `key`, and what it has: to find a sound copy of a damaged object."""
        for store in self._order():
            try:
                data = store.get(key, 0, length)
            except StoreError as error:
                self._failed(store, error, f"get {key}")
                continue
            yield store, data

    def stat(self, key: str) -> Stat:
        return self._first_answer(f"stat {key}", lambda store: store.stat(key))

    def exists(self, key: str) -> bool:
        try:
            self.stat(key)
        except KeyNotFound:
            return False
        return True

    def children(self, prefix: str) -> list[str]:
        return self._first_answer(f"list {prefix}", lambda store: store.children(prefix))

    def list(self, prefix: str = "", after: str = "", limit: int | None = None) -> Iterator[Stat]:
        failure: StoreError | None = None
        for store in self._order():
            try:
                for stat in store.list(prefix, after, limit):
                    yield stat
                    after = stat.key  # where another one goes on
                    limit = None if limit is None else limit - 1
                return
            except StoreError as error:
                self._failed(store, error, f"list {prefix}")
                failure = failure or error
        assert failure
        raise failure

    def close(self) -> None:
        for store in self.stores:
            store.close()

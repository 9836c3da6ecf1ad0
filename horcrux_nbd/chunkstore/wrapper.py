"""A store around a store. What retries, limits or misbehaves (in tests) is one; they stack."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

from .base import ChunkStore, Stat

T = TypeVar("T")


class WrapperStore(ChunkStore):
    """Passes everything on to `store`. A subclass overrides `_do`, through which every operation
    goes but `list` and `close`, or single operations."""

    def __init__(self, store: ChunkStore) -> None:
        self.store = store

    @property
    def url(self) -> str:  # type: ignore[override]
        return self.store.url

    @property
    def concurrency(self) -> int:  # type: ignore[override]
        return self.store.concurrency

    @property
    def timeout(self) -> float:  # type: ignore[override]
        return self.store.timeout

    def _do(self, what: str, operation: Callable[[], T]) -> T:
        """Run one operation of the store within; `what` is it and its key, for messages."""
        return operation()

    def prepare(self) -> None:
        self._do("prepare", self.store.prepare)

    def check(self) -> None:
        self._do("check", self.store.check)

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        return self._do(f"get {key}", lambda: self.store.get(key, offset, length))

    def copies(self, key: str, length: int) -> Iterator[tuple[ChunkStore, bytes]]:
        return self.store.copies(key, length)

    def put(self, key: str, data: bytes) -> None:
        self._do(f"put {key}", lambda: self.store.put(key, data))

    def put_exclusive(self, key: str, data: bytes) -> None:
        self._do(f"put {key}", lambda: self.store.put_exclusive(key, data))

    def sync(self) -> None:
        self._do("sync", self.store.sync)

    def stat(self, key: str) -> Stat:
        return self._do(f"stat {key}", lambda: self.store.stat(key))

    def exists(self, key: str) -> bool:
        return self._do(f"stat {key}", lambda: self.store.exists(key))

    def children(self, prefix: str) -> list[str]:
        return self._do(f"list {prefix}", lambda: self.store.children(prefix))

    def delete(self, key: str) -> None:
        self._do(f"delete {key}", lambda: self.store.delete(key))

    def list(self, prefix: str = "", after: str = "", limit: int | None = None) -> Iterator[Stat]:
        return self.store.list(prefix, after, limit)

    def sweep(self) -> int:
        return self._do("sweep", self.store.sweep)

    def close(self) -> None:
        self.store.close()

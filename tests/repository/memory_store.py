"""A chunk store in a dict, for tests that make it misbehave or want to know what was asked."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from horcrux_nbd.chunkstore import base
from horcrux_nbd.chunkstore.base import ChunkStore, Stat
from horcrux_nbd.errors import KeyExists, KeyNotFound


class MemoryStore(ChunkStore):
    """Keeps the contract, and a record of the calls that change something, in order.

    `objects` is what is durable and visible; what was put since the last sync is in `pending`, so
    a test can look at what a power cut would leave.
    """

    def __init__(self) -> None:
        self.url = "memory://store"
        self.concurrency = 8
        self.objects: dict[str, bytes] = {}
        self.pending: dict[str, bytes] = {}
        self.calls: list[tuple[str, str]] = []  # ("put", key), ("exclusive", key), ("sync", "")
        self.reads: list[tuple[str, str]] = []  # ("get", key), ("list", prefix), ("stat", key)
        self.lock = threading.Lock()

    def prepare(self) -> None:
        pass

    def _look(self, what: str, key: str) -> bytes:
        base.check_key(key)
        with self.lock:
            self.reads.append((what, key))
            data = self.pending.get(key, self.objects.get(key))
        if data is None:
            raise KeyNotFound(self.url, key)
        return data

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        base.check_range(offset, length)
        data = self._look("get", key)
        return data[offset:] if length is None else data[offset : offset + length]

    def put(self, key: str, data: bytes) -> None:
        base.check_key(key)
        with self.lock:
            self.calls.append(("put", key))
            self.pending[key] = bytes(data)

    def sync(self) -> None:
        with self.lock:
            self.calls.append(("sync", ""))
            self.objects.update(self.pending)
            self.pending.clear()

    def put_exclusive(self, key: str, data: bytes) -> None:
        base.check_key(key)
        with self.lock:
            self.calls.append(("exclusive", key))
            if key in self.objects or key in self.pending:
                raise KeyExists(self.url, key)
            self.objects[key] = bytes(data)

    def stat(self, key: str) -> Stat:
        return Stat(key, len(self._look("stat", key)), 0.0)

    def children(self, prefix: str) -> list[str]:
        base.check_folder(prefix)
        keys = {**self.objects, **self.pending}
        return sorted({k[len(prefix) :].split("/")[0] for k in keys if k.startswith(prefix)})

    def delete(self, key: str) -> None:
        with self.lock:
            self.calls.append(("delete", key))
            self.objects.pop(key, None)
            self.pending.pop(key, None)

    def list(self, prefix: str = "", after: str = "", limit: int | None = None) -> Iterator[Stat]:
        with self.lock:
            self.reads.append(("list", prefix))
            keys = {**self.objects, **self.pending}
        found = sorted(k for k in keys if k.startswith(prefix) and k > after)
        for key in found if limit is None else found[: max(limit, 0)]:
            yield Stat(key, len(keys[key]), 0.0)

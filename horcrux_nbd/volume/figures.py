"""What a served volume did so far, for `status` and for metrics. Cheap enough to be always on."""

from __future__ import annotations

import bisect
import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

# Upper bounds, in seconds: from a chunk off a local disk to a store that is away (60 s).
BOUNDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


class Histogram:
    """How long something took: how often within each of BOUNDS, and in all."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS) + 1)
        self._sum = 0.0
        self._lock = threading.Lock()

    def add(self, seconds: float) -> None:
        with self._lock:
            self._counts[bisect.bisect_left(BOUNDS, seconds)] += 1
            self._sum += seconds

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Count the block that it is around, also when that fails."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.add(time.monotonic() - began)

    def to_json(self) -> dict[str, Any]:
        """`bounds` in seconds, `counts` within each (not cumulated; one more for the rest), `sum`
        in seconds.
        """
        with self._lock:
            return {"bounds": BOUNDS, "counts": list(self._counts), "sum": round(self._sum, 6)}


class Figures:
    """Counts since the start. Bytes are of plaintext."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.fetched_chunks = 0
        self.fetched_bytes = 0
        self.received_bytes = 0  # the same as it was stored: what came over the line
        self.fetch_errors = 0
        # Pieces of reads that the cache had. Counted without the lock, which reads would wait for:
        # CPython switches threads at calls and loops only, so none is lost in `+= 1`.
        self.cache_hits = 0
        self.fetches, self.flushes = Histogram(), Histogram()

    def fetched(self, size: int, stored: int) -> None:
        with self._lock:
            self.fetched_chunks += 1
            self.fetched_bytes += size
            self.received_bytes += stored

    def failed(self) -> None:
        with self._lock:
            self.fetch_errors += 1

    def to_json(self) -> dict[str, Any]:
        return {
            "fetched_bytes": self.fetched_bytes,
            "received_bytes": self.received_bytes,
            "fetched_chunks": self.fetched_chunks,
            "fetch_errors": self.fetch_errors,
            "cache_hits": self.cache_hits,
            "fetch_seconds": self.fetches.to_json(),
            "flush_seconds": self.flushes.to_json(),
        }

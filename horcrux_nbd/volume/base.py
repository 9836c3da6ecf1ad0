"""The base of a volume: one version of an image, read lazily through cache and store."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

from ..errors import Damaged
from ..native import handles, library
from ..repository.commits import Commit
from ..repository.index import Index
from ..repository.objects import NULL_ID, Kind, kind_of
from ..repository.repository import Repository
from .cache import Cache
from .demand import Demand
from .fetch import Background, SingleFlight
from .figures import Figures
from .local import LocalObjects
from .overlay import fill_zeros
from .readahead import ReadAhead

log = logging.getLogger(__name__)

# A waiter gives up after this many times the store's own limit, which ends the fetch before that:
# 75 s, below the 90 s after which the kernel's NBD client gives up on a request.
WAIT_FACTOR = 1.25
DEFAULT_LIMIT = 60.0  # seconds, for a store that has none
# A damaged object is fetched this often in all before a read fails: the store may have healed.
ATTEMPTS = 2


class Base:
    """One version, read-only. Safe to use from any number of threads."""

    def __init__(
        self,
        repository: Repository,
        commit: Commit,
        cache: Cache,
        local: LocalObjects | None = None,
        figures: Figures | None = None,
        demand: Demand | None = None,
    ) -> None:
        """`local` has what exists on this host only; `figures` and `demand` go on from another
        base.
        """
        self.commit = commit
        self.repository, self._cache, self._local = repository, cache, local
        self._chunk_size = commit.chunk_size
        self._index = Index(commit.index, commit.levels, self.load_node)
        limit = WAIT_FACTOR * (repository.store.timeout or DEFAULT_LIMIT)
        self._nodes = SingleFlight(self._fetch_node, limit)
        self._chunks = SingleFlight(self._fetch_chunk, limit)
        self._read_ahead = ReadAhead(commit.chunk_size, commit.chunks)
        self.figures = figures or Figures()
        self.demand = demand or Demand()
        # Where nbdkit's filter finds the chunks that were read here once and are still open.
        found = library.active()
        self.table = handles.Table(found, commit.chunk_size, 2 * cache.max_open) if found else None
        # One slot of the store is left for a reader that waits.
        threads = max(1, min(16, repository.store.concurrency - 1))
        self._background = Background(self._prefetch, threads)

    def successor(self, commit: Commit) -> Base:
        """Another version through the same cache and store, which counts on from here."""
        return Base(self.repository, commit, self._cache, self._local, self.figures, self.demand)

    # ---- reading

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill `view` with the version's bytes from `offset`; zeros behind its end."""
        size = self._chunk_size
        first, last = offset // size, (offset + len(view) - 1) // size
        ahead = self._read_ahead.observe(first, last)
        if ahead:
            self._background.wish(n for n in ahead if not self._present(n))
        if first == last:
            self._read_chunk(first, offset - first * size, view)
            return
        self._background.wish(n for n in range(first + 1, last + 1) if not self._present(n))
        for number in range(first, last + 1):
            low = max(offset, number * size)
            high = min(offset + len(view), (number + 1) * size)
            self._read_chunk(number, low - number * size, view[low - offset : high - offset])

    def _read_chunk(self, number: int, offset: int, view: memoryview) -> None:
        oid = self._index.lookup(number) if number < self.commit.chunks else NULL_ID
        if oid == NULL_ID:
            fill_zeros(view)
            if self.table is not None:
                self.table.put_zeros(number)
            return
        self.demand.touch(number)
        cached = self._cache.open(oid)
        if cached is not None:
            if cached.read_into(offset, view):
                self.figures.cache_hits += 1
                if self.table is not None and cached.native is not None:
                    self.table.put(number, cached.native)
                return
            self._cache.drop(oid)
        # What was committed here is read here, whether the chunk below it can be had or not.
        if self._local is not None and self._local.patched_into(oid, offset, view):
            return
        if self._chunks.under_way(oid):
            content = self._chunks.get(oid)
        else:
            with self.demand.miss(number):
                content = self._chunks.get(oid)
        view[:] = memoryview(content)[offset : offset + len(view)]

    def present(self, number: int) -> bool:
        """Whether chunk `number` is here, or is zeros. May fetch nodes."""
        oid = self._index.lookup(number) if number < self.commit.chunks else NULL_ID
        return oid == NULL_ID or self._cache.has(oid)

    def next_chunk(self, start: int) -> int | None:
        """The first chunk from `start` on that is no hole. May fetch nodes."""
        return next((number for number, _ in self._index.entries(start, self.commit.chunks)), None)

    def bring(self, number: int) -> int:
        """Fetch a chunk unless it is here; about how many bytes came from the store for it."""
        before = self.figures.fetched_bytes
        self._prefetch(number)
        if self.figures.fetched_bytes == before:
            return 0
        part = self.figures.received_bytes / max(1, self.figures.fetched_bytes)
        return int(self._chunk_size * part)

    def cache_has_room(self, chunks: int) -> bool:
        """Whether so many more chunks fit into the cache without an eviction."""
        return self._cache.room() >= chunks * self._chunk_size

    def _present(self, number: int) -> bool:
        if number >= self.commit.chunks:
            return True
        if not self._index.is_cached(number):
            return False
        oid = self._index.lookup(number)
        return oid == NULL_ID or self._cache.has(oid)

    def _prefetch(self, number: int) -> None:
        if number >= self.commit.chunks:
            return
        oid = self._index.lookup(number)
        if oid != NULL_ID and not self._cache.has(oid):
            self._chunks.get(oid)

    def prefetch(self, offset: int, length: int) -> None:
        """Fetch [offset, offset + length) in the background."""
        first, last = offset // self._chunk_size, (offset + length - 1) // self._chunk_size
        self._background.wish(n for n in range(first, last + 1) if not self._present(n))

    # ---- fetching

    def _fetch_chunk(self, oid: bytes) -> bytes:
        # Somebody else's flight may have ended between our look into the cache and this one.
        if self._cache.has(oid):
            content = self._cache.content(oid, self._chunk_size)
            if content is not None:
                return content
        with self.figures.fetches.timed():
            chunk = self._verified(
                lambda: self.repository.read_chunk(oid, self._chunk_size, self._part, self._keep)
            )
        self._cache.insert(oid, chunk)
        return chunk

    def _part(self, oid: bytes) -> bytes | None:
        return self._local.part(oid) if self._local is not None else None

    def _keep(self, oid: bytes, plain: bytes, stored: int) -> None:
        """Count what the store gave. Patches are kept for commits, which merge them."""
        self.figures.fetched(len(plain), stored)
        if kind_of(oid) is Kind.PATCH:
            self._cache.insert(oid, plain, meta=True)

    def local_commit(self, oid: bytes) -> Commit | None:
        """A commit that is on this host, or None."""
        return self._local.commit(oid) if self._local is not None else None

    def load_node(self, oid: bytes) -> bytes:
        """The plaintext of an index node: from this host, else fetched and kept."""
        node = self._local.node(oid) if self._local is not None else self._cache.read(oid)
        return node if node is not None else self._nodes.get(oid)

    def _fetch_node(self, oid: bytes) -> bytes:
        node = self._verified(lambda: self.repository.read_object(oid, (Kind.NODE,))[1])
        self._cache.insert(oid, node, meta=True)
        return node

    def _verified(self, fetch: Callable[[], bytes]) -> bytes:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return fetch()
            except Damaged as error:
                if attempt == ATTEMPTS:
                    self.figures.failed()
                    raise
                log.warning("%s: it is fetched again", error)
            except BaseException:
                self.figures.failed()
                raise
        raise AssertionError("unreachable")

    # ---- extents and figures

    def extents(self, offset: int, stop: int) -> Iterator[tuple[int, int, bool]]:
        """(start, stop, whether it can hold data) of pieces that cover [offset, stop).

        Holes come from the index alone. May fetch nodes.
        """
        size, at = self._chunk_size, offset
        first, last = offset // size, min(self.commit.chunks, -(-stop // size))
        for number, _ in self._index.entries(first, last):
            low, high = max(offset, number * size), min(stop, (number + 1) * size)
            if low > at:
                yield at, low, False
            yield low, high, True
            at = high
        if at < stop:
            yield at, stop, False

    def present_bytes(self) -> tuple[int, int]:
        """(bytes of chunks in the cache, bytes of chunks in all): whole chunks, zeros left out.

        Walks the index, whose missing nodes it fetches, and looks up each chunk in the cache.
        """
        here = total = 0
        for _, oid in self._index.entries():
            total += 1
            here += self._cache.has(oid)
        return here * self._chunk_size, total * self._chunk_size

    def close(self, wait: bool = True) -> None:
        """Stop fetching in the background; `wait` for what is under way."""
        self._background.stop(wait)

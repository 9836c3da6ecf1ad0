"""Pin: a version as a whole on this host, for use without its repository."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ..errors import NoSpace, UsageError
from ..progress import Progress
from ..repository.commits import Commit
from ..repository.index import Index
from ..repository.objects import NULL_ID, Kind
from ..repository.repository import Repository
from ..units import format_size
from ..volume import pins
from ..volume.cache import TRAILER, Cache
from ..volume.local import LocalObjects
from ..volume.pins import Pin

OF_LIMIT = 0.9  # of the cache's limit may be pinned: the rest is for everything else


@dataclass(frozen=True)
class Pinned:
    """A pinned version. `bytes` of chunks that it has; `fetched` are those that were missing."""

    id: bytes
    bytes: int
    fetched: int


def pin(
    repository: Repository,
    cache: Cache,
    oid: bytes,
    commit: Commit,
    local: LocalObjects | None = None,
    progress: Progress | None = None,
) -> Pinned:
    """Bring all of a version to this host, and keep it in the cache until `unpin`.

    Broken off, it goes on when it is called again. Raises UsageError where the cache is too small,
    NoSpace, StoreError, Damaged.
    """
    progress = progress or Progress()
    size = commit.chunk_size
    nodes: set[bytes] = set()

    def load(node: bytes) -> bytes:
        nodes.add(node)
        plain = cache.read(node)
        if plain is None:
            plain = local.node(node) if local is not None else None
            plain = plain or repository.read_object(node, (Kind.NODE,))[1]
            cache.insert(node, plain, meta=True)
        return plain

    index = Index(commit.index, commit.levels, load)
    chunks = sorted({chunk for _, chunk in index.entries() if chunk != NULL_ID})
    _check_room(cache, oid, len(chunks) * (size + TRAILER.size))
    pins.save(cache.folder, oid, [*chunks, *nodes])
    if cache.read(oid) is None:
        plain = local.commit_plain(oid) if local is not None else None
        cache.insert(oid, plain or repository.read_object(oid, (Kind.COMMIT,))[1], meta=True)
    missing = [chunk for chunk in chunks if not cache.has(chunk)]
    progress.start("pin", len(missing) * size)
    have: Callable[[bytes], bytes | None] | None = local.part if local is not None else None

    def bring(chunk: bytes) -> None:
        cache.insert(chunk, repository.read_chunk(chunk, size, have))
        if not cache.has(chunk):
            raise NoSpace(f"no space left for what is pinned in {cache.folder}: free some")
        progress.advance(size)

    pool = ThreadPoolExecutor(max(1, repository.store.concurrency), thread_name_prefix="pin")
    try:
        for _ in pool.map(bring, missing):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
    return Pinned(oid, len(chunks) * size, len(missing) * size)


def _check_room(cache: Cache, oid: bytes, size: int) -> None:
    others = 0
    for one in pins.load(cache.folder):
        if one.commit != oid:
            others += pinned_bytes(cache, one)
    if size + others > cache.limit * OF_LIMIT:
        also = f" beside {format_size(others)} of other pins" if others else ""
        raise UsageError(
            f"the version needs {format_size(size)} of the cache{also}, whose limit is "
            f"{format_size(cache.limit)}: raise cache.size in the configuration, or let go of "
            "another with `horcrux-cli pin -d`"
        )


def pinned_bytes(cache: Cache, one: Pin) -> int:
    """Bytes that are on this host of what is pinned."""
    return sum(cache.size_of(chunk) for chunk in one.chunks())

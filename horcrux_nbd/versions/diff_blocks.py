"""What differs between two versions, volumes or both, in blocks. Equal parts are never looked at.

Two indexes tell which chunks differ without reading any; overlays tell it to the block. Exactly
which blocks of a chunk differ takes its content on both sides, from this host or the store.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

from ..errors import Damaged, UsageError
from ..repository.commits import Commit
from ..repository.index import FANOUT, Index, check_node
from ..repository.objects import ID_SIZE, NULL_ID, Kind
from ..repository.repository import Repository
from ..units import KiB
from ..volume import state as states
from ..volume.base import Base
from ..volume.cache import Cache
from ..volume.layer import BLOCK_SIZE, Layer
from ..volume.local import LocalObjects
from ..volume.overlay import Overlay
from ..volume.pack import touched_chunks, written_blocks
from .history import FAR
from .session import Session

EMPTY = bytes(FANOUT * ID_SIZE)
TRIES = 5  # a commit may end just while a volume is opened for reading


class Side:
    """One side of a comparison: a version, with a volume's changes over it or not.

    Reads of it never take a lock: of a volume in use it is what its map on disk says, which is what
    was flushed, and blocks that are being written may be older or newer.
    """

    def __init__(
        self,
        name: str,
        commit: Commit,
        repository: Repository,
        cache: Cache,
        local: LocalObjects | None = None,
        layers: tuple[Layer, ...] = (),
        resources: contextlib.ExitStack | None = None,
    ) -> None:
        self.name, self.commit, self.layers = name, commit, layers
        self._base = Base(repository, commit, cache, local)
        self._repository, self._cache, self._local = repository, cache, local
        self.far = False  # whether a node took its time
        self.index = Index(commit.index, commit.levels, self._node)
        self._view: Overlay | Base = Overlay(layers, self._base) if layers else self._base
        self._resources = resources

    def _node(self, oid: bytes) -> bytes:
        """As `Base.load_node`, but a node that came at once is not kept: a comparison reads many,
        and each file in the cache costs more than such a read.
        """
        node = self._local.node(oid) if self._local is not None else self._cache.read(oid)
        if node is None:
            began = time.monotonic()
            node = self._repository.read_object(oid, (Kind.NODE,))[1]
            if time.monotonic() - began > FAR:
                self.far = True
                self._cache.insert(oid, node, meta=True)
        return node

    def table(self, oid: bytes, level: int) -> bytes:
        """The ids in a node of the index at `level`."""
        return EMPTY if oid == NULL_ID else check_node(self._node(oid), level)

    @property
    def concurrency(self) -> int:
        """How many reads at once are worth having."""
        return self._repository.store.concurrency

    @property
    def size(self) -> int:
        """Bytes."""
        return self.commit.size

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill `view` from `offset`; zeros behind the end. Raises Damaged, StoreError."""
        self._view.read_into(offset, view)

    def chunk(self, number: int) -> bytes:
        """The content of one chunk."""
        content = bytearray(self.commit.chunk_size)
        self.read_into(number * len(content), memoryview(content))
        return bytes(content)

    def __enter__(self) -> Side:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._base.close(wait=False)
        for layer in self.layers:
            layer.close()
        if self._resources is not None:
            self._resources.close()


def volume_side(name: str) -> Side:
    """A volume as it is now, its changes included."""
    for attempt in range(TRIES):
        with contextlib.ExitStack() as stack:
            session = stack.enter_context(Session(name, lock=False))
            state = session.state
            commit = states.base_commit(session.folder, state)
            try:
                layers = []
                for one in state.layers:
                    folder = states.layer_folder(session.folder, one)
                    layer = Layer(folder, bytes.fromhex(one.id), state.size).open(read_only=True)
                    layers.append(layer)
            except (Damaged, FileNotFoundError):
                for layer in layers:
                    layer.close()
                if attempt + 1 < TRIES and session.state != state:
                    continue
                raise
            return Side(
                name,
                commit,
                session.remote,
                session.cache,
                session.local,
                tuple(layers),
                stack.pop_all(),
            )
    raise AssertionError("unreachable")


def version_side(name: str, oid: bytes, session: Session) -> Side:
    """A version that a volume knows; `session` stays open as long as it is used."""
    return Side(name, session.commit(oid), session.remote, session.cache, session.local)


def stored_side(name: str, commit: Commit, repository: Repository, cache: Cache) -> Side:
    """A version of a repository."""
    return Side(name, commit, repository, cache)


@dataclass(frozen=True)
class Extent:
    """`length` bytes from `start` differ. Multiples of 4 KiB, but for the end of the image."""

    start: int
    length: int


@dataclass
class Stat:
    """How much differs. `bytes` is an upper bound unless `exact`."""

    chunks: int = 0
    bytes: int = 0
    exact: bool = False
    sizes: tuple[int, int] = (0, 0)


def differing(old: Side, new: Side, *, exact: bool = False) -> Iterator[Extent]:
    """Where two sides differ, ascending, merged. Not `exact`: whole chunks where only the indexes
    say so, and blocks that were written with the bytes that they had: nothing is fetched then.
    Raises UsageError for sides that cannot be compared.
    """
    chunk = _chunk_size(old, new)
    last: Extent | None = None
    by_index = differing_chunks(old, new)
    for number in sorted(by_index | _written_chunks(old) | _written_chunks(new)):
        for first, stop in _blocks(old, new, number, exact, number in by_index):
            start = number * chunk + first * BLOCK_SIZE
            end = min(number * chunk + stop * BLOCK_SIZE, max(old.size, new.size))
            if last is not None and last.start + last.length == start:
                last = Extent(last.start, end - last.start)
                continue
            if last is not None:
                yield last
            last = Extent(start, end - start)
    if last is not None:
        yield last


def stat(old: Side, new: Side, *, exact: bool = False) -> Stat:
    """How much differs; see `differing`."""
    chunk = _chunk_size(old, new)
    found = Stat(exact=exact, sizes=(old.size, new.size))
    counted = -1
    for extent in differing(old, new, exact=exact):
        found.bytes += extent.length
        first, last = extent.start // chunk, (extent.start + extent.length - 1) // chunk
        found.chunks += last - max(first, counted + 1) + 1
        counted = last
    return found


def _chunk_size(old: Side, new: Side) -> int:
    if old.commit.chunk_size != new.commit.chunk_size:
        raise UsageError(
            f"{old.name} has chunks of {old.commit.chunk_size // KiB} KiB and {new.name} of "
            f"{new.commit.chunk_size // KiB} KiB: they cannot be compared block by block"
        )
    return old.commit.chunk_size


def differing_chunks(old: Side, new: Side) -> set[int]:
    """The chunks whose ids differ. Reads the nodes of a level many at a time: an index of a large
    image is thousands, and a store may be far away.
    """
    if old.index.levels != new.index.levels:
        return {number for number, _, _ in old.index.diff(new.index)}
    pairs = [(0, old.index.root, new.index.root)]
    with ThreadPoolExecutor(max(1, min(16, new.concurrency))) as pool:
        for level in range(new.index.levels - 1, -1, -1):
            pairs = [pair for pair in pairs if pair[1] != pair[2]]
            tables = [
                _tables(pool, side, level, ids)
                for side, ids in (
                    (old, sorted({a for _, a, _ in pairs})),
                    (new, sorted({b for _, _, b in pairs})),
                )
            ]
            pairs = [
                (number * FANOUT + slot, a, b)
                for number, x, y in pairs
                for slot, a, b in _differing_slots(tables[0][x], tables[1][y])
            ]
    return {number for number, _, _ in pairs}


def _tables(
    pool: ThreadPoolExecutor, side: Side, level: int, ids: list[bytes]
) -> dict[bytes, bytes]:
    found = {}
    pending = iter(ids)
    for oid in pending:
        found[oid] = side.table(oid, level)
        if side.far:  # threads only cost where the store is near
            break
    rest = list(pending)
    return found | dict(zip(rest, pool.map(lambda oid: side.table(oid, level), rest), strict=True))


def _differing_slots(old: bytes, new: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    for slot in range(FANOUT):
        at = slice(slot * ID_SIZE, (slot + 1) * ID_SIZE)
        if old[at] != new[at]:
            yield slot, old[at], new[at]


def _written_chunks(side: Side) -> set[int]:
    commit = side.commit
    return set(touched_chunks(side.layers, side.index, commit.chunk_size, commit.chunks))


def _blocks(
    old: Side, new: Side, number: int, exact: bool, other_id: bool
) -> Iterator[tuple[int, int]]:
    """[first, stop) of blocks of a chunk that differ."""
    count = old.commit.chunk_size // BLOCK_SIZE
    if exact:
        a, b = old.chunk(number), new.chunk(number)
        blocks = [
            n
            for n in range(count)
            if a[n * BLOCK_SIZE : (n + 1) * BLOCK_SIZE] != b[n * BLOCK_SIZE : (n + 1) * BLOCK_SIZE]
        ]
    elif other_id:
        yield 0, count
        return
    else:
        blocks = sorted(
            {n for side in (old, new) for n in written_blocks(side.layers, side.commit, number)}
        )
    at = 0
    while at < len(blocks):
        begin = at
        while at + 1 < len(blocks) and blocks[at + 1] == blocks[at] + 1:
            at += 1
        yield blocks[begin], blocks[at] + 1
        at += 1

"""Which bytes of two contents may differ: from ids and maps, and from the bytes where it must.

Equal ids in both indexes are equal chunks, so most of two images is never looked at. Where ids
differ, the patches above what both have in common say which blocks of 4 KiB changed. Only two whole
chunks have to be read to know, and only where somebody asks about them.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator

from ..repository.objects import NULL_ID, Kind, kind_of
from ..repository.patch import BLOCK_BITS, BLOCK_SIZE, Patch
from ..units import MiB
from ..volume.blockmap import BASE, DATA
from ..volume.layer import Layer
from .content import Content

# Chunks that are fetched to tell their blocks apart, and that are read for it on this host (where
# the first look at each costs about 2 ms), in bytes. Beyond that whole chunks, or all blocks that
# were written, count as different.
FETCH_LIMIT = 16 * MiB
READ_LIMIT = 128 * MiB


class Differences:
    """Call it with (offset, length) for the ranges there that may differ; ascending.

    Exact to the block of 4 KiB within the limits above. Contents of different chunk sizes differ
    everywhere.
    """

    def __init__(self, old: Content, new: Content, *, exact: bool = True) -> None:
        """Not `exact`: no data is read, so blocks count that were written as they had been."""
        self._old, self._new = old, new
        self._size = new.commit.chunk_size
        self._comparable = old.commit.chunk_size == new.commit.chunk_size
        self._chunks = array("Q")
        if self._comparable:
            self._chunks.extend(number for number, _, _ in old.index.diff(new.index))
        self._known: dict[int, list[int] | None] = {}
        self._cheaply: dict[int, bool] = {}
        self._may_fetch, self._may_read = (FETCH_LIMIT, READ_LIMIT) if exact else (0, 0)

    def __call__(self, offset: int, length: int) -> Iterable[tuple[int, int]]:
        if not self._comparable:
            return [(offset, offset + length)]
        blocks = {*self._in_chunks(offset, length), *self._in_layers(offset, length)}
        return list(_ranges(sorted(blocks), offset, offset + length))

    # ---- what was committed

    def _in_chunks(self, offset: int, length: int) -> Iterator[int]:
        """Numbers of blocks of the image."""
        per_chunk = self._size >> BLOCK_BITS
        low, high = offset >> BLOCK_BITS, -(-(offset + length) >> BLOCK_BITS)
        at = bisect_left(self._chunks, low // per_chunk)
        while at < len(self._chunks) and self._chunks[at] * per_chunk < high:
            number = self._chunks[at]
            first = number * per_chunk
            blocks = self._blocks_of(number)
            if blocks is None:
                yield from range(max(first, low), min(first + per_chunk, high))
            else:
                yield from (first + block for block in blocks if low <= first + block < high)
            at += 1

    def _blocks_of(self, number: int) -> list[int] | None:
        """The blocks in a chunk that differ; None if that would cost too much to know."""
        if number not in self._known:
            self._known[number] = self._find(number)
        return self._known[number]

    def _find(self, number: int) -> list[int] | None:
        a, b = self._old.index.lookup(number), self._new.index.lookup(number)
        candidates = self._patched(a, b)
        here = self._is_here(self._old, a) and self._is_here(self._new, b)
        if here:
            allowed = self._may_read >= 2 * self._size
            self._may_read -= 2 * self._size if allowed else 0
        else:
            # Patches said it already, if there are some, and the chunks need not come for them.
            allowed = candidates is None and self._may_fetch >= 2 * self._size
            self._may_fetch -= 2 * self._size if allowed else 0
        if not allowed:
            return candidates
        per_chunk = self._size >> BLOCK_BITS
        old, new = (self._chunk(content, number) for content in (self._old, self._new))
        return [
            block
            for block in (range(per_chunk) if candidates is None else candidates)
            if old[block << BLOCK_BITS : (block + 1) << BLOCK_BITS]
            != new[block << BLOCK_BITS : (block + 1) << BLOCK_BITS]
        ]

    def _chunk(self, content: Content, number: int) -> bytes:
        data = bytearray(self._size)
        content.base.read_into(number * self._size, memoryview(data))
        return bytes(data)

    def _is_here(self, content: Content, oid: bytes) -> bool:
        """Whether reading the chunk would fetch nothing."""
        if oid == NULL_ID or content.cache.has(oid):
            return True
        return content.local is not None and content.local.content(oid) is not None

    # ---- patches

    def _patched(self, a: bytes, b: bytes) -> list[int] | None:
        """The blocks in which two ids differ at most, where both come from something in common."""
        if Kind.PATCH not in (kind_of(a), kind_of(b)):
            return None
        mine, theirs = self._layers(self._old, a), self._layers(self._new, b)
        common = next((oid for oid in mine if oid in theirs), None)
        if common is None:
            return None
        above = [(self._old, oid) for oid in mine[: mine.index(common)]]
        above += [(self._new, oid) for oid in theirs[: theirs.index(common)]]
        return sorted(
            {block for content, oid in above for block in self._patch(content, oid).blocks}
        )

    def _layers(self, content: Content, oid: bytes) -> list[bytes]:
        """A chunk's patches from the newest down, and what they end in."""
        found = [oid]
        while kind_of(found[-1]) is Kind.PATCH:
            found += self._patch(content, found[-1]).chain
        return found

    def _patch(self, content: Content, oid: bytes) -> Patch:
        plain = content.cache.read(oid) if content.local is None else content.local.part(oid)
        if plain is None:
            _, plain = content.repository.read_object(oid, (Kind.PATCH,), self._size)
            content.cache.insert(oid, plain, meta=True)
        return Patch.decode(plain, self._size)

    # ---- what was written to a volume

    def _in_layers(self, offset: int, length: int) -> Iterator[int]:
        low, high = offset >> BLOCK_BITS, -(-(offset + length) >> BLOCK_BITS)
        for content in (self._old, self._new):
            for layer in content.layers:
                yield from self._written(layer, low, high)

    def _written(self, layer: Layer, low: int, high: int) -> Iterator[int]:
        for state, start, stop in layer.blocks.runs(low, high):
            if state == BASE:
                continue
            if state != DATA and stop - start > self._size >> BLOCK_BITS:
                # A large piece that was trimmed: only where there was something below.
                yield from self._trimmed(start, stop)
                continue
            yield from self._rewritten(start, stop)

    def _trimmed(self, start: int, stop: int) -> Iterator[int]:
        for content in (self._old, self._new):
            pieces = content.base.extents(start << BLOCK_BITS, stop << BLOCK_BITS)
            for low, high, data in pieces:
                if data:
                    yield from range(low >> BLOCK_BITS, -(-high >> BLOCK_BITS))

    def _rewritten(self, start: int, stop: int) -> Iterator[int]:
        """Those of the blocks that hold something else, where it costs no fetch to see."""
        per_chunk = self._size >> BLOCK_BITS
        while start < stop:
            number = start // per_chunk
            end = min(stop, (number + 1) * per_chunk)
            length = min((end << BLOCK_BITS), self._old.size, self._new.size)
            length -= start << BLOCK_BITS
            if length <= 0 or not self._cheap(number):
                yield from range(start, end)
            else:
                a = self._old.read(start << BLOCK_BITS, length)
                b = self._new.read(start << BLOCK_BITS, length)
                for at in range(0, length, BLOCK_SIZE):
                    if a[at : at + BLOCK_SIZE] != b[at : at + BLOCK_SIZE]:
                        yield start + (at >> BLOCK_BITS)
            start = end

    def _cheap(self, number: int) -> bool:
        """Whether both sides of a chunk can be read without a fetch, and enough of that is left."""
        if number not in self._cheaply:
            self._cheaply[number] = self._may_read >= 2 * self._size and all(
                self._is_here(content, content.index.lookup(number))
                for content in (self._old, self._new)
            )
            self._may_read -= 2 * self._size if self._cheaply[number] else 0
        return self._cheaply[number]


def _ranges(blocks: Iterable[int], low: int, high: int) -> Iterator[tuple[int, int]]:
    """Ascending block numbers as ranges of bytes, cut to [low, high)."""
    start = stop = -1
    for block in blocks:
        if block != stop:
            if start >= 0:
                yield max(start << BLOCK_BITS, low), min(stop << BLOCK_BITS, high)
            start = block
        stop = block + 1
    if start >= 0:
        yield max(start << BLOCK_BITS, low), min(stop << BLOCK_BITS, high)

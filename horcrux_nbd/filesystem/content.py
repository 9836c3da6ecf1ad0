"""Whether two files hold the same, told from where their data lies as far as that goes."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from itertools import pairwise

from ..units import MiB, round_up
from .changes import Changed
from .inode import Inode
from .reader import PIECE, Piece, Reader

GRAIN = 4096  # bytes: what `changed` tells apart, as overlays and patches do
# Data that one comparison reads, from each side, where a file moved on the disk and only its bytes
# tell whether it changed. Beyond that what moved counts as changed.
READ_LIMIT = 16 * MiB


class Contents:
    """Compares contents of files of two readers.

    `changed` tells which bytes of the images may differ; without it nothing is known to be equal.
    In file systems that are not versions of one another a file with the size and time that it had
    counts as the same, as rsync has it: all would have to be read to know better.
    """

    def __init__(self, old: Reader, new: Reader, changed: Changed | None) -> None:
        self._old, self._new = old, new
        self._changed = changed
        self._left = READ_LIMIT
        self._same_system = old.superblock.identity == new.superblock.identity
        # Several files may share what `changed` tells as one block.
        self._grain = min(GRAIN, new.image.block_size)
        self._fine = self._grain < GRAIN
        replayed = sorted({*old.image.overlay, *new.image.overlay})
        size = new.image.block_size
        same_size = old.image.block_size == size
        # What a journal holds is not where `changed` looks.
        self._replayed = [(n * size, (n + 1) * size) for n in replayed] if same_size else []
        if replayed and not same_size:
            self._changed = None

    def differing(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """[start, stop) within the range where the images may differ; ascending, may overlap."""
        if self._changed is None:
            yield offset, offset + length
            return
        yield from self._changed(offset, length)
        if self._replayed:
            yield from _within(self._replayed, offset, offset + length)

    def compare(self, old: Inode, new: Inode) -> tuple[bool, int]:
        """(whether the contents differ, bytes of the new one that are not as they were)."""
        a, b = self._old.inline(old), self._new.inline(new)
        if a is not None and b is not None:
            return a != b, 0 if a == b else len(b)
        if a is not None or b is not None:
            return self._compare_inline(old, new)
        if not self._same_system and (old.size, old.mtime) == (new.size, new.mtime):
            return False, 0
        changed = 0
        pieces = list(self._old.pieces(old)), list(self._new.pieces(new))
        for low, high, before, after in _merged(*pieces, min(old.size, new.size), new.size):
            if low >= old.size and after is not None:
                # The rest of the block that the file ended in may have been its own already.
                edge = min(high, round_up(old.size, self._new.image.block_size))
                placed = self._compare_placed(after, low, edge, False) if low < edge else 0
                changed += placed + high - max(low, edge)
            elif low >= old.size:
                continue
            elif before is not None and before == after:
                changed += self._compare_placed(before, low, high, old.size > high == new.size)
            elif before is not None or after is not None:
                changed += self._compare_moved(before, after, high - low)
        return old.size != new.size or changed > 0, changed

    def _compare_placed(self, place: int, low: int, high: int, cut: bool) -> int:
        """Bytes in whole blocks that differ in a part of the file that is where it was.

        `cut` says that the file ends there now and did not: the kernel cleared the rest of its last
        block, which tells nothing of what is before.
        """
        total, done = 0, low
        for start, stop in sorted(self.differing(place, high - low)):
            first = max(done, (low + start - place) // GRAIN * GRAIN)
            last = min(round_up(low + stop - place, GRAIN), high)
            if last <= first:
                continue
            done = last
            if self._fine and last - first <= self._left:
                self._left -= last - first
                total += self._count(place + first - low, place + first - low, last - first)
                continue
            if cut and last == high and high % GRAIN:
                edge = max(first, high // GRAIN * GRAIN)
                if not self._count(place + edge - low, place + edge - low, high - edge):
                    last = edge
            total += last - first
        return total

    def _compare_inline(self, old: Inode, new: Inode) -> tuple[bool, int]:
        """One is in its inode, so it is short: the first block says it all, but for the length."""
        a, b = next(self._old.read_file(old), b""), next(self._new.read_file(new), b"")
        same = a == b and old.size == new.size
        return not same, 0 if same else new.size

    def _compare_moved(self, before: int | None, after: int | None, length: int) -> int:
        """Bytes that differ where the same part of a file is not in the same place."""
        changed = 0
        for at in range(0, length, PIECE):
            step = min(PIECE, length - at)
            if step > self._left:
                return changed + (length - at if after is not None else GRAIN)
            self._left -= step
            changed += self._count(
                None if before is None else before + at, None if after is None else after + at, step
            )
        return changed

    def _count(self, before: int | None, after: int | None, length: int) -> int:
        """Bytes in blocks that differ, by reading both; None reads as zeros."""
        a = bytes(length) if before is None else self._old.image.bytes_at(before, length)
        b = bytes(length) if after is None else self._new.image.bytes_at(after, length)
        if a == b:
            return 0
        step = self._grain
        return sum(
            min(step, length - low)
            for low in range(0, length, step)
            if a[low : low + step] != b[low : low + step]
        )


def data_bytes(reader: Reader, inode: Inode) -> int:
    """Bytes of a regular file that are not holes."""
    inline = reader.inline(inode)
    if inline is not None:
        return len(inline)
    return sum(length for _, _, length in reader.pieces(inode))


def _merged(
    old: list[Piece], new: list[Piece], both: int, size: int
) -> Iterator[tuple[int, int, int | None, int | None]]:
    """(start, stop, where it lies in the old image, in the new) of the file's parts up to `size`.

    None where there is a hole; each part is in one piece on both sides, and on one side of `both`.
    """
    borders = {0, both, size}
    for pieces in (old, new):
        for start, _, length in pieces:
            borders |= {min(start, size), min(start + length, size)}
    places = [_Places(old), _Places(new)]
    for low, high in pairwise(sorted(borders)):
        yield low, high, places[0].at(low), places[1].at(low)


class _Places:
    """Where offsets lie, asked in ascending order."""

    def __init__(self, pieces: list[Piece]) -> None:
        self._pieces, self._next = pieces, 0

    def at(self, offset: int) -> int | None:
        while self._next < len(self._pieces):
            start, place, length = self._pieces[self._next]
            if offset < start:
                return None
            if offset < start + length:
                return place + offset - start
            self._next += 1
        return None


def _within(ranges: list[tuple[int, int]], start: int, stop: int) -> Iterator[tuple[int, int]]:
    """The parts of `ranges` (sorted) in [start, stop)."""
    at = max(bisect_right(ranges, (start, start)) - 1, 0)
    for low, high in ranges[at:]:
        if low >= stop:
            return
        if high > start:
            yield max(low, start), min(high, stop)

"""Which blocks go where: free space of a file system that is being laid out.

Block numbers and counts are in blocks of the file system. Not safe for several threads.

What is not placed elsewhere is handed out in ascending order from a cursor, so that what is asked
for one after another lies together. What alignment skips is handed out again once the end is
reached, so that alignment never makes a file system too small.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable


class OutOfSpace(Exception):
    """`missing` blocks more than there are were asked for."""

    def __init__(self, missing: int) -> None:
        super().__init__(f"{missing} blocks too few")
        self.missing = missing


class Space:
    """Free ranges, [start, end) each."""

    def __init__(self, free: Iterable[tuple[int, int]]) -> None:
        self._ranges = sorted(free)
        self._skipped: list[tuple[int, int]] = []
        self._at = 0
        self.free_blocks = sum(end - start for start, end in self._ranges)

    def claim(self, start: int, count: int) -> list[tuple[int, int]]:
        """Take what is free of [start, start + count): (start, count) of each part, ascending.

        Only before the first `take`: for what has its place already.
        """
        end = start + count
        index = max(bisect_right(self._ranges, (start, 1 << 63)) - 1, 0)
        got: list[tuple[int, int]] = []
        while index < len(self._ranges) and self._ranges[index][0] < end:
            free_start, free_end = self._ranges[index]
            first, last = max(start, free_start), min(end, free_end)
            if first >= last:
                index += 1
                continue
            rest = [(free_start, first), (last, free_end)]
            kept = [(a, b) for a, b in rest if a < b]
            self._ranges[index : index + 1] = kept
            index += len(kept)
            got.append((first, last - first))
            self.free_blocks -= last - first
        return got

    def begin_at(self, block: int) -> None:
        """Hand out what lies from `block` on first, and what lies before it last."""
        before = [(a, min(b, block)) for a, b in self._ranges if a < block]
        self._ranges = [(max(a, block), b) for a, b in self._ranges if b > block]
        self._skipped.extend(before)

    def take(self, count: int, align: int = 1, phase: int = 0) -> list[tuple[int, int]]:
        """`count` blocks: (start, count) of each part, in order.

        Part by part, the number of blocks before it plus `phase` equals its start modulo `align`
        while there is room for that. Raises OutOfSpace and takes nothing.
        """
        if count > self.free_blocks:
            raise OutOfSpace(count - self.free_blocks)
        got: list[tuple[int, int]] = []
        done = 0
        while done < count:
            if self._at == len(self._ranges):
                self._ranges, self._skipped = sorted(self._skipped), []
                self._at, align = 0, 1
            start, end = self._ranges[self._at]
            first = start + (done + phase - start) % align
            if first >= end:
                self._skipped.append((start, end))
                self._at += 1
                continue
            if first > start:
                self._skipped.append((start, first))
            size = min(end - first, count - done)
            if first + size == end:
                self._at += 1
            else:
                self._ranges[self._at] = (first + size, end)
            got.append((first, size))
            done += size
        self.free_blocks -= count
        return got

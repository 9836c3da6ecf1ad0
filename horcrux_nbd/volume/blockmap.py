"""Which blocks of an overlay layer hold what, in memory.

A block (4 KiB) is BASE (never written: look below), DATA (in the layer's data file) or ZERO. States
are kept in groups of 128 blocks, a `bytes` of 128 states each, made when first written. A group
that is in `_groups` is described by that alone; one that is not is ZERO if a zero range covers it,
BASE else. So memory grows with what was written (about 300 bytes for each 512 KiB group), never
with the image, and trimming a petabyte is one range.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

BASE, DATA, ZERO = 0, 1, 2

GROUP_BITS = 7
GROUP = 1 << GROUP_BITS  # blocks in a group
# Fewer whole groups than this are zeroed one by one: `Ranges.add` copies its lists, and 100,000
# short ranges of a fragmented fstrim took 20 s.
MIN_RANGE = 8
FRESH = 512  # new groups that are looked through one by one before they are sorted in

# One object for all groups that are alike.
UNIFORM = {state: bytes([state]) * GROUP for state in (BASE, DATA, ZERO)}
_STATES = [bytes([state]) for state in range(3)]


class Ranges:
    """A set of integers kept as sorted, disjoint, non-adjacent [start, stop) ranges.

    One thread may `add` while others ask: the lists are replaced together, never changed.
    """

    def __init__(self) -> None:
        self._lists: tuple[list[int], list[int]] = ([], [])

    def add(self, start: int, stop: int) -> None:
        starts, stops = self._lists
        first = bisect_left(stops, start)  # the first range that touches or follows
        last = bisect_right(starts, stop)
        if first < last:
            start = min(start, starts[first])
            stop = max(stop, stops[last - 1])
        self._lists = (
            [*starts[:first], start, *starts[last:]],
            [*stops[:first], stop, *stops[last:]],
        )

    def __contains__(self, value: int) -> bool:
        starts, stops = self._lists
        at = bisect_right(starts, value) - 1
        return at >= 0 and value < stops[at]

    def next_change(self, value: int) -> int | None:
        """The least number above `value` where membership differs, None if there is none."""
        starts, stops = self._lists
        at = bisect_right(starts, value)
        if at and value < stops[at - 1]:
            return stops[at - 1]
        return starts[at] if at < len(starts) else None

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(*self._lists, strict=True)

    def __len__(self) -> int:
        return len(self._lists[0])


class GroupStore(Protocol):
    """Groups of 128 states by their number, and which of them are dirty. Here in Python (`Groups`)
    or native (native/handles.py). One thread at a time changes it; any number read beside that.
    """

    def get(self, number: int) -> bytes | None:
        """The states of a group as they are at one moment; UNIFORM's object where all are alike."""

    def put(self, number: int, states: bytes, dirty: bool) -> None: ...

    def drop(self, number: int) -> None:
        """It is not there any more, nor dirty."""

    def touch(self, number: int) -> None:
        """It is dirty, if it is there."""

    def __contains__(self, number: int) -> bool: ...

    def __len__(self) -> int: ...

    def next(self, number: int) -> int | None:
        """The first group that is there, from `number` on."""

    def numbers(self, low: int = 0, high: int = 1 << 63) -> list[int]:
        """Those that are there, in [low, high), ascending."""

    def items(self) -> list[tuple[int, bytes]]:
        """All, ascending."""

    @property
    def dirty(self) -> int:
        """How many are."""

    def take_dirty(self) -> list[tuple[int, bytes]]:
        """Those that are, ascending; none is afterwards."""

    def sums(self) -> tuple[int, int, int]:
        """(DATA blocks, ZERO blocks, groups that are in `zeros`)."""


class ZeroRanges(Protocol):
    """What `Ranges` does."""

    def add(self, start: int, stop: int) -> None: ...

    def __contains__(self, value: int) -> bool: ...

    def next_change(self, value: int) -> int | None: ...

    def __iter__(self) -> Iterator[tuple[int, int]]: ...

    def __len__(self) -> int: ...


class Groups:
    """A GroupStore in Python.

    **Invariant:** a group's `bytes` is replaced, never changed in place, so a reader that holds one
    sees one moment of it.
    """

    def __init__(self, zeros: ZeroRanges) -> None:
        self._zeros = zeros
        self._groups: dict[int, bytes] = {}
        self._dirty: set[int] = set()
        # The numbers in `_groups`, for walks over huge ranges: ascending, but for `_fresh` ones.
        self._order: list[int] = []
        self._fresh: list[int] = []
        self._order_lock = threading.Lock()
        self.get = self._groups.get

    def put(self, number: int, states: bytes, dirty: bool) -> None:
        if number not in self._groups:
            with self._order_lock:
                self._fresh.append(number)
                if len(self._fresh) > FRESH:
                    known = len(self._order) + len(self._fresh)
                    if known > 2 * len(self._groups) + 2 * FRESH:  # most are gone
                        self._order = sorted([*self._groups, number])
                    else:  # two ascending runs: sorting them is merging them
                        self._order = sorted([*self._order, *sorted(self._fresh)])
                    self._fresh = []
        if states.count(states[0]) == GROUP:
            states = UNIFORM[states[0]]
        self._groups[number] = states
        if dirty:
            self._dirty.add(number)

    def drop(self, number: int) -> None:
        del self._groups[number]
        self._dirty.discard(number)

    def touch(self, number: int) -> None:
        if number in self._groups:
            self._dirty.add(number)

    def __contains__(self, number: int) -> bool:
        return number in self._groups

    def __len__(self) -> int:
        return len(self._groups)

    def next(self, number: int) -> int | None:
        """As far as the order is known: it may be one that was there."""
        with self._order_lock:
            order = self._order
            nearest = min((n for n in self._fresh if n >= number), default=None)
        at = bisect_left(order, number)
        if at < len(order) and (nearest is None or order[at] < nearest):
            return order[at]
        return nearest

    def numbers(self, low: int = 0, high: int = 1 << 63) -> list[int]:
        with self._order_lock:
            order, fresh = self._order, [n for n in self._fresh if low <= n < high]
        near = order[bisect_left(order, low) : bisect_left(order, high)] + fresh
        return sorted({number for number in near if number in self._groups})

    def items(self) -> list[tuple[int, bytes]]:
        return sorted(self._groups.items())

    @property
    def dirty(self) -> int:
        return len(self._dirty)

    def take_dirty(self) -> list[tuple[int, bytes]]:
        numbers, self._dirty = self._dirty, set()
        return [(number, self._groups[number]) for number in sorted(numbers)]

    def sums(self) -> tuple[int, int, int]:
        data = zero = 0
        for states in list(self._groups.values()):
            data += states.count(DATA)
            zero += states.count(ZERO)
        overridden = sum(n in self._zeros for n in list(self._groups)) if self._zeros else 0
        return data, zero, overridden


class BlockMap:
    """States of all blocks. Callers serialise `mark`; `runs` may run at any time beside it."""

    def __init__(self, groups: GroupStore | None = None, zeros: ZeroRanges | None = None) -> None:
        self._zeros = zeros if zeros is not None else Ranges()  # of group numbers
        self._groups = groups if groups is not None else Groups(self._zeros)
        self.dirty_zeros: list[tuple[int, int]] = []  # ranges zeroed since `take_dirty`

    def group(self, number: int) -> bytes:
        """The 128 states of a group."""
        states = self._groups.get(number)
        if states is None:
            zero = bool(self._zeros) and number in self._zeros
            states = UNIFORM[ZERO] if zero else UNIFORM[BASE]
        return states

    def state(self, block: int) -> int:
        return self.group(block >> GROUP_BITS)[block & (GROUP - 1)]

    def uniform(self, first: int, stop: int) -> int | None:
        """The state of all blocks in [first, stop) if they are in one group and alike."""
        number = first >> GROUP_BITS
        if (stop - 1) >> GROUP_BITS != number:
            return None
        states = self.group(number)
        state = states[first & (GROUP - 1)]
        if stop - first == 1 or states is UNIFORM[state]:
            return state
        a = first & (GROUP - 1)
        return state if states.count(state, a, a + stop - first) == stop - first else None

    def mark(self, first: int, count: int, state: int) -> None:
        """Give `count` blocks from `first` the state DATA or ZERO. Whole groups of ZERO cost O(1)
        for each group that was written before, whatever the count.
        """
        stop = first + count
        if state == ZERO and count >= GROUP:
            low, high = -(-first >> GROUP_BITS), stop >> GROUP_BITS
            if high - low >= MIN_RANGE:
                self._mark(first, low << GROUP_BITS, state)
                self._zero_groups(low, high)
                first = high << GROUP_BITS
        self._mark(first, stop, state)

    def _mark(self, first: int, stop: int, state: int) -> None:
        while first < stop:
            number = first >> GROUP_BITS
            a = first & (GROUP - 1)
            b = min(GROUP, stop - (number << GROUP_BITS))
            old = self.group(number)
            if old.count(state, a, b) != b - a:
                states = old[:a] + _STATES[state] * (b - a) + old[b:]
                if states == UNIFORM[ZERO] and self._beside_zeros(number):
                    self._zero_groups(number, number + 1)
                else:
                    self._groups.put(number, states, dirty=True)
            first = (number + 1) << GROUP_BITS

    def _beside_zeros(self, number: int) -> bool:
        """Whether a zeroed group would only make a range longer: trims meet within a group."""
        return bool(self._zeros) and (number - 1 in self._zeros or number + 1 in self._zeros)

    def _zero_groups(self, low: int, high: int) -> None:
        self._zeros.add(low, high)  # first, so that a reader never sees BASE between
        for number in self._groups.numbers(low, high):
            self._groups.drop(number)
        if self.dirty_zeros and self.dirty_zeros[-1][0] <= low <= self.dirty_zeros[-1][1]:
            low, before = self.dirty_zeros.pop()  # a disk that is discarded piece by piece
            high = max(high, before)
        self.dirty_zeros.append((low, high))

    def runs(self, first: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(state, first, stop) of maximal runs of blocks in [first, stop), ascending."""
        state, begin = -1, first
        for now, low, high in self._pieces(first, stop):
            if now != state:
                if state >= 0:
                    yield state, begin, low
                state, begin = now, low
            if high == stop:
                yield state, begin, stop

    def _pieces(self, first: int, stop: int) -> Iterator[tuple[int, int, int]]:
        while first < stop:
            number = first >> GROUP_BITS
            end = min(stop, (number + 1) << GROUP_BITS)
            states = self._groups.get(number)
            if states is None:
                zero = number in self._zeros
                if end < stop:
                    end = min(stop, self._next_known(number) << GROUP_BITS)
                yield (ZERO if zero else BASE), first, end
            elif states is UNIFORM[states[0]]:
                yield states[0], first, end
            else:
                at, last = first & (GROUP - 1), end - (number << GROUP_BITS)
                while at < last:
                    state = states[at]
                    begin = at
                    while at < last and states[at] == state:
                        at += 1
                    base = number << GROUP_BITS
                    yield state, base + begin, base + at
            first = end

    def _next_known(self, number: int) -> int:
        """The next group above `number` that may differ from it."""
        nearest, change = self._groups.next(number + 1), self._zeros.next_change(number)
        return min(n for n in (nearest, change, 1 << 62) if n is not None)

    @property
    def is_dirty(self) -> bool:
        """Whether anything changed since `take_dirty`."""
        return bool(self._groups.dirty or self.dirty_zeros)

    def take_dirty(self) -> tuple[list[tuple[int, int]], list[tuple[int, bytes]]]:
        """What changed since the last call: zeroed ranges of groups, then groups with their states.

        To be applied in this order. What happens from here on is left for the next call.
        """
        zeros, self.dirty_zeros = self.dirty_zeros, []
        return zeros, self._groups.take_dirty()

    def give_back(self, zeros: Sequence[tuple[int, int]], numbers: Iterable[int]) -> None:
        """Undo a `take_dirty` whose changes could not be logged."""
        self.dirty_zeros[:0] = zeros
        for number in numbers:  # but for those that a later zero range has
            self._groups.touch(number)

    def restore(self, number: int, states: bytes) -> None:
        """Take a group's states from a log."""
        self._groups.put(number, states, dirty=False)

    def restore_zeros(self, low: int, high: int) -> None:
        """Take a zeroed range of groups from a log."""
        self._zero_groups(low, high)
        self.dirty_zeros.clear()

    def everything(self) -> tuple[list[tuple[int, int]], list[tuple[int, bytes]]]:
        """The whole map in the form of `take_dirty`, for a compact log."""
        return list(self._zeros), self._groups.items()

    def written_groups(self) -> list[int]:
        """Groups that were written or zeroed block by block, ascending."""
        return self._groups.numbers()

    def zero_ranges(self) -> list[tuple[int, int]]:
        """[first, stop) ranges of groups zeroed as a whole; `written_groups` win over them."""
        return list(self._zeros)

    @property
    def entries(self) -> int:
        """How many entries a compact log of this map has."""
        return len(self._groups) + len(self._zeros)

    def count(self) -> tuple[int, int]:
        """(DATA blocks, ZERO blocks)."""
        data, zero, overridden = self._groups.sums()
        covered = sum(stop - start for start, stop in self._zeros)
        return data, zero + (covered - overridden) * GROUP

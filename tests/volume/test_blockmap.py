from __future__ import annotations

import itertools
import random
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from horcrux_nbd.volume import core
from horcrux_nbd.volume.blockmap import BASE, DATA, GROUP, MIN_RANGE, ZERO, BlockMap, ZeroRanges

TIB = 1 << 28  # blocks in a TiB


def new_map() -> BlockMap:
    return core.make(1 << 62, 1 << 40).blocks


def new_ranges() -> ZeroRanges:
    """Of the map, in Python or native; it goes with the map."""
    return new_map()._zeros


def states_of(blocks: BlockMap, first: int, stop: int) -> list[int]:
    found = []
    for state, a, b in blocks.runs(first, stop):
        assert a == first + len(found)
        assert b > a
        found += [state] * (b - a)
    assert len(found) == stop - first
    return found


# ---- ranges


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 12)), max_size=30))
def test_ranges_are_the_set_of_what_was_added(added: list[tuple[int, int]]) -> None:
    ranges, model = new_ranges(), set()
    for start, length in added:
        ranges.add(start, start + length)
        model.update(range(start, start + length))
    assert {n for n in range(-1, 80) if n in ranges} == model
    pairs = list(ranges)
    assert len(ranges) == len(pairs)
    assert all(a < b for a, b in pairs)
    assert all(x[1] < y[0] for x, y in itertools.pairwise(pairs)), "not merged"
    for n in range(80):
        change = next((m for m in range(n + 1, 90) if (m in model) != (n in model)), None)
        assert ranges.next_change(n) == change


# ---- the map against a model: one state for each block

MARKS = st.tuples(
    st.integers(0, GROUP * 20), st.integers(1, GROUP * 12), st.sampled_from([DATA, ZERO])
)


@settings(max_examples=150, deadline=None)
@given(st.lists(MARKS, max_size=14), st.integers(0, GROUP * 30), st.integers(1, GROUP * 8))
def test_states_are_those_that_were_marked(
    marks: list[tuple[int, int, int]], first: int, length: int
) -> None:
    blocks, model = new_map(), [BASE] * GROUP * 40
    for at, count, state in marks:
        blocks.mark(at, count, state)
        model[at : at + count] = [state] * count
    assert states_of(blocks, 0, len(model)) == model
    stop = min(first + length, len(model))
    if first < stop:
        assert states_of(blocks, first, stop) == model[first:stop]
        uniform = blocks.uniform(first, stop)
        alike = len(set(model[first:stop])) == 1
        one_group = first // GROUP == (stop - 1) // GROUP
        assert uniform == (model[first] if alike and one_group else None)
        assert blocks.state(first) == model[first]
    assert blocks.count() == (model.count(DATA), model.count(ZERO))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(MARKS, st.booleans()), max_size=20))
def test_what_is_dirty_makes_the_same_map(steps: list[tuple[tuple[int, int, int], bool]]) -> None:
    blocks, copy, compact = new_map(), new_map(), new_map()
    for (at, count, state), take in [*steps, ((0, 1, DATA), True)]:
        blocks.mark(at, count, state)
        if take:
            zeros, groups = blocks.take_dirty()
            for low, high in zeros:
                copy.restore_zeros(low, high)
            for number, states in groups:
                copy.restore(number, states)
    end = GROUP * 40
    assert states_of(copy, 0, end) == states_of(blocks, 0, end)
    assert blocks.take_dirty() == ([], [])
    assert copy.take_dirty() == ([], []), "what comes from a log is in the log"
    zeros, groups = blocks.everything()
    for low, high in zeros:
        compact.restore_zeros(low, high)
    for number, states in groups:
        compact.restore(number, states)
    assert states_of(compact, 0, end) == states_of(blocks, 0, end)
    assert len(zeros) + len(groups) == blocks.entries


def test_dirty_changes_that_could_not_be_logged_come_again() -> None:
    blocks = new_map()
    blocks.mark(0, GROUP * MIN_RANGE, ZERO)
    blocks.mark(5, 1, DATA)
    zeros, groups = blocks.take_dirty()
    blocks.mark(GROUP * 100, GROUP * MIN_RANGE, ZERO)
    blocks.mark(6, 1, DATA)
    blocks.give_back(zeros, [number for number, _ in groups])
    again_zeros, again_groups = blocks.take_dirty()
    assert again_zeros == [(0, MIN_RANGE), (100, 100 + MIN_RANGE)]
    assert [number for number, _ in again_groups] == [0]
    assert again_groups[0][1][5:7] == bytes([DATA, DATA])


# ---- size and time


def test_a_disk_discarded_piece_by_piece_is_one_range() -> None:
    blocks = new_map()
    for piece in range(0, TIB, GROUP * MIN_RANGE):
        blocks.mark(piece, GROUP * MIN_RANGE, ZERO)
    assert blocks.entries == 1
    assert blocks.take_dirty() == ([(0, TIB // GROUP)], [])


def test_short_zeroed_pieces_make_no_ranges() -> None:
    blocks = new_map()
    for group in range(0, 2000, 2):
        blocks.mark(group * GROUP, GROUP, ZERO)
    assert blocks.zero_ranges() == []
    assert blocks.count() == (0, 1000 * GROUP)


@pytest.mark.parametrize("written", [0, 100, 20_000])
def test_64_tib_are_walked_and_trimmed_in_the_time_of_what_was_written(written: int) -> None:
    blocks, end = new_map(), 64 * TIB
    numbers = random.Random(1).sample(range(end), written)
    for number in numbers:
        blocks.mark(number, 1, DATA)
    began = time.process_time()
    runs = list(blocks.runs(0, end))
    assert sum(b - a for state, a, b in runs if state == DATA) == written
    for at in range(0, end, end // 1000):  # as extents are asked for
        next(blocks.runs(at, end))
    blocks.mark(0, end, ZERO)
    assert list(blocks.runs(0, end)) == [(ZERO, 0, end)]
    # Group by group it would be 134 million steps, over 10 s; this bound is a hundred times ours.
    assert time.process_time() - began < 5


def test_new_groups_after_a_walk_are_found_by_the_next() -> None:
    blocks, end = new_map(), 64 * TIB
    for step in range(200):
        blocks.mark(step * 500_009 * GROUP, 1, DATA)
        assert sum(1 for run in blocks.runs(0, end) if run[0] == DATA) == step + 1
    blocks.mark(0, 100 * 500_009 * GROUP, ZERO)
    blocks.mark(GROUP, 1, DATA)
    assert sum(1 for run in blocks.runs(0, end) if run[0] == DATA) == 101


def test_readers_beside_a_marker_see_each_block_before_or_after() -> None:
    """A group that is trimmed after it was written never shows as BASE in between."""
    blocks, stop = new_map(), threading.Event()
    blocks.mark(0, GROUP * 64, DATA)
    wrong: list[object] = []

    def look() -> None:
        while not stop.is_set():
            for state, a, b in blocks.runs(0, GROUP * 64):
                if state == BASE:
                    wrong.append((a, b))
            if blocks.state(GROUP * 30) == BASE:
                wrong.append("state")

    readers = [threading.Thread(target=look) for _ in range(3)]
    for reader in readers:
        reader.start()
    for _ in range(400):
        blocks.mark(0, GROUP * 64, ZERO)
        blocks.mark(GROUP * 30, GROUP * 2, DATA)
        blocks.mark(3, GROUP * 40, DATA)
    stop.set()
    for reader in readers:
        reader.join(10)
    assert wrong == []


def test_a_trimmed_group_is_zeros_before_it_is_no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """The moment that the threads above hardly ever meet."""
    blocks = new_map()
    blocks.mark(0, GROUP * 64, DATA)
    add, seen = blocks._zeros.add, []

    def look(start: int, stop: int) -> None:
        seen.append(blocks.state(GROUP * 5))
        add(start, stop)

    monkeypatch.setattr(blocks._zeros, "add", look)
    blocks.mark(0, GROUP * 64, ZERO)
    assert seen == [DATA]

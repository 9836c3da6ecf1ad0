"""No block is given twice, none is lost, and what is asked for in order lies in order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from horcrux_nbd.source.space import OutOfSpace, Space


def test_one_behind_the_other() -> None:
    space = Space([(10, 20), (30, 100)])
    assert space.take(4) == [(10, 4)]
    assert space.take(8) == [(14, 6), (30, 2)]
    assert space.take(1) == [(32, 1)]


def test_alignment_follows_the_place_in_the_file() -> None:
    space = Space([(3, 20), (37, 200)])
    # Part of a file that begins at block 2 of it; each part keeps in step after a break.
    parts = space.take(30, align=16, phase=2)
    logical = 2
    for start, count in parts:
        assert start % 16 == logical % 16
        logical += count
    assert logical == 32


def test_what_alignment_skips_is_used_in_the_end() -> None:
    space = Space([(1, 64)])
    assert space.take(16, align=16) == [(16, 16)]
    assert space.take(32) == [(32, 32)]
    assert space.take(15, align=16) == [(1, 15)]
    with pytest.raises(OutOfSpace) as error:
        space.take(1)
    assert error.value.missing == 1


def test_claims_come_first_and_new_ones_behind() -> None:
    space = Space([(0, 100)])
    assert space.claim(40, 10) == [(40, 10)]
    assert space.claim(45, 10) == [(50, 5)]
    assert space.claim(40, 15) == []
    space.begin_at(55)
    assert space.take(50) == [(55, 45), (0, 5)]
    assert space.take(35) == [(5, 35)]
    assert space.free_blocks == 0


RANGES = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 60)), min_size=1, max_size=8)
CLAIMS = st.lists(st.tuples(st.integers(0, 400), st.integers(1, 50)), max_size=8)
WISHES = st.lists(
    st.tuples(st.integers(1, 60), st.sampled_from([1, 1, 8, 32]), st.integers(0, 40)), max_size=12
)


@given(RANGES, CLAIMS, st.integers(0, 300), WISHES)
def test_every_block_once(
    ranges: list[tuple[int, int]],
    claims: list[tuple[int, int]],
    begin: int,
    wishes: list[tuple[int, int, int]],
) -> None:
    free: list[tuple[int, int]] = []
    at = 0
    for gap, size in ranges:
        free.append((at + gap, at + gap + size))
        at += gap + size + 1
    left = {block for start, end in free for block in range(start, end)}
    space = Space(free)

    def use(parts: list[tuple[int, int]]) -> int:
        for start, count in parts:
            blocks = set(range(start, start + count))
            assert blocks <= left
            left.difference_update(blocks)
        return sum(count for _, count in parts)

    for start, count in claims:
        wanted = left & set(range(start, start + count))
        assert use(space.claim(start, count)) == len(wanted)
        assert not left & wanted
    space.begin_at(begin)
    for count, align, phase in wishes:
        if count > len(left):
            with pytest.raises(OutOfSpace):
                space.take(count, align, phase)
        else:
            assert use(space.take(count, align, phase)) == count
        assert space.free_blocks == len(left)

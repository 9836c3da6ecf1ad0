"""Extents, times and device numbers; that the kernel reads them is proven in test_directory."""

from __future__ import annotations

import pytest

from horcrux_nbd.source.ext4_inode import (
    device_numbers,
    extent_tree,
    pack_time,
    read_extents,
    split_extents,
    tree_blocks,
)
from horcrux_nbd.source.ext4_inode import pack_inode as pack


def test_neighbours_join_and_long_ones_split() -> None:
    assert split_extents([(0, 100, 5), (5, 105, 5), (20, 110, 1)]) == [(0, 100, 10), (20, 110, 1)]
    assert split_extents([(0, 7, 70_000)]) == [
        (0, 7, 32768),
        (32768, 32775, 32768),
        (65536, 65543, 4464),
    ]


@pytest.mark.parametrize(
    ("extents", "blocks"),
    [(0, 0), (4, 0), (5, 1), (340, 1), (341, 2), (1360, 4), (1361, 6), (340 * 340, 341)],
)
def test_blocks_of_a_tree(extents: int, blocks: int) -> None:
    assert tree_blocks(extents) == blocks
    written: dict[int, bytes] = {}
    root = extent_tree(
        [(2 * at, 10**9 + at, 1) for at in range(extents)],
        list(range(blocks)),
        written.__setitem__,
    )
    assert len(root) == 60
    assert set(written) == set(range(blocks))
    assert all(len(data) == 4096 for data in written.values())


def test_extents_can_be_read_back() -> None:
    extents = [(0, (1 << 40) + 5, 3), (9, 77, 32768)]
    inode = pack(
        mode=0o100644,
        uid=0,
        gid=0,
        size=0,
        links=1,
        blocks=0,
        mtime=0,
        body=extent_tree(extents, [], lambda block, data: None),
        mapped=True,
    )
    assert read_extents(inode) == extents


@pytest.mark.parametrize(
    ("time", "packed"),
    [
        (0, (0, 0)),
        (1_999_999_999, (1, 999_999_999 << 2)),
        (-1, ((1 << 32) - 1, 999_999_999 << 2)),
        ((1 << 31) * 10**9, (1 << 31, 1)),
        ((1 << 32) * 10**9 + 7, (0, 7 << 2 | 1)),
        (-(10**30), (1 << 31, 0)),
        (10**30, ((1 << 31) - 1, 3)),
    ],
)
def test_times_beyond_2038_and_before_1970(time: int, packed: tuple[int, int]) -> None:
    assert pack_time(time) == packed


def test_device_numbers_short_and_long() -> None:
    assert device_numbers(1, 3)[:8] == bytes([3, 1, 0, 0, 0, 0, 0, 0])
    assert device_numbers(259, 70_000)[:4] == bytes(4)
    assert len(device_numbers(259, 70_000)) == 60

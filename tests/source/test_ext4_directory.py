"""Directory blocks; that the kernel and e2fsck read them is proven in test_directory."""

from __future__ import annotations

import struct

from horcrux_nbd.source.ext4_directory import directory_blocks


def names_in(block: bytes) -> list[bytes]:
    found, at = [], 0
    while at < len(block) - 12:
        inode, length, size, _ = struct.unpack_from("<IHBB", block, at)
        if inode:
            found.append(block[at + 8 : at + 8 + size])
        at += length
    assert at == len(block) - 12
    return found


def test_one_block_in_order() -> None:
    names = [(b"%03d" % number, 20 + number, 1) for number in range(100)]
    blocks = directory_blocks(12, 2, names, lambda name: (0, 0), 1)
    assert len(blocks) == 1
    assert names_in(blocks[0]) == [b".", b"..", *(name for name, _, _ in names)]


def test_names_of_one_hash_go_on_in_the_next_block() -> None:
    """Then the hash in the index is odd: the kernel looks into the block before, too."""
    names = [(b"%0250d" % number, 20, 1) for number in range(30)]
    blocks = directory_blocks(12, 2, names, lambda name: (1000, 0), 1)
    limit, count, first = struct.unpack_from("<HHI", blocks[0], 32)
    assert (limit, count, first) == (507, len(blocks) - 1, 1)
    for at in range(1, count):
        assert struct.unpack_from("<II", blocks[0], 32 + 8 * at) == (1001, at + 1)
    assert sorted(name for block in blocks[1:] for name in names_in(block)) == [
        name for name, _, _ in names
    ]


def test_leaves_have_room_for_new_names() -> None:
    names = [(b"%0250d" % number, 20, 1) for number in range(300)]
    blocks = directory_blocks(12, 2, names, lambda name: (int(name) * 2, 0), 1)
    assert all(len(names_in(block)) <= 13 for block in blocks[1:])

"""Where the data of a file lies: extent trees, and the block lists of ext2 and ext3.

Source: Linux Documentation/filesystems/ext4/ifork.rst, blockmap.rst.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from .blocks import Blocks
from .crc32c import crc32c
from .inode import EXTENTS, Inode
from .superblock import Superblock

_HEADER = struct.Struct("<HHHHI")
_LEAF = struct.Struct("<IHHI")
_INDEX = struct.Struct("<IIHH")
_MAGIC = 0xF30A
_MAX_DEPTH = 5
_UNWRITTEN = 32768  # a count above it: room that reads as zeros
_DIRECT = 12


class Extent(NamedTuple):
    """`length` blocks of a file from its block `logical` on, at block `physical` of the image."""

    logical: int
    physical: int
    length: int


class Mapper:
    """Walks the trees of one file system. Room that was never written shows as a hole."""

    def __init__(self, superblock: Superblock, image: Blocks) -> None:
        self._super, self._image = superblock, image

    def extents(self, inode: Inode, seed: int) -> Iterator[Extent]:
        """The file's data, ascending; `seed` is what the checksums of its tree begin with.

        Raises Damaged. However the tree is forged, it ends: the file's blocks are counted, and
        there cannot be more of them than the file system has.
        """
        found = self._tree(inode, seed) if inode.flags & EXTENTS else self._lists(inode)
        total, end = 0, 0
        for extent in found:
            total += extent.length
            if extent.logical < end or total > self._super.blocks:
                raise self._image.damaged(f"blocks of inode {inode.number} are named twice")
            if extent.physical < 1 or extent.physical + extent.length > self._super.blocks:
                raise self._image.damaged(
                    f"inode {inode.number} lies in block {extent.physical}, of {self._super.blocks}"
                )
            end = extent.logical + extent.length
            yield extent

    # ---- extent trees

    def _tree(self, inode: Inode, seed: int) -> Iterator[Extent]:
        depth = int.from_bytes(inode.body[6:8], "little")
        if depth > _MAX_DEPTH:
            raise self._bad(inode)
        yield from self._node(inode, seed, inode.body, depth, 0, 1 << 32)

    def _bad(self, inode: Inode) -> Exception:
        return self._image.damaged(f"the extent tree of inode {inode.number}")

    def _node(
        self, inode: Inode, seed: int, node: bytes, depth: int, low: int, high: int
    ) -> Iterator[Extent]:
        """What is below `node`, all of it in [low, high): so no node serves twice."""
        magic, entries, most, level, _ = _HEADER.unpack_from(node)
        room = (len(node) - _HEADER.size) // _LEAF.size
        if magic != _MAGIC or level != depth or not entries <= most <= room:
            raise self._bad(inode)
        if not entries and node is not inode.body:
            raise self._bad(inode)
        if depth == 0:
            for at in range(_HEADER.size, _HEADER.size + entries * _LEAF.size, _LEAF.size):
                logical, count, physical_high, physical = _LEAF.unpack_from(node, at)
                written = count <= _UNWRITTEN
                count = count if written else count - _UNWRITTEN
                if not count or logical < low or logical + count > high:
                    raise self._bad(inode)
                low = logical + count
                if written:
                    yield Extent(logical, physical | physical_high << 32, count)
            return
        children = []
        for at in range(_HEADER.size, _HEADER.size + entries * _INDEX.size, _INDEX.size):
            logical, child, child_high, _ = _INDEX.unpack_from(node, at)
            if logical < low:
                raise self._bad(inode)
            low = logical + 1
            children.append((logical, child | child_high << 32))
        stops = [logical for logical, _ in children[1:]] + [high]
        for (logical, child), stop in zip(children, stops, strict=True):
            block = self._image.block(child)
            self._check(inode, seed, block)
            yield from self._node(inode, seed, block, depth - 1, logical, stop)

    def _check(self, inode: Inode, seed: int, block: bytes) -> None:
        if not self._super.checksums:
            return
        most = int.from_bytes(block[4:6], "little")
        end = _HEADER.size + most * _LEAF.size
        if end + 4 > len(block) or crc32c(seed, block[:end]) != int.from_bytes(
            block[end : end + 4], "little"
        ):
            raise self._image.damaged(
                f"the checksum of the extent tree of inode {inode.number} is wrong"
            )

    # ---- block lists

    def _lists(self, inode: Inode) -> Iterator[Extent]:
        """Runs of the direct blocks, then of those that one, two and three levels lead to."""
        # Behind the end there is room at most, which holds nothing of the file.
        limit = -(-inode.size // self._super.block_size)
        run: list[int] = []
        for logical, physical in self._pointers(inode, limit):
            if run and logical == run[0] + run[2] and physical == run[1] + run[2]:
                run[2] += 1
                continue
            if run:
                yield Extent(*run)
            run = [logical, physical, 1]
        if run:
            yield Extent(*run)

    def _pointers(self, inode: Inode, limit: int) -> Iterator[tuple[int, int]]:
        pointers = struct.unpack("<15I", inode.body)
        for logical in range(min(_DIRECT, limit)):
            if pointers[logical]:
                yield logical, pointers[logical]
        per_block = self._super.block_size // 4
        start, seen = _DIRECT, [0]
        for level in (1, 2, 3):
            if start >= limit:
                return
            if pointers[_DIRECT + level - 1]:
                block = pointers[_DIRECT + level - 1]
                yield from self._indirect(inode, block, level, start, limit, seen)
            start += per_block**level

    def _indirect(
        self, inode: Inode, number: int, level: int, start: int, limit: int, seen: list[int]
    ) -> Iterator[tuple[int, int]]:
        seen[0] += 1
        if seen[0] > self._super.blocks:
            raise self._image.damaged(f"block lists of inode {inode.number} are named twice")
        block = self._image.block(number)
        span = (len(block) // 4) ** (level - 1)
        for slot, pointer in enumerate(struct.unpack(f"<{len(block) // 4}I", block)):
            logical = start + slot * span
            if logical >= limit:
                return
            if not pointer:
                continue
            if level == 1:
                yield logical, pointer
            else:
                yield from self._indirect(inode, pointer, level - 1, logical, limit, seen)

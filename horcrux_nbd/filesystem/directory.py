"""Directories: the entries in their blocks.

An indexed directory (htree) is read as what it also is, a row of blocks with entries: its index
only says which of them holds a name. Source: Linux Documentation/filesystems/ext4/directory.rst.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from .blocks import Blocks
from .crc32c import crc32c
from .superblock import FILETYPE, Superblock

_ENTRY = struct.Struct("<IHBB")
_TAIL = struct.Struct("<IHBBI")
_COUNT = struct.Struct("<HH")
_TAIL_TYPE = 0xDE
DIRECTORY_TYPE = 2  # of an entry: it names a directory


class Entry(NamedTuple):
    """A name in a directory. `type` is 0 where the file system does not tell it here."""

    name: bytes
    inode: int
    type: int


class Directories:
    """Takes directory blocks apart. `.` and `..` do not show. Raises Damaged."""

    def __init__(self, superblock: Superblock, image: Blocks) -> None:
        self._super, self._image = superblock, image
        self._typed = bool(superblock.incompat & FILETYPE)

    def entries(self, block: bytes, what: str) -> Iterator[Entry]:
        """The entries in one block, or in the part of an inode that holds some."""
        end, at = len(block), 0
        inodes, typed = self._super.inodes, self._typed
        unpack = _ENTRY.unpack_from
        while at + 8 <= end:
            number, length, name_length, kind = unpack(block, at)
            if length == 65535 or (length == 0 and end == 65536):
                length = 65536  # the one length that 16 bits cannot hold
            if length < 8 + name_length or length & 3 or at + length > end or length < 8:
                raise self._image.damaged(f"an entry of {what}")
            if number:
                name = block[at + 8 : at + 8 + name_length]
                if name not in (b".", b".."):
                    if not name or name_length > 255 or b"/" in name or b"\0" in name:
                        raise self._image.damaged(f"a name that cannot be in {what}")
                    if number > inodes:
                        raise self._image.damaged(f"{what} names inode {number}, of {inodes}")
                    yield Entry(name, number, kind if typed and kind < 8 else 0)
            at += length
        if at != end:
            raise self._image.damaged(f"an entry of {what}")

    def check(self, block: bytes, seed: int, indexed: bool, what: str) -> None:
        """Compare the block's checksum, where the file system has them."""
        if not self._super.checksums:
            return
        *tail, stored = _TAIL.unpack_from(block, len(block) - _TAIL.size)
        sound = tail == [0, 12, 0, _TAIL_TYPE] and crc32c(seed, block[: -_TAIL.size]) == stored
        # The tail of an index block may look the same: the kernel reuses a block with entries.
        if not sound and not (indexed and self._index_is_sound(block, seed)):
            raise self._image.damaged(f"the checksum of a block of {what} is wrong")

    def _index_is_sound(self, block: bytes, seed: int) -> bool:
        """For a block of the index itself (kernel: ext4_dx_csum)."""
        (_, length, _, _) = _ENTRY.unpack_from(block)
        counts = 8 if length in (len(block), 65535, 0) else 32
        limit, count = _COUNT.unpack_from(block, counts)
        tail, end = counts + limit * 8, counts + count * 8
        if count > limit or tail + 8 > len(block):
            return False
        crc = crc32c(crc32c(seed, block[:end]), block[tail : tail + 4] + bytes(4))
        return crc == int.from_bytes(block[tail + 4 : tail + 8], "little")

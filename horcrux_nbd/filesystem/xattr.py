"""Extended attributes: in the inode, in a block, and values in inodes of their own.

Source: Linux Documentation/filesystems/ext4/attributes.rst, fs/ext4/acl.h.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

from .blocks import Blocks
from .crc32c import crc32c
from .inode import Inode
from .superblock import Superblock

_MAGIC = 0xEA020000
_HEADER = 32
_ENTRY = struct.Struct("<BBHIII")
_PREFIXES = {
    1: b"user.",
    2: b"system.posix_acl_access",
    3: b"system.posix_acl_default",
    4: b"trusted.",
    6: b"security.",
    7: b"system.",
    8: b"system.richacl",
}
_ENCRYPTION = 9
_ACLS = (2, 3)
_ACL_USER, _ACL_GROUP = 0x02, 0x08  # tags with a number behind them
MAX_VALUE = 65536  # XATTR_SIZE_MAX of the kernel
INLINE_DATA = b"system.data"  # the rest of a small file; no attribute to anybody else


class _Found(NamedTuple):
    prefix: int
    name: bytes
    at: int
    size: int
    inode: int  # that holds the value; 0: it is here


class Attributes:
    """Reads attributes. `value_of(inode number, size)` reads a value that has an inode."""

    def __init__(
        self, superblock: Superblock, image: Blocks, value_of: Callable[[int, int], bytes]
    ) -> None:
        self._super, self._image, self._value_of = superblock, image, value_of

    def read(self, inode: Inode) -> dict[bytes, bytes]:
        """All attributes, as listxattr(2) and getxattr(2) give them to root. Raises Damaged."""
        found: dict[bytes, bytes] = {}
        for name, value in self._all(inode):
            if name in found:
                raise self._image.damaged(f"inode {inode.number} has the attribute {name!r} twice")
            found[name] = value
        found.pop(INLINE_DATA, None)
        return found

    def inline(self, inode: Inode) -> bytes:
        """The part of an inline file that does not fit between its fields."""
        for name, value in self._inside(inode):
            if name == INLINE_DATA:
                return value
        return b""

    def _all(self, inode: Inode) -> Iterator[tuple[bytes, bytes]]:
        yield from self._inside(inode)
        if inode.xattr_block:
            yield from self._in_block(inode)

    def _inside(self, inode: Inode) -> Iterator[tuple[bytes, bytes]]:
        area = inode.raw[inode.extra :]
        if len(area) >= 8 and int.from_bytes(area[:4], "little") == _MAGIC:
            yield from self._entries(inode, area[4:], 0)

    def _in_block(self, inode: Inode) -> Iterator[tuple[bytes, bytes]]:
        number = inode.xattr_block
        block = self._image.block(number)
        if int.from_bytes(block[:4], "little") != _MAGIC or block[8:12] != b"\1\0\0\0":
            raise self._image.damaged(f"the attributes of inode {inode.number}")
        if self._super.checksums:
            data = block[:16] + bytes(4) + block[20:]
            crc = crc32c(crc32c(self._super.seed, struct.pack("<Q", number)), data)
            if crc != int.from_bytes(block[16:20], "little"):
                raise self._image.damaged(
                    f"the checksum of the attributes of inode {inode.number} is wrong"
                )
        yield from self._entries(inode, block, _HEADER)

    def _entries(self, inode: Inode, area: bytes, at: int) -> Iterator[tuple[bytes, bytes]]:
        """The entries in `area` from `at` on, whose values' offsets are from its beginning."""
        for found in self._parse(inode, area, at):
            prefix = _PREFIXES.get(found.prefix)
            if found.prefix == _ENCRYPTION:
                continue
            if prefix is None:
                prefix = b"unknown-%d." % found.prefix
            if found.inode:
                value = self._value_of(found.inode, found.size)
            else:
                value = area[found.at : found.at + found.size]
            if found.prefix in _ACLS:
                value = self._acl(inode, value)
            yield prefix + found.name, value

    def _parse(self, inode: Inode, area: bytes, at: int) -> Iterator[_Found]:
        bad = self._image.damaged(f"the attributes of inode {inode.number}")
        while at + 4 <= len(area) and area[at : at + 4] != b"\0\0\0\0":
            if at + _ENTRY.size > len(area):
                raise bad
            name_length, index, offset, value_inode, size, _ = _ENTRY.unpack_from(area, at)
            name = area[at + _ENTRY.size : at + _ENTRY.size + name_length]
            here = not value_inode
            if len(name) != name_length or b"\0" in name or size > MAX_VALUE:
                raise bad
            if here and size and offset + size > len(area):
                raise bad
            yield _Found(index, name, offset, size, value_inode)
            at += -(-(_ENTRY.size + name_length) // 4) * 4

    def _acl(self, inode: Inode, value: bytes) -> bytes:
        """ext4 keeps version 1 of an ACL, short; xattr(7) gives version 2, 8 bytes an entry."""
        bad = self._image.damaged(f"the ACL of inode {inode.number}")
        if value[:4] != b"\1\0\0\0":
            raise bad
        parts, at = [b"\2\0\0\0"], 4
        while at < len(value):
            if at + 4 > len(value):
                raise bad
            tag, permissions = struct.unpack_from("<HH", value, at)
            at += 4
            number = 0xFFFFFFFF
            if tag in (_ACL_USER, _ACL_GROUP):
                if at + 4 > len(value):
                    raise bad
                (number,) = struct.unpack_from("<I", value, at)
                at += 4
            parts.append(struct.pack("<HHI", tag, permissions, number))
        return b"".join(parts)

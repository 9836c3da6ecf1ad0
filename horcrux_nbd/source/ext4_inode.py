"""ext4 inodes and extent trees as bytes.

Source: Linux Documentation/filesystems/ext4/ (inodes, ifork). Little endian, blocks of 4 KiB,
inodes of 256 bytes of which 160 are fields and 96 hold extended attributes.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Callable, Sequence

from .libext2fs import BLOCK, INODE

Extent = tuple[int, int, int]  # logical block, physical block, count

XATTR_ROOM = INODE - 160
MAX_FILE_BLOCKS = (1 << 32) - 1  # logical block numbers have 32 bits
MAX_LINKS = 65000
FAST_LINK = 60  # bytes that the inode has for block numbers; a shorter link's target lies there

_EXTENTS, _INDEXED = 0x80000, 0x1000  # i_flags
_HUGE_FILE = 0x40000
_EXTENT_BLOCKS = 32768  # in one extent that holds data
_EXTENT_MAGIC = 0xF30A
_IN_INODE = 4  # extents that fit into the inode
_IN_BLOCK = (BLOCK - 16) // 12  # a header of 12 bytes, a checksum of 4
_EXTRA_SIZE = 32  # i_extra_isize: up to and with the creation time and project

_HEADER = struct.Struct("<HHHHI")
_LEAF = struct.Struct("<IHHI")
_INDEX = struct.Struct("<IIHH")
_FIELDS = struct.Struct("<HHIIIIIHHIII60sIIIIHHHHHHHHIIIIIII")


def split_extents(extents: Sequence[Extent]) -> list[Extent]:
    """The same blocks in extents as ext4 has them: at most 128 MiB each, neighbours joined."""
    joined: list[list[int]] = []
    for logical, physical, count in extents:
        if joined:
            last = joined[-1]
            if last[0] + last[2] == logical and last[1] + last[2] == physical:
                last[2] += count
                continue
        joined.append([logical, physical, count])
    return [
        (logical + at, physical + at, min(_EXTENT_BLOCKS, count - at))
        for logical, physical, count in joined
        for at in range(0, count, _EXTENT_BLOCKS)
    ]


def tree_blocks(extents: int) -> int:
    """How many blocks beside the inode a tree of that many (split) extents takes."""
    blocks, level = 0, extents
    while level > _IN_INODE:
        level = -(-level // _IN_BLOCK)
        blocks += level
    return blocks


def extent_tree(
    extents: Sequence[Extent], blocks: Sequence[int], write: Callable[[int, bytes], None]
) -> bytes:
    """The 60 bytes of the inode that lead to `extents` (split, ascending).

    `write(block, data)` gets the nodes that do not fit into the inode, one for each of `blocks`
    (`tree_blocks` says how many).
    """
    entries = [
        (logical, _LEAF.pack(logical, count, physical >> 32, physical & 0xFFFFFFFF))
        for logical, physical, count in extents
    ]
    unused = iter(blocks)
    depth = 0
    while len(entries) > _IN_INODE:
        above = []
        for at in range(0, len(entries), _IN_BLOCK):
            part = entries[at : at + _IN_BLOCK]
            block = next(unused)
            node = _HEADER.pack(_EXTENT_MAGIC, len(part), _IN_BLOCK, depth, 0)
            node += b"".join(entry for _, entry in part)
            write(block, node.ljust(BLOCK, b"\0"))
            logical = part[0][0]
            above.append((logical, _INDEX.pack(logical, block & 0xFFFFFFFF, block >> 32, 0)))
        entries = above
        depth += 1
    root = _HEADER.pack(_EXTENT_MAGIC, len(entries), _IN_INODE, depth, 0)
    return (root + b"".join(entry for _, entry in entries)).ljust(FAST_LINK, b"\0")


def device_numbers(major: int, minor: int) -> bytes:
    """The 60 bytes of a device's inode: the short form where it fits (kernel: old_encode_dev)."""
    if major < 256 and minor < 256:
        return struct.pack("<I", major << 8 | minor).ljust(FAST_LINK, b"\0")
    number = (minor & 0xFF) | major << 8 | (minor & ~0xFF) << 12
    return struct.pack("<II", 0, number & 0xFFFFFFFF).ljust(FAST_LINK, b"\0")


def pack_time(nanoseconds: int) -> tuple[int, int]:
    """Seconds, and the extra field: two more bits of seconds, thirty of nanoseconds.

    Reaches from 1901 to 2446; what lies outside is moved to that border.
    """
    seconds, rest = divmod(nanoseconds, 10**9)
    if not -(1 << 31) <= seconds < (1 << 34) - (1 << 31):
        seconds, rest = (-(1 << 31), 0) if seconds < 0 else ((1 << 34) - (1 << 31) - 1, 0)
    epoch = (seconds + (1 << 31)) >> 32
    return seconds & 0xFFFFFFFF, rest << 2 | epoch


def pack_inode(
    *,
    mode: int,
    uid: int,
    gid: int,
    size: int,
    links: int,
    blocks: int,
    mtime: int,
    body: bytes,
    mapped: bool,
    indexed: bool = False,
    xattr_block: int = 0,
    xattrs: bytes = b"",
) -> bytes:
    """256 bytes. `blocks` counts all it takes, in blocks of 4 KiB; `mtime` in nanoseconds.

    `body` is what `extent_tree` (then `mapped`), `device_numbers` or a short link's target give;
    `xattrs` at most XATTR_ROOM bytes. All four times are `mtime`: a file's access, change and
    creation time differ from copy to copy, and the image shall not.
    """
    seconds, extra = pack_time(mtime)
    flags = (_EXTENTS if mapped else 0) | (_INDEXED if indexed else 0)
    sectors = blocks * (BLOCK // 512)
    if sectors >= 1 << 48:  # counted in blocks from there on
        sectors, flags = blocks, flags | _HUGE_FILE
    if stat.S_ISDIR(mode) and links > MAX_LINKS:
        links = 1  # dir_nlink: too many to count
    return _FIELDS.pack(
        mode,
        uid & 0xFFFF,
        size & 0xFFFFFFFF,
        seconds,  # accessed
        seconds,  # changed
        seconds,  # modified
        0,  # deleted
        gid & 0xFFFF,
        links,
        sectors & 0xFFFFFFFF,
        flags,
        0,  # version
        body,
        0,  # generation
        xattr_block & 0xFFFFFFFF,
        size >> 32,
        0,  # fragment
        sectors >> 32,
        xattr_block >> 32,
        uid >> 16,
        gid >> 16,
        0,  # checksum
        0,
        _EXTRA_SIZE,
        0,  # checksum
        extra,  # changed
        extra,  # modified
        extra,  # accessed
        seconds,  # created
        extra,
        0,  # version
        0,  # project
    ) + xattrs.ljust(XATTR_ROOM, b"\0")


def read_extents(inode: bytes) -> list[Extent]:
    """The extents in an inode that has no further blocks of them; empty if it maps nothing."""
    (flags,) = struct.unpack_from("<I", inode, 0x20)
    magic, count, _, depth, _ = _HEADER.unpack_from(inode, 0x28)
    if not flags & _EXTENTS or magic != _EXTENT_MAGIC or depth:
        return []
    extents = []
    for at in range(count):
        logical, size, high, low = _LEAF.unpack_from(inode, 0x28 + 12 * (at + 1))
        extents.append((logical, high << 32 | low, size))
    return extents

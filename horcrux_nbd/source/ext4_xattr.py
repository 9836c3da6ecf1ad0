"""Extended attributes and ACLs as ext4 stores them: in the inode, the rest in one block.

Source: Linux Documentation/filesystems/ext4/attributes.rst, fs/ext4/acl.h.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from ..errors import UsageError
from .ext4_inode import XATTR_ROOM
from .libext2fs import BLOCK, xattr_hash

_MAGIC = 0xEA020000
_HEADER = struct.Struct("<IIIII12x")
_ENTRY = struct.Struct("<BBHIII")
_END = 4  # bytes of zeros behind the last entry
_ACLS = {b"system.posix_acl_access": 2, b"system.posix_acl_default": 3}
_PREFIXES = ((b"user.", 1), (b"trusted.", 4), (b"security.", 6))
_ACL_USER, _ACL_GROUP = 0x02, 0x08  # tags with a number behind them
MAX_REFERENCES = 1024  # files that share one block (kernel: EXT4_XATTR_REFCOUNT_MAX)

Attribute = tuple[int, bytes, bytes]  # number of the prefix, rest of the name, value


def to_disk(pairs: Sequence[tuple[bytes, bytes]]) -> list[Attribute]:
    """Attributes as xattr(7) shows them, in the form and order that ext4 has them in.

    Raises UsageError for a name that ext4 cannot hold.
    """
    attributes = []
    for name, value in pairs:
        if name in _ACLS:
            attributes.append((_ACLS[name], b"", _acl_to_disk(value)))
            continue
        for prefix, index in _PREFIXES:
            if name.startswith(prefix):
                attributes.append((index, name[len(prefix) :], value))
                break
        else:
            raise UsageError(f"ext4 cannot hold the attribute {name.decode(errors='replace')}")
    # The kernel's search in a block relies on this order.
    return sorted(attributes, key=lambda a: (a[0], len(a[1]), a[1]))


def pack(attributes: Sequence[Attribute]) -> tuple[bytes, bytes]:
    """(bytes for the inode, bytes of a block); either is empty where it is not needed.

    The block names one file that uses it; `with_references` changes that. Raises UsageError if
    they take more than both hold.
    """
    inside: list[Attribute] = []
    outside: list[Attribute] = []
    room = XATTR_ROOM - 4 - _END
    # Small ones first: what is in the inode costs no block and no read of one.
    for attribute in sorted(attributes, key=lambda a: (_size(a), a)):
        if _size(attribute) <= room:
            inside.append(attribute)
            room -= _size(attribute)
        else:
            outside.append(attribute)
    if sum(map(_size, outside)) > BLOCK - _HEADER.size - _END:
        raise UsageError("has more extended attributes than ext4 can hold (about 4 KiB)")
    in_inode = in_block = b""
    if inside:
        entries, values, _ = _lay_out(sorted(inside, key=_order), XATTR_ROOM - 4, 0)
        in_inode = struct.pack("<I", _MAGIC) + _join(entries, values, XATTR_ROOM - 4)
    if outside:
        room = BLOCK - _HEADER.size
        entries, values, digest = _lay_out(sorted(outside, key=_order), room, _HEADER.size)
        in_block = _HEADER.pack(_MAGIC, 1, 1, digest, 0) + _join(entries, values, room)
    return in_inode, in_block


def with_references(block: bytes, count: int) -> bytes:
    """`block` as one that `count` files share."""
    return block[:4] + struct.pack("<I", count) + block[8:]


def _order(attribute: Attribute) -> tuple[int, int, bytes]:
    return attribute[0], len(attribute[1]), attribute[1]


def _pad(data: bytes) -> bytes:
    return data.ljust((len(data) + 3) & ~3, b"\0")


def _size(attribute: Attribute) -> int:
    return len(_pad(bytes(_ENTRY.size) + attribute[1])) + len(_pad(attribute[2]))


def _lay_out(attributes: Sequence[Attribute], room: int, base: int) -> tuple[bytes, bytes, int]:
    """Entries, the values that end the room (last first), and the hash of all."""
    entries, values, digest = b"", b"", 0
    for index, name, value in attributes:
        padded = _pad(value)
        values = padded + values
        offset = base + room - len(values) if value else 0
        entry = _ENTRY.pack(len(name), index, offset, 0, len(value), 0) + name
        entry_hash = xattr_hash(entry, padded)
        entries += _pad(entry[:12] + struct.pack("<I", entry_hash) + name)
        digest = ((digest << 16 | digest >> 16) & 0xFFFFFFFF) ^ entry_hash
    return entries, values, digest


def _join(entries: bytes, values: bytes, room: int) -> bytes:
    return entries + bytes(room - len(entries) - len(values)) + values


def _acl_to_disk(value: bytes) -> bytes:
    """xattr(7) gives an ACL in version 2 (8 bytes an entry); ext4 keeps version 1."""
    if len(value) < 4 or (len(value) - 4) % 8 or value[:4] != b"\x02\0\0\0":
        raise UsageError("has an ACL of an unknown form")
    packed = struct.pack("<I", 1)
    for tag, permissions, number in struct.iter_unpack("<HHI", value[4:]):
        packed += struct.pack("<HH", tag, permissions)
        if tag in (_ACL_USER, _ACL_GROUP):
            packed += struct.pack("<I", number)
    return packed

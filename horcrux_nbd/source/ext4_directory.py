"""ext4 directories as blocks of bytes: one block in order of names, or a hash tree of many.

Source: Linux Documentation/filesystems/ext4/directory.rst. Blocks end in a tail that
libext2fs fills with their checksum.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence

from ..errors import UsageError
from .libext2fs import BLOCK

Name = tuple[bytes, int, int]  # name, inode, type of file

_HEAD = struct.Struct("<IHBB")
_TAIL = struct.pack("<IHBBI", 0, 12, 0, 0xDE, 0)
_ROOM = BLOCK - len(_TAIL)
# What the kernel leaves when it splits blocks is about this full; full blocks would all split at
# the first new names. e2fsck -D leaves the same.
_FILL = _ROOM * 80 // 100
_ROOT_LIMIT = (BLOCK - 32 - 8) // 8
_NODE_LIMIT = (BLOCK - 8 - 8) // 8
_TYPE_DIRECTORY = 2

# The type of file in the mode (S_IFMT >> 12) → in a directory entry.
FILE_TYPES = {0o10: 1, 0o4: 2, 0o2: 3, 0o6: 4, 0o1: 5, 0o14: 6, 0o12: 7}


def directory_blocks(
    number: int,
    parent: int,
    names: Iterable[Name],
    name_hash: Callable[[bytes], tuple[int, int]],
    hash_version: int,
) -> list[bytes]:
    """The blocks of directory inode `number` that lies in `parent`; more than one is indexed.

    Raises UsageError for more names than ext4 takes.
    """
    items = [_pack(name, inode, kind) for name, inode, kind in names]
    dots = [_pack(b".", number, _TYPE_DIRECTORY), _pack(b"..", parent, _TYPE_DIRECTORY)]
    if sum(map(len, items)) + 24 <= _ROOM:
        return [_leaf(dots + items)]
    # Entries begin with inode (4), length (2), length of the name (1), type (1), name.
    hashed = sorted((*name_hash(item[8 : 8 + item[6]]), item) for item in items)
    leaves: list[tuple[int, bytes]] = []
    part: list[bytes] = []
    filled = first = 0
    previous = -1
    for major, _, item in hashed:
        if filled + len(item) > _FILL and part:
            leaves.append((first, _leaf(part)))
            part, filled = [], 0
        if not part:
            # An odd hash says that names of that hash are in the block before, too.
            first = major | 1 if major == previous else major
        part.append(item)
        filled += len(item)
        previous = major
    leaves.append((first, _leaf(part)))
    return _index(dots, leaves, hash_version)


def _pack(name: bytes, inode: int, kind: int) -> bytes:
    length = (8 + len(name) + 3) & ~3
    return (_HEAD.pack(inode, length, len(name), kind) + name).ljust(length, b"\0")


def _leaf(items: Sequence[bytes]) -> bytes:
    # The last entry reaches to the tail.
    data = bytearray(b"".join(items))
    at = len(data) - len(items[-1])
    struct.pack_into("<H", data, at + 4, _ROOM - at)
    return bytes(data).ljust(_ROOM, b"\0") + _TAIL


def _index(
    dots: Sequence[bytes], leaves: Sequence[tuple[int, bytes]], hash_version: int
) -> list[bytes]:
    """The root, the nodes below it if there are any, then the leaves."""
    levels = 0 if len(leaves) <= _ROOT_LIMIT else 1
    nodes = [leaves[at : at + _NODE_LIMIT] for at in range(0, len(leaves), _NODE_LIMIT)]
    if levels and len(nodes) > _ROOT_LIMIT:
        raise UsageError("a directory has more names than ext4 takes in one")
    inner: list[bytes] = []
    if levels:
        below = [(node[0][0], 1 + at) for at, node in enumerate(nodes)]
        first_leaf = 1 + len(nodes)
        for node in nodes:
            pairs = [(node_hash, first_leaf + at) for at, (node_hash, _) in enumerate(node)]
            first_leaf += len(node)
            inner.append(_HEAD.pack(0, BLOCK, 0, 0) + _entries(pairs, _NODE_LIMIT))
    else:
        below = [(leaf_hash, 1 + at) for at, (leaf_hash, _) in enumerate(leaves)]
    dot_dot = bytearray(dots[1])
    struct.pack_into("<H", dot_dot, 4, BLOCK - 12)
    root = dots[0] + dot_dot + struct.pack("<IBBBB", 0, hash_version, 8, levels, 0)
    root += _entries(below, _ROOT_LIMIT)
    return [block.ljust(BLOCK, b"\0") for block in (root, *inner, *(leaf for _, leaf in leaves))]


def _entries(pairs: Sequence[tuple[int, int]], limit: int) -> bytes:
    # The first has no hash: the limit and the count lie in its place.
    head = struct.pack("<HHI", limit, len(pairs), pairs[0][1])
    return head + b"".join(struct.pack("<II", *pair) for pair in pairs[1:])

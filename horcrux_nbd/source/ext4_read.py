"""Reads the metadata of an ext4 through any function that reads a disk, nothing else of it.

For layouts of earlier versions (and whoever wants to know what lies in an image without mounting
it). Every field is checked before it is used: an image may come from anywhere. Not for file
systems with blocks other than 4 KiB, meta_bg or a journal that has to be replayed.

Source: Linux Documentation/filesystems/ext4/.
"""

from __future__ import annotations

import functools
import stat
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..errors import Damaged, UsageError
from .ext4_inode import Extent
from .ext4_make import Geometry
from .layout import Layout, Place
from .libext2fs import BLOCK

Read = Callable[[int, int], bytes]  # offset, length

ROOT = 2
_READ_AT_ONCE = 64  # blocks; metadata lies together, and a read may cost a fetch
_CACHED = 256  # such reads that are kept: 64 MiB
_MAX_DEPTH = 5  # of an extent tree, by the format

_EXTENTS_FLAG = 0x80000
_INLINE_DATA = 0x10000000
_META_BG, _HAS_64BIT, _NEEDS_RECOVERY = 0x10, 0x80, 0x4  # s_feature_incompat


@dataclass(frozen=True, slots=True)
class Inode:
    """What is known of a file beside its names."""

    number: int
    mode: int
    uid: int
    gid: int
    size: int
    links: int
    flags: int
    xattr_block: int  # 0 for none
    body: bytes  # 60 bytes: the root of its extents, or what a short link leads to


class Ext4Image:
    """The ext4 that `read(offset, length)` reads. Raises UsageError where it is none of ours."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self._piece = functools.lru_cache(maxsize=_CACHED)(
            lambda number: read(number * _READ_AT_ONCE * BLOCK, _READ_AT_ONCE * BLOCK)
        )
        data = read(1024, 1024)
        if data[0x38:0x3A] != b"\x53\xef":
            raise UsageError("there is no ext4 in this image")
        self.inodes, low = struct.unpack_from("<II", data, 0)
        (block_bits,) = struct.unpack_from("<I", data, 0x18)
        (self._per_group,) = struct.unpack_from("<I", data, 0x28)
        (self._inode_size,) = struct.unpack_from("<H", data, 0x58)
        (incompat,) = struct.unpack_from("<I", data, 0x60)
        wide = bool(incompat & _HAS_64BIT)
        high = struct.unpack_from("<I", data, 0x150)[0] if wide else 0
        self.blocks = high << 32 | low
        self._descriptor = struct.unpack_from("<H", data, 0xFE)[0] if wide else 32
        if block_bits != 2 or incompat & (_META_BG | _NEEDS_RECOVERY):
            raise UsageError(
                "this ext4 cannot be read without mounting it: it was not unmounted or frozen, "
                "or was made with other options"
            )
        if not self._per_group or self._inode_size < 128 or self._descriptor < 32:
            raise Damaged("the super block of the ext4 in this image is damaged")

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.blocks * BLOCK, self.inodes)

    def block(self, number: int, count: int = 1) -> bytes:
        """Blocks as they are on the disk."""
        return self._bytes(number * BLOCK, count * BLOCK)

    def inode(self, number: int) -> Inode:
        """Raises Damaged for a number that there is not."""
        if not 1 <= number <= self.inodes:
            raise Damaged(f"ext4: no inode {number} in this image")
        group, index = divmod(number - 1, self._per_group)
        descriptor = self._bytes(BLOCK + group * self._descriptor, self._descriptor)
        (table,) = struct.unpack_from("<I", descriptor, 8)
        if self._descriptor >= 64:
            table |= struct.unpack_from("<I", descriptor, 0x28)[0] << 32
        data = self._bytes(table * BLOCK + index * self._inode_size, 128)
        mode, uid, size = struct.unpack_from("<HHI", data, 0)
        gid, links = struct.unpack_from("<HH", data, 0x18)
        (flags,) = struct.unpack_from("<I", data, 0x20)
        (size_high,) = struct.unpack_from("<I", data, 0x6C)
        (xattr_low,) = struct.unpack_from("<I", data, 0x68)
        xattr_high, uid_high, gid_high = struct.unpack_from("<HHH", data, 0x76)
        return Inode(
            number=number,
            mode=mode,
            uid=uid_high << 16 | uid,
            gid=gid_high << 16 | gid,
            size=size_high << 32 | size,
            links=links,
            flags=flags,
            xattr_block=xattr_high << 32 | xattr_low,
            body=data[0x28:0x64],
        )

    def extents(self, inode: Inode) -> list[Extent]:
        """Where its data lies, ascending; empty if it has no extents (devices, short links)."""
        return self.extent_tree(inode)[0]

    def extent_tree(self, inode: Inode) -> tuple[list[Extent], list[int]]:
        """The extents of its data, and the blocks beside the inode that they are listed in."""
        extents: list[Extent] = []
        nodes: list[int] = []
        if inode.flags & _EXTENTS_FLAG and not inode.flags & _INLINE_DATA:
            self._collect(inode.body, inode.number, _MAX_DEPTH, extents, nodes)
        return extents, nodes

    def _collect(
        self, node: bytes, number: int, depth_left: int, extents: list[Extent], nodes: list[int]
    ) -> None:
        magic, entries, _, depth = struct.unpack_from("<HHHH", node, 0)
        if magic != 0xF30A or depth > depth_left or 12 + 12 * entries > len(node):
            raise Damaged(f"ext4: the extents of inode {number} are damaged")
        for at in range(12, 12 + 12 * entries, 12):
            if depth:
                _, low, high = struct.unpack_from("<IIH", node, at)
                block = high << 32 | low
                self._collect(self.block(block), number, depth - 1, extents, nodes)
                nodes.append(block)
            else:
                logical, count, high, low = struct.unpack_from("<IHHI", node, at)
                # Above 32,768: set aside, but not written yet.
                count = count if count <= 32768 else count - 32768
                extents.append((logical, high << 32 | low, count))

    def names(self, inode: Inode) -> Iterator[tuple[bytes, int]]:
        """(name, inode) of what is in a directory, without `.` and `..`, as they lie there."""
        for logical, block, count in self.extents(inode):
            for at in range(min(count, -(-inode.size // BLOCK) - logical)):
                yield from _names_in(self.block(block + at), inode.number)

    def walk(self) -> Iterator[tuple[bytes, Inode]]:
        """(path, inode) of everything; the root is `.`. Names in the order of their bytes."""
        root = self.inode(ROOT)
        yield b".", root
        seen = {ROOT}
        pending = [(b"", root)]
        while pending:
            folder, directory = pending.pop()
            deeper = []
            for name, number in sorted(self.names(directory)):
                path = folder + name
                inode = self.inode(number)
                yield path, inode
                if stat.S_ISDIR(inode.mode):
                    if number in seen:
                        raise Damaged(f"ext4: directory inode {number} has two places")
                    seen.add(number)
                    deeper.append((path + b"/", inode))
            pending.extend(reversed(deeper))

    def _bytes(self, offset: int, length: int) -> bytes:
        size = _READ_AT_ONCE * BLOCK
        number, start = divmod(offset, size)
        if start + length <= size:
            return self._piece(number)[start : start + length]
        return self._read(offset, length)


def read_layout(read: Read) -> Layout:
    """Where everything lies in the ext4 that `read(offset, length)` reads.

    For the `previous` of `open_source`: it keeps files there, so that a new version of them
    changes few blocks. A wrong layout costs space in the store and nothing else. Raises
    UsageError if there is no ext4 that can be read, Damaged.
    """
    image = Ext4Image(read)
    layout = Layout(image.geometry)
    seen: set[int] = set()
    for path, inode in image.walk():
        if inode.number not in seen:
            seen.add(inode.number)
            extents, nodes = image.extent_tree(inode)
            layout.places[path] = Place(
                inode.number, tuple(extents), tuple(nodes), inode.xattr_block
            )
    return layout


def _names_in(block: bytes, number: int) -> Iterator[tuple[bytes, int]]:
    at = 0
    while at + 8 <= len(block):
        inode, length, size, _ = struct.unpack_from("<IHBB", block, at)
        if length < 8 or length % 4 or at + length > len(block) or 8 + size > length:
            raise Damaged(f"ext4: directory inode {number} is damaged")
        name = block[at + 8 : at + 8 + size]
        if inode and size and name not in (b".", b".."):
            yield name, inode
        at += length

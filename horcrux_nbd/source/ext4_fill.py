"""Fills an empty ext4 with a directory tree, without the contents of its files.

Everything but the contents is written to the image. For these, blocks are set aside and a list of
pieces is returned that says which part of which file belongs where.

Order on the disk, behind the metadata that mke2fs packed together: directories, other metadata,
small files, large files. Within each in the order of paths, so that the same tree gives the same
bytes, and what is used together lies together. Inodes are numbered in that order, too.

With the layout of an earlier version, what was there stays where it was, what has grown goes on
behind it where that is free, and everything new follows behind all that.
"""

from __future__ import annotations

import os
import stat
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..errors import UsageError
from ..files import write_all
from ..units import MiB
from . import ext4_inode, ext4_xattr
from .ext4_directory import FILE_TYPES, directory_blocks
from .ext4_inode import FAST_LINK, MAX_FILE_BLOCKS, MAX_LINKS, Extent
from .layout import Layout, Place, follow_moves
from .libext2fs import BLOCK, LOST_AND_FOUND, Ext4
from .space import Space
from .tree import Entry, Tree, show

ROOT = 2
# Large files begin where a chunk of up to 1 MiB begins, in the image as in the file: then equal
# parts of files give equal chunks, wherever the files lie. Below 4 MiB the gaps would cost more.
LARGE = 4 * MiB
_ALIGN = MiB // BLOCK

Piece = tuple[int, int, Entry, int]  # offset in the image, length, file, offset in the file
Range = tuple[int, int]  # first logical block, count


@dataclass(slots=True, eq=False)
class _Node:
    """An inode to be: one entry, or all names of a file."""

    entry: Entry
    number: int = 0
    extents: Sequence[Extent] = ()
    body: bytes | None = None  # what the inode holds in place of extents
    size: int = 0
    blocks: int = 0  # all it takes
    indexed: bool = False
    xattrs: bytes = b""
    xattr_block: int = 0
    tree: Sequence[int] = ()  # blocks of its extent tree


def blocks_of(size: int) -> int:
    return -(-size // BLOCK)


def wanted_blocks(entry: Entry) -> list[Range]:
    """Blocks that a regular file takes: all, or for a sparse one those that hold something."""
    if entry.allocated is None:
        return [(0, blocks_of(entry.size))] if entry.size else []
    wanted: list[Range] = []
    for offset, length in entry.allocated:
        first, end = offset // BLOCK, blocks_of(offset + length)
        if wanted and first <= wanted[-1][0] + wanted[-1][1]:
            first = wanted.pop()[0]
        wanted.append((first, end - first))
    return wanted


def fill(filesystem: Ext4, fd: int, tree: Tree, previous: Layout | None = None) -> list[Piece]:
    """Put `tree` into the empty `filesystem`, whose image is open as `fd`.

    It has inodes enough for it. Returns the pieces, ascending. Raises OutOfSpace if it has too
    few blocks, UsageError for a file that ext4 cannot hold.
    """
    return _Filler(filesystem, fd, tree, previous).run()


class _Filler:
    def __init__(
        self,
        filesystem: Ext4,
        fd: int,
        tree: Tree,
        previous: Layout | None,
    ) -> None:
        self._fs, self._fd, self._tree = filesystem, fd, tree
        self._remove_lost_and_found()
        self._space = Space(filesystem.free_ranges())
        self._nodes = [_Node(entry) for entry in tree.walk() if entry.same_as is None]
        self._previous: dict[bytes, Place] = {}
        if previous is not None:
            paths = [node.entry.path() for node in self._nodes]
            self._previous = follow_moves(previous.places, paths)
        self._numbers: dict[Entry, int] = {}
        self._claims: dict[Entry, list[Extent]] = {}
        self._tree_claims: dict[Entry, list[int]] = {}
        self._xattr_claims: dict[Entry, list[int]] = {}
        self._marked = (0, 0)  # start and count of blocks that are taken and not yet marked so

    def run(self) -> list[Piece]:
        self._number()
        self._claim()
        for node in self._nodes:
            if stat.S_ISDIR(node.entry.mode):
                self._make_directory(node)
        self._make_xattrs()
        for node in self._nodes:
            self._make_special(node)
        files = [node for node in self._nodes if stat.S_ISREG(node.entry.mode)]
        pieces: list[Piece] = []
        for large in (False, True):
            for node in files:
                if (node.entry.size >= LARGE) is large:
                    self._make_file(node, pieces)
        for node in sorted(self._nodes, key=lambda node: node.number):
            self._write_inode(node)
        self._mark(0, 0)
        pieces.sort(key=lambda piece: piece[0])
        return pieces

    # ---- inodes --------------------------------------------------------------------------------

    def _remove_lost_and_found(self) -> None:
        """Databases refuse a data directory that has one (docker-library/mysql #69)."""
        for number in (ROOT, LOST_AND_FOUND):
            for _, block, count in ext4_inode.read_extents(self._fs.read_inode(number)):
                self._fs.mark_blocks(block, count, used=False)
                write_all(self._fd, bytes(count * BLOCK), block * BLOCK)
        self._fs.mark_inode(LOST_AND_FOUND, directory=True, used=False)
        self._fs.write_inode(LOST_AND_FOUND, bytes(256))

    def _number(self) -> None:
        self._numbers[self._tree.root] = ROOT
        taken = set()
        for node in self._nodes[1:]:
            place = self._previous.get(node.entry.path()) if self._previous else None
            if place is None or place.inode in taken:
                continue
            if LOST_AND_FOUND <= place.inode <= self._fs.inodes:
                taken.add(place.inode)
                self._numbers[node.entry] = place.inode
        number = LOST_AND_FOUND
        for node in self._nodes:
            if node.entry not in self._numbers:
                while number in taken:
                    number += 1
                self._numbers[node.entry] = number
                number += 1
            node.number = self._numbers[node.entry]

    def _write_inode(self, node: _Node) -> None:
        entry = node.entry
        mapped = node.body is None
        if mapped:
            extents = ext4_inode.split_extents(node.extents)
            count = ext4_inode.tree_blocks(len(extents))
            if count:
                node.tree = self._single_blocks(count, self._tree_claims.pop(entry, []))
            node.body = ext4_inode.extent_tree(
                extents, node.tree, lambda block, data: self._write_node(node, block, data)
            )
            node.blocks += count
        assert node.body is not None
        if not stat.S_ISDIR(entry.mode) and entry.links > MAX_LINKS:
            raise UsageError(
                f"{show(entry.path())} has {entry.links} names, ext4 allows {MAX_LINKS}"
            )
        if node.number != ROOT:
            self._fs.mark_inode(node.number, directory=stat.S_ISDIR(entry.mode))
        self._fs.write_inode(
            node.number,
            ext4_inode.pack_inode(
                mode=entry.mode,
                uid=entry.uid,
                gid=entry.gid,
                size=node.size,
                links=entry.links,
                blocks=node.blocks,
                mtime=entry.mtime,
                body=node.body,
                mapped=mapped,
                indexed=node.indexed,
                xattr_block=node.xattr_block,
                xattrs=node.xattrs,
            ),
        )

    def _write_node(self, node: _Node, block: int, data: bytes) -> None:
        write_all(self._fd, self._fs.seal_extent_block(node.number, data), block * BLOCK)

    # ---- blocks --------------------------------------------------------------------------------

    def _claim(self) -> None:
        """Take the blocks that files had before, as far as they still want them."""
        last = 0
        for node in self._nodes if self._previous else ():
            entry = node.entry
            place = self._previous.get(entry.path())
            if place is None:
                continue
            if stat.S_ISREG(entry.mode):
                wanted = wanted_blocks(entry)
            elif stat.S_ISDIR(entry.mode):
                wanted = [(0, 1 << 32)]  # how many blocks it takes is not known yet
            else:
                wanted = [(0, 1)]
            old = [(logical, count, block) for logical, block, count in place.extents]
            kept: list[Extent] = []
            for (logical, _, block), first, size in overlaps(old, wanted):
                for start, got in self._space.claim(block + first - logical, size):
                    kept.append((start - block + logical, start, got))
            self._claims[entry] = kept
            self._tree_claims[entry] = self._claim_blocks(place.tree)
            if place.xattr_block:
                self._xattr_claims[entry] = self._claim_blocks([place.xattr_block])
            ends = [block + count for _, block, count in kept]
            last = max([last, place.xattr_block + 1, *ends, *(block + 1 for block in place.tree)])
        self._space.begin_at(last)

    def _claim_blocks(self, blocks: Sequence[int]) -> list[int]:
        return [block for block in blocks if self._space.claim(block, 1)]

    def _single_blocks(self, count: int, claimed: Sequence[int]) -> list[int]:
        """`count` blocks of no order: those claimed before first. Counts them as taken."""
        blocks = list(claimed[:count])
        if len(blocks) < count:
            for start, size in self._space.take(count - len(blocks)):
                blocks.extend(range(start, start + size))
        for block in blocks:
            self._mark(block, 1)
        return blocks

    def _place(self, node: _Node, wanted: Sequence[Range], align: int = 1) -> None:
        """Give `node` its blocks: those it has a claim on, and new ones for the rest."""
        claims = deque(self._claims.pop(node.entry, ()) if self._claims else ())
        extents: list[Extent] = []
        for first, count in wanted:
            end = first + count
            while first < end and claims and claims[0][0] < end:
                logical, block, size = claims.popleft()
                start, stop = max(logical, first), min(logical + size, end)
                if stop < logical + size:
                    claims.appendleft((end, block + end - logical, logical + size - end))
                if start < stop:
                    extents.extend(self._new(first, start - first, align))
                    extents.append((start, block + start - logical, stop - start))
                    first = stop
            extents.extend(self._new(first, end - first, align))
        for _, block, count in extents:
            self._mark(block, count)
            node.blocks += count
        node.extents = extents

    def _mark(self, start: int, count: int) -> None:
        """Blocks are taken one behind the other: marking them together saves most calls."""
        begin, size = self._marked
        if begin + size == start:
            self._marked = (begin, size + count)
            return
        if size:
            self._fs.mark_blocks(begin, size)
        self._marked = (start, count)

    def _new(self, logical: int, count: int, align: int) -> Iterator[Extent]:
        if count > 0:
            for block, size in self._space.take(count, align, logical):
                yield logical, block, size
                logical += size

    # ---- kinds of entries ----------------------------------------------------------------------

    def _make_directory(self, node: _Node) -> None:
        entry = node.entry
        parent = self._numbers[entry.parent] if entry.parent else ROOT
        names = (
            (
                child.name,
                self._numbers[child.same_as or child],
                FILE_TYPES[stat.S_IFMT(child.mode) >> 12],
            )
            for child in entry.children
        )
        try:
            blocks = directory_blocks(
                node.number, parent, names, self._fs.name_hash, self._fs.hash_version
            )
        except UsageError as error:
            raise UsageError(f"{show(entry.path())}: {error}") from error
        self._place(node, [(0, len(blocks))])
        for logical, start, count in node.extents:
            for at in range(count):
                self._fs.write_directory_block(node.number, start + at, blocks[logical + at])
        node.size = len(blocks) * BLOCK
        node.indexed = len(blocks) > 1

    def _make_special(self, node: _Node) -> None:
        """Everything but directories and regular files."""
        entry = node.entry
        if stat.S_ISLNK(entry.mode):
            node.size = len(entry.target)
            if node.size < FAST_LINK:
                node.body = entry.target.ljust(FAST_LINK, b"\0")
                return
            self._place(node, [(0, 1)])
            write_all(self._fd, entry.target.ljust(BLOCK, b"\0"), node.extents[0][1] * BLOCK)
        elif stat.S_ISCHR(entry.mode) or stat.S_ISBLK(entry.mode):
            node.body = ext4_inode.device_numbers(os.major(entry.rdev), os.minor(entry.rdev))
        elif stat.S_ISFIFO(entry.mode) or stat.S_ISSOCK(entry.mode):
            node.body = bytes(FAST_LINK)

    def _make_file(self, node: _Node, pieces: list[Piece]) -> None:
        entry = node.entry
        if blocks_of(entry.size) > MAX_FILE_BLOCKS:
            raise UsageError(f"{show(entry.path())} is larger than a file can be in ext4 (16 TiB)")
        node.size = entry.size
        self._place(node, wanted_blocks(entry), _ALIGN if entry.size >= LARGE else 1)
        data = ((0, entry.size),) if entry.data is None else entry.data
        files = [(logical * BLOCK, count * BLOCK, block) for logical, block, count in node.extents]
        for (offset, _, block), start, length in overlaps(files, data):
            pieces.append((block * BLOCK + start - offset, length, entry, start))

    def _make_xattrs(self) -> None:
        """Files with equal attributes share a block, as the kernel does it."""
        sharing: dict[bytes, list[_Node]] = {}
        for node in self._nodes:
            if not node.entry.xattrs:
                continue
            try:
                node.xattrs, outside = ext4_xattr.pack(ext4_xattr.to_disk(node.entry.xattrs))
            except UsageError as error:
                raise UsageError(f"{show(node.entry.path())}: {error}") from error
            if outside:
                sharing.setdefault(outside, []).append(node)
        for data, nodes in sharing.items():
            for at in range(0, len(nodes), ext4_xattr.MAX_REFERENCES):
                part = nodes[at : at + ext4_xattr.MAX_REFERENCES]
                claims = [
                    block for node in part for block in self._xattr_claims.get(node.entry, ())
                ]
                (block,) = self._single_blocks(1, claims)
                shared = ext4_xattr.with_references(data, len(part))
                self._fs.write_xattr_block(part[0].number, block, shared)
                for node in part:
                    node.xattr_block = block
                    node.blocks += 1


def overlaps(
    extents: Sequence[tuple[int, int, int]], ranges: Sequence[Range]
) -> Iterator[tuple[tuple[int, int, int], int, int]]:
    """(extent, start, length) of what each extent (start, length, anything) shares with `ranges`.

    Both ascend and do not overlap among themselves.
    """
    at = 0
    for extent in extents:
        begin, end = extent[0], extent[0] + extent[1]
        while at < len(ranges) and ranges[at][0] < end:
            start = max(begin, ranges[at][0])
            stop = min(end, ranges[at][0] + ranges[at][1])
            if start < stop:
                yield extent, start, stop - start
            if ranges[at][0] + ranges[at][1] > end:
                break
            at += 1

"""Which inodes differ between two versions of one file system: told from the inode tables.

The kernel writes the time of every change into the inode, so an inode that is the same byte for
byte is the same file, and whatever lies in an unchanged part of the image is never read.
"""

from __future__ import annotations

from collections.abc import Iterator

from .content import Contents
from .reader import Reader


def touched_inodes(old: Reader, new: Reader, contents: Contents) -> set[int]:
    """The numbers of all inodes whose bytes differ, in use or not."""
    found: set[int] = set()
    for group in range(max(old.superblock.groups, new.superblock.groups)):
        found.update(_in_group(old, new, contents, group))
    return found


def _in_group(old: Reader, new: Reader, contents: Contents, group: int) -> Iterator[int]:
    superblock = new.superblock
    first = group * superblock.inodes_per_group + 1
    readers = [r for r in (old, new) if group < r.superblock.groups]
    used = max(reader.groups[group].used for reader in readers)
    if not used:
        return
    size, block_size = superblock.inode_size, superblock.block_size
    if len(readers) == 1:  # the file system was made larger or smaller
        yield from range(first, first + used)
        return
    tables = old.groups[group].table, new.groups[group].table
    blocks = -(-used * size // block_size)
    if tables[0] != tables[1]:
        differing = iter(range(blocks))
    else:
        differing = _blocks(contents, tables[0], blocks, block_size)
    for at in differing:
        a, b = old.image.block(tables[0] + at), new.image.block(tables[1] + at)
        if a == b:
            continue
        number = first + at * block_size // size
        for skip in range(0, block_size, size):
            if a[skip : skip + size] != b[skip : skip + size]:
                yield number + skip // size


def _blocks(contents: Contents, table: int, blocks: int, size: int) -> Iterator[int]:
    """Numbers within a table of the blocks that may differ, ascending."""
    done = 0
    for start, stop in sorted(contents.differing(table * size, blocks * size)):
        low, high = start // size - table, -(-stop // size) - table
        yield from range(max(low, done), high)
        done = max(done, high)

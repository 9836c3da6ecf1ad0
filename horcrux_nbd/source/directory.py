"""A directory as an ext4 image, without a copy of its files.

The metadata lies in an unnamed temporary file of the image's length that is sparse; the contents
are read from the files themselves when the image is read.
"""

from __future__ import annotations

import heapq
import os
import stat
import threading
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path

from ..errors import UsageError
from ..files import read_exactly
from ..progress import Progress
from ..units import GiB, MiB, format_size, round_up
from .base import Source, check_range
from .ext4_fill import Piece, fill, wanted_blocks
from .ext4_make import MIN_SIZE, TIMESTAMP, Geometry, check_ext4, coarse, inodes_for, make_ext4
from .ext4_read import read_layout
from .layout import Layout
from .libext2fs import BLOCK, INODE, Ext4
from .raw import data_ranges
from .space import OutOfSpace
from .temporary import UnnamedFile, check_room, choose_folder
from .tree import Entry, Tree, show

# Room to grow is a hole in the image and costs nothing. A database writes logs of a size of its
# own (PostgreSQL: max_wal_size is 1 GB) and a second copy of its largest table when it rewrites it.
LEAST_ROOM = GiB
_ATTEMPTS = 4
_OWN_INODES = 16  # the first ten are the file system's own


class Ext4Source(Source):
    """An ext4 image made of `tree`. `layout` says where everything lies in it."""

    filesystem = "ext4"

    def __init__(
        self,
        tree: Tree,
        *,
        size: int | None = None,
        free: int | None = None,
        temporary: str | Path | None = None,
        progress: Progress | None = None,
        label: str = "",
        previous: Layout | None = None,
    ) -> None:
        progress = progress or Progress()
        if size is not None and free is not None:
            raise UsageError("give the size of the image or the free room in it, not both")
        folder = choose_folder(temporary)
        needed = _needed(tree)
        metadata = _metadata(tree)
        self._tree = tree
        self._lock = threading.Lock()
        self._failed: dict[str, None] = {}
        check_room(folder, metadata, "the file system's metadata")
        progress.note(
            f"{tree.files:,} files, {format_size(tree.file_bytes)}; temporary space for metadata: "
            f"about {format_size(metadata)} in {folder}"
        )
        for line in tree.notes():
            progress.note(line)
        self._file = UnnamedFile(folder)
        try:
            pieces = self._make(needed, size, free, label, previous)
            check_ext4(self._file)
            self._map(pieces)
        except BaseException:
            self._file.close()
            raise
        self.temporary_bytes = self._file.used()
        progress.note(f"image of {format_size(self.size)}, ext4")

    def _make(
        self, needed: int, size: int | None, free: int | None, label: str, previous: Layout | None
    ) -> list[Piece]:
        """Choose the geometry and fill it; a size that nobody asked for grows until all fits."""
        files = self._tree.files
        if previous and size in (None, previous.geometry.size):
            geometry = previous.geometry
        elif size is not None:
            whole = size - size % BLOCK
            geometry, previous = Geometry(whole, inodes_for(whole, files)), None
        else:
            geometry, previous = self._choose(needed, free), None
        for _ in range(_ATTEMPTS):
            make_ext4(self._file, geometry, label)
            pieces = self._try(geometry, previous, needed + (free or 0) if size is None else 0)
            if pieces is not None:
                return pieces
            if size is not None:
                break
            if previous:  # it has outgrown its file system: everything gets a new place
                geometry, previous = self._choose(needed, free), None
            else:
                geometry = self._choose(needed * 5 // 4, free)
        least = self._least(needed, label)
        raise UsageError(
            f"{format_size(geometry.size)} is too small for {files:,} files of "
            f"{format_size(self._tree.file_bytes)}: choose at least {format_size(least)} "
            f"({least} bytes)"
        )

    def _try(
        self, geometry: Geometry, previous: Layout | None, bytes_free: int
    ) -> list[Piece] | None:
        """Fill the empty file system; None if it is too small, or had less than that free."""
        with Ext4(self._file.path, TIMESTAMP) as filesystem:
            if _free(filesystem) < bytes_free or self._tree.files + _OWN_INODES > filesystem.inodes:
                return None
            try:
                pieces = fill(filesystem, self._file.fd, self._tree, previous)
            except OutOfSpace:
                return None
        self.size = geometry.size
        return pieces

    def _choose(self, needed: int, free: int | None) -> Geometry:
        """A geometry with room for `needed` bytes and `free` more."""
        room = max(needed, LEAST_ROOM) if free is None else free
        return _geometry(needed + room, self._tree.files, in_steps=free is None)

    def _least(self, needed: int, label: str) -> int:
        """A size that is known to do, tried out with an empty file system."""
        geometry = _geometry(needed, self._tree.files, in_steps=False)
        while True:
            make_ext4(self._file, geometry, label)
            with Ext4(self._file.path, TIMESTAMP) as filesystem:
                missing = needed - _free(filesystem)
            if missing <= 0:
                return geometry.size
            size = round_up(geometry.size + missing + missing // 50, MiB)
            geometry = Geometry(size, inodes_for(size, self._tree.files))

    def _map(self, pieces: list[Piece]) -> None:
        self._entries: list[Entry] = []
        indexes: dict[Entry, int] = {}
        self._starts, self._lengths = array("Q"), array("Q")
        self._files, self._offsets = array("Q"), array("Q")
        for start, length, entry, offset in pieces:
            index = indexes.setdefault(entry, len(self._entries))
            if index == len(self._entries):
                self._entries.append(entry)
            self._starts.append(start)
            self._lengths.append(length)
            self._files.append(index)
            self._offsets.append(offset)
        self._metadata = list(data_ranges(self._file.fd, 0, self.size))
        self._metadata_starts = [start for start, _ in self._metadata]

    @property
    def layout(self) -> Layout:
        """Where everything lies, for the next version."""
        return read_layout(self.read)

    # ---- reading -------------------------------------------------------------------------------

    def extents(self) -> Iterator[tuple[int, int]]:
        data = zip(self._starts, self._lengths, strict=True)
        begin = end = 0
        for offset, length in heapq.merge(self._metadata, data):
            start, stop = offset - offset % BLOCK, round_up(offset + length, BLOCK)
            if start > end:
                if end > begin:
                    yield begin, end - begin
                begin = start
            end = max(end, stop)
        if end > begin:
            yield begin, min(end, self.size) - begin

    def read(self, offset: int, length: int) -> bytes:
        check_range(offset, length)
        end = offset + length
        first = max(bisect_right(self._starts, offset) - 1, 0)
        last = bisect_right(self._starts, end - 1, first)
        if first < last and self._starts[first] + self._lengths[first] <= offset:
            first += 1
        if last - first == 1 and not self._has_metadata(offset, end):
            start, size = self._starts[first], self._lengths[first]
            if start <= offset and end <= start + size:
                at = self._offsets[first] + offset - start
                return self._read_file(self._entries[self._files[first]], at, length)
        if self._has_metadata(offset, end):
            buffer = bytearray(read_exactly(self._file.fd, length, offset))
        else:
            buffer = bytearray(length)
        view = memoryview(buffer)
        for index in range(first, last):
            start = max(self._starts[index], offset)
            stop = min(self._starts[index] + self._lengths[index], end)
            at = self._offsets[index] + start - self._starts[index]
            entry = self._entries[self._files[index]]
            view[start - offset : stop - offset] = self._read_file(entry, at, stop - start)
        return bytes(buffer)

    def _has_metadata(self, start: int, end: int) -> bool:
        index = bisect_right(self._metadata_starts, end - 1) - 1
        return index >= 0 and sum(self._metadata[index]) > start

    def _read_file(self, entry: Entry, offset: int, length: int) -> bytes:
        try:
            fd = self._tree.open(entry)
            try:
                return read_exactly(fd, length, offset)
            finally:
                os.close(fd)
        except OSError as error:
            path = show(entry.path())
            with self._lock:
                self._failed[f"{path}: {error.strerror or error}"] = None
            return bytes(length)

    def problems(self) -> list[str]:
        with self._lock:
            failed = list(self._failed)
        seen = {line.partition(": ")[0] for line in failed}
        return failed + [
            line for line in self._tree.changes() if line.partition(": ")[0] not in seen
        ]

    def close(self) -> None:
        self._file.close()


def _free(filesystem: Ext4) -> int:
    return sum(end - start for start, end in filesystem.free_ranges()) * BLOCK


def _needed(tree: Tree) -> int:
    """Bytes that the tree takes in an ext4: contents, directories, attributes; rather too many."""
    blocks = 0
    for entry in tree.walk():
        if entry.same_as is not None:
            continue
        if stat.S_ISREG(entry.mode):
            wanted = wanted_blocks(entry)
            count = sum(count for _, count in wanted)
            # An extent reaches 128 MiB; a block of them holds 340.
            extents = len(wanted) + count // 16384
            blocks += count + (1 + extents // 300 if extents > 4 else 0)
        elif stat.S_ISDIR(entry.mode):
            # 12 for its head and padding; blocks of a hash tree are filled to 80 %.
            names = sum(len(child.name) + 12 for child in entry.children)
            blocks += 1 if names < 4000 else 3 + names // 2950
        elif stat.S_ISLNK(entry.mode):
            blocks += 1
        if entry.xattrs:
            blocks += 1
    return blocks * BLOCK


def _metadata(tree: Tree) -> int:
    """Bytes of temporary space that the metadata takes, about."""
    total = 4 * MiB + tree.files * INODE
    for entry in tree.walk():
        total += len(entry.name) * 5 // 4 + 16
        total += BLOCK * (bool(entry.children) + bool(entry.xattrs))
    return total


def _geometry(content: int, files: int, *, in_steps: bool) -> Geometry:
    """For `content` bytes beside the metadata."""
    total = content
    for _ in range(4):  # the overhead grows with the size: this converges at once
        geometry = Geometry(total, inodes_for(total, files))
        total = max(round_up(content + geometry.overhead + content // 100, MiB), MIN_SIZE)
        if in_steps:
            total = coarse(total)
    return Geometry(total, inodes_for(total, files))

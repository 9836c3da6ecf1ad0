"""A directory as an ext4 image, without a copy of its files.

The metadata lies in an unnamed temporary file of the image's length that is sparse; the contents
are read from the files themselves when the image is read.
"""

from __future__ import annotations

import heapq
import os
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
from .ext4_make import TIMESTAMP, Geometry, check_ext4, coarse, inodes_for, make_ext4
from .layout import Layout
from .libext2fs import BLOCK, Ext4
from .raw import data_ranges
from .space import OutOfSpace
from .temporary import UnnamedFile, check_room, choose_folder
from .tree import Entry, Tree, show

# Room to grow is a hole in the image and costs nothing. A database writes logs of a size of its
# own (PostgreSQL: max_wal_size is 1 GB) and a second copy of its largest table when it rewrites it.
LEAST_ROOM = GiB
_ATTEMPTS = 4


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
        """Choose the size and fill it; a size that nobody asked for grows until all fits."""
        room = max(needed, LEAST_ROOM) if free is None else free
        if previous and size in (None, previous.geometry.size):
            geometry = previous.geometry
        else:
            geometry, previous = (
                _geometry(needed + room, size, self._tree.files, free is None),
                None,
            )
        for _ in range(_ATTEMPTS):
            make_ext4(self._file, geometry, label)
            with Ext4(self._file.path, TIMESTAMP) as filesystem:
                has = sum(end - start for start, end in filesystem.free_ranges()) * BLOCK
                inodes = filesystem.inodes
                try:
                    if has < needed or (free is not None and has < needed + free):
                        raise OutOfSpace(-(-(needed + (free or 0) - has) // BLOCK))
                    if self._tree.files + 16 > inodes:
                        raise OutOfSpace(1)
                    pieces, self._places = fill(filesystem, self._file.fd, self._tree, previous)
                except OutOfSpace as error:
                    missing = error.missing * BLOCK
                else:
                    self.size, self._geometry = geometry.size, geometry
                    return pieces
            if size is not None:
                least = round_up(size + missing + missing // 50 + MiB, MiB)
                raise UsageError(
                    f"{format_size(size)} is too small for {self._tree.files:,} files of "
                    f"{format_size(self._tree.file_bytes)}: it takes at least {format_size(least)} "
                    f"({least} bytes)"
                )
            wanted = geometry.size + missing + missing // 50 - geometry.overhead
            geometry = _geometry(max(wanted, needed + room), None, self._tree.files, free is None)
            previous = None
        raise UsageError("the files do not fit into an ext4 of the size they should need")

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
        return Layout(self._geometry, {entry.path(): place for entry, place in self._places})

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


def _needed(tree: Tree) -> int:
    """Bytes that the tree takes in an ext4, at most: contents, directories, attributes."""
    blocks = 0
    for entry in tree.walk():
        if entry.same_as is not None:
            continue
        wanted = wanted_blocks(entry) if entry.mode & 0o170000 == 0o100000 else ()
        blocks += sum(count for _, count in wanted) + len(wanted) // 300
        # Directories that are filled to 80 %, a target or attributes in a block of their own.
        names = sum(len(child.name) + 12 for child in entry.children)
        blocks += names // 3000 + bool(entry.children) + 2
    return blocks * BLOCK


def _metadata(tree: Tree) -> int:
    """Bytes of temporary space that the metadata takes, about."""
    names = sum(len(entry.name) + 12 for entry in tree.walk())
    folders = sum(1 for entry in tree.walk() if entry.children)
    attributes = sum(BLOCK for entry in tree.walk() if entry.xattrs)
    return 4 * MiB + tree.files * 256 + names * 5 // 4 + folders * BLOCK + attributes


def _geometry(content: int, size: int | None, files: int, round_it: bool) -> Geometry:
    """For `content` bytes beside the metadata, or of exactly `size`."""
    if size is not None:
        whole = size - size % BLOCK
        return Geometry(whole, inodes_for(whole, files))
    total = content
    for _ in range(4):  # the overhead grows with the size: this converges at once
        geometry = Geometry(total, inodes_for(total, files))
        total = round_up(content + geometry.overhead + content // 100, MiB)
        if round_it:
            total = coarse(total)
    return Geometry(total, inodes_for(total, files))

"""What a layer's writers share: in Python, or native where nbdkit's filter writes to it as well.

There is one Layer, one BlockMap and one Recent, with the rules; what they keep their state in is
either of these, and the tests of all go through both.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext

from ..native import handles, library
from .blockmap import UNIFORM, BlockMap, Groups, Ranges
from .journal import State, StateProtocol, seed_of
from .recent import Pen, PenProtocol

MOST_WRITTEN = 16  # ranges, and blocks in one, that are kept (core.h has the same)


class Core:
    """A layer's lock, the storage of its marks, and which of its data files are dirty."""

    native: handles.Layer | None = None

    def __init__(self) -> None:
        self.lock: AbstractContextManager[object] = threading.Lock()
        self.blocks = BlockMap(Groups(zeros := Ranges()), zeros)
        self.pen: PenProtocol = Pen()
        self.journal: StateProtocol = State()
        self.flushing: AbstractContextManager[object] = nullcontext()  # Layer's go one by one
        self._touched: set[int] = set()
        self._written: list[tuple[int, int]] | None = []
        self._touching = threading.Lock()

    def set_file(self, segment: int, fd: int) -> None:
        """The data file of a segment is open as `fd`; -1: it is not any more."""

    def set_whole(self, whole: bool) -> None:
        """Whether the next flush has to be Layer's own, and of everything."""

    def failure(self) -> int:
        """The errno of a sync that failed elsewhere than in Layer; 0 if none has."""
        return 0

    def set_writable(self, writable: bool) -> None:
        """Whether others than Layer's methods may write to the layer."""

    def touch(self, segment: int) -> None:
        """A data file was written to."""
        if segment not in self._touched:
            with self._touching:
                self._touched.add(segment)

    def wrote(self, first: int, stop: int) -> None:
        """Blocks of data files were written to."""
        with self._touching:
            if self._written is not None:
                self._written.append((first, stop))
                if len(self._written) > MOST_WRITTEN or stop - first > MOST_WRITTEN:
                    self._written = None

    def take_written(self) -> list[tuple[int, int]] | None:
        """The blocks that were written to since the last call, None if they are many."""
        with self._touching:
            written, self._written = self._written, []
        return written

    def take_touched(self) -> list[int]:
        """The data files that were written to since the last call."""
        with self._touching:
            touched, self._touched = self._touched, set()
        return list(touched)


class NativeCore(Core):
    """A Core that the native part knows."""

    def __init__(
        self, found: library.Library, size: int, segment_size: int, layer_id: bytes
    ) -> None:
        self.native = layer = handles.Layer(found, size, segment_size, seed_of(layer_id))
        self.lock = layer.lock
        self.blocks = BlockMap(handles.Groups(found, layer, UNIFORM), handles.Zeros(found, layer))
        self.pen = handles.Pen(found, layer)
        self.journal = handles.JournalState(found, layer)
        self.flushing = layer.flushing
        self.set_whole, self.failure = layer.set_whole, layer.failure  # type: ignore[method-assign]
        self.set_file, self.set_writable = layer.set_file, layer.set_writable  # type: ignore[method-assign]
        self.touch, self.take_touched = layer.touch, layer.take_touched  # type: ignore[method-assign]
        self.wrote, self.take_written = layer.wrote, layer.take_written  # type: ignore[method-assign]


def make(size: int, segment_size: int, layer_id: bytes = bytes(16)) -> Core:
    """A core for a layer of `size` bytes, in data files of `segment_size`."""
    found = library.active()
    return Core() if found is None else NativeCore(found, size, segment_size, layer_id)

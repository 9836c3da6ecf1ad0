"""What a layer's writers share: in Python, or native where nbdkit's filter writes to it as well.

There is one Layer, one BlockMap and one Recent, with the rules; what they keep their state in is
either of these, and the tests of all go through both.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager

from ..native import handles, library
from .blockmap import UNIFORM, BlockMap, Groups, Ranges
from .recent import Pen, PenProtocol


class Core:
    """A layer's lock, the storage of its marks, and which of its data files are dirty."""

    native: handles.Layer | None = None

    def __init__(self) -> None:
        self.lock: AbstractContextManager[object] = threading.Lock()
        self.blocks = BlockMap(Groups(zeros := Ranges()), zeros)
        self.pen: PenProtocol = Pen()
        self._touched: set[int] = set()
        self._touching = threading.Lock()

    def set_file(self, segment: int, fd: int) -> None:
        """The data file of a segment is open as `fd`; -1: it is not any more."""

    def set_writable(self, writable: bool) -> None:
        """Whether others than Layer's methods may write to the layer."""

    def touch(self, segment: int) -> None:
        """A data file was written to."""
        if segment not in self._touched:
            with self._touching:
                self._touched.add(segment)

    def take_touched(self) -> list[int]:
        """The data files that were written to since the last call."""
        with self._touching:
            touched, self._touched = self._touched, set()
        return list(touched)


class NativeCore(Core):
    """A Core that the native part knows."""

    def __init__(self, found: library.Library, size: int, segment_size: int) -> None:
        self.native = layer = handles.Layer(found, size, segment_size)
        self.lock = layer.lock
        self.blocks = BlockMap(handles.Groups(found, layer, UNIFORM), handles.Zeros(found, layer))
        self.pen = handles.Pen(found, layer)
        self.set_file, self.set_writable = layer.set_file, layer.set_writable  # type: ignore[method-assign]
        self.touch, self.take_touched = layer.touch, layer.take_touched  # type: ignore[method-assign]


def make(size: int, segment_size: int) -> Core:
    """A core for a layer of `size` bytes, in data files of `segment_size`."""
    found = library.active()
    return Core() if found is None else NativeCore(found, size, segment_size)

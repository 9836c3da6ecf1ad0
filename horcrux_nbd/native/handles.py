"""The objects of core.h as Python objects: each is freed with the last reference to it.

They have the same methods as their counterparts in Python (volume/core.py, volume/blockmap.py),
which the tests of both go through.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from .library import Library

GROUP = 128
_NEVER = (1 << 64) - 1
_NO_MEMORY = -2
_WRITTEN = 16  # core.h, HX_MOST_WRITTEN
# core.h, hx_volume_sums
_SUMS = (
    "native_reads", "native_read_bytes", "native_writes", "native_written_bytes",
    "native_cache_hits",
)  # fmt: skip


def _check(result: int) -> int:
    if result == _NO_MEMORY:
        raise MemoryError
    return result


class Groups:
    """blockmap.Groups: states of groups of 128 blocks, by their number."""

    def __init__(self, library: Library, layer: Layer, uniform: Mapping[int, bytes]) -> None:
        """`uniform`: the one object for each state that all blocks of a group may have."""
        self._slow, self._quick, self._uniform = library.slow, library.quick, uniform
        self._layer = layer  # whose memory it is
        self._map = self._quick.layer_map(layer.pointer)

    def get(self, number: int) -> bytes | None:
        states = ctypes.create_string_buffer(GROUP)
        state = self._quick.map_get(self._map, number, states)
        if state < 0:
            return None
        return self._uniform.get(state) or states.raw

    def put(self, number: int, states: bytes, dirty: bool) -> None:
        _check(self._quick.map_put(self._map, number, states, dirty))

    def drop(self, number: int) -> None:
        self._quick.map_drop(self._map, number)

    def touch(self, number: int) -> None:
        self._quick.map_touch(self._map, number)

    def __contains__(self, number: int) -> bool:
        return bool(self._quick.map_next(self._map, number) == number)

    def __len__(self) -> int:
        return int(self._quick.map_count(self._map))

    def next(self, number: int) -> int | None:
        found = self._quick.map_next(self._map, number)
        return None if found == _NEVER else found

    def numbers(self, low: int = 0, high: int = _NEVER) -> list[int]:
        found: list[int] = []
        room = min(high - low, len(self) + 1024)
        numbers = (ctypes.c_uint64 * room)()
        while room:
            count = self._slow.map_list(self._map, low, high, numbers, None, room)
            found += numbers[:count]
            if count < room:
                break
            low = found[-1] + 1
        return found

    def items(self) -> list[tuple[int, bytes]]:
        return [(number, states) for number in self.numbers() if (states := self.get(number))]

    @property
    def dirty(self) -> int:
        return int(self._quick.map_dirty(self._map))

    def take_dirty(self) -> list[tuple[int, bytes]]:
        room = self.dirty
        if not room:
            return []
        numbers = (ctypes.c_uint64 * room)()
        states = ctypes.create_string_buffer(room * GROUP)
        count = self._slow.map_take(self._map, numbers, states)
        content = memoryview(states)
        found = ((numbers[i], bytes(content[i * GROUP : (i + 1) * GROUP])) for i in range(count))
        return sorted(found)

    def sums(self) -> tuple[int, int, int]:
        sums = (ctypes.c_uint64 * 3)()
        self._slow.map_sum(self._map, sums)
        return sums[0], sums[1], sums[2]


class Zeros:
    """blockmap.Ranges: the groups that are zeroed as a whole."""

    def __init__(self, library: Library, layer: Layer) -> None:
        self._quick, self._layer = library.quick, layer
        self._map = self._quick.layer_map(layer.pointer)

    def add(self, start: int, stop: int) -> None:
        _check(self._quick.zeros_add(self._map, start, stop))

    def __contains__(self, value: int) -> bool:
        return bool(self._quick.zeros_has(self._map, value))

    def next_change(self, value: int) -> int | None:
        found = self._quick.zeros_change(self._map, value)
        return None if found == _NEVER else found

    def __iter__(self) -> Iterator[tuple[int, int]]:
        room = len(self)
        starts, stops = (ctypes.c_uint64 * room)(), (ctypes.c_uint64 * room)()
        self._quick.zeros_list(self._map, starts, stops)
        return zip(starts, stops, strict=True)

    def __len__(self) -> int:
        return int(self._quick.zeros_count(self._map))


class Pen:
    """recent.Pen: where the next mark is noted."""

    def __init__(self, library: Library, layer: Layer) -> None:
        self._quick, self._layer = library.quick, layer

    def place(self, fd: int, at: int, end: int, generation: int) -> None:
        low = generation & 0xFFFFFFFF
        self._quick.recent_set(self._layer.pointer, fd, at, end, low)

    @property
    def at(self) -> int:
        return int(self._quick.recent_at(self._layer.pointer))

    def note(self, first: int, what: int) -> bool:
        result = self._quick.note(self._layer.pointer, first, what)
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        return bool(result)


class JournalState:
    """journal.State: where the next record goes."""

    def __init__(self, library: Library, layer: Layer) -> None:
        self._quick, self._layer = library.quick, layer

    def _get(self, what: int) -> int:
        value = int(self._quick.journal_get(self._layer.pointer, what))
        return value if value != _NEVER else -1

    def _set(self, what: int, value: int) -> None:
        self._quick.journal_set(self._layer.pointer, what, value & _NEVER)

    fd = property(lambda self: self._get(0), lambda self, value: self._set(0, value))
    at = property(lambda self: self._get(1), lambda self, value: self._set(1, value))
    number = property(lambda self: self._get(2), lambda self, value: self._set(2, value))
    epoch = property(lambda self: self._get(3), lambda self, value: self._set(3, value))


class Lock:
    """A lock that the native part takes as well."""

    def __init__(self, take: object, give: object, *which: int) -> None:
        self._take, self._give, self._which = take, give, which

    def __enter__(self) -> None:
        self._take(*self._which)  # type: ignore[operator]

    def __exit__(self, *_: object) -> None:
        self._give(*self._which)  # type: ignore[operator]


class Layer:
    """core.Core of one layer."""

    def __init__(self, library: Library, size: int, segment_size: int, seed: int) -> None:
        self._quick, self._slow = library.quick, library.slow
        self.pointer = 0
        self.pointer = self._quick.layer_new(size, segment_size, seed) or 0
        if not self.pointer:
            raise MemoryError
        # A cycle would keep the memory, and what it refers to, until a collection.
        self.lock = Lock(self._slow.layer_lock, self._quick.layer_unlock, self.pointer)
        self.flushing = Lock(self._slow.flush_lock, self._quick.flush_unlock, self.pointer)
        self._segments = size // segment_size + 1
        self._beyond: set[int] = set()  # dirty ones that the native part has no place for

    def set_file(self, segment: int, fd: int) -> None:
        self._quick.layer_set_file(self.pointer, segment, fd)

    def set_writable(self, writable: bool) -> None:
        self._quick.layer_set_closed(self.pointer, not writable)

    def set_whole(self, whole: bool) -> None:
        self._quick.layer_set_whole(self.pointer, whole)

    def failure(self) -> int:
        return int(self._quick.layer_failed(self.pointer))

    def touch(self, segment: int) -> None:
        if self._quick.layer_touch(self.pointer, segment) < 0:
            with self.lock:
                self._beyond.add(segment)

    def wrote(self, first: int, stop: int) -> None:
        self._quick.layer_wrote(self.pointer, first, stop)

    def take_written(self) -> list[tuple[int, int]] | None:
        firsts, stops = (ctypes.c_uint64 * _WRITTEN)(), (ctypes.c_uint64 * _WRITTEN)()
        count = self._quick.layer_take_written(self.pointer, firsts, stops)
        return None if count < 0 else list(zip(firsts[:count], stops[:count], strict=True))

    def take_touched(self) -> list[int]:
        room = min(self._segments, 65536)
        segments = (ctypes.c_uint64 * room)()
        count = self._quick.layer_take(self.pointer, segments, room)
        with self.lock:
            beyond, self._beyond = self._beyond, set()
        return [*segments[:count], *beyond]

    def __del__(self) -> None:
        if self.pointer:
            self._slow.layer_free(self.pointer)


class File:
    """A descriptor that reads in both parts use; closed when both are done with it."""

    __slots__ = ("_pointer", "_quick", "_slow")

    def __init__(self, library: Library, fd: int, length: int) -> None:
        self._slow, self._quick = library.slow, library.quick
        self._pointer = self._quick.file_new(fd, length)
        if not self._pointer:
            raise MemoryError

    @property
    def pointer(self) -> int:
        return int(self._pointer)

    def was_used(self, reset: bool = False) -> bool:
        """Whether the native part read it since it was asked with `reset` last."""
        return bool(self._quick.file_used(self._pointer, reset))

    def __del__(self) -> None:
        if getattr(self, "_pointer", None):
            self._slow.file_retire(self._pointer)


class Table:
    """Chunks of one base that the native part serves."""

    def __init__(self, library: Library, chunk_size: int, slots: int) -> None:
        self._quick, self._slow = library.quick, library.slow
        self.pointer = 0
        self.pointer = self._quick.table_new(chunk_size, slots) or 0
        if not self.pointer:
            raise MemoryError

    def put(self, number: int, file: File) -> None:
        """Chunk `number` is in `file`, verified."""
        self._quick.table_put(self.pointer, number, file.pointer)

    def put_zeros(self, number: int) -> None:
        """Chunk `number` is zeros."""
        self._quick.table_put(self.pointer, number, None)

    def __del__(self) -> None:
        if self.pointer:
            self._slow.table_free(self.pointer)


class Gate:
    """overlay.Gate: any number of writers, or none."""

    def __init__(self, library: Library, volume: int) -> None:
        self._slow, self._quick, self._volume = library.slow, library.quick, volume

    def __enter__(self) -> None:
        self._slow.gate_enter(self._volume)

    def __exit__(self, *_: object) -> None:
        self._quick.gate_leave(self._volume)

    @contextmanager
    def closed(self) -> Iterator[None]:
        self._slow.gate_close(self._volume)
        try:
            yield
        finally:
            self._quick.gate_open(self._volume)


class Volume:
    """The stack that is served natively, and the locks of its writers."""

    def __init__(self, library: Library) -> None:
        self._quick, self._slow = library.quick, library.slow
        self.pointer = 0
        self.pointer = self._quick.volume_new() or 0
        if not self.pointer:
            raise MemoryError
        self.gate = Gate(library, self.pointer)
        self._kept: object = None

    def set(self, layers: Sequence[Layer], base: Table | None, read_only: bool) -> None:
        """Serve from these; no request uses what was set before when this returns."""
        pointers = (ctypes.c_void_p * len(layers))(*(layer.pointer for layer in layers))
        table = base.pointer if base is not None else None
        _check(self._slow.volume_set(self.pointer, pointers, len(layers), table, read_only))
        self._kept = (tuple(layers), base)

    def stripes(self, numbers: Iterable[int]) -> Lock:
        """The locks of these stripes, as one."""
        which = sum(1 << number for number in numbers)
        return Lock(self._slow.stripes_lock, self._quick.stripes_unlock, self.pointer, which)

    def serve(self, serving: bool) -> None:
        """Whether nbdkit's requests are served from here."""
        self._quick.serve(self.pointer if serving else None)

    def sums(self) -> dict[str, int]:
        """What was served natively since the start."""
        sums = (ctypes.c_uint64 * len(_SUMS))()
        self._quick.volume_sums(self.pointer, sums)
        return dict(zip(_SUMS, sums, strict=True))

    def flushes(self) -> tuple[list[int], float]:
        """How many native flushes took how long (figures.BOUNDS), and seconds in all."""
        counts = (ctypes.c_uint64 * 16)()
        total = self._quick.volume_flushes(self.pointer, counts)
        return list(counts), total / 1e9

    # For tests, which have no nbdkit.

    def flush(self) -> bool:
        """Flush natively; False if that is left to Python."""
        return bool(self._slow.flush(self.pointer))

    def read(self, offset: int, view: memoryview) -> int:
        """Fill `view` from its start with what is here; how many bytes that are."""
        buffer = (ctypes.c_char * len(view)).from_buffer(view)
        return int(self._slow.read(self.pointer, buffer, len(view), offset))

    def write(self, offset: int, data: bytes) -> bool:
        """Write natively; False if that is left to Python."""
        return bool(self._slow.write(self.pointer, data, len(data), offset))

    def __del__(self) -> None:
        if self.pointer:
            self._slow.volume_free(self.pointer)

"""The shared object: where it is, whether this process has it as nbdkit's filter, its functions."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_uint, c_uint32, c_uint64, c_void_p
from pathlib import Path

log = logging.getLogger(__name__)

NAME = "nbdkit-horcrux-filter.so"
ABI = 1  # core.h, HX_ABI

_FUNCTIONS: dict[str, tuple[object, list[object]]] = {
    "abi": (c_int, []),
    "filter_loaded": (c_int, []),
    "serve": (None, [c_void_p]),
    "map_get": (c_int, [c_void_p, c_uint64, c_char_p]),
    "map_put": (c_int, [c_void_p, c_uint64, c_char_p, c_int]),
    "map_drop": (None, [c_void_p, c_uint64]),
    "map_touch": (c_int, [c_void_p, c_uint64]),
    "map_next": (c_uint64, [c_void_p, c_uint64]),
    "map_count": (c_uint64, [c_void_p]),
    "map_dirty": (c_uint64, [c_void_p]),
    "map_list": (
        c_uint64,
        [c_void_p, c_uint64, c_uint64, POINTER(c_uint64), c_char_p, c_uint64],
    ),
    "map_take": (c_uint64, [c_void_p, POINTER(c_uint64), c_char_p]),
    "map_sum": (None, [c_void_p, POINTER(c_uint64)]),
    "zeros_add": (c_int, [c_void_p, c_uint64, c_uint64]),
    "zeros_count": (c_uint64, [c_void_p]),
    "zeros_has": (c_int, [c_void_p, c_uint64]),
    "zeros_change": (c_uint64, [c_void_p, c_uint64]),
    "zeros_list": (None, [c_void_p, POINTER(c_uint64), POINTER(c_uint64)]),
    "layer_new": (c_void_p, [c_uint64, c_uint64, c_uint64]),
    "layer_set_whole": (None, [c_void_p, c_int]),
    "layer_failed": (c_int, [c_void_p]),
    "journal_get": (c_uint64, [c_void_p, c_uint]),
    "journal_set": (None, [c_void_p, c_uint, c_uint64]),
    "flush_lock": (None, [c_void_p]),
    "flush_unlock": (None, [c_void_p]),
    "flush": (c_int, [c_void_p]),
    "volume_flushes": (c_uint64, [c_void_p, POINTER(c_uint64)]),
    "layer_free": (None, [c_void_p]),
    "layer_map": (c_void_p, [c_void_p]),
    "layer_lock": (None, [c_void_p]),
    "layer_unlock": (None, [c_void_p]),
    "layer_set_file": (c_int, [c_void_p, c_uint64, c_int]),
    "layer_set_closed": (None, [c_void_p, c_int]),
    "layer_touch": (c_int, [c_void_p, c_uint64]),
    "layer_wrote": (None, [c_void_p, c_uint64, c_uint64]),
    "layer_take_written": (c_int, [c_void_p, POINTER(c_uint64), POINTER(c_uint64)]),
    "layer_take": (c_uint64, [c_void_p, POINTER(c_uint64), c_uint64]),
    "recent_set": (None, [c_void_p, c_int, c_uint64, c_uint64, c_uint32]),
    "recent_at": (c_uint64, [c_void_p]),
    "note": (c_int, [c_void_p, c_uint64, c_uint64]),
    "file_new": (c_void_p, [c_int, c_uint64]),
    "file_retire": (None, [c_void_p]),
    "file_used": (c_int, [c_void_p, c_int]),
    "table_new": (c_void_p, [c_uint64, c_uint64]),
    "table_free": (None, [c_void_p]),
    "table_put": (None, [c_void_p, c_uint64, c_void_p]),
    "volume_new": (c_void_p, []),
    "volume_free": (None, [c_void_p]),
    "volume_set": (c_int, [c_void_p, POINTER(c_void_p), c_size_t, c_void_p, c_int]),
    "gate_enter": (None, [c_void_p]),
    "gate_leave": (None, [c_void_p]),
    "gate_close": (None, [c_void_p]),
    "gate_open": (None, [c_void_p]),
    "stripes_lock": (None, [c_void_p, c_uint64]),
    "stripes_unlock": (None, [c_void_p, c_uint64]),
    "read": (c_size_t, [c_void_p, c_void_p, c_size_t, c_uint64]),
    "write": (c_int, [c_void_p, c_void_p, c_size_t, c_uint64]),
    "volume_sums": (None, [c_void_p, POINTER(c_uint64)]),
}


class Calls:
    """The functions, without their `hx_`. `quick` ones hold on to the interpreter's lock: for what
    takes less than handing it over, and waits for no lock that Python code runs under.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(library, f"hx_{name}")
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)

    def __getattr__(self, name: str) -> ctypes._NamedFuncPointer:
        raise AttributeError(name)


SYNC = ctypes.CFUNCTYPE(c_int, c_int)


class Library:
    """The shared object at `path`, opened. The same file is the same instance in a process."""

    def __init__(self, path: Path) -> None:
        """Raises OSError where it cannot be opened or is of another release."""
        # Lazily: its filter's calls into nbdkit are not there in other processes.
        mode = os.RTLD_LAZY | os.RTLD_LOCAL
        self.path = path
        self.slow = Calls(ctypes.CDLL(str(path), mode=mode))
        self.quick = Calls(ctypes.PyDLL(str(path), mode=mode))
        if self.quick.abi() != ABI:
            raise OSError(f"{path} belongs to another release: build it again")

    def sync_with(self, sync: Callable[[int], None]) -> None:
        """For tests: sync a descriptor by `sync`, which raises OSError; kept for good."""

        def call(fd: int) -> int:
            try:
                sync(fd)
            except OSError as error:
                ctypes.set_errno(error.errno or 5)
                return -1
            return 0

        function = SYNC(call)
        _syncs.append(function)
        place = ctypes.c_void_p.in_dll(ctypes.CDLL(str(self.path)), "hx_sync")
        place.value = ctypes.cast(function, ctypes.c_void_p).value


_syncs: list[object] = []  # C has their addresses
_forced: list[Library | None] = []


def active() -> Library | None:
    """The library, where this process is an nbdkit that has it as its filter; None elsewhere."""
    return _forced[-1] if _forced else _of_this_process()


@contextmanager
def forced(library: Library | None) -> Iterator[None]:
    """For tests: what `active` says meanwhile."""
    _forced.append(library)
    try:
        yield
    finally:
        _forced.pop()


@functools.cache
def _of_this_process() -> Library | None:
    # The filter's own path, whatever it was called by: another copy would be another instance.
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    path = next((line.split(None, 5)[5] for line in maps.splitlines() if line.endswith(NAME)), None)
    if path is None:
        return None
    try:
        library = Library(Path(path))
    except (OSError, AttributeError) as error:
        log.warning("the native filter is not used: %s", error)
        return None
    return library if library.quick.filter_loaded() else None

"""CRC-32C as ext4 uses it: reflected, polynomial 0x82F63B78, not inverted at the end.

libext2fs has it in C, 100 times as fast as Python; where that is missing a table does.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

_POLYNOMIAL = 0x82F63B78
SEED = 0xFFFFFFFF

Crc = Callable[[int, bytes, int], int]  # value so far, data, its length


@functools.cache
def _in_c() -> Crc | None:
    try:
        function = ctypes.CDLL("libext2fs.so.2").ext2fs_crc32c_le
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_uint32, ctypes.c_char_p, ctypes.c_size_t]
    function.restype = ctypes.c_uint32
    return function


@functools.cache
def _table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (_POLYNOMIAL if value & 1 else 0)
        table.append(value)
    return table


def in_python(crc: int, data: bytes) -> int:
    """`crc32c` without a library."""
    table = _table()
    for byte in data:
        crc = crc >> 8 ^ table[(crc ^ byte) & 0xFF]
    return crc


def crc32c(crc: int, data: bytes) -> int:
    """`crc` continued over `data`; begin with SEED."""
    function = _in_c()
    return in_python(crc, data) if function is None else function(crc, data, len(data))

"""File system exerciser: random calls on one file, compared with what it has to hold.

After fsx of Apple and SGI (xfstests' ltp/fsx.c): reads and writes, also through a mapping,
truncation, holes, preallocation and syncs, at any offset; the page cache is dropped now and then,
so that what is read comes from the device.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
from pathlib import Path

MAX_SIZE = 4 << 20
_PUNCH, _ZERO, _KEEP = 2, 16, 1  # linux/falloc.h

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class Exerciser:
    """One file at `path`, made anew. `run` may be called again and again, then `check`."""

    def __init__(self, path: Path, seed: str) -> None:
        self._path, self._chance = path, random.Random(seed)
        self._model = bytearray()
        self.calls: list[str] = []
        path.write_bytes(b"")

    def run(self, count: int) -> None:
        """`count` calls. Raises AssertionError with the last calls where something differs."""
        actions = {
            self._write: 30, self._read: 25, self._map_write: 12, self._map_read: 8,
            self._truncate: 6, self._punch: 8, self._zero_range: 4, self._allocate: 3,
            self._sync: 3, self._drop: 4,
        }  # fmt: skip
        fd = os.open(self._path, os.O_RDWR)
        try:
            for action in self._chance.choices(list(actions), list(actions.values()), k=count):
                action(fd)
        finally:
            os.close(fd)

    def check(self) -> None:
        """The whole file, from the device as far as that can be."""
        with self._path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            self._compare(0, file.read(), whole=True)

    def _did(self, what: str, *numbers: int) -> None:
        self.calls.append(f"{what} {' '.join(map(str, numbers))}")

    def _range(self, limit: int) -> tuple[int, int]:
        """(offset, length), within `limit`; often at a page's edge."""
        offset = self._chance.randrange(max(limit, 1))
        if self._chance.random() < 0.3:
            offset &= ~4095
        length = self._chance.choice([1, 511, 512, 4096, self._chance.randrange(1, 100_000)])
        return offset, min(length, limit - offset)

    def _compare(self, offset: int, found: bytes, *, whole: bool = False) -> None:
        expected = self._model if whole else self._model[offset : offset + len(found)]
        if found == expected:
            return
        at = next(
            (n for n, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b),
            min(len(found), len(expected)),
        )
        raise AssertionError(
            f"{self._path}: byte {offset + at} differs ({len(found)} bytes, {len(expected)} "
            f"expected), after {len(self.calls)} calls, the last: {'; '.join(self.calls[-20:])}"
        )

    def _put(self, offset: int, data: bytes) -> None:
        self._grow(offset + len(data))
        self._model[offset : offset + len(data)] = data

    def _grow(self, size: int) -> None:
        self._model.extend(bytes(max(0, size - len(self._model))))

    def _data(self, length: int) -> bytes:
        return self._chance.randbytes(16) * (length // 16) + bytes([1]) * (length % 16)

    # ---- calls

    def _write(self, fd: int) -> None:
        offset, length = self._range(MAX_SIZE)
        data = self._data(length)
        self._did("write", offset, length)
        assert os.pwrite(fd, data, offset) == length
        self._put(offset, data)

    def _read(self, fd: int) -> None:
        offset, length = self._range(len(self._model))
        self._did("read", offset, length)
        self._compare(offset, os.pread(fd, length, offset))

    def _map_write(self, fd: int) -> None:
        offset, length = self._range(len(self._model))
        if length > 0:
            self._did("map write", offset, length)
            data = self._data(length)
            with mmap.mmap(fd, len(self._model)) as view:
                view[offset : offset + length] = data
                if self._chance.random() < 0.3:
                    view.flush()
            self._put(offset, data)

    def _map_read(self, fd: int) -> None:
        offset, length = self._range(len(self._model))
        if length > 0:
            self._did("map read", offset, length)
            with mmap.mmap(fd, len(self._model), prot=mmap.PROT_READ) as view:
                self._compare(offset, view[offset : offset + length])

    def _truncate(self, fd: int) -> None:
        size = self._chance.randrange(MAX_SIZE)
        self._did("truncate", size)
        os.ftruncate(fd, size)
        del self._model[size:]
        self._grow(size)

    def _fallocate(self, fd: int, what: str, mode: int, offset: int, length: int) -> None:
        self._did(what, offset, length)
        if _libc.fallocate(fd, mode, offset, length):
            code = ctypes.get_errno()
            raise OSError(code, f"{what}: {os.strerror(code)}")

    def _punch(self, fd: int) -> None:
        offset, length = self._range(len(self._model))
        if length > 0:
            self._fallocate(fd, "punch", _PUNCH | _KEEP, offset, length)
            self._put(offset, bytes(length))

    def _zero_range(self, fd: int) -> None:
        offset, length = self._range(MAX_SIZE)
        self._fallocate(fd, "zero range", _ZERO, offset, length)
        self._put(offset, bytes(length))

    def _allocate(self, fd: int) -> None:
        offset, length = self._range(MAX_SIZE)
        self._fallocate(fd, "allocate", 0, offset, length)
        self._grow(offset + length)

    def _sync(self, fd: int) -> None:
        self._did("sync")
        os.fsync(fd)

    def _drop(self, fd: int) -> None:
        self._did("drop")
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

"""A source that is a disk image already: a raw file or a block device."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator

from ..errors import UsageError
from ..files import read_exactly
from .base import Source, check_range

_EXT4_EXTENTS = 0x40  # in s_feature_incompat: what makes an "ext" file system ext4


def detect_filesystem(read: Callable[[int, int], bytes]) -> str | None:
    """ "ext4" or "xfs" if the disk that `read(offset, length)` reads begins with one.

    Magic numbers: Linux Documentation/filesystems/ext4 (super block at 1024) and xfs_sb(5).
    """
    head = read(0, 2048)
    if head[:4] == b"XFSB":
        return "xfs"
    if head[1024 + 0x38 : 1024 + 0x3A] == b"\x53\xef":
        incompat = int.from_bytes(head[1024 + 0x60 : 1024 + 0x64], "little")
        if incompat & _EXT4_EXTENTS:
            return "ext4"
    return None


def data_ranges(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of what is no hole between `start` and `end` (SEEK_DATA, lseek(2))."""
    offset = start
    while offset < end:
        try:
            offset = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole until the end of the file
                return
            if error.errno != errno.EINVAL:
                raise
            yield offset, end - offset  # this file system knows no holes
            return
        if offset >= end:
            return
        hole = min(os.lseek(fd, offset, os.SEEK_HOLE), end)
        if hole <= offset:  # cut short behind our back
            return
        yield offset, hole - offset
        offset = hole


class RawSource(Source):
    """A raw image file or a block device, read where it lies."""

    def __init__(self, path: str) -> None:
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror}") from error
        try:
            status = os.fstat(self._fd)
            self._is_device = stat.S_ISBLK(status.st_mode)
            if not self._is_device and not stat.S_ISREG(status.st_mode):
                raise UsageError(f"{path} is neither a file nor a block device")
            self.size = os.lseek(self._fd, 0, os.SEEK_END)
            if self.size == 0:
                raise UsageError(f"{path} is empty: there is no disk image in it")
            self.filesystem = detect_filesystem(self.read)
        except BaseException:
            os.close(self._fd)
            raise
        self._path = path
        self._began = _identity(status)

    def extents(self) -> Iterator[tuple[int, int]]:
        if self._is_device:
            yield 0, self.size
        else:
            yield from data_ranges(self._fd, 0, self.size)

    def read(self, offset: int, length: int) -> bytes:
        check_range(offset, length)
        return read_exactly(self._fd, length, offset)

    def problems(self) -> list[str]:
        # The times of a device node say nothing about what is written to the device.
        if not self._is_device and _identity(os.fstat(self._fd)) != self._began:
            return [f"{self._path}: changed while it was read"]
        return []

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _identity(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def device_in_use(path: str) -> bool:
    """Whether the block device is mounted or otherwise held (open(2): O_EXCL without O_CREAT)."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        return error.errno == errno.EBUSY
    return False

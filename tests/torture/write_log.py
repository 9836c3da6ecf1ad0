"""A reader of the dm-log-writes format, which qemu's `blklogwrites` driver writes too.

    sector 0      super block: u64 magic, u64 version (1), u64 entries, u32 bytes of a sector
    then          entry: u64 sector, u64 sectors, u64 flags, u64 bytes of a mark's text; from the
                  next sector on the data (a discard has none) or the text

(Linux, Documentation/admin-guide/device-mapper/log-writes.rst; qemu, block/blklogwrites.c)
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

MAGIC = 0x6A736677736872
FLUSH, FUA, DISCARD, MARK = 1, 2, 4, 8
_SUPER = struct.Struct("<QQQI")
_ENTRY = struct.Struct("<QQQQ")


@dataclass(frozen=True)
class Entry:
    """A request, in the order in which they were completed. `offset` and `length` in bytes."""

    offset: int
    length: int
    flags: int
    data: bytes

    @property
    def is_barrier(self) -> bool:
        """Whether all that was completed before it is durable when it is, and this as well."""
        return bool(self.flags & (FLUSH | FUA))

    def apply(self, disk: BinaryIO) -> None:
        """Do it to an image."""
        disk.seek(self.offset)
        disk.write(bytes(self.length) if self.flags & DISCARD else self.data)


def entries(path: Path) -> Iterator[Entry]:
    """The log in the file `path`, whose writer has ended. Raises ValueError for anything else."""
    with path.open("rb") as log:
        magic, version, count, sector = _SUPER.unpack(log.read(_SUPER.size))
        if (magic, version) != (MAGIC, 1):
            raise ValueError(f"{path} is no log of writes: magic {magic:#x}, version {version}")
        at = sector
        for _ in range(count):
            log.seek(at)
            first, sectors, flags, length = _ENTRY.unpack(log.read(_ENTRY.size))
            at += sector
            data, length = b"", length if flags & MARK else sectors * sector
            if not flags & DISCARD and length:
                log.seek(at)
                data = log.read(length)
                if len(data) < length:
                    raise ValueError(f"{path} ends within the data of an entry")
                at += -(-length // sector) * sector
            if not flags & MARK:
                yield Entry(first * sector, sectors * sector, flags, data)

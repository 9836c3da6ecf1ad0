"""Small flushes of new blocks with one sync, not two.

A flush of blocks that were written for the first time syncs the data files, which has the file
system commit the blocks that it found for them, and then the map's log. A database that syncs each
8 KiB pays that each time. So a small flush copies its blocks into this file instead, whose own
blocks are all there and written, and syncs it alone. Data files and map follow with the next flush
that is not small, at the latest when this file is full.

```
journal   a header, then records, each a block of numbers and the blocks themselves
          (docs/design.md, "Layout of a volume's folder")
```

**Invariant:** what is in here was acknowledged by a flush and is not yet durable in the data files
and the map. When a flush has made it so, the epoch goes up, durably, before that flush is
acknowledged; records of other epochs do not count.
**Invariant:** within the boot that it was written in, it is not replayed: the kernel has all that
was written, also what came later (`recent` has the marks). After a power cut each of its blocks is
what was flushed last.
"""

from __future__ import annotations

import contextlib
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import xxhash

from .. import files
from ..errors import Damaged
from .recent import place

BLOCK = 4096
SIZE = 2 << 20  # bytes: about 250 flushes of a block, and then one that syncs everything
MOST = 16  # blocks in a record; more is no small flush
# So many flushes of few new blocks one after another, and there is a journal: a volume that is
# flushed now and then has no use for it.
AFTER = 8

HEADER = struct.Struct("<8sQ16s16sQQI")  # magic, epoch, layer id, boot, device, inode, CRC-32
MAGIC = b"HRCXJRN1"
RECORD = struct.Struct("<4sIQQQ")  # magic, blocks, epoch, number, XXH64 of the record, this as 0
RECORD_MAGIC = b"JREC"


def seed_of(layer_id: bytes) -> int:
    """The seed of a layer's checksums."""
    return int.from_bytes(layer_id[:8], "little")


class StateProtocol(Protocol):
    """Where the next record goes. Here in Python (`State`) or native (native/handles.py)."""

    fd: int  # -1: there is no journal
    at: int  # bytes
    number: int  # how many records there are
    epoch: int


class State:
    """A StateProtocol in Python."""

    def __init__(self) -> None:
        self.fd, self.at, self.number, self.epoch = -1, BLOCK, 0, 0


class Journal:
    """The journal of one layer. Callers serialise everything."""

    def __init__(self, path: Path, layer_id: bytes, state: StateProtocol | None = None) -> None:
        self._path, self._id = path, layer_id
        self._seed = seed_of(layer_id)
        self._state = state if state is not None else State()
        self._state.at = BLOCK
        self._place: tuple[bytes, int, int] | None = None
        self._small = 0  # flushes of few blocks since the last of many

    # ---- after a start

    def load(self, read_only: bool) -> dict[int, bytes]:
        """What the records that a dead server left say each block is: nothing within the boot, and
        the folder, that they were written in. Unless `read_only`, it is ready for `clear`, which is
        due when all of that is durable elsewhere. Raises Damaged.
        """
        try:
            with open(self._path, "rb") as file:
                data = file.read(SIZE + 1)
        except FileNotFoundError:
            return {}
        header = data[: HEADER.size].ljust(HEADER.size, b"\0")
        if not any(header):
            return {}  # it was being made: nothing was acknowledged through it
        magic, epoch, layer_id, *where, checksum = HEADER.unpack(header)
        told = (magic, layer_id, checksum, len(data))
        if told != (MAGIC, self._id, zlib.crc32(header[:-4]), SIZE):
            raise Damaged(
                f"{self._path} is damaged (its header): what was flushed last may be in it; "
                "restore the volume's folder from a backup, or remove the volume"
            )
        self._state.epoch = epoch
        blocks: dict[int, bytes] = {}
        number, at = 0, BLOCK
        while found := self._record(data, at, number):
            blocks.update(found)
            at += BLOCK * (1 + len(found))
            number += 1
        for later in range(at + BLOCK, SIZE, BLOCK):
            if self._record(data, later, None):
                raise Damaged(
                    f"{self._path} is damaged at byte {at}: what was flushed after it cannot be "
                    "trusted; restore the volume's folder from a backup, or remove the volume"
                )
        if not read_only:
            self._state.fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
            self._state.number = number
        return {} if tuple(where) == place(self._path.parent) else blocks

    def _record(self, data: bytes, at: int, number: int | None) -> dict[int, bytes]:
        """The blocks of the record at `at`, none if there is none with this number (or any)."""
        if at + BLOCK > len(data):
            return {}
        magic, count, epoch, found, checksum = RECORD.unpack_from(data, at)
        end = at + BLOCK * (1 + count)
        if (
            magic != RECORD_MAGIC
            or epoch != self._state.epoch
            or number not in (None, found)
            or not 1 <= count <= MOST
            or end > len(data)
            or checksum != self._sum(data[at:end])
        ):
            return {}
        numbers = struct.unpack_from(f"<{count}Q", data, at + RECORD.size)
        return {
            block: data[start : start + BLOCK]
            for block, start in zip(numbers, range(at + BLOCK, end, BLOCK), strict=True)
        }

    def _sum(self, record: bytes) -> int:
        hasher = xxhash.xxh64(record[: RECORD.size - 8], seed=self._seed)
        hasher.update(bytes(8))
        hasher.update(memoryview(record)[RECORD.size :])
        return int(hasher.intdigest())

    # ---- while it is served

    @property
    def in_use(self) -> bool:
        """Whether it has something that is durable nowhere else."""
        return self._state.number > 0

    def wanted(self, count: int) -> bool:
        """Whether a flush of `count` blocks, some of them new, should come here if it fits."""
        self._small = self._small + 1 if count <= MOST else 0
        return count <= MOST and (self._state.fd >= 0 or self._small > AFTER)

    def make(self) -> bool:
        """Be ready for records; False where there is no room. All that was written is durable."""
        if self._state.fd >= 0:
            return True
        fd = -1
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            # Written, not only allocated: else each sync would have the file system commit that.
            files.write_all(fd, bytes(SIZE), 0)
            os.fsync(fd)  # so that one with a header is whole
            self._state.epoch += 1
            files.write_all(fd, self._header(), 0)
            os.fsync(fd)
            files.sync_folder(self._path.parent)
        except OSError:
            if fd >= 0:
                os.close(fd)
            with contextlib.suppress(OSError):
                os.unlink(self._path)
            self._small = -(1 << 20)  # not again soon
            return False
        self._state.fd, self._state.at, self._state.number = fd, BLOCK, 0
        return True

    def _header(self) -> bytes:
        fields = (MAGIC, self._state.epoch, self._id, *(self._place or place(self._path.parent)))
        header = HEADER.pack(*fields, 0)[:-4]
        return header + struct.pack("<I", zlib.crc32(header))

    def has_room(self, count: int) -> bool:
        return self._state.at + BLOCK * (1 + count) <= SIZE

    def append(self, numbers: Sequence[int], contents: bytes) -> None:
        """Make blocks durable. Raises OSError; then nothing is known of what the disk has."""
        head = RECORD.pack(RECORD_MAGIC, len(numbers), self._state.epoch, self._state.number, 0)
        head = (head + struct.pack(f"<{len(numbers)}Q", *numbers)).ljust(BLOCK, b"\0")
        checksum = struct.pack("<Q", self._sum(head + contents))
        record = head[: RECORD.size - 8] + checksum + head[RECORD.size :] + contents
        files.write_all(self._state.fd, record, self._state.at)
        os.fdatasync(self._state.fd)
        self._state.at += len(record)
        self._state.number += 1

    def clear(self) -> None:
        """All that is in here is durable elsewhere. Raises OSError."""
        if not self._state.number:
            return
        self._state.epoch += 1
        files.write_all(self._state.fd, self._header(), 0)
        os.fdatasync(self._state.fd)
        self._state.at, self._state.number = BLOCK, 0

    def distrust(self) -> None:
        """The data files cannot be relied on, in this boot either: let the next server replay what
        was flushed, if this disk takes that.
        """
        with contextlib.suppress(OSError):
            if self._state.number:
                self._place = bytes(16), 0, 0
                files.write_all(self._state.fd, self._header(), 0)
                os.fdatasync(self._state.fd)

    def remove(self) -> None:
        """Nothing of it is needed: what it had is durable elsewhere."""
        self.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)

    def close(self) -> None:
        if self._state.fd >= 0:
            os.close(self._state.fd)
            self._state.fd = -1

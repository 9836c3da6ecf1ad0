"""Marks since the last flush, where the death of the process does not reach them.

The map on disk learns of a write when it is flushed. A process that dies before (nbdkit 1.32.5
does when a client leaves with requests under way) would lose what it has acknowledged, and a kernel
that connects again to the next process goes on as if it were there. So each mark is also written,
unsynced, to this file: the kernel keeps it beside the data. After a power cut neither is to be
relied on, so it counts only within the boot, and the folder, that it was written in.

```
recent   two halves, each a header and marks (docs/design.md, "On the host")
```

**Invariant:** marks go to one half while those of the other are being flushed; the halves change
roles when a flush takes the marks. Both are replayed, the older first: doing again what a flush
has done already changes nothing, as long as all that came later is done again too.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from ..errors import NoSpace

log = logging.getLogger(__name__)

HALF = 1 << 19  # bytes: 21,000 marks, at least 85 MiB of fresh blocks; then a flush is due
HEADER = struct.Struct("<8sQ16sQQII")  # magic, generation, boot, device, inode, checksum, 0
MAGIC = b"HRCXRCN1"
ENTRY = struct.Struct("<QQII")  # first block, count << 2 | state, generation (low), checksum
FIRST_ENTRY = 64  # offset of the first entry in its half

# One that holds on to the GIL: 24 bytes into the page cache take less than handing it over.
_pwrite = ctypes.PyDLL(None, use_errno=True).pwrite
_pwrite.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int64]
_pwrite.restype = ctypes.c_ssize_t

Mark = tuple[int, int, int]  # first block, count, state


def boot_id() -> bytes:
    """16 bytes that are others after each start of the machine."""
    text = Path("/proc/sys/kernel/random/boot_id").read_text()
    return bytes.fromhex(text.strip().replace("-", ""))


def place(folder: Path) -> tuple[bytes, int, int]:
    """(boot id, device, inode): what says another is of before a restart, or of a copy."""
    status = os.stat(folder)
    return boot_id(), status.st_dev, status.st_ino


class PenProtocol(Protocol):
    """Writes entries one behind the other. Here in Python (`Pen`) or native (native/handles.py)."""

    @property
    def at(self) -> int:
        """Where the next entry goes, bytes in the file."""

    def place(self, fd: int, at: int, end: int, generation: int) -> None:
        """Go on in `fd` at `at`, up to `end`; -1: nothing is noted, and all is well."""

    def note(self, first: int, what: int) -> bool:
        """Write an entry; False if there is no room. Raises OSError."""


class Pen:
    """A PenProtocol in Python."""

    def __init__(self) -> None:
        self._fd, self.at, self._end, self._generation = -1, 0, 0, 0

    def place(self, fd: int, at: int, end: int, generation: int) -> None:
        self._fd, self.at, self._end, self._generation = fd, at, end, generation

    def note(self, first: int, what: int) -> bool:
        if self._fd < 0:
            return True
        if self.at + ENTRY.size > self._end:
            return False
        _write(self._fd, _encode(first, what, self._generation), self.at)
        self.at += ENTRY.size
        return True


class Recent:
    """The file of one layer. Callers serialise all but `load`."""

    def __init__(self, path: Path, pen: PenProtocol | None = None) -> None:
        self.path = path
        self._fd = -1
        self._half = 0
        self._pen = pen if pen is not None else Pen()
        self._generation = 0
        self._begin = 0  # of the entries since the last `switch`

    def load(self) -> list[Mark]:
        """The marks that the last process noted, oldest first; none where they do not count."""
        try:
            with open(self.path, "rb") as file:
                data = file.read(2 * HALF)
        except FileNotFoundError:
            return []
        halves: list[tuple[int, list[Mark]]] = []
        for start in (0, HALF):
            half = data[start : start + HALF]
            header = half[: HEADER.size]
            if len(header) < HEADER.size:
                continue
            magic, generation, *where, checksum, _ = HEADER.unpack(header)
            ours = magic == MAGIC and tuple(where) == self._place()
            if ours and checksum == zlib.crc32(header[:-8]):
                halves.append((generation, list(_entries(half, generation))))
        self._generation = max((generation for generation, _ in halves), default=0)
        return [mark for _, marks in sorted(halves, key=lambda half: half[0]) for mark in marks]

    def _place(self) -> tuple[bytes, int, int]:
        return place(self.path.parent)

    def start(self) -> None:
        """Begin anew: what `load` gave is durable now. Does without where there is no room."""
        self.remove()  # an entry of before must not look like one of ours
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            self._fd = os.open(self.path, flags, 0o600)
            os.posix_fallocate(self._fd, 0, 2 * HALF)
            self.switch()
            self.switch()  # both halves are of this process
        except (OSError, NoSpace) as error:
            log.warning(
                "%s: %s: until the next start each first write of a block is flushed, which is "
                "slow",
                self.path,
                error,
            )
            self.remove()

    def switch(self) -> None:
        """What is noted from here on belongs to the next flush. Raises NoSpace, OSError."""
        if self._fd < 0:
            return
        fields = (MAGIC, self._generation + 1, *self._place())
        checksum = zlib.crc32(HEADER.pack(*fields, 0, 0)[:-8])
        with self._telling_of_space():
            _write(self._fd, HEADER.pack(*fields, checksum, 0), HALF - self._half)
        self._generation += 1
        self._half = HALF - self._half
        self._begin = self._half + FIRST_ENTRY
        self._pen.place(self._fd, self._begin, self._half + HALF, self._generation)

    @property
    def active(self) -> bool:
        """Whether what is noted is kept; there may have been no room for the file."""
        return self._fd >= 0

    @property
    def noted(self) -> bool:
        """Whether there was a mark since the last `switch`."""
        return self._fd >= 0 and self._pen.at > self._begin

    def note(self, first: int, count: int, state: int) -> bool:
        """Keep a mark; False if there is no room: flush, and try again. Raises NoSpace, OSError."""
        with self._telling_of_space():
            return self._pen.note(first, count << 2 | state)

    @contextlib.contextmanager
    def _telling_of_space(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NoSpace(f"no space left for {self.path}: free some") from error
            raise

    def remove(self) -> None:
        """All that was noted is durable: nothing is left of it."""
        self.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)

    def close(self) -> None:
        self._pen.place(-1, 0, 0, 0)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _encode(first: int, what: int, generation: int) -> bytes:
    low = generation & 0xFFFFFFFF
    return ENTRY.pack(first, what, low, zlib.crc32(ENTRY.pack(first, what, low, 0)))


def _entries(half: bytes, generation: int) -> Iterator[Mark]:
    for at in range(FIRST_ENTRY, len(half) - ENTRY.size + 1, ENTRY.size):
        first, what, *_ = ENTRY.unpack_from(half, at)
        if half[at : at + ENTRY.size] != _encode(first, what, generation):
            return  # the end, or one that was cut off by death
        yield first, what >> 2, what & 3


def _write(fd: int, data: bytes, offset: int) -> None:
    done = _pwrite(fd, data, len(data), offset)
    if 0 < done < len(data):
        _write(fd, data[done:], offset + done)
    elif done != len(data):
        code = ctypes.get_errno() or errno.EIO
        raise OSError(code, os.strerror(code))

"""The overlay's map on disk: a log of checksummed batches, one for each flush.

A batch says which groups got which states. It is appended only after the data that it makes
visible is synced, so at any moment a block is what the last complete batch says or something
written later, never zeros or garbage. A torn batch at the end was never acknowledged and is cut
off; one in the middle is damage and is refused. The layout is in docs/format.md, "Overlay map".

A damaged or cut-off end looks like a torn one. So the file `flushed` beside the log notes how many
batches were acknowledged: written after they were synced and never synced itself, so what it says,
however old, is in the log, or the log was damaged.

**Invariant:** at most one batch is on its way to the disk: the next is written when it is synced.
So a bad batch with a good one behind it is damage, and never what a power cut leaves.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import xxhash

from .. import files
from ..errors import Damaged, NoSpace
from .blockmap import GROUP, BlockMap

FILE_HEADER = struct.Struct("<8sHHI16sQQ")  # magic, version, log2 block, group, layer id, size, sum
FILE_MAGIC = b"HRCXMAP1"
BATCH_HEADER = struct.Struct("<4sIQIIQ")  # magic, payload bytes, sequence, zero ranges, groups, sum
BATCH_MAGIC = b"BTCH"
ZEROS = struct.Struct("<QQ")  # first group, one past the last
GROUP_ENTRY = struct.Struct(f"<Q{GROUP // 4}s")  # group, its states at two bits each
MAX_BATCH = 1 << 24  # bytes of payload; more is written as several batches
# A log that has grown to this many times its compact form, and beyond this size, is rewritten.
COMPACT_FACTOR = 4
COMPACT_FROM = 1 << 20

# Beyond so many times the compact form of a map in which everything was written, and this room for
# what a full disk kept from being rewritten, it is no log: somebody made it longer.
IMPLAUSIBLE_FACTOR, IMPLAUSIBLE_FROM = COMPACT_FACTOR + 2, 64 << 20

FLUSHED = struct.Struct("<8sQ16sI")  # magic, batches that were acknowledged, layer id, CRC-32
FLUSHED_MAGIC = b"HRCXFLS1"

# Room that is taken ahead of the log, so that on a full disk what was written can still be flushed.
RESERVE = 1 << 20
_KEEP_SIZE = 0x01  # FALLOC_FL_KEEP_SIZE, linux/falloc.h
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]

_PACKED = GROUP // 4
_LOW_BITS = int.from_bytes(b"\x03" * _PACKED)

Changes = tuple[Sequence[tuple[int, int]], Sequence[tuple[int, bytes]]]


def pack_states(states: bytes) -> bytes:
    """128 states at two bits each, the first in the low bits."""
    packed = 0
    for lane in range(4):
        packed |= int.from_bytes(states[lane::4]) << 2 * lane
    return packed.to_bytes(_PACKED)


def unpack_states(packed: bytes) -> bytes:
    """The opposite; ValueError for a state that there is not."""
    number = int.from_bytes(packed)
    states = bytearray(GROUP)
    for lane in range(4):
        states[lane::4] = (number >> 2 * lane & _LOW_BITS).to_bytes(_PACKED)
    if 3 in states:
        raise ValueError("no such state")
    return bytes(states)


def _batches(changes: Changes, sequence: int, seed: int) -> Iterator[tuple[int, bytes]]:
    """(sequence, bytes) of the batches that say `changes`, at least one."""
    zeros, groups = changes
    at_zero = at_group = 0
    while True:
        some_zeros = zeros[at_zero : at_zero + MAX_BATCH // ZEROS.size]
        at_zero += len(some_zeros)
        room = MAX_BATCH - len(some_zeros) * ZEROS.size
        # Zeroed ranges come first in the order of things: groups only when all are out.
        some_groups = groups[at_group : at_group + room // GROUP_ENTRY.size]
        if at_zero < len(zeros):
            some_groups = []
        at_group += len(some_groups)
        payload = b"".join(
            [ZEROS.pack(*zero) for zero in some_zeros]
            + [GROUP_ENTRY.pack(number, pack_states(states)) for number, states in some_groups]
        )
        sequence += 1
        head = (BATCH_MAGIC, len(payload), sequence, len(some_zeros), len(some_groups))
        yield sequence, BATCH_HEADER.pack(*head, _sum(head, payload, seed)) + payload
        if at_zero == len(zeros) and at_group == len(groups):
            return


def _sum(head: tuple[bytes, int, int, int, int], payload: bytes, seed: int) -> int:
    hasher = xxhash.xxh3_64(seed=seed)
    hasher.update(BATCH_HEADER.pack(*head, 0))
    hasher.update(payload)
    return int(hasher.intdigest())


class MapLog:
    """The log of one layer. `append` is called by one flush at a time."""

    def __init__(self, path: Path, layer_id: bytes, size: int) -> None:
        """Refer to the log at `path` of the layer `layer_id` (16 bytes) of `size` bytes."""
        self.path, self.layer_id, self.size = path, layer_id, size
        self._seed = int.from_bytes(layer_id[:8], "little")
        self._fd = -1
        self._end = self._reserved = 0
        self.sequence = 0
        self._flushed = _Flushed(path.with_name("flushed"), layer_id)

    def _header(self) -> bytes:
        fields = (FILE_MAGIC, 1, 12, GROUP, self.layer_id, self.size)
        checksum = xxhash.xxh3_64_intdigest(FILE_HEADER.pack(*fields, 0))
        return FILE_HEADER.pack(*fields, checksum)

    def create(self) -> None:
        """Make an empty log, durably."""
        files.publish(self.path, self._header(), mode=0o600)

    def open(self, read_only: bool = False, blocks: BlockMap | None = None) -> BlockMap:
        """Read the log, into `blocks` or an own map, and, unless `read_only`, be ready to append.

        A torn end is cut off. Raises Damaged.
        """
        blocks = blocks if blocks is not None else BlockMap()
        if read_only:
            self._open_beside_a_server(blocks)
            return blocks
        fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            length = self._read(fd, blocks)
            if self.sequence < self._flushed.read():
                raise self._lost()
            if self._end < length:
                os.ftruncate(fd, self._end)
                os.fsync(fd)
        except BaseException:
            os.close(fd)
            raise
        self._fd, self._reserved = fd, self._end
        self._reserve(1)
        return blocks

    def _open_beside_a_server(self, blocks: BlockMap) -> None:
        """Read it while somebody may append to it, or replace it. Reading it again, as it is later,
        into the same map changes that to what it is later: no block becomes BASE again.
        """
        flushed = self._flushed.read()  # before the log, which only grows
        while True:
            with files.opened(self.path, os.O_RDONLY) as fd:
                self._read(fd, blocks)
            if self.sequence >= flushed:
                return
            before, flushed = flushed, self._flushed.read()
            if flushed >= before:  # else it was replaced meanwhile
                raise self._lost()

    def _lost(self) -> Damaged:
        return Damaged(
            f"{self.path} is damaged at byte {self._end}: changes that were flushed are missing at "
            "its end; restore the volume's folder from a backup, or remove the volume"
        )

    def _read(self, fd: int, blocks: BlockMap) -> int:
        length = os.fstat(fd).st_size
        groups = (self.size >> 12 + GROUP.bit_length() - 1) + 1
        if length > IMPLAUSIBLE_FROM + IMPLAUSIBLE_FACTOR * groups * GROUP_ENTRY.size:
            raise Damaged(f"{self.path} is damaged: {length} bytes are more than it can have")
        data = files.read_exactly(fd, length, 0)
        if data[: FILE_HEADER.size] != self._header():
            raise Damaged(f"{self.path} is damaged or belongs to another overlay (its header)")
        self._end = self._replay(data, blocks)
        return len(data)

    def _replay(self, data: bytes, blocks: BlockMap) -> int:
        self.sequence, at = 0, FILE_HEADER.size
        while at < len(data):
            batch = self._batch(data, at)
            if batch is None or batch[0] != self.sequence + 1:
                self._refuse_if_more_follows(data, at)
                break
            self.sequence, zeros, groups, end = batch
            try:
                for number in range(zeros):
                    blocks.restore_zeros(
                        *ZEROS.unpack_from(data, at + BATCH_HEADER.size + number * ZEROS.size)
                    )
                begin = at + BATCH_HEADER.size + zeros * ZEROS.size
                for number in range(groups):
                    group, packed = GROUP_ENTRY.unpack_from(data, begin + number * GROUP_ENTRY.size)
                    blocks.restore(group, unpack_states(packed))
            except ValueError:
                raise Damaged(f"{self.path} is damaged at byte {at}: no such state") from None
            at = end
        return at

    def _batch(self, data: bytes, at: int) -> tuple[int, int, int, int] | None:
        """(sequence, zero ranges, groups, end) of the batch at `at`, None if none is there."""
        if at + BATCH_HEADER.size > len(data):
            return None
        magic, length, sequence, zeros, groups, checksum = BATCH_HEADER.unpack_from(data, at)
        begin = at + BATCH_HEADER.size
        head = (magic, length, sequence, zeros, groups)
        if (
            magic != BATCH_MAGIC
            or length != zeros * ZEROS.size + groups * GROUP_ENTRY.size
            or begin + length > len(data)
            or _sum(head, data[begin : begin + length], self._seed) != checksum
        ):
            return None
        return sequence, zeros, groups, begin + length

    def _refuse_if_more_follows(self, data: bytes, at: int) -> None:
        """A bad batch before a good one is no torn end: acknowledged changes would be lost."""
        later = data.find(BATCH_MAGIC, at)
        while later >= 0:
            batch = self._batch(data, later)
            if batch is not None and batch[0] > self.sequence:
                raise Damaged(
                    f"{self.path} is damaged at byte {at}: the overlay's changes after it cannot "
                    "be trusted; restore the volume's folder from a backup, or remove the volume"
                )
            later = data.find(BATCH_MAGIC, later + 1)

    def _reserve(self, length: int) -> None:
        """Take room for `length` bytes more and some ahead, where that can be done."""
        if self._end + length > self._reserved:
            room = length + RESERVE
            if _libc.fallocate(self._fd, _KEEP_SIZE, self._end, room) == 0:
                self._reserved = self._end + room

    def append(self, changes: Changes) -> None:
        """Make `changes` durable. The data that they refer to must be durable already.

        Raises NoSpace: some of the changes may be durable then, all may be appended again. After
        another OSError nothing is known of what the disk has.
        """
        for sequence, data in _batches(changes, self.sequence, self._seed):
            self._reserve(len(data))
            try:
                files.write_all(self._fd, data, self._end)
            except OSError as error:
                # A piece that stays might look like damage behind a shorter batch.
                os.ftruncate(self._fd, self._end)
                self._reserved = self._end
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise NoSpace(f"no space left for {self.path}: free some") from error
                raise
            os.fdatasync(self._fd)
            self._end += len(data)
            self.sequence = sequence
        self._flushed.write(self.sequence)

    def wants_compaction(self, entries: int) -> bool:
        """Whether the log is much longer than a map of `entries` entries needs."""
        return self._end > COMPACT_FROM and self._end > COMPACT_FACTOR * entries * GROUP_ENTRY.size

    def compact(self, everything: Changes) -> None:
        """Replace the log by one that says `everything` at once; NoSpace leaves it as it is.

        `everything` must be no newer than what was appended last.
        """
        batches = list(_batches(everything, 0, self._seed))
        data = b"".join([self._header(), *(batch for _, batch in batches)])
        self._flushed.clear()  # durably, before there is a log that counts from one
        files.publish(self.path, data, mode=0o600)
        fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        os.close(self._fd)
        self._fd, self._end, self.sequence = fd, len(data), batches[-1][0]
        self._reserved = self._end
        self._reserve(1)
        self._flushed.write(self.sequence)

    @property
    def end(self) -> int:
        """Length of the log, bytes."""
        return self._end

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._flushed.close()


class _Flushed:
    """How many batches of a log were acknowledged. Help against damage only: what cannot be noted
    is not.
    """

    def __init__(self, path: Path, layer_id: bytes) -> None:
        self._path, self._id = path, layer_id
        self._fd = -1

    def read(self) -> int:
        """What was noted; 0 where nothing was, or it cannot be told."""
        try:
            with files.opened(self._path, os.O_RDONLY) as fd:
                data = os.pread(fd, FLUSHED.size, 0)
        except OSError:
            return 0
        if len(data) != FLUSHED.size:
            return 0
        magic, sequence, layer_id, checksum = FLUSHED.unpack(data)
        good = (magic, layer_id, checksum) == (FLUSHED_MAGIC, self._id, zlib.crc32(data[:-4]))
        return int(sequence) if good else 0

    def write(self, sequence: int) -> None:
        """Note that `sequence` batches are durable. 3 µs: it is not synced."""
        data = FLUSHED.pack(FLUSHED_MAGIC, sequence, self._id, 0)[:-4]
        with contextlib.suppress(OSError):
            self._open()
            os.pwrite(self._fd, data + struct.pack("<I", zlib.crc32(data)), 0)

    def clear(self) -> None:
        """Note that nothing is known, durably. Raises OSError."""
        if self.read():
            self._open()
            os.pwrite(self._fd, bytes(FLUSHED.size), 0)
            os.fdatasync(self._fd)

    def _open(self) -> None:
        if self._fd < 0:
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

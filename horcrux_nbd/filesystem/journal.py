"""What a journal holds that has not reached its place: a file system that was not unmounted.

Nothing is written. The result says for which blocks the journal has the newest content, and reads
that when asked. Source: Linux Documentation/filesystems/ext4/journal.rst, fs/jbd2/recovery.c.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from ..errors import EnvironmentProblem
from .blocks import Blocks
from .crc32c import SEED, crc32c
from .mapping import Extent

_MAGIC = 0xC03B3998
_MAGIC_BYTES = struct.pack(">I", _MAGIC)
_DESCRIPTOR, _COMMIT, _SUPER_1, _SUPER_2, _REVOKE = 1, 2, 3, 4, 5
_HEADER = struct.Struct(">III")

# incompat features
_REVOKES, _WIDE, _ASYNC, _CSUM_2, _CSUM_3, _FAST_COMMIT = 0x1, 0x2, 0x4, 0x8, 0x10, 0x20
_KNOWN = _REVOKES | _WIDE | _ASYNC | _CSUM_2 | _CSUM_3 | _FAST_COMMIT
_ESCAPED, _SAME_UUID, _LAST = 0x1, 0x2, 0x8  # flags of a tag
_DEFAULT_FAST_COMMIT = 256  # blocks, where the journal does not say
_FAST_HEAD = 9  # EXT4_FC_TAG_HEAD: what a fast commit area begins with


class Journal:
    """The journal that lies in `extents` of the image."""

    def __init__(self, image: Blocks, extents: Sequence[Extent]) -> None:
        self._image = image
        self._extents = list(extents)
        self._starts = [extent.logical for extent in self._extents]
        data = self._block(0)
        magic, kind, _, size, length, self._first, self._sequence, self._start = struct.unpack_from(
            ">IIIIIIII", data
        )
        if magic != _MAGIC or kind not in (_SUPER_1, _SUPER_2) or size != image.block_size:
            raise image.damaged("the journal's superblock")
        self._features, fast = 0, 0
        self._seed = 0
        if kind == _SUPER_2:
            (self._features,) = struct.unpack_from(">I", data, 0x28)
            if self._features & ~_KNOWN:
                raise EnvironmentProblem(
                    f"the journal in {image.name} has features that are not known here "
                    f"({self._features & ~_KNOWN:#x}): mount and unmount it once"
                )
            if self._checksums:
                crc = crc32c(SEED, data[:0xFC] + bytes(4) + data[0x100:0x400])
                if crc != int.from_bytes(data[0xFC:0x100], "big"):
                    raise image.damaged("the checksum of the journal's superblock is wrong")
                self._seed = crc32c(SEED, data[0x30:0x40])
            if self._features & _FAST_COMMIT:
                fast = int.from_bytes(data[0x54:0x58], "big") or _DEFAULT_FAST_COMMIT
        self._last = length - fast  # the first block that is not of the ring
        self._length = length
        if not 0 < self._first < self._last or not (
            self._start == 0 or self._first <= self._start < self._last
        ):
            raise image.damaged("the journal's superblock")

    @property
    def _checksums(self) -> bool:
        return bool(self._features & (_CSUM_2 | _CSUM_3))

    def _place(self, block: int) -> int:
        """Where in the image a block of the journal lies."""
        at = bisect_right(self._starts, block) - 1
        extent = self._extents[at] if at >= 0 else Extent(0, 0, 0)
        if not extent.logical <= block < extent.logical + extent.length:
            raise self._image.damaged(f"the journal has no block {block}")
        return extent.physical + block - extent.logical

    def _block(self, block: int) -> bytes:
        size = self._image.block_size
        return self._image.raw(self._place(block) * size, size)

    def _next(self, block: int, by: int = 1) -> int:
        block += by
        return block if block < self._last else self._first + block - self._last

    # ---- replay

    def replay(self) -> Mapping[int, Callable[[], bytes]]:
        """Block of the file system → what reads its content. Empty where all is in its place.

        Transactions count that have their commit record, as for the kernel. Raises Damaged.
        """
        if self._start == 0:
            return {}
        found: dict[int, tuple[int, Callable[[], bytes]]] = {}
        revoked: dict[int, int] = {}
        following = self._sequence
        for sequence, tags, revokes in self._transactions():
            following = (sequence + 1) & 0xFFFFFFFF
            for block, read in tags:
                found[block] = (sequence, read)
            for block in revokes:
                revoked[block] = sequence
        if self._features & _FAST_COMMIT:
            self._check_fast_commits(following)
        # A revoke says: what is older, or in the same transaction, is not to be brought back.
        return {
            block: read
            for block, (written, read) in found.items()
            if block not in revoked or _after(written, revoked[block])
        }

    def _transactions(
        self,
    ) -> Iterator[tuple[int, list[tuple[int, Callable[[], bytes]]], list[int]]]:
        """(sequence, (block, reader) of what was logged, blocks revoked) of each that is whole."""
        block, sequence = self._start, self._sequence
        tags: list[tuple[int, Callable[[], bytes]]] = []
        revokes: list[int] = []
        for _ in range(self._last):  # a ring cannot have more
            data = self._block(block)
            magic, kind, number = _HEADER.unpack_from(data)
            if magic != _MAGIC or number != sequence:
                return
            if kind == _DESCRIPTOR:
                if not self._sealed(data):
                    return
                new = list(self._tags(data, block, sequence))
                tags += new
                if len(tags) > self._last:
                    raise self._image.damaged("a transaction larger than the journal")
                block = self._next(block, len(new))
            elif kind == _REVOKE:
                if self._sealed(data):
                    revokes += self._revokes(data)
            elif kind == _COMMIT:
                if not self._committed(data):
                    return
                yield sequence, tags, revokes
                tags, revokes = [], []
                sequence = (sequence + 1) & 0xFFFFFFFF
            else:
                return
            block = self._next(block)

    def _sealed(self, data: bytes) -> bool:
        """Whether a descriptor's or revoke's checksum is right."""
        if not self._checksums:
            return True
        return crc32c(self._seed, data[:-4] + bytes(4)) == int.from_bytes(data[-4:], "big")

    def _committed(self, data: bytes) -> bool:
        if not self._checksums:
            return True
        crc = crc32c(self._seed, data[:0x10] + bytes(4) + data[0x14:])
        return crc == int.from_bytes(data[0x10:0x14], "big")

    def _tags(
        self, data: bytes, at_block: int, sequence: int
    ) -> Iterator[tuple[int, Callable[[], bytes]]]:
        wide = bool(self._features & _WIDE)
        if self._features & _CSUM_3:
            size = 16
        else:
            size = 8 + (4 if wide else 0) + (2 if self._features & _CSUM_2 else 0)
        end = len(data) - (4 if self._checksums else 0)
        at, place = _HEADER.size, at_block
        while at + size <= end:
            high = 0
            if self._features & _CSUM_3:
                block, flags, high, crc = struct.unpack_from(">IIII", data, at)
            else:
                block, crc, flags = struct.unpack_from(">IHH", data, at)
                if wide:
                    (high,) = struct.unpack_from(">I", data, at + 8)
            place = self._next(place)
            if wide:
                block |= high << 32
            if block >= self._image.blocks:
                raise self._image.damaged(f"the journal has block {block}")
            escaped = bool(flags & _ESCAPED)
            yield block, partial(self._content, self._place(place), sequence, crc, escaped)
            at += size + (0 if flags & _SAME_UUID else 16)
            if flags & _LAST:
                return

    def _content(self, place: int, sequence: int, crc: int, escaped: bool) -> bytes:
        """A logged block, read from where it lies in the journal."""
        size = self._image.block_size
        data = self._image.raw(place * size, size)
        if self._checksums:
            found = crc32c(crc32c(self._seed, struct.pack(">I", sequence)), data)
            if found != crc if self._features & _CSUM_3 else found & 0xFFFF != crc:
                raise self._image.damaged("the checksum of a block in the journal is wrong")
        # A block that begins like one of the journal's own was changed to be told from them.
        return _MAGIC_BYTES + data[4:] if escaped else data

    def _revokes(self, data: bytes) -> list[int]:
        wide = bool(self._features & _WIDE)
        (used,) = struct.unpack_from(">I", data, _HEADER.size)
        end = len(data) - (4 if self._checksums else 0)
        if not _HEADER.size + 4 <= used <= end:
            raise self._image.damaged("a revoke record of the journal")
        count = (used - _HEADER.size - 4) // (8 if wide else 4)
        return list(struct.unpack_from(f">{count}{'Q' if wide else 'I'}", data, _HEADER.size + 4))

    def _check_fast_commits(self, sequence: int) -> None:
        """Changes since the last transaction in a form that is not read here are refused."""
        data = self._block(self._last + 1)
        tag, length, features, transaction = struct.unpack_from("<HHII", data)
        if tag == _FAST_HEAD and length == 8 and transaction == sequence:
            raise EnvironmentProblem(
                f"the ext4 in {self._image.name} has fast commits that were not replayed "
                f"(features {features:#x}): mount and unmount it once"
            )


def _after(sequence: int, other: int) -> bool:
    """Whether `sequence` is later; numbers wrap (kernel: tid_gt)."""
    return 0 < ((sequence - other) & 0xFFFFFFFF) < 1 << 31

"""Pack: frozen layers become chunks, patches and an index over the version below them.

Nothing here needs the store: what is not on this host is linked to, not read (DESIGN §3). Only a
changed block is stored: one that was written with the bytes it had is none, where they are here to
compare with.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ..progress import Progress
from ..repository.change import ChangeWriter, block_of, with_blocks
from ..repository.commits import Commit
from ..repository.index import Index
from ..repository.objects import MAX_LAYERS, layers_of
from ..repository.patch import (
    BLOCK_BITS,
    BLOCK_SIZE,
)
from ..repository.writer import ObjectWriter
from ..units import MiB
from .blockmap import BASE, DATA, GROUP_BITS
from .layer import Layer
from .local import LocalObjects

AT_ONCE = 64  # chunks that one thread takes: handing over each of them costs what a patch costs
# Written bytes below which one thread is faster than two, which wait for Python's lock in turns.
FEW = 32 * MiB


@dataclass
class Packed:
    """What layers change: ascending (chunk, id), and how much. Bytes are of whole blocks."""

    changes: list[tuple[int, bytes]]
    changed_bytes: int = 0
    chunks: int = 0
    patches: int = 0
    bookkeeping: bool = False  # the change in chunk 0 is what a freeze itself makes

    @property
    def nothing(self) -> bool:
        """Whether nobody wrote anything since the version below."""
        return not self.changes or (self.bookkeeping and len(self.changes) == 1)


def touched_chunks(
    layers: Sequence[Layer], index: Index, chunk_size: int, chunks: int
) -> list[int]:
    """The chunks that the layers may change, ascending. Of a huge zeroed range only those that the
    version below, or a layer, has anything in.
    """
    group_size = BLOCK_SIZE << GROUP_BITS
    found: set[int] = set()
    for layer in layers:
        for group in layer.blocks.written_groups():
            first = group * group_size // chunk_size
            stop = -(-(group + 1) * group_size // chunk_size)
            found.update(range(first, min(stop, chunks)))
        for low, high in layer.blocks.zero_ranges():
            first, stop = low * group_size // chunk_size, -(-high * group_size // chunk_size)
            found.update(number for number, _ in index.entries(first, min(stop, chunks)))
    return sorted(found)


def written_blocks(layers: Sequence[Layer], commit: Commit, number: int) -> dict[int, bytes]:
    """The blocks of chunk `number` that the layers have, newest first, by their number in it."""
    per_chunk = commit.chunk_size >> BLOCK_BITS
    first = number * per_chunk
    stop = min(first + per_chunk, -(-commit.size >> BLOCK_BITS))
    blocks: dict[int, bytes] = {}
    for layer in reversed(layers):
        for state, low, high in layer.blocks.runs(first, stop):
            if state == BASE:
                continue
            data = bytearray((high - low) << BLOCK_BITS)
            if state == DATA:
                layer.read_into(low << BLOCK_BITS, memoryview(data))
            for block in range(low, high):
                at = (block - low) << BLOCK_BITS
                blocks[block - first] = bytes(data[at : at + BLOCK_SIZE])
    return blocks


class Packer:
    """Packs layers, the newest first, over one version."""

    def __init__(
        self,
        layers: Sequence[Layer],
        commit: Commit,
        index: Index,
        local: LocalObjects,
        writer: ObjectWriter,
        fetch: Callable[[bytes], bytes],
    ) -> None:
        """`fetch` reads a chunk from the store: for one with as many layers as there can be."""
        self._fetch = fetch
        self._layers, self._commit, self._index = layers, commit, index
        self._local = local
        self._writer = ChangeWriter(writer, local.patch, commit.chunk_size)
        self._packed = Packed([])
        self._lock = threading.Lock()

    def pack(self, progress: Progress) -> Packed:
        """Store chunks and patches (not yet durable); what they are."""
        size = self._commit.chunk_size
        numbers = touched_chunks(self._layers, self._index, size, self._commit.chunks)
        progress.start("commit", len(numbers) * size)

        def work(some: Sequence[int]) -> None:
            for number in some:
                self._chunk(number)
            progress.advance(len(some) * size)

        parts = [numbers[at : at + AT_ONCE] for at in range(0, len(numbers), AT_ONCE)]
        written = sum(sum(layer.blocks.count()) for layer in self._layers) * BLOCK_SIZE
        if written < FEW:
            for part in parts:
                work(part)
        else:
            pool = ThreadPoolExecutor(max(2, os.cpu_count() or 1), thread_name_prefix="pack")
            try:
                for _ in pool.map(work, parts):
                    pass
            finally:
                pool.shutdown(cancel_futures=True)  # on a full disk the rest would fail one by one
        self._packed.changes.sort()
        return self._packed

    def _chunk(self, number: int) -> None:
        blocks = written_blocks(self._layers, self._commit, number)
        if not blocks:
            return
        old = self._index.lookup(number)
        same = self._local.unchanged(old, blocks)
        changed = {n: block for n, block in blocks.items() if n not in same}
        if not changed:
            return
        if number == 0 and changed.keys() == {0}:
            content = self._local.content(old)
            first = self._writer.patched(old).get(0) if content is None else block_of(content, 0)
            if first is not None:
                self._packed.bookkeeping = only_bookkeeping(first, changed[0])
        new, is_patch = self._writer.store(old, changed, lambda: self._whole(number, old, blocks))
        if new == old:
            return
        with self._lock:
            self._packed.changes.append((number, new))
            self._packed.changed_bytes += len(changed) * BLOCK_SIZE
            self._packed.chunks += not is_patch
            self._packed.patches += is_patch

    def _whole(self, number: int, old: bytes, blocks: dict[int, bytes]) -> bytes | None:
        """What the chunk was, as far as it matters below `blocks`, where that can be had here. From
        the store only where there is no other way.
        """
        content = self._local.content(old)
        if content is not None:
            return content
        patched = self._writer.patched(old)
        count = min(self._commit.chunk_size, self._commit.size - number * self._commit.chunk_size)
        if len({*blocks, *patched}) >= -(-count >> BLOCK_BITS):  # all of it is known after all
            return with_blocks(bytes(self._commit.chunk_size), {**patched, **blocks})
        if layers_of(old) >= MAX_LAYERS and self._local.patch(old) is None:
            return self._fetch(old)
        return None


# Of ext4's superblock: when and where it was mounted and how often, when it was written last, the
# kilobytes written in all, and the checksum (fs/ext4/ext4.h, struct ext4_super_block).
_BOOKKEEPING = (
    (0x2C, 4), (0x30, 4), (0x34, 2), (0x88, 64), (0x178, 8), (0x274, 2), (0x3FC, 4),
)  # fmt: skip


def only_bookkeeping(old: bytes, new: bytes) -> bool:
    """Whether block 0 differs only in what ext4 notes there with each freeze, mount and unmount,
    though nobody writes anything.
    """
    if any(block[0x438:0x43A] != b"\x53\xef" for block in (old, new)):
        return False
    a, b = bytearray(old), bytearray(new)
    for offset, length in _BOOKKEEPING:
        at = 1024 + offset
        a[at : at + length] = b[at : at + length] = bytes(length)
    return a == b

"""Pack: a frozen layer becomes chunks, patches and an index over the version below it.

Nothing here needs the store: what is not on this host is linked to, not read (DESIGN §3). Only a
changed block is stored: one that was written with the bytes it had is none, where they are here to
compare with.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ..progress import Progress
from ..repository.commits import Commit
from ..repository.index import Index
from ..repository.objects import MAX_LAYERS, NULL_ID, Kind, kind_of, layers_of
from ..repository.patch import (
    BLOCK_BITS,
    BLOCK_SIZE,
    MAX_CHAIN,
    PATCH_WORTH,
    Patch,
    chain_over,
)
from ..repository.writer import ObjectWriter, any_bytes
from .blockmap import BASE, DATA, GROUP_BITS
from .layer import Layer
from .local import LocalObjects


@dataclass
class Packed:
    """What a layer changes: ascending (chunk, id), and how much. Bytes are of whole blocks."""

    changes: list[tuple[int, bytes]]
    changed_bytes: int = 0
    chunks: int = 0
    patches: int = 0


def touched_chunks(layer: Layer, index: Index, chunk_size: int, chunks: int) -> Iterator[int]:
    """The chunks that the layer may change, ascending. Of a huge zeroed range only those that the
    version below has anything in.
    """
    group_size = BLOCK_SIZE << GROUP_BITS
    found: set[int] = set()
    for group in layer.blocks.written_groups():
        first = group * group_size // chunk_size
        stop = -(-(group + 1) * group_size // chunk_size)
        found.update(range(first, min(stop, chunks)))
    for low, high in layer.blocks.zero_ranges():
        first, stop = low * group_size // chunk_size, -(-high * group_size // chunk_size)
        found.update(number for number, _ in index.entries(first, min(stop, chunks)))
    yield from sorted(found)


class Packer:
    """Packs one layer over one version."""

    def __init__(
        self,
        layer: Layer,
        commit: Commit,
        index: Index,
        local: LocalObjects,
        writer: ObjectWriter,
        fetch: Callable[[bytes], bytes],
    ) -> None:
        """`fetch` reads a chunk from the store: for one with as many layers as there can be."""
        self._fetch = fetch
        self._layer, self._commit, self._index = layer, commit, index
        self._local, self._writer = local, writer
        self._packed = Packed([])
        self._lock = threading.Lock()

    def pack(self, progress: Progress) -> Packed:
        """Store chunks and patches (not yet durable); what they are."""
        size = self._commit.chunk_size
        numbers = list(touched_chunks(self._layer, self._index, size, self._commit.chunks))
        progress.start("commit", len(numbers) * size)

        def work(number: int) -> None:
            self._chunk(number)
            progress.advance(size)

        with ThreadPoolExecutor(max(2, os.cpu_count() or 1), thread_name_prefix="pack") as pool:
            for _ in pool.map(work, numbers):
                pass
        self._packed.changes.sort()
        return self._packed

    def _written(self, number: int) -> dict[int, bytes]:
        """The blocks of a chunk that the layer has, by their number in the chunk."""
        per_chunk = self._commit.chunk_size >> BLOCK_BITS
        first = number * per_chunk
        stop = min(first + per_chunk, -(-self._commit.size >> BLOCK_BITS))
        blocks: dict[int, bytes] = {}
        for state, low, high in self._layer.blocks.runs(first, stop):
            if state == BASE:
                continue
            data = bytearray((high - low) << BLOCK_BITS)
            if state == DATA:
                self._layer.read_into(low << BLOCK_BITS, memoryview(data))
            for block in range(low, high):
                at = (block - low) << BLOCK_BITS
                blocks[block - first] = bytes(data[at : at + BLOCK_SIZE])
        return blocks

    def _chunk(self, number: int) -> None:
        blocks = self._written(number)
        old = self._index.lookup(number)
        count = min(self._commit.chunk_size, self._commit.size - number * self._commit.chunk_size)
        covered = len(blocks) == -(-count >> BLOCK_BITS)
        content = self._local.content(old)
        if content is not None:
            blocks = {
                n: block
                for n, block in blocks.items()
                if content[n << BLOCK_BITS : (n + 1) << BLOCK_BITS] != block
            }
        if not blocks:
            return
        if content is None:
            if covered:
                content = bytes(self._commit.chunk_size)
            elif layers_of(old) >= MAX_LAYERS:
                content = self._fetch(old)
        new, is_patch = self._store(old, blocks, content)
        if new == old:
            return
        with self._lock:
            self._packed.changes.append((number, new))
            self._packed.changed_bytes += len(blocks) * BLOCK_SIZE
            self._packed.chunks += not is_patch
            self._packed.patches += is_patch

    def _store(
        self, old: bytes, blocks: dict[int, bytes], content: bytes | None
    ) -> tuple[bytes, bool]:
        """Store a chunk or a patch; its id, and whether it is a patch."""
        size = self._commit.chunk_size
        below, chain = self._flatten(old, blocks)
        most = (size >> BLOCK_BITS) * PATCH_WORTH
        # Over zeros a whole chunk costs what the patch would: zstd makes nothing of the rest.
        whole = old == NULL_ID or len(below) > most or layers_of(chain[0]) + 1 > MAX_CHAIN
        if content is not None and whole:
            full = bytearray(content)
            for number, block in blocks.items():
                full[number << BLOCK_BITS : (number + 1) << BLOCK_BITS] = block
            if not any_bytes(bytes(full)):
                return NULL_ID, False
            return self._writer.write(Kind.CHUNK, bytes(full)), False
        return self._writer.write(Kind.PATCH, Patch(chain, below).encode(size)), True

    def _flatten(
        self, old: bytes, blocks: dict[int, bytes]
    ) -> tuple[dict[int, bytes], tuple[bytes, ...]]:
        """The blocks of a patch, and its chain: patches that are here are merged into it."""
        merged, below = dict(blocks), old
        while kind_of(below) is Kind.PATCH:
            patch = self._local.patch(below)
            if patch is None:
                break
            merged = {**patch.blocks, **merged}
            below = patch.chain[0]
            if len(patch.chain) > 1 and self._local.patch(below) is None:
                return merged, patch.chain
        return merged, chain_over(below)

"""Patch objects: the changed 4 KiB blocks of one chunk, over what was there (docs/format.md).

A database that dirties one page in each of a thousand chunks should push a thousand pages, not a
thousand chunks. So an index entry may name a patch, which names its chain: the patches below it,
nearest first, and at the end the full chunk or the null id. Whoever has the patch knows all it
needs and fetches it at once.

A commit must not need the remote. Its writer may have the index entry of the patch below and not
that patch, whose chain it then cannot copy: the chain ends in that patch and goes on in it, at the
price of one more round trip for who reads it. How many layers there are is in the id of each patch,
so that writer still knows when there are too many.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import Damaged
from .objects import ID_SIZE, MAX_LAYERS, NULL_ID, Kind, kind_of, layers_of

BLOCK_BITS = 12
BLOCK_SIZE = 1 << BLOCK_BITS  # the grain of changes, in a patch as in the overlay
# log2 of the block size, layers, ids in the chain, 0, blocks in the chunk
PATCH_HEADER = struct.Struct("<BBBBI")
# Layers from which a writer that has the parts makes one patch over the full chunk of them: eight
# small objects at once still cost one round trip. MAX_LAYERS is where it has to.
MAX_CHAIN = 8
# A chunk with more than this part of its blocks changed is stored whole: the patch would save
# little, and each reader would fetch both.
PATCH_WORTH = 0.25

FetchMany = Callable[[Sequence[bytes]], Mapping[bytes, tuple[Kind, bytes]]]


def max_patch_size(chunk_size: int) -> int:
    """The most plaintext bytes that a patch of such a chunk can have."""
    blocks = chunk_size >> BLOCK_BITS
    return PATCH_HEADER.size + MAX_LAYERS * ID_SIZE + -(-blocks // 8) + chunk_size


def chain_over(below: bytes, patch: Patch | None = None) -> tuple[bytes, ...]:
    """The chain of a patch over what an index entry names now, NULL_ID included.

    `patch` is the object behind `below`, where that is a patch and at hand. ValueError where there
    are too many layers: read the parts and store a full chunk, or one patch over it.
    """
    if layers_of(below) >= MAX_LAYERS:
        raise ValueError(f"{below.hex()} has {MAX_LAYERS} layers: it takes no patch more")
    if kind_of(below) is Kind.PATCH and patch is not None:
        return (below, *patch.chain)
    return (below,)


def _check_chain(chain: tuple[bytes, ...]) -> int:
    """How many layers a patch over `chain` has. ValueError for a chain that cannot be."""
    if not 1 <= len(chain) <= MAX_LAYERS or any(len(oid) != ID_SIZE for oid in chain):
        raise ValueError(f"a chain of {len(chain)} ids")
    layers = layers_of(chain[0]) + 1
    for depth, oid in enumerate(chain):
        if kind_of(oid) is Kind.PATCH:
            if layers_of(oid) != layers - 1 - depth:
                raise ValueError("a chain whose layers do not count down")
        elif depth != layers - 1 or depth != len(chain) - 1:
            raise ValueError("a chain with something else than patches before its end")
        elif oid != NULL_ID and kind_of(oid) is not Kind.CHUNK:
            raise ValueError("a chain that ends in no chunk")
    if layers > MAX_LAYERS:
        raise ValueError(f"{layers} layers")
    return layers


@dataclass(frozen=True)
class Patch:
    """`blocks` maps a block's number within its chunk to its 4,096 bytes; ascending."""

    chain: tuple[bytes, ...]
    blocks: Mapping[int, bytes]

    @property
    def open_end(self) -> bytes | None:
        """The patch that the chain ends in and goes on in; None where the chain is whole."""
        return self.chain[-1] if kind_of(self.chain[-1]) is Kind.PATCH else None

    def encode(self, chunk_size: int) -> bytes:
        """The plaintext. ValueError for a patch that the format cannot hold."""
        count = chunk_size >> BLOCK_BITS
        layers = _check_chain(self.chain)
        if not self.blocks:
            raise ValueError("a patch without blocks")
        bitmap = bytearray(-(-count // 8))
        numbers = sorted(self.blocks)
        if numbers[0] < 0 or numbers[-1] >= count:
            raise ValueError(f"blocks {numbers[0]} to {numbers[-1]} in a chunk of {count}")
        for number in numbers:
            bitmap[number >> 3] |= 1 << (number & 7)
        header = PATCH_HEADER.pack(BLOCK_BITS, layers, len(self.chain), 0, count)
        parts = [header, *self.chain, bytes(bitmap)]
        for number in numbers:
            if len(self.blocks[number]) != BLOCK_SIZE:
                raise ValueError(f"block {number} has {len(self.blocks[number])} bytes")
            parts.append(self.blocks[number])
        return b"".join(parts)

    @classmethod
    def decode(cls, plain: bytes, chunk_size: int) -> Patch:
        """The patch in `plain`; raises Damaged if it is none for a chunk of that size."""
        count = chunk_size >> BLOCK_BITS
        if len(plain) < PATCH_HEADER.size:
            raise Damaged("a patch object is too short")
        bits, layers, chain_length, reserved, blocks = PATCH_HEADER.unpack_from(plain)
        if bits != BLOCK_BITS or reserved or blocks != count:
            raise Damaged(f"a patch object does not fit chunks of {chunk_size} bytes")
        at = PATCH_HEADER.size
        chain = tuple(plain[at + i * ID_SIZE : at + (i + 1) * ID_SIZE] for i in range(chain_length))
        try:
            if _check_chain(chain) != layers:
                raise ValueError(f"{layers} layers that are not there")
        except ValueError as error:
            raise Damaged(f"a patch object has a broken chain: {error}") from None
        at += chain_length * ID_SIZE
        bitmap = plain[at : at + -(-count // 8)]
        at += len(bitmap)
        numbers = [
            n for n in range(count) if n >> 3 < len(bitmap) and bitmap[n >> 3] >> (n & 7) & 1
        ]
        if not numbers or len(plain) - at != len(numbers) * BLOCK_SIZE:
            raise Damaged("a patch object has another length than its bitmap says")
        return cls(
            chain,
            {
                number: plain[at + i * BLOCK_SIZE : at + (i + 1) * BLOCK_SIZE]
                for i, number in enumerate(numbers)
            },
        )


def resolve(oid: bytes, chunk_size: int, fetch: FetchMany) -> bytes:
    """The `chunk_size` bytes of the chunk that an index entry names, be it a patch or not.

    `fetch` gets ids and returns kind and verified plaintext of each, all at once where it can.
    Raises Damaged if the parts do not make a chunk, and what `fetch` raises.
    """
    layers: list[Patch] = []
    parts: dict[bytes, tuple[Kind, bytes]] = {}
    while kind_of(oid) is Kind.PATCH:
        if oid not in parts:  # the first, or one that a chain goes on in
            parts.update(fetch([oid]))
        layer = Patch.decode(parts.pop(oid)[1], chunk_size)
        if layers and layers[-1].chain[1:] not in ((), layer.chain):
            raise Damaged(f"patch {oid.hex()} has another chain than the patch above it says")
        layers.append(layer)
        missing = [part for part in layer.chain if part != NULL_ID and part not in parts]
        if missing:
            parts.update(fetch(missing))
        oid = layer.chain[0]
    if oid == NULL_ID:
        chunk = bytearray(chunk_size)
    elif kind_of(oid) is Kind.CHUNK:
        plain = parts[oid][1] if oid in parts else fetch([oid])[oid][1]
        check_chunk(plain, oid, chunk_size)
        if not layers:
            return plain
        chunk = bytearray(plain)
    else:
        raise Damaged(f"{oid.hex()} names no chunk and no patch")
    for layer in reversed(layers):
        for number, block in layer.blocks.items():
            chunk[number << BLOCK_BITS : (number + 1) << BLOCK_BITS] = block
    return bytes(chunk)


def check_chunk(plain: bytes, oid: bytes, chunk_size: int) -> bytes:
    """`plain` if it has the length of a chunk; raises Damaged else."""
    if len(plain) != chunk_size:
        raise Damaged(
            f"chunk {oid.hex()} has {len(plain)} bytes where the version has chunks of {chunk_size}"
        )
    return plain

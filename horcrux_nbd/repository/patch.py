"""Patch objects: the changed 4 KiB blocks of one chunk, over what was there (docs/format.md).

A database that dirties one page in each of a thousand chunks should push a thousand pages, not a
thousand chunks. So an index entry may name a patch, which names its whole chain: the patches below
it, nearest first, and at the end the full chunk or the null id. Whoever has the patch knows all it
needs and fetches it at once.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import Damaged
from .objects import ID_SIZE, NULL_ID, Kind

BLOCK_BITS = 12
BLOCK_SIZE = 1 << BLOCK_BITS  # the grain of changes, in a patch as in the overlay
PATCH_HEADER = struct.Struct("<BBHI")  # log2 of the block size, ids in the chain, 0, blocks
# Ids in a chain, the chunk included: eight small objects at once still cost one round trip.
MAX_CHAIN = 8
# A chunk with more than this part of its blocks changed is stored whole: the patch would save
# little, and each reader would fetch both.
PATCH_WORTH = 0.25

FetchMany = Callable[[Sequence[bytes]], Mapping[bytes, tuple[Kind, bytes]]]


def max_patch_size(chunk_size: int) -> int:
    """The most plaintext bytes that a patch of such a chunk can have."""
    blocks = chunk_size >> BLOCK_BITS
    return PATCH_HEADER.size + MAX_CHAIN * ID_SIZE + -(-blocks // 8) + chunk_size


@dataclass(frozen=True)
class Patch:
    """`blocks` maps a block's number within its chunk to its 4,096 bytes; ascending."""

    chain: tuple[bytes, ...]
    blocks: Mapping[int, bytes]

    def encode(self, chunk_size: int) -> bytes:
        """The plaintext. ValueError for a patch that the format cannot hold."""
        count = chunk_size >> BLOCK_BITS
        if not 1 <= len(self.chain) <= MAX_CHAIN or NULL_ID in self.chain[:-1]:
            raise ValueError(f"a chain of {len(self.chain)} ids cannot be")
        if not self.blocks:
            raise ValueError("a patch without blocks")
        bitmap = bytearray(-(-count // 8))
        numbers = sorted(self.blocks)
        if numbers[0] < 0 or numbers[-1] >= count:
            raise ValueError(f"block {numbers} outside of {count}")
        for number in numbers:
            bitmap[number >> 3] |= 1 << (number & 7)
        header = PATCH_HEADER.pack(BLOCK_BITS, len(self.chain), 0, count)
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
        bits, chain_length, reserved, blocks = PATCH_HEADER.unpack_from(plain)
        if bits != BLOCK_BITS or reserved or blocks != count:
            raise Damaged(f"a patch object does not fit chunks of {chunk_size} bytes")
        if not 1 <= chain_length <= MAX_CHAIN:
            raise Damaged(f"a patch object has a chain of {chain_length} ids")
        at = PATCH_HEADER.size
        chain = tuple(plain[at + i * ID_SIZE : at + (i + 1) * ID_SIZE] for i in range(chain_length))
        if any(len(oid) != ID_SIZE for oid in chain) or NULL_ID in chain[:-1]:
            raise Damaged("a patch object has a broken chain")
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
    kind, plain = fetch([oid])[oid]
    if kind is Kind.CHUNK:
        return check_chunk(plain, oid, chunk_size)
    top = Patch.decode(plain, chunk_size)
    below = fetch([part for part in top.chain if part != NULL_ID])
    layers = [top]
    for depth, part in enumerate(top.chain[:-1]):
        kind, plain = below[part]
        if kind is not Kind.PATCH:
            raise Damaged(f"object {part.hex()}, within a patch's chain, is no patch")
        layer = Patch.decode(plain, chunk_size)
        if layer.chain != top.chain[depth + 1 :]:
            raise Damaged(f"patch {oid.hex()} has a chain that does not hang together")
        layers.append(layer)
    last = top.chain[-1]
    if last == NULL_ID:
        chunk = bytearray(chunk_size)
    else:
        kind, plain = below[last]
        if kind is not Kind.CHUNK:
            raise Damaged(f"object {last.hex()}, the end of a patch's chain, is no chunk")
        chunk = bytearray(check_chunk(plain, last, chunk_size))
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

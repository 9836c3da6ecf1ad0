"""Changed blocks of a chunk become a patch, or past a quarter of it a full chunk (DESIGN §3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from .objects import NULL_ID, Kind, kind_of, layers_of
from .patch import BLOCK_BITS, BLOCK_SIZE, MAX_CHAIN, PATCH_WORTH, Patch, chain_over
from .writer import ObjectWriter


class ChangeWriter:
    """Stores changes over what an index names. Safe for several threads."""

    def __init__(
        self, writer: ObjectWriter, patch: Callable[[bytes], Patch | None], chunk_size: int
    ) -> None:
        """`patch` gives the patch object behind an id, if it is at hand."""
        self._writer, self._patch, self._size = writer, patch, chunk_size

    def store(
        self, old: bytes, blocks: Mapping[int, bytes], content: Callable[[], bytes | None]
    ) -> tuple[bytes, bool]:
        """Store `blocks`, which change the chunk that `old` names; the new id, and whether it is
        that of a patch. `content` gives what the chunk was before, where that is at hand; it is
        asked only where a whole chunk is better. ValueError where it has nothing and patches that
        are not at hand have all the layers that there can be.
        """
        merged, below, chain = self._merge(old, blocks)
        most = (self._size >> BLOCK_BITS) * PATCH_WORTH
        layers = layers_of(chain[0] if chain else below) + 1
        # Over zeros a whole chunk costs what the patch would: zstd makes nothing of the rest.
        if old == NULL_ID or len(merged) > most or layers > MAX_CHAIN:
            whole = content()
            if whole is not None:
                return self._writer.write(Kind.CHUNK, with_blocks(whole, blocks)), False
        patch = Patch(chain or chain_over(below), merged)
        return self._writer.write(Kind.PATCH, patch.encode(self._size)), True

    def patched(self, old: bytes) -> dict[int, bytes]:
        """The blocks that the patches at hand, from the top on, have of what `old` names."""
        return self._merge(old, {}, everything=True)[0]

    def _merge(
        self, old: bytes, blocks: Mapping[int, bytes], everything: bool = False
    ) -> tuple[dict[int, bytes], bytes, tuple[bytes, ...]]:
        """Blocks, what lies below them, and the chain from there on where it is known.

        A patch below that is larger than all above it, or small with them, stays as it is, unless
        there are MAX_CHAIN layers or `everything` is wanted: else a chunk that each commit changes
        a little would be stored anew with all of its changes each time. So large ones grow down
        the chain, where a block is stored at most once for each doubling, and small ones wait
        until the chain is full.
        """
        merged, below = dict(blocks), old
        small = (self._size >> BLOCK_BITS) * PATCH_WORTH / 4 if layers_of(old) < MAX_CHAIN else 0
        while kind_of(below) is Kind.PATCH:
            patch = self._patch(below)
            if patch is None:
                break
            room = layers_of(below) < MAX_CHAIN and patch.open_end is None
            stays = len(patch.blocks) > len(merged) or len(patch.blocks) + len(merged) <= small
            if room and stays and not everything:
                return merged, below, (below, *patch.chain)
            merged = {**patch.blocks, **merged}
            below = patch.chain[0]
            if len(patch.chain) > 1 and self._patch(below) is None:
                return merged, below, patch.chain
        return merged, below, ()


def block_of(content: bytes, number: int) -> bytes:
    """Block `number` of a chunk."""
    return content[number << BLOCK_BITS : (number + 1) << BLOCK_BITS]


def with_blocks(content: bytes, blocks: Mapping[int, bytes]) -> bytes:
    """`content` with some of its blocks replaced."""
    changed = bytearray(content)
    for number, block in blocks.items():
        changed[number << BLOCK_BITS : (number + 1) << BLOCK_BITS] = block
    return bytes(changed)


def differing_blocks(old: bytes, new: bytes) -> dict[int, bytes]:
    """The blocks of `new` that are not what they are in `old`; both are whole chunks."""
    return {
        number: block
        for number in range(len(new) // BLOCK_SIZE)
        if (block := block_of(new, number)) != block_of(old, number)
    }

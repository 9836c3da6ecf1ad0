"""The blocks of an image: read through a small cache, with what a journal has to say laid over."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping

from ..errors import Damaged
from ..units import MiB

Read = Callable[[int, int], bytes]  # offset, length (bytes) → exactly so many bytes

CACHE = 16 * MiB  # bytes of metadata blocks that one reader keeps


class Blocks:
    """An image of `size` bytes as blocks. `name` says in messages which image it is.

    `read` raises what it likes; that passes through. Not for several threads.
    """

    def __init__(self, read: Read, size: int, name: str) -> None:
        self._read, self.size, self.name = read, size, name
        self.block_size = 1024  # until the superblock says more
        self.blocks = size // 1024
        # What the journal has for a block, instead of the block itself.
        self.overlay: Mapping[int, Callable[[], bytes]] = {}
        self._cache: OrderedDict[int, bytes] = OrderedDict()

    def damaged(self, what: str) -> Damaged:
        """The error to raise."""
        return Damaged(
            f"the file system in {self.name} is damaged ({what}): serve a copy of it and let "
            "fsck look, or go back to an earlier version"
        )

    def use(self, block_size: int, blocks: int) -> None:
        """How large a block is, and how many there are. Forgets what was read."""
        self.block_size, self.blocks = block_size, blocks
        self._cache.clear()

    def raw(self, offset: int, length: int) -> bytes:
        """Bytes of the image as they are, whatever the journal says."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise self.damaged(f"something lies beyond its end, at byte {offset}")
        data = self._read(offset, length)
        if len(data) != length:
            raise self.damaged(f"it ends at byte {offset + len(data)}")
        return data

    def block(self, number: int) -> bytes:
        """One block of metadata."""
        data = self._cache.get(number)
        if data is not None:
            self._cache.move_to_end(number)
            return data
        data = self._load(number)
        self._cache[number] = data
        if len(self._cache) * self.block_size > CACHE:
            self._cache.popitem(last=False)
        return data

    def _load(self, number: int) -> bytes:
        if not 0 <= number < self.blocks:
            raise self.damaged(f"block {number} is named, of {self.blocks}")
        replayed = self.overlay.get(number)
        if replayed is not None:
            return replayed()
        return self.raw(number * self.block_size, self.block_size)

    def bytes_at(self, offset: int, length: int) -> bytes:
        """Content of a file that lies in one piece. Not kept.

        Goes by the journal too: with data=journal it has contents as well.
        """
        if not self.overlay:
            return self.raw(offset, length)
        size = self.block_size
        parts = []
        start, at = offset, offset
        while at < offset + length:
            number, skip = divmod(at, size)
            take = min(size - skip, offset + length - at)
            if number in self.overlay:
                if at > start:
                    parts.append(self.raw(start, at - start))
                parts.append(self._load(number)[skip : skip + take])
                start = at + take
            at += take
        if at > start:
            parts.append(self.raw(start, at - start))
        return b"".join(parts)

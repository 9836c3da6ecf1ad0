"""What a store holds under `objects/`, from one LIST: ids, sizes, and a mark for each.

37 bytes of memory for each object, whatever Python adds to a set of ids: a million objects, which
is 500 GB in chunks of 512 KiB, are 37 MB.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterator

from ..chunkstore.base import ChunkStore
from ..errors import StoreError
from .objects import ID_SIZE, key_id

_PREFIX = 2  # bytes of an id that find its neighbourhood at once


class Listing:
    """The objects of one store at one moment, in order of their ids. Not locked."""

    def __init__(self) -> None:
        self._ids = bytearray()
        self._starts = array("L", bytes(array("L").itemsize * ((1 << 8 * _PREFIX) + 1)))
        self.sizes = array("Q")  # bytes, as stored
        self.marks = bytearray()  # for whoever uses the listing; 0 at first
        self.strays: list[str] = []  # keys that name no object; the first hundred
        self.complete = True  # False where `limit` ended it early

    @classmethod
    def read(cls, store: ChunkStore, limit: int | None = None) -> Listing:
        """List `store`; at most `limit` objects. Raises StoreError."""
        listing = cls()
        last = b""
        for entry in store.list("objects/"):
            oid = key_id(entry.key)
            if oid is None:
                if len(listing.strays) < 100:
                    listing.strays.append(entry.key)
                continue
            if oid <= last:  # the search below depends on it
                raise StoreError(f"{store.url} lists its keys out of order")
            if limit is not None and len(listing) == limit:
                listing.complete = False
                break
            last = oid
            listing._ids += oid
            listing.sizes.append(entry.size)
        listing._finish()
        return listing

    def _finish(self) -> None:
        self.marks = bytearray(len(self))
        counts = self._starts
        for at in range(len(self)):
            counts[int.from_bytes(self.id(at)[:_PREFIX], "big") + 1] += 1
        self._starts = array("L", itertools.accumulate(counts))

    def __len__(self) -> int:
        return len(self.sizes)

    def id(self, at: int) -> bytes:
        return bytes(self._ids[at * ID_SIZE : (at + 1) * ID_SIZE])

    def ids(self) -> Iterator[bytes]:
        """All ids, ascending."""
        return (self.id(at) for at in range(len(self)))

    def find(self, oid: bytes) -> int | None:
        """Where `oid` is in the listing; None if it is not."""
        prefix = int.from_bytes(oid[:_PREFIX], "big")
        low, high = self._starts[prefix], self._starts[prefix + 1]
        while low < high:
            middle = (low + high) // 2
            if self.id(middle) < oid:
                low = middle + 1
            else:
                high = middle
        return low if low < len(self) and self.id(low) == oid else None

    def __contains__(self, oid: bytes) -> bool:
        return self.find(oid) is not None

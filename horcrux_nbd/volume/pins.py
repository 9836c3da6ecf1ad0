"""Pins: what the cache keeps however full it is, so that a version can be used offline.

```
<cache>/pins/<commit id>    the ids of all that the version needs, ascending, 32 bytes each
```

A pin is written before what it names is fetched, so nothing of it is evicted on the way; broken
off, it goes on when it is made again.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Iterable
from pathlib import Path

from .. import files
from ..repository.objects import ID_SIZE, Kind, kind_of

FOLDER = "pins"


class Pin:
    """One pinned version. `ids` are of chunks (as the index names them), nodes and the commit."""

    def __init__(self, commit: bytes, table: bytes) -> None:
        self.commit, self._table = commit, table

    def __len__(self) -> int:
        return len(self._table) // ID_SIZE

    def _id(self, at: int) -> bytes:
        return self._table[at * ID_SIZE : (at + 1) * ID_SIZE]

    def __contains__(self, oid: bytes) -> bool:
        at = bisect_left(range(len(self)), oid, key=self._id)
        return at < len(self) and self._id(at) == oid

    def chunks(self) -> list[bytes]:
        """The ids that an index names."""
        return [oid for oid in self.ids() if kind_of(oid) in (Kind.CHUNK, Kind.PATCH)]

    def ids(self) -> list[bytes]:
        return [self._id(at) for at in range(len(self))]


def save(cache: Path, commit: bytes, ids: Iterable[bytes]) -> Pin:
    """Pin a version in the cache at `cache`, durably. Raises NoSpace."""
    files.make_folder(cache / FOLDER, 0o700)
    table = b"".join(sorted({*ids, commit}))
    files.publish(cache / FOLDER / commit.hex(), table, mode=0o600)
    return Pin(commit, table)


def load(cache: Path) -> list[Pin]:
    """All pins of the cache at `cache`."""
    try:
        names = sorted(os.listdir(cache / FOLDER))
    except FileNotFoundError:
        return []
    found = []
    for name in names:
        if len(name) == 2 * ID_SIZE:
            table = (cache / FOLDER / name).read_bytes()
            found.append(Pin(bytes.fromhex(name), table[: len(table) // ID_SIZE * ID_SIZE]))
    return found


def remove(cache: Path, commit: bytes) -> bool:
    """Let go of a version; False where it was not pinned."""
    try:
        os.unlink(cache / FOLDER / commit.hex())
    except FileNotFoundError:
        return False
    return True

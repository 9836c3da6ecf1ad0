"""The contract of a chunk store: a key → bytes service at a URL.

Everything above works with any store that keeps these sentences; tests/chunkstore/conformance.py
checks each of them against every kind of store.

Keys: one or more parts joined by `/`, each 1 to 255 of `A-Z a-z 0-9 . _ -` and not beginning with
a dot; 1,000 bytes in all. A key is never also the folder of another key.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from ..closing import Closing
from ..errors import KeyNotFound, UsageError

MAX_KEY = 1000  # S3 allows 1,024 bytes, some of which a prefix takes
_PART = r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,254}"
_NAME = re.compile(_PART)
_KEY = re.compile(rf"{_PART}(?:/{_PART})*")
_PREFIX = re.compile(rf"(?:{_PART}(?:/{_PART})*/?)?")


def is_part(name: str) -> bool:
    """Whether `name` can be one part of a key; for names found in a folder."""
    return bool(_NAME.fullmatch(name))


def is_key(key: str) -> bool:
    """Whether `check_key` would take it; for names that a store lists."""
    return len(key) <= MAX_KEY and bool(_KEY.fullmatch(key))


def check_key(key: str) -> str:
    """`key` itself if it is one; raises UsageError else."""
    if not is_key(key):
        raise UsageError(f"{key[:80]!r} is no key of a chunk store")
    return key


def check_prefix(prefix: str) -> str:
    """`prefix` itself if keys can begin with it (empty: all of them)."""
    if len(prefix) > MAX_KEY or not _PREFIX.fullmatch(prefix):
        raise UsageError(f"{prefix[:80]!r} is no prefix of keys")
    return prefix


@dataclass(frozen=True)
class Stat:
    """What a store knows of one object without reading it."""

    key: str
    size: int  # bytes
    mtime: float  # seconds since 1970 by the store's own clock; when it was last put


class ChunkStore(Closing, ABC):
    """One chunk store. Safe to call from any number of threads.

    Every operation may raise StoreUnavailable (may work later), StoreRefused (credentials, host
    key, permission), StoreMissing (no such folder or bucket), StoreFull or StoreError (final).
    None of them blocks longer than the store's own time limits.
    """

    url: str  # canonical, without secrets; opens the same store again
    concurrency: int  # how many operations at once are worth having, at least 1
    timeout: float = 0.0  # seconds without any answer after which an operation gives up; 0: none

    @abstractmethod
    def prepare(self) -> None:
        """Make the place where objects go, if it can be made: a folder (parents too), a prefix.

        Does nothing where it exists. Never makes a bucket: raises StoreMissing.
        """

    def check(self) -> None:
        """Raise what is wrong with the place itself: missing, refused, away. Cheap."""
        next(self.list(limit=1), None)

    @abstractmethod
    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        """The object's bytes from `offset`, `length` of them or all that follow.

        Shorter, or empty, where the object ends before; `length=0` gives b"" if it exists.
        Never returns less because a connection broke. Raises KeyNotFound, also for a range;
        ValueError for a negative offset or length.
        """

    def copies(self, key: str, length: int) -> Iterator[tuple[ChunkStore, bytes]]:
        """The copies of an object (up to `length` bytes) in several stores that are one, with the
        store of each; nothing where there is but one. To find a sound one of a damaged object.
        """
        return iter(())

    @abstractmethod
    def put(self, key: str, data: bytes) -> None:
        """Store `data` under `key`, replacing what was there, whole or not at all.

        A reader sees the old bytes or the new. This store object sees the new ones at once; others
        see them, durably, when the next `sync` returns, if not before.
        """

    def sync(self) -> None:
        """Make all that was put before durable and visible to everybody.

        A local folder makes a thousand puts durable at the price of one this way.
        """

    @abstractmethod
    def put_exclusive(self, key: str, data: bytes) -> None:
        """Store `data` under `key` if nothing is there; else raise KeyExists and change nothing.

        Of any number of callers on any hosts exactly one returns. When it raises StoreUnavailable
        the object may be there or not, and may hold `data`. Whole or not at all; durable.
        """

    @abstractmethod
    def stat(self, key: str) -> Stat:
        """Size and time of one object; raises KeyNotFound."""

    def exists(self, key: str) -> bool:
        """Whether there is an object under `key`."""
        try:
            self.stat(key)
        except KeyNotFound:
            return False
        return True

    @abstractmethod
    def children(self, prefix: str) -> list[str]:
        """The parts that follow `prefix` (empty, or ending in `/`), sorted, each once.

        For keys `a/x`, `a/y/z` and prefix `a/`: `["x", "y"]`. One level, whatever lies below. A
        folder with no object below it may show.
        """

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove the object; no error where there is none."""

    @abstractmethod
    def list(self, prefix: str = "", after: str = "", limit: int | None = None) -> Iterator[Stat]:
        """Objects whose key begins with `prefix`, those above `after` only, by key in byte order.

        `prefix` may end inside a part. At most `limit` of them. Nothing there is no error. Objects
        put or deleted meanwhile may show or not; every other shows once. Names that are no keys
        (files left by something else, unfinished uploads) do not show.
        """

    def sweep(self) -> int:
        """Remove files that killed writers left a day ago or more, which no `list` shows; how many.

        Only stores that publish by a temporary name have any.
        """
        return 0

    def close(self) -> None:
        """Give up connections. The store is not used after."""


def check_folder(prefix: str) -> str:
    """`prefix` itself if `children` takes it: empty, or a key and a slash. Raises UsageError."""
    if prefix and not prefix.endswith("/"):
        raise UsageError(f"{prefix[:80]!r} is no folder of keys: it ends in no slash")
    return check_prefix(prefix)


def check_range(offset: int, length: int | None) -> None:
    """ValueError for what `get` refuses."""
    if offset < 0 or (length is not None and length < 0):
        raise ValueError(f"negative range {offset}, {length}")

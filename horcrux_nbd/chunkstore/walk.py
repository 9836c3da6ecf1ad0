"""Keys in byte order from a tree of folders; what `list` is on a disk and over SFTP."""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from ..files import TEMPORARY_PREFIX
from .base import MAX_KEY, Stat, is_part

STALE = 24 * 3600.0  # seconds; no write lasts so long, and clocks differ by less


@dataclass(frozen=True)
class Entry:
    """One name in a folder. `look` gives size and mtime, or None if it is gone or no plain file."""

    name: str
    is_folder: bool
    look: Callable[[], tuple[int, float] | None]


# Of folders ("" or "a/b/"), what is in each, in their order; nothing for one that is not there.
# Many at once, so that a store with a round trip for each can put them together.
Scan = Callable[[list[str]], Iterator[Iterable[Entry]]]


def folder_of(prefix: str) -> str:
    """The deepest folder that holds every key that begins with `prefix`: "" or ends in a slash."""
    return prefix[: prefix.rfind("/") + 1]


def walk(scan: Scan, prefix: str, after: str, limit: int | None) -> Iterator[Stat]:
    """What `ChunkStore.list` says, with one folder's names in memory for each level."""
    if limit is not None and limit <= 0:
        return
    count = 0
    folder = folder_of(prefix)
    for entries in scan([folder]):
        for key, entry in _walk(scan, folder, entries, prefix, after):
            found = entry.look()
            if found is None:
                continue
            yield Stat(key, *found)
            count += 1
            if count == limit:
                return


def stale(scan: Scan, folder: str = "") -> Iterator[str]:
    """Paths of the temporary files below `folder` that are older than STALE."""
    for entries in scan([folder]):
        for entry in list(entries):
            path = f"{folder}{entry.name}"
            if entry.is_folder and is_part(entry.name):
                yield from stale(scan, f"{path}/")
            elif entry.name.startswith(TEMPORARY_PREFIX):
                found = entry.look()
                if found is not None and time.time() - found[1] > STALE:
                    yield path


def merge(newer: Iterable[Stat], older: Iterable[Stat], limit: int | None) -> Iterator[Stat]:
    """Two listings as one, each key once: of two with one key that of `newer`."""
    # The merge is stable: of two with one key that of the first comes first.
    both = heapq.merge(newer, older, key=lambda entry: entry.key)
    once = (next(group) for _, group in itertools.groupby(both, key=lambda entry: entry.key))
    return itertools.islice(once, limit if limit is None else max(limit, 0))


def _walk(
    scan: Scan, folder: str, entries: Iterable[Entry], prefix: str, after: str
) -> Iterator[tuple[str, Entry]]:
    wanted = []
    for entry in entries:
        if not is_part(entry.name):
            continue
        # A folder sorts as if its slash were part of its name: "a-b" comes before "a/c".
        key = f"{folder}{entry.name}{'/' if entry.is_folder else ''}"
        if len(key) > MAX_KEY or not (key.startswith(prefix) or prefix.startswith(key)):
            continue
        if key > after or (entry.is_folder and after.startswith(key)):
            wanted.append((key, entry))
    wanted.sort(key=lambda pair: pair[0])
    below = scan([key for key, entry in wanted if entry.is_folder])
    for key, entry in wanted:
        if entry.is_folder:
            yield from _walk(scan, key, next(below), prefix, after)
        elif key.startswith(prefix):
            yield key, entry

"""Keys in byte order from a tree of folders; what `list` is on a disk and over SFTP."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from .base import MAX_KEY, Stat, is_part


@dataclass(frozen=True)
class Entry:
    """One name in a folder. `look` gives size and mtime, or None if it is gone or no plain file."""

    name: str
    is_folder: bool
    look: Callable[[], tuple[int, float] | None]


Scan = Callable[[str], Iterable[Entry]]  # of a folder: "" or "a/b/"; nothing where there is none


def folder_of(prefix: str) -> str:
    """The deepest folder that holds every key that begins with `prefix`: "" or ends in a slash."""
    return prefix[: prefix.rfind("/") + 1]


def walk(scan: Scan, prefix: str, after: str, limit: int | None) -> Iterator[Stat]:
    """What `ChunkStore.list` says, with one folder's names in memory for each level."""
    if limit is not None and limit <= 0:
        return
    count = 0
    for key, entry in _walk(scan, folder_of(prefix), prefix, after):
        found = entry.look()
        if found is None:
            continue
        yield Stat(key, *found)
        count += 1
        if count == limit:
            return


def _walk(scan: Scan, folder: str, prefix: str, after: str) -> Iterator[tuple[str, Entry]]:
    # A folder sorts as if its slash were part of its name: "a-b" comes before "a/c".
    entries = [
        (f"{folder}{entry.name}{'/' if entry.is_folder else ''}", entry)
        for entry in scan(folder)
        if is_part(entry.name)
    ]
    entries.sort(key=lambda pair: pair[0])
    for key, entry in entries:
        if len(key) > MAX_KEY or not (key.startswith(prefix) or prefix.startswith(key)):
            continue
        if entry.is_folder:
            if after < key or after.startswith(key):
                yield from _walk(scan, key, prefix, after)
        elif key.startswith(prefix) and key > after:
            yield key, entry

"""What differs between two versions of a file system: the words for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

# changed(offset, length) → ascending [start, stop) in [offset, offset + length) of the images whose
# bytes may differ. What it leaves out is the same in both.
Changed = Callable[[int, int], Iterable[tuple[int, int]]]

ADDED, DELETED, MODIFIED, RENAMED = "added", "deleted", "modified", "renamed"

KINDS = {
    0o100000: "file",
    0o040000: "directory",
    0o120000: "link",
    0o020000: "character device",
    0o060000: "block device",
    0o010000: "fifo",
    0o140000: "socket",
}


@dataclass(frozen=True)
class Change:
    """One path that differs. Sizes in bytes.

    `what` is, of a file that is in both: "content", "mode", "owner", "times", "xattrs", "device",
    in this order. A directory's own time is none: it changes with each name in it.
    """

    path: bytes
    kind: str  # ADDED, DELETED, MODIFIED or RENAMED
    type: str  # one of KINDS; of a deleted one the old type
    old_size: int | None = None  # None where it was not there
    new_size: int | None = None
    # Bytes of the new content that were not the same in the old one, in whole blocks up to the end
    # of the file; holes count nothing.
    changed_bytes: int = 0
    what: tuple[str, ...] = ()
    old_path: bytes | None = None  # of a renamed one

    def to_json(self) -> dict[str, Any]:
        """For `--json`. A path that is no UTF-8 has a twin in hex beside it."""
        value = {
            "path": text(self.path),
            "kind": self.kind,
            "type": self.type,
            "old_size": self.old_size,
            "new_size": self.new_size,
            "changed_bytes": self.changed_bytes,
            "what": list(self.what),
            "old_path": None if self.old_path is None else text(self.old_path),
        }
        return value | hex_of("path_hex", self.path) | hex_of("old_path_hex", self.old_path)


def hex_of(key: str, path: bytes | None) -> dict[str, str]:
    """`{key: hex}` of a path that is no UTF-8, else nothing."""
    if path is None:
        return {}
    try:
        path.decode()
    except UnicodeDecodeError:
        return {key: path.hex()}
    return {}


def text(path: bytes) -> str:
    """A path as text, with U+FFFD for what is no UTF-8."""
    return path.decode(errors="replace")


def shown(path: bytes) -> str:
    """A path for a terminal: bytes that it would obey, or that are no text, as `\\ooo`."""
    parts = []
    for character in path.decode(errors="surrogateescape"):
        if character == "\\":
            parts.append("\\\\")
        elif character.isprintable():
            parts.append(character)
        else:
            encoded = character.encode(errors="surrogateescape")
            parts.append("".join(f"\\{byte:03o}" for byte in encoded))
    return "".join(parts)

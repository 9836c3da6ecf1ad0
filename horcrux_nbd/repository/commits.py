"""Commits: immutable versions of an image (docs/format.md, "Commits").

The plaintext is JSON in one canonical form (ASCII, sorted keys, no spaces), so that equal commits
have equal ids and any language can read them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from ..errors import Damaged, EnvironmentProblem, UsageError
from ..names import check_name
from ..units import KiB, MiB, format_size
from .index import MAX_LEVELS, levels_for
from .objects import NULL_ID, Kind, kind_of
from .patch import BLOCK_SIZE
from .records import canonical, integer, parse, text

MIN_CHUNK = 64 * KiB
MAX_CHUNK = 64 * MiB
DEFAULT_CHUNK = 512 * KiB
MAX_COMMIT = 1 * MiB  # bytes of plaintext; bounds what a reader allocates
MAX_IMAGE = 1 << 62  # bytes; NBD and off_t end at 2^63 - 1
VERSION = 1
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?Z", re.ASCII)


def check_chunk_size(size: int) -> int:
    """`size` itself if chunks can have it (bytes); raises UsageError else."""
    if not MIN_CHUNK <= size <= MAX_CHUNK or size & (size - 1):
        raise UsageError(
            f"chunk size {format_size(size)} cannot be: take a power of two from "
            f"{MIN_CHUNK // KiB}K to {MAX_CHUNK // MiB}M"
        )
    return size


def now() -> str:
    """This moment as commits and refs write it: UTC, whole microseconds, `…Z`."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


@dataclass(frozen=True)
class Commit:
    """One version. Sizes are in bytes; `index` is NULL_ID for an image of zeros."""

    image: str
    size: int
    chunk_size: int
    index: bytes
    parents: tuple[bytes, ...] = ()
    author: str = ""
    time: str = ""
    message: str = ""
    tags: dict[str, str] = field(default_factory=dict)  # free key=value notes, e.g. ticket=4711
    filesystem: str | None = None
    # What its writer stored for it: "bytes" in "objects", itself left out, and "changed" bytes of
    # the image. A note for lists; nothing depends on it. Empty where the writer did not say.
    new: dict[str, int] = field(default_factory=dict)

    @property
    def chunks(self) -> int:
        """How many chunks the image has; the last may reach beyond `size` (zeros there)."""
        return -(-self.size // self.chunk_size)

    @property
    def levels(self) -> int:
        """The height of the index tree."""
        return levels_for(self.chunks)

    def encode(self) -> bytes:
        """The canonical plaintext. UsageError for what `decode` would not take."""
        value = {
            "author": self.author,
            "chunk_size": self.chunk_size,
            "filesystem": self.filesystem,
            "image": self.image,
            "index": self.index.hex(),
            "message": self.message,
            "parents": [parent.hex() for parent in self.parents],
            "size": self.size,
            "tags": self.tags,
            "time": self.time,
            "version": VERSION,
        }
        if self.new:
            value["new"] = self.new
        plain = canonical(value)
        if len(plain) > MAX_COMMIT:
            raise UsageError(f"message and tags are over {format_size(MAX_COMMIT)}: shorten them")
        try:
            self.decode(plain)
        except Damaged as error:
            raise UsageError(f"this commit cannot be: {error}") from None
        return plain

    @classmethod
    def decode(cls, plain: bytes) -> Commit:
        """The commit in `plain`, which its id has proven. Raises Damaged, EnvironmentProblem.

        Members that this release does not know are left alone.
        """
        try:
            value = parse(plain)
            if integer(value["version"]) != VERSION:
                raise EnvironmentProblem(
                    f"a commit of format {value['version']}, newer than this program: upgrade "
                    "horcrux-nbd"
                )
            commit = cls(
                image=check_name("image", text(value["image"])),
                size=integer(value["size"]),
                chunk_size=check_chunk_size(integer(value["chunk_size"])),
                index=_id(value["index"], Kind.NODE),
                parents=tuple(_id(parent, Kind.COMMIT) for parent in value["parents"]),
                author=text(value["author"]),
                time=text(value["time"]),
                message=text(value["message"]),
                tags={text(k): text(v) for k, v in value["tags"].items()},
                filesystem=None if value["filesystem"] is None else text(value["filesystem"]),
                new={text(k): integer(v) for k, v in value.get("new", {}).items()},
            )
        except (ValueError, KeyError, TypeError, AttributeError, UsageError) as error:
            raise Damaged(f"a commit object cannot be read ({error!r:.200})") from None
        if not 0 <= commit.size <= MAX_IMAGE or commit.levels > MAX_LEVELS:
            raise Damaged(f"a commit object claims an image of {commit.size} bytes")
        if NULL_ID in commit.parents or not _TIME.fullmatch(commit.time):
            raise Damaged("a commit object has a broken parent or time")
        return commit


def _id(value: Any, kind: Kind) -> bytes:
    oid = bytes.fromhex(text(value))
    if oid.hex() != value or (oid != NULL_ID and kind_of(oid) is not kind):
        raise ValueError(f"{value!r:.80} is no id of a {kind.name.lower()}")
    return oid


def block_count(size: int) -> int:
    """4 KiB blocks in `size` bytes, the last one perhaps in part."""
    return -(-size // BLOCK_SIZE)

"""Refs: the only thing in a repository that moves, and it only ever grows (docs/format.md, "Refs").

A branch is a series of numbered records. Moving it is one exclusive create of the next number, so
of two writers one wins, on every kind of store, without a server and without a lock. Keys count
down, so the newest record is the first that a store lists.
"""

from __future__ import annotations

import difflib
import json
import secrets
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from ..chunkstore.base import ChunkStore
from ..errors import Busy, Damaged, KeyExists, KeyNotFound, NotFound, UsageError
from ..names import check_name, is_name
from .commits import now
from .objects import ID_SIZE

_TOP = 10**20 - 1


class BranchMoved(Busy):
    """Somebody else moved the branch first. `record` is what it points to now, if anything."""

    def __init__(self, message: str, record: BranchRecord | None) -> None:
        super().__init__(message)
        self.record = record


@dataclass(frozen=True)
class BranchRecord:
    """One step of a branch. `commit` is None where the branch was deleted."""

    number: int  # 1 is the oldest
    commit: bytes | None
    author: str
    time: str
    why: str
    token: str  # of the writer's own: it finds it and knows that it won

    def encode(self) -> bytes:
        value = asdict(self)
        value["commit"] = self.commit.hex() if self.commit else None
        value["version"] = 1
        return json.dumps(value, sort_keys=True).encode()


@dataclass(frozen=True)
class TagRecord:
    """A name that stays."""

    commit: bytes
    author: str
    time: str
    message: str

    def encode(self) -> bytes:
        value = {**asdict(self), "commit": self.commit.hex(), "version": 1}
        return json.dumps(value, sort_keys=True).encode()


def _decode(data: bytes, what: str, fields: tuple[str, ...]) -> dict[str, Any]:
    try:
        value = json.loads(data)
        if value["version"] != 1:
            raise Damaged(f"{what} is of a newer format than this program: upgrade it")
        found = {name: value[name] for name in fields}
        for name, text in found.items():
            if name != "number" and not isinstance(text, str | None):
                raise TypeError(name)
        if found["commit"] is not None:
            found["commit"] = bytes.fromhex(found["commit"])
            if len(found["commit"]) != ID_SIZE:
                raise ValueError("commit")
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{what} cannot be read ({error!r})") from None
    return found


class Refs:
    """The refs of one repository."""

    def __init__(self, store: ChunkStore) -> None:
        self._store = store

    # ---- what is there

    def images(self) -> list[str]:
        """Names of all images."""
        return [name for name in self._store.children("refs/") if is_name(name)]

    def branches(self, image: str) -> list[str]:
        """Names of all branches that an image has or had."""
        check_name("image", image)
        return [n for n in self._store.children(f"refs/{image}/heads/") if is_name(n)]

    def tags(self, image: str) -> list[str]:
        """Names of all tags of an image."""
        check_name("image", image)
        return [n for n in self._store.children(f"refs/{image}/tags/") if is_name(n)]

    def _branch_prefix(self, image: str, branch: str) -> str:
        return f"refs/{check_name('image', image)}/heads/{check_name('branch', branch)}/"

    def records(self, image: str, branch: str, limit: int | None = None) -> Iterator[BranchRecord]:
        """The records of a branch, newest first (a reflog). Raises Damaged."""
        prefix = self._branch_prefix(image, branch)
        for entry in self._store.list(prefix, limit=limit):
            yield self._read_record(entry.key)

    def _read_record(self, key: str) -> BranchRecord:
        what = f"{self._store.url}: ref {key}"
        fields = ("commit", "author", "time", "why", "token")
        name = key.rsplit("/", 1)[1]
        if len(name) != 20 or not name.isdigit():
            raise Damaged(f"{what} is no record of a branch")
        return BranchRecord(_TOP - int(name), **_decode(self._store.get(key), what, fields))

    def head(self, image: str, branch: str) -> BranchRecord | None:
        """The newest record, also that of a deletion; None if there never was such a branch."""
        return next(self.records(image, branch, limit=1), None)

    def tag(self, image: str, tag: str) -> TagRecord | None:
        """A tag's record, or None."""
        key = f"refs/{check_name('image', image)}/tags/{check_name('tag', tag)}"
        try:
            data = self._store.get(key)
        except KeyNotFound:
            return None
        what = f"{self._store.url}: tag {tag}"
        value = _decode(data, what, ("commit", "author", "time", "message"))
        if value["commit"] is None:
            raise Damaged(f"{what} names no commit")
        return TagRecord(**value)

    def require_image(self, image: str) -> None:
        """Raises NotFound, which names the images that there are."""
        check_name("image", image)
        images = self.images()
        if image not in images:
            raise NotFound(f"{self._store.url}: no image {image!r}{suggest(image, images)}")

    # ---- what moves

    def move(
        self,
        image: str,
        branch: str,
        commit: bytes | None,
        expected: bytes | None,
        *,
        author: str,
        why: str,
    ) -> BranchRecord:
        """Let `branch` point to `commit` (None deletes it), if it points to `expected` now.

        All that the commit needs must be in the store and durable before. Exactly one of any
        number of callers with the same `expected` returns; raises BranchMoved for the others, who
        learn who moved it, when and to what.
        """
        current = self.head(image, branch)
        if (current.commit if current else None) != expected:
            raise self._moved(image, branch, current)
        number = current.number + 1 if current else 1
        record = BranchRecord(number, commit, author, now(), why, secrets.token_hex(16))
        key = f"{self._branch_prefix(image, branch)}{_TOP - number:020d}"
        try:
            self._store.put_exclusive(key, record.encode())
        except KeyExists:
            # Perhaps our own, whose answer got lost on the way.
            there = self._read_record(key)
            if there.token != record.token:
                raise self._moved(image, branch, self.head(image, branch)) from None
        return record

    def _moved(self, image: str, branch: str, record: BranchRecord | None) -> BranchMoved:
        if record is None or record.commit is None:
            return BranchMoved(f"branch {branch!r} of {image} does not exist any more", record)
        return BranchMoved(
            f"branch {branch!r} of {image} was moved by {record.author or 'somebody'} at "
            f"{record.time} to {record.commit.hex()[:12]} ({record.why}): fetch it and try again, "
            "or choose another branch",
            record,
        )

    def make_tag(self, image: str, tag: str, commit: bytes, *, author: str, message: str) -> None:
        """Name `commit` for good. Raises UsageError where the tag exists with another commit."""
        key = f"refs/{check_name('image', image)}/tags/{check_name('tag', tag)}"
        try:
            self._store.put_exclusive(key, TagRecord(commit, author, now(), message).encode())
        except KeyExists:
            there = self.tag(image, tag)
            if there is None or there.commit != commit:
                raise UsageError(
                    f"tag {tag!r} of {image} exists already: delete it first or choose another name"
                ) from None

    def delete_tag(self, image: str, tag: str) -> None:
        """Remove a tag; raises NotFound."""
        if self.tag(image, tag) is None:
            raise NotFound(f"{image} has no tag {tag!r}{suggest(tag, self.tags(image))}")
        self._store.delete(f"refs/{image}/tags/{tag}")


def suggest(name: str, known: list[str]) -> str:
    """The end of a message about an unknown name: near ones, or the ones that there are."""
    if not known:
        return " (there is none)"
    near = difflib.get_close_matches(name, known, n=3)
    if near:
        return f": did you mean {', '.join(near)}?"
    more = f" and {len(known) - 8} more" if len(known) > 8 else ""
    return f": there is {', '.join(known[:8])}{more}"

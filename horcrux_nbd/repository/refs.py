"""Refs: the only thing in a repository that moves, and it only ever grows (docs/format.md, "Refs").

A branch is a series of numbered records. Moving it is one exclusive create of the next number, so
of two writers one wins, on every kind of store, without a server and without a lock. Keys count
down, so the newest record is the first that a store lists.
"""

from __future__ import annotations

import contextlib
import difflib
import re
import secrets
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from ..chunkstore.base import ChunkStore
from ..errors import (
    Busy,
    Damaged,
    KeyExists,
    KeyNotFound,
    NotFound,
    StoreError,
    StoreUnavailable,
    UsageError,
)
from ..names import check_name, is_name
from .commits import now
from .objects import PLAIN, Form, Kind, kind_of
from .records import MAX_RECORD, text
from .sweeps import refuse_during_removal

_TOP = 10**20 - 1
_NUMBER = re.compile(r"[0-9]{20}")
# Names that a copying program left among the records (`….partial`) may come first; where they are
# more than a few, the whole folder is listed.
_FEW = 8
# Branches whose heads are read for the message about an unknown name.
_MANY = 64


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

    def members(self, key: str) -> dict[str, Any]:
        """What the record at `key` says."""
        commit = self.commit.hex() if self.commit else None
        return {**asdict(self), "commit": commit, "key": key}


@dataclass(frozen=True)
class TagRecord:
    """A name that stays."""

    commit: bytes
    author: str
    time: str
    message: str

    def members(self, key: str) -> dict[str, Any]:
        """What the record at `key` says."""
        return {**asdict(self), "commit": self.commit.hex(), "key": key}


def _decode(data: bytes, key: str, url: str, fields: tuple[str, ...], form: Form) -> dict[str, Any]:
    what = f"{url}: ref {key}"
    value = form.decode_record(key, data, what)
    try:
        found: dict[str, Any] = {name: text(value[name]) for name in fields}
        commit = value["commit"]
        found["commit"] = None if commit is None else bytes.fromhex(text(commit))
        if commit is not None and kind_of(found["commit"]) is not Kind.COMMIT:
            raise ValueError(f"{commit!r:.80} is no id of a commit")
        if value["key"] != key:  # a valid record, but of another branch or number
            raise ValueError(f"it belongs at {value['key']!r:.200}")
    except (ValueError, KeyError) as error:
        raise Damaged(f"{what} is damaged ({error}): restore it from a copy") from None
    return found


class Refs:
    """The refs of one repository."""

    def __init__(self, store: ChunkStore, form: Form = PLAIN) -> None:
        self._store, self._form = store, form

    def encode(self, key: str, record: BranchRecord | TagRecord) -> bytes:
        """A record for `key` as it is stored."""
        return self._form.encode_record(key, record.members(key))

    # ---- what is there

    def images(self) -> list[str]:
        """Names of all images."""
        return [name for name in self._store.children("refs/") if is_name(name)]

    def branches(self, image: str) -> list[str]:
        """Names of all branches that an image has or had: a deleted one has a last record."""
        check_name("image", image)
        return [n for n in self._store.children(f"refs/{image}/heads/") if is_name(n)]

    def heads(self, image: str) -> dict[str, BranchRecord]:
        """The newest record of each branch that an image has; deleted ones are left out."""
        found = ((name, self.head(image, name)) for name in self.branches(image))
        return {name: record for name, record in found if record and record.commit is not None}

    def tags(self, image: str) -> list[str]:
        """Names of all tags of an image."""
        check_name("image", image)
        return [n for n in self._store.children(f"refs/{image}/tags/") if is_name(n)]

    def _branch_prefix(self, image: str, branch: str) -> str:
        return f"refs/{check_name('image', image)}/heads/{check_name('branch', branch)}/"

    def records(self, image: str, branch: str) -> Iterator[BranchRecord]:
        """The records of a branch, newest first (a reflog). Raises Damaged."""
        return map(self.read_record, self.record_keys(image, branch))

    def record_keys(self, image: str, branch: str) -> list[str]:
        """The keys of a branch's records, newest first.

        Keys that are no numbers, such as what a copying program left, are passed over.
        """
        return self._record_keys(self._branch_prefix(image, branch), None)[0]

    def _record_keys(self, prefix: str, limit: int | None) -> tuple[list[str], int]:
        """The keys of records among the first `limit` keys, and how many keys that were."""
        keys = [entry.key for entry in self._store.list(prefix, limit=limit)]
        return [key for key in keys if _NUMBER.fullmatch(key[len(prefix) :])], len(keys)

    def read_record(self, key: str) -> BranchRecord:
        """The record of a branch under `key`. Raises Damaged, KeyNotFound."""
        found = self._read(key, ("author", "time", "why", "token"))
        return BranchRecord(number=_TOP - int(key[-20:]), **found)

    def _read(self, key: str, fields: tuple[str, ...]) -> dict[str, Any]:
        data = self._store.get(key, 0, MAX_RECORD + 1)
        return _decode(data, key, self._store.url, fields, self._form)

    def head(self, image: str, branch: str) -> BranchRecord | None:
        """The newest record, also that of a deletion; None if there never was such a branch."""
        keys, seen = self._record_keys(self._branch_prefix(image, branch), _FEW)
        if not keys and seen == _FEW:
            keys = self.record_keys(image, branch)
        return self.read_record(keys[0]) if keys else None

    def tag(self, image: str, tag: str) -> TagRecord | None:
        """A tag's record, or None."""
        key = f"refs/{check_name('image', image)}/tags/{check_name('tag', tag)}"
        try:
            value = self._read(key, ("author", "time", "message"))
        except KeyNotFound:
            return None
        if value["commit"] is None:
            raise Damaged(f"{self._store.url}: ref {key} is damaged: it names no commit")
        return TagRecord(**value)

    def require_image(self, image: str) -> None:
        """Raises NotFound, which names the images that there are."""
        check_name("image", image)
        images = self.images()
        if image not in images:
            raise NotFound(f"{self._store.url}: no image {image!r}{suggest(image, images)}")

    def known(self, image: str) -> list[str]:
        """Names of versions of the image, for a message: branches that there are, then tags."""
        branches = self.branches(image)
        if len(branches) <= _MANY:
            with contextlib.suppress(Damaged):  # no reason to hide what the message is about
                branches = list(self.heads(image))
        return list(dict.fromkeys(branches + self.tags(image)))

    def is_shallow(self, image: str, commit: bytes) -> bool:
        """Whether the parents of `commit` were removed on purpose (docs/format.md, "Removal")."""
        return self._store.exists(self.shallow_key(image, commit))

    def shallow_key(self, image: str, commit: bytes) -> str:
        """Where it is said that the parents of `commit` were removed on purpose."""
        return f"refs/{check_name('image', image)}/shallow/{commit.hex()}"

    def shallow(self, image: str) -> list[bytes]:
        """The commits of an image whose parents were removed on purpose."""
        found = []
        for name in self._store.children(self.shallow_key(image, b"")):
            with contextlib.suppress(ValueError):  # a name that is no id
                oid = bytes.fromhex(name)
                if kind_of(oid) is Kind.COMMIT and oid.hex() == name:
                    found.append(oid)
        return found

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
        learn who moved it, when and to what. After StoreUnavailable it may have moved or not. Busy
        while unreachable objects are being removed.
        """
        prefix = self._branch_prefix(image, branch)
        if commit is not None:
            refuse_during_removal(self._store)
        current = self.head(image, branch)
        if (current.commit if current else None) != expected:
            raise self.moved(image, branch, current)
        number = current.number + 1 if current else 1
        record = BranchRecord(number, commit, author, now(), why, secrets.token_hex(16))
        key = f"{prefix}{_TOP - number:020d}"
        try:
            self._store.put_exclusive(key, self.encode(key, record))
        except (KeyExists, StoreUnavailable) as error:
            # Perhaps our own, whose answer got lost on the way.
            try:
                won = self.read_record(key).token == record.token
            except StoreError:  # not there, or still away: the first error says why
                raise error from None
            if not won:
                raise self.moved(image, branch, self.head(image, branch)) from None
        return record

    def moved(self, image: str, branch: str, record: BranchRecord | None) -> BranchMoved:
        """The error for whoever expected the branch elsewhere."""
        if record is None:
            return BranchMoved(f"there is no branch {branch!r} of {image}: fetch again", record)
        if record.commit is None:
            return BranchMoved(
                f"branch {branch!r} of {image} was deleted by {record.author or 'somebody'} at "
                f"{record.time} ({record.why}): choose another branch",
                record,
            )
        return BranchMoved(
            f"branch {branch!r} of {image} was moved by {record.author or 'somebody'} at "
            f"{record.time} to {record.commit.hex()[:12]} ({record.why}): fetch it and try again, "
            "or choose another branch",
            record,
        )

    def make_tag(self, image: str, tag: str, commit: bytes, *, author: str, message: str) -> None:
        """Name `commit` for good. Raises UsageError where the tag exists with another commit; Busy
        while unreachable objects are being removed.
        """
        key = f"refs/{check_name('image', image)}/tags/{check_name('tag', tag)}"
        refuse_during_removal(self._store)
        try:
            self._store.put_exclusive(
                key, self.encode(key, TagRecord(commit, author, now(), message))
            )
        except KeyExists:
            there = self.tag(image, tag)
            if there is None or there.commit != commit:
                raise UsageError(
                    f"tag {tag!r} of {image} exists already: delete it first or choose another name"
                ) from None

    def make_shallow(self, image: str, commit: bytes, *, author: str, why: str) -> None:
        """Say that the parents of `commit` are removed on purpose. For retention, before it does.

        No promise that anything is there, so it needs no rule of `sweeps`.
        """
        key = self.shallow_key(image, commit)
        members = {"author": author, "key": key, "time": now(), "why": why}
        with contextlib.suppress(KeyExists):
            self._store.put_exclusive(key, self._form.encode_record(key, members))

    def delete_tag(self, image: str, tag: str) -> None:
        """Remove a tag, also a damaged one; raises NotFound."""
        key = f"refs/{check_name('image', image)}/tags/{check_name('tag', tag)}"
        if not self._store.exists(key):
            raise NotFound(f"{image} has no tag {tag!r}{suggest(tag, self.tags(image))}")
        self._store.delete(key)


def suggest(name: str, known: list[str]) -> str:
    """The end of a message about an unknown name: near ones, or the ones that there are."""
    if not known:
        return " (there is none)"
    near = difflib.get_close_matches(name, known, n=3)
    if near:
        return f": did you mean {', '.join(near)}?"
    more = f" and {len(known) - 8} more" if len(known) > 8 else ""
    return f": there is {', '.join(known[:8])}{more}"

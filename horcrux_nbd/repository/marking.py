"""What refs reach: from heads and tags down to chunks, each object read once.

Each object that is reached gets the number of the group of versions that needs it, or MANY where
several do: so one walk tells what is reachable at all, and what only one version holds.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TypeVar

from ..errors import Damaged, HorcruxError
from ..progress import Progress
from .affected import read_table
from .commits import Commit
from .index import table_ids
from .listing import Listing
from .objects import NULL_ID, Kind, kind_of
from .patch import Patch
from .refs import TagRecord
from .repository import Repository

MANY = (1 << 32) - 1
_AT_ONCE = 4096  # objects asked for before the next are looked at: bounds what waits in memory

T = TypeVar("T")
R = TypeVar("R")


@dataclass
class Roots:
    """What the refs of a repository named when they were read."""

    heads: dict[tuple[str, str], bytes] = field(default_factory=dict)  # (image, branch)
    tags: dict[tuple[str, str], TagRecord] = field(default_factory=dict)  # (image, tag)
    shallow: dict[bytes, list[str]] = field(default_factory=dict)  # commit: keys that say so

    @property
    def commits(self) -> set[bytes]:
        return {*self.heads.values(), *(tag.commit for tag in self.tags.values())}


def read_roots(repository: Repository) -> Roots:
    """All heads, tags and shallow commits. Raises Damaged: then nobody can tell what is needed."""
    refs, roots = repository.refs, Roots()
    for image in refs.images():
        for branch, record in refs.heads(image).items():
            if record.commit is not None:
                roots.heads[image, branch] = record.commit
        for name in refs.tags(image):
            tag = refs.tag(image, name)
            if tag is not None:
                roots.tags[image, name] = tag
        for oid in refs.shallow(image):
            roots.shallow.setdefault(oid, []).append(refs.shallow_key(image, oid))
    return roots


class Versions:
    """The commits of a repository, read once each."""

    def __init__(self, repository: Repository, found: dict[bytes, Commit | HorcruxError]) -> None:
        self._repository, self._found = repository, found
        self.listed = list(found)  # ids of those that were there at the beginning

    def get(self, oid: bytes) -> Commit | HorcruxError:
        """A commit, or why it cannot be read. One that came since is read now."""
        if oid not in self._found:
            self._found[oid] = _read_commit(self._repository, oid)
        return self._found[oid]


def _read_commit(repository: Repository, oid: bytes) -> Commit | HorcruxError:
    try:
        return repository.read_commit(oid)
    except Damaged as error:
        return error


def history(
    get: Callable[[bytes], Commit | HorcruxError | None],
    tips: Iterable[bytes],
    shallow: Collection[bytes],
    *,
    tolerant: bool = False,
) -> dict[bytes, Commit]:
    """`tips` and all before them, as far as versions were kept: children before their parents.

    Raises Damaged for one that is needed and not there, unless `tolerant`: then it is left out.
    """
    found: dict[bytes, Commit] = {}
    pending = sorted(set(tips))
    children: dict[bytes, int] = dict.fromkeys(pending, 0)
    child_of: dict[bytes, bytes] = {}
    while pending:
        oid = pending.pop()
        if oid in found:
            continue
        commit = get(oid)
        if not isinstance(commit, Commit):
            if tolerant:
                continue
            raise _unreadable(oid, commit, found.get(child_of.get(oid, b"")))
        found[oid] = commit
        if oid in shallow:
            continue
        for parent in dict.fromkeys(commit.parents):
            children[parent] = children.get(parent, 0) + 1
            child_of[parent] = oid
            pending.append(parent)
    # Topological: a chain of a hundred thousand versions is no recursion.
    ready = sorted(
        (oid for oid in found if not children[oid]), key=lambda oid: (found[oid].time, oid)
    )
    ordered: dict[bytes, Commit] = {}
    while ready:
        oid = ready.pop()
        ordered[oid] = found[oid]
        if oid in shallow:
            continue
        for parent in dict.fromkeys(found[oid].parents):
            children[parent] -= 1
            if not children[parent] and parent in found:
                ready.append(parent)
    return ordered


def _unreadable(oid: bytes, why: HorcruxError | Commit | None, child: Commit | None) -> Damaged:
    where = f", before a version of {child.image} of {child.time}" if child else ""
    return Damaged(
        f"commit {oid.hex()} cannot be read{where} ({why or 'it is missing'}): without it nobody "
        "can tell what is needed: `horcrux-cli repair` first"
    )


class Marking:
    """Who needs each object of a listing. Use it in a `with` block."""

    def __init__(
        self, repository: Repository, listing: Listing, progress: Progress | None = None
    ) -> None:
        self.repository, self.listing = repository, listing
        self.owners = array("I", bytes(4 * len(listing)))  # by place; 0: nobody, or MANY
        self.levels = bytearray(len(listing))  # of nodes that were reached, by place
        self.missing: set[bytes] = set()  # reached, and not in the listing
        self._progress = progress or Progress()
        self._pool = ThreadPoolExecutor(
            max(2, repository.store.concurrency), thread_name_prefix="mark"
        )

    def __enter__(self) -> Marking:
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def each(self, work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """`work` for each item, in parallel and in order; not all of them wait at once."""
        left = iter(items)
        while some := list(islice(left, _AT_ONCE)):
            yield from self._pool.map(work, some)

    def read_commits(self) -> Versions:
        """Every commit in the listing, at once and not one after the other as a history goes."""
        ids = [oid for oid in self.listing.ids() if kind_of(oid) is Kind.COMMIT]
        self._progress.start("reading versions")
        read = partial(_read_commit, self.repository)
        return Versions(self.repository, dict(zip(ids, self.each(read, ids), strict=True)))

    def _touch(self, oid: bytes, owner: int) -> bool:
        """Note that `owner` needs an object; whether what is below it has to be told as well."""
        at = self.listing.find(oid)
        if at is None:  # stored since the listing was made, or missing
            self.missing.add(oid)
            return True
        before = self.owners[at]
        if before in (owner, MANY):
            return False
        self.owners[at] = owner if before == 0 else MANY
        return True

    def mark(self, owner: int, commits: Mapping[bytes, Commit], *, tolerant: bool = False) -> None:
        """Note what the versions `commits` need, themselves included. Raises Damaged, unless
        `tolerant`: then what is below an unreadable object is left out.
        """
        levels: dict[int, set[bytes]] = {}
        sizes: dict[bytes, int] = {}
        for oid, commit in commits.items():
            self._touch(oid, owner)
            if commit.index != NULL_ID:
                levels.setdefault(commit.levels - 1, set()).add(commit.index)
                sizes[commit.index] = commit.chunk_size
        patches: dict[bytes, int] = {}
        walked: set[bytes] = set()  # those that are in no listing
        for level in range(max(levels, default=-1), -1, -1):
            nodes = [oid for oid in sorted(levels.get(level, ())) if self._new(oid, owner, walked)]

            def read(oid: bytes, level: int = level) -> bytes:
                return self._read(lambda: read_table(self.repository, level, oid), b"", tolerant)

            for oid, table in zip(nodes, self.each(read, nodes), strict=True):
                at = self.listing.find(oid)
                if at is not None:
                    self.levels[at] = level
                self._progress.advance(len(table))
                for child in table_ids(table):
                    if level:
                        levels.setdefault(level - 1, set()).add(child)
                        sizes[child] = sizes[oid]
                    elif kind_of(child) is Kind.PATCH:
                        patches[child] = sizes[oid]
                    else:
                        self._touch(child, owner)
        self._mark_patches(owner, patches, walked, tolerant)

    def _new(self, oid: bytes, owner: int, walked: set[bytes]) -> bool:
        if oid in walked or not self._touch(oid, owner):
            return False
        if self.listing.find(oid) is None:
            walked.add(oid)
        return True

    def _mark_patches(
        self, owner: int, patches: dict[bytes, int], walked: set[bytes], tolerant: bool
    ) -> None:
        while patches:
            now = [oid for oid in sorted(patches) if self._new(oid, owner, walked)]
            sizes, patches = patches, {}

            def read(oid: bytes, sizes: dict[bytes, int] = sizes) -> tuple[bytes, ...]:
                return self._read(lambda: self._chain(oid, sizes[oid]), (), tolerant)

            for oid, chain in zip(now, self.each(read, now), strict=True):
                for part in chain:
                    if kind_of(part) is Kind.PATCH:
                        patches[part] = sizes[oid]
                    elif part != NULL_ID:
                        self._touch(part, owner)

    def _chain(self, oid: bytes, chunk_size: int) -> tuple[bytes, ...]:
        plain = self.repository.read_object(oid, (Kind.PATCH,), chunk_size)[1]
        return Patch.decode(plain, chunk_size).chain

    def _read(self, read: Callable[[], R], nothing: R, tolerant: bool) -> R:
        try:
            return read()
        except Damaged as error:
            if tolerant:
                return nothing
            raise Damaged(
                f"{error}: without it nobody can tell what is needed: `horcrux-cli repair` first"
            ) from None

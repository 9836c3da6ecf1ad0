"""Reading many commits: logs, graphs, and what only one version holds.

A commit names its parent, so a history is as many round trips as it has versions. The records of a
branch name most of them at once: where the store is far away, they and the commits they name are
read many at a time. What was read stays in the cache: a commit never changes.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

from ..errors import Damaged, HorcruxError
from ..repository.commits import Commit
from ..repository.index import Index, check_node, table_ids
from ..repository.objects import NULL_ID, Kind, kind_of, object_key
from ..repository.patch import Patch
from ..repository.repository import Repository
from ..volume.cache import Cache
from ..volume.local import LocalObjects

WINDOW = 64  # records read ahead at once
# Seconds for one object, several times in a row: beyond, reading ahead is worth two requests each,
# and what was read is worth a file in the cache, which costs about a millisecond.
FAR = 0.005
SLOW_READS = 3


class Commits:
    """Commits by id, from a volume's own, the cache and the repository. For one thread."""

    def __init__(
        self,
        repository: Repository,
        cache: Cache,
        local: LocalObjects | None = None,
        *,
        keep: bool = False,
    ) -> None:
        """`keep` puts what is read into the cache, also where the store is near."""
        self.repository, self._cache, self._local, self._keep = repository, cache, local, keep
        self._known: dict[bytes, Commit] = {}
        self._ahead: set[bytes] = set()  # read ahead, and not asked for yet
        self._keys: dict[str, Iterator[str]] = {}  # records of a branch that were not read yet
        self._slow = 0  # reads in a row that took their time

    def get(self, oid: bytes, branch: tuple[str, str] | None = None) -> Commit:
        """One commit; `branch` (image and name) is where those before it may be found."""
        self._ahead.discard(oid)
        found = self._known.get(oid) or self._here(oid)
        far = self._slow >= SLOW_READS
        if found is None and branch is not None and far and not self._ahead:
            self._read_ahead(*branch)
            self._ahead.discard(oid)
            found = self._known.get(oid)
        if found is None:
            found, slow = self._fetch(oid)
            self._slow = self._slow + 1 if slow else 0
        self._known[oid] = found
        return found

    def _here(self, oid: bytes) -> Commit | None:
        if self._local is not None:
            return self._local.commit(oid)
        plain = self._cache.read(oid)
        return None if plain is None else Commit.decode(plain)

    def _fetch(self, oid: bytes) -> tuple[Commit, bool]:
        """A commit from the store, and whether that took its time: then it is kept."""
        began = time.monotonic()
        plain = self.repository.read_object(oid, (Kind.COMMIT,))[1]
        slow = time.monotonic() - began > FAR
        if slow or self._keep:
            self._cache.insert(oid, plain, meta=True)
        return Commit.decode(plain), slow

    def _read_ahead(self, image: str, branch: str) -> None:
        refs = self.repository.refs
        keys = self._keys.get(branch)
        if keys is None:
            keys = self._keys[branch] = iter(refs.record_keys(image, branch))
        some = [key for key, _ in zip(keys, range(WINDOW), strict=False)]

        def read(key: str) -> tuple[bytes, Commit] | None:
            try:
                oid = refs.read_record(key).commit
                if oid is None or oid in self._known:
                    return None
                return oid, self._here(oid) or self._fetch(oid)[0]
            except HorcruxError:  # whoever needs it will read it, and see
                return None

        with ThreadPoolExecutor(max(1, self.repository.store.concurrency)) as pool:
            for found in pool.map(read, some):
                if found is not None and found[0] not in self._known:
                    self._known[found[0]] = found[1]
                    self._ahead.add(found[0])

    def line(self, tip: bytes, branch: str | None = None) -> Iterator[tuple[bytes, Commit]]:
        """The commit `tip` and its first parents, newest first, as far as they were kept.

        `branch` is the one that `tip` is on, if any. Raises Damaged for one that is missing.
        """
        oid: bytes | None = tip
        child: bytes | None = None
        where: tuple[str, str] | None = None
        while oid is not None:
            try:
                commit = self.get(oid, where)
            except Damaged:
                image = self._known[child].image if child is not None else None
                if image is not None and self.repository.refs.is_shallow(image, child or b""):
                    return  # what was before it was removed on purpose
                raise
            if branch is not None:
                where = commit.image, branch
            yield oid, commit
            child, oid = oid, commit.parents[0] if commit.parents else None


def in_order(commits: Commits, tips: Iterable[bytes], most: int) -> list[tuple[bytes, Commit]]:
    """All versions from several tips on, each before its parents, newer ones first; at most `most`
    versions are looked at.
    """
    found: dict[bytes, Commit] = {}
    children: dict[bytes, int] = {}
    pending = list(dict.fromkeys(tips))
    heads = set(pending)
    while pending and len(found) < most:
        oid = pending.pop(0)
        if oid in found:
            continue
        try:
            found[oid] = commits.get(oid)
        except Damaged:
            if oid in heads:
                raise
            continue  # a parent that was removed
        for parent in found[oid].parents:
            children[parent] = children.get(parent, 0) + 1
            pending.append(parent)
    ready = [(_newest_first(found[oid]), oid) for oid in found if not children.get(oid)]
    heapq.heapify(ready)
    ordered = []
    while ready:
        _, oid = heapq.heappop(ready)
        ordered.append((oid, found[oid]))
        for parent in found[oid].parents:
            children[parent] -= 1
            if not children[parent] and parent in found:
                heapq.heappush(ready, (_newest_first(found[parent]), parent))
    return ordered


def _newest_first(commit: Commit) -> tuple[int, ...]:
    return tuple(-ord(character) for character in commit.time)


# ---- what a version holds


def only_in(repository: Repository, oid: bytes, others: Mapping[bytes, Commit]) -> tuple[int, int]:
    """(objects, bytes as stored) that version `oid` needs and none of `others` does: what its
    removal would give back, itself included. Reads the index of all of them, equal nodes once.
    """
    commit = repository.read_commit(oid)
    mine = _needs(repository, [commit], set())
    theirs = _needs(
        repository, [made for other, made in others.items() if other != oid], set(), within=mine
    )
    only = (mine - theirs) | {oid}
    with ThreadPoolExecutor(max(1, repository.store.concurrency)) as pool:
        sizes = pool.map(lambda one: repository.store.stat(object_key(one)).size, only)
        return len(only), sum(sizes)


def _needs(
    repository: Repository,
    commits: Iterable[Commit],
    seen: set[bytes],
    within: set[bytes] | None = None,
) -> set[bytes]:
    """Chunks, patches and nodes that versions need; with `within`, only those among these."""
    needed: set[bytes] = set()
    patches: set[tuple[bytes, int]] = set()
    for commit in commits:
        pending = [(commit.index, commit.levels - 1)]
        while pending:
            oid, level = pending.pop()
            if oid == NULL_ID or oid in seen:
                continue
            seen.add(oid)
            needed.add(oid)
            table = check_node(repository.read_object(oid, (Kind.NODE,))[1], level)
            for child in table_ids(table):
                if level:
                    pending.append((child, level - 1))
                else:
                    needed.add(child)
                    if kind_of(child) is Kind.PATCH:
                        patches.add((child, commit.chunk_size))
    # A patch's chain is needed too.
    while patches:
        oid, chunk_size = patches.pop()
        if oid in seen:
            continue
        seen.add(oid)
        plain = repository.read_object(oid, (Kind.PATCH,), chunk_size)[1]
        for part in Patch.decode(plain, chunk_size).chain:
            if part == NULL_ID:
                continue
            needed.add(part)
            if kind_of(part) is Kind.PATCH:
                patches.add((part, chunk_size))
    return needed if within is None else needed & within


def new_in(repository: Repository, commit: Commit, parent: Commit | None) -> tuple[int, int]:
    """(chunks that differ, bytes as stored of their objects) of a version against its parent, for
    one whose writer did not note it.
    """
    index: Index = repository.index(commit)
    if parent is None:
        ids = [new for _, new in index.entries()]
    else:
        ids = [new for _, _, new in repository.index(parent).diff(index)]
    there = {new for new in ids if new != NULL_ID}
    with ThreadPoolExecutor(max(1, repository.store.concurrency)) as pool:
        sizes = pool.map(lambda one: repository.store.stat(object_key(one)).size, there)
        return len(ids), sum(sizes)

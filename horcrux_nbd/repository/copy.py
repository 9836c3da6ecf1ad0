"""Copies of a repository, whole or in part, kept alike: clone and sync.

Only what is missing travels, as it is stored, and each object is proven on its way. The order is
that of every writer (docs/format.md, "Order of writing"): a reader of the copy that sees a ref sees
all below it. Broken off anywhere, the next run sends what is still missing.

A copy goes one way and takes nothing away: versions, tags and records that only the copy has stay.
A branch that moved differently in both is told, and left alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from ..chunkstore.base import ChunkStore
from ..errors import Busy, Damaged, KeyExists, KeyNotFound, UsageError
from ..names import Version, is_name
from ..progress import Progress
from ..units import MiB
from . import profiles
from .commits import DEFAULT_CHUNK, MAX_CHUNK, Commit, now
from .configuration import copy_keys
from .listing import Listing
from .marking import Marking, Roots, Versions, history, read_roots
from .objects import HEADER, Kind, kind_of, object_key
from .records import MAX_RECORD
from .refs import BranchRecord, TagRecord
from .repository import Repository
from .sweeps import Sweeps

MEMORY = 256 * MiB  # of objects under way, stored and plain
BATCH = 4096
_OLD, _NEW = 1, 2  # owners: what the target's refs reach already, and what is to come


@dataclass
class Copied:
    """What a copy did. Bytes as stored."""

    versions: int = 0
    objects: int = 0
    bytes: int = 0
    known_objects: int = 0  # needed by new versions, and there already
    refs: int = 0
    conflicts: list[str] = field(default_factory=list)  # refs that differ in both: left alone


@dataclass
class _Wanted:
    """The refs that are to be there, and the commits that they need."""

    records: dict[tuple[str, str], list[str]] = field(default_factory=dict)  # keys, newest first
    tags: dict[str, bytes] = field(default_factory=dict)  # key: data
    tips: set[bytes] = field(default_factory=set)  # with all before them
    single: set[bytes] = field(default_factory=set)  # without
    narrow: set[tuple[str, str]] = field(default_factory=set)  # records without what is before
    shallow: set[bytes] = field(default_factory=set)


def copy(
    source: Repository,
    store: ChunkStore,
    versions: Sequence[Version | str] = (),
    *,
    author: str = "",
    progress: Progress | None = None,
) -> Copied:
    """Bring the repository `source` to `store`, which is empty or holds a copy of it.

    `versions` are images (all of their history) and single versions (without it); none: everything.
    Raises UsageError where `store` holds another repository; NotFound; Damaged where the source is;
    Busy during a removal; StoreError.
    """
    target = Repository.create(store, source.chunk_size, copy_of=source)
    if target.id != source.id:
        raise UsageError(
            f"{store.url} holds another repository than {source.url}: choose an empty place, or "
            "a copy of this one"
        )
    copy_keys(source, store)
    return _Copy(source, target, author, progress or Progress()).run(versions)


class _Copy:
    def __init__(
        self, source: Repository, target: Repository, author: str, progress: Progress
    ) -> None:
        self._source, self._target = source, target
        self._author, self._progress = author, progress
        self._done = Copied()

    def run(self, versions: Sequence[Version | str]) -> Copied:
        sweeps = Sweeps(self._target.store)  # before the first look at an object
        self._progress.start("reading refs")
        wanted = self._wanted(versions)
        # After the refs: what they reach was stored before them.
        listing, there = Listing.read(self._source.store), Listing.read(self._target.store)
        roots = read_roots(self._target)
        with Marking(self._source, listing, self._progress) as marking:
            commits = marking.read_commits()
            with Marking(self._target, there) as others:
                own = others.read_commits()
            whole = history(own.get, roots.commits, roots.shallow)
            every = self._commits(wanted, commits, whole)
            new = {oid: made for oid, made in every.items() if oid not in whole}
            self._progress.start("reading the index")
            below = {p for made in new.values() for p in made.parents if p in whole}
            marking.mark(_OLD, {oid: whole[oid] for oid in below}, tolerant=True)
            marking.missing.clear()
            marking.mark(_NEW, new)
            lost = [oid for oid in marking.missing if oid not in there]
            if lost:
                raise Damaged(
                    f"object {lost[0].hex()} is missing in {self._source.url} ({len(lost)} in all):"
                    " `horcrux-cli repair` it first"
                )
            self._send(marking, there, new)
        if sweeps.must_look_again():
            raise Busy(
                f"{self._target.url}: a removal came in between: run it again, which sends only "
                "what is missing"
            )
        self._move_refs(wanted, roots, {**whole, **every}, commits)
        self._done.versions = len(new)
        return self._done

    # ---- what is wanted

    def _wanted(self, versions: Sequence[Version | str]) -> _Wanted:
        wanted, refs = _Wanted(), self._source.refs
        for image in [v for v in versions if isinstance(v, str)] if versions else refs.images():
            refs.require_image(image)
            for branch in refs.branches(image):
                wanted.records[image, branch] = refs.record_keys(image, branch)
                head = refs.head(image, branch)
                if head is not None and head.commit is not None:
                    wanted.tips.add(head.commit)
            for name in refs.tags(image):
                tag = refs.tag(image, name)
                if tag is not None:
                    self._want_tag(wanted, image, name, tag)
                    wanted.tips.add(tag.commit)
            wanted.shallow.update(refs.shallow(image))
        for version in versions:
            if isinstance(version, Version):
                self._want_version(wanted, version)
        return wanted

    def _want_tag(self, wanted: _Wanted, image: str, name: str, tag: TagRecord) -> None:
        key = f"refs/{image}/tags/{name}"
        wanted.tags[key] = self._source.refs.encode(key, tag)

    def _want_version(self, wanted: _Wanted, version: Version) -> None:
        refs, image = self._source.refs, version.image
        found = self._source.resolve(version)
        wanted.single.add(found.id)
        named = is_name(version.ref)  # and no `main~2`
        head = refs.head(image, version.ref) if named else None
        if head is not None and head.commit == found.id:
            keys = refs.record_keys(image, version.ref)
            # Older records may be missing in the copy, but none in between. (Keys count down.)
            there = self._target.refs.record_keys(image, version.ref)[:1]
            keys = [key for key in keys if key <= there[0]] if there else keys[:1]
            if (image, version.ref) not in wanted.records:
                wanted.records[image, version.ref] = keys
                wanted.narrow.add((image, version.ref))
            return
        tag = refs.tag(image, version.ref) if named else None
        if tag is None:  # an id, or `main~2`: what keeps it in the copy is a tag of that name
            made = TagRecord(found.id, self._author, now(), f"{version} of {self._source.url}")
            self._want_tag(wanted, image, found.id.hex()[:12], made)
        else:
            self._want_tag(wanted, image, version.ref, tag)

    def _commits(
        self, wanted: _Wanted, commits: Versions, whole: dict[bytes, Commit]
    ) -> dict[bytes, Commit]:
        """The commits that the wanted refs need, parents first."""
        tips = set(wanted.tips)
        # A branch was there once: who looks at the copy between two records finds it whole too.
        for (image, branch), keys in wanted.records.items():
            there = set(self._target.refs.record_keys(image, branch))
            for key in keys if there else ():
                oid = None if key in there else self._source.refs.read_record(key).commit
                if oid is None or oid in whole or not isinstance(commits.get(oid), Commit):
                    continue  # those that were removed since are in no copy
                if (image, branch) in wanted.narrow:
                    wanted.single.add(oid)
                    continue
                with contextlib.suppress(Damaged):
                    history(commits.get, [oid], wanted.shallow)
                    tips.add(oid)
        every = history(commits.get, tips, wanted.shallow)
        for oid in wanted.single:
            every.setdefault(oid, self._source.read_commit(oid))
        return dict(reversed(every.items()))

    # ---- objects

    def _send(self, marking: Marking, there: Listing, new: dict[bytes, Commit]) -> None:
        listing, done = marking.listing, self._done
        steps: dict[int, list[bytes]] = {}
        total = 0
        for at, owner in enumerate(marking.owners):
            if owner != _NEW:
                continue
            oid = listing.id(at)
            known = there.find(oid)
            if known is not None and there.sizes[known] > HEADER.size:
                done.known_objects += 1
                continue
            kind = kind_of(oid)
            if kind is Kind.COMMIT:
                continue
            total += listing.sizes[at]
            steps.setdefault(1 + marking.levels[at] if kind is Kind.NODE else 0, []).append(oid)
        largest = max((made.chunk_size for made in new.values()), default=DEFAULT_CHUNK)
        workers = max(self._source.store.concurrency, self._target.store.concurrency)
        workers = max(2, min(workers, MEMORY // (3 * largest)))
        self._progress.start("copying", total)
        with ThreadPoolExecutor(workers, thread_name_prefix="copy") as pool:
            for step in sorted(steps):
                for at in range(0, len(steps[step]), BATCH):
                    self._batch(pool, steps[step][at : at + BATCH])
                self._target.store.sync()
            for oid in new:
                if oid not in there:
                    self._count(self._one(oid))
            self._target.store.sync()

    def _batch(self, pool: ThreadPoolExecutor, ids: Iterable[bytes]) -> None:
        futures = [pool.submit(self._one, oid) for oid in ids]
        try:
            for future in futures:
                self._count(future.result())
        finally:
            for future in futures:
                future.cancel()

    def _count(self, size: int) -> None:
        self._done.objects += 1
        self._done.bytes += size

    def _one(self, oid: bytes) -> int:
        kind = kind_of(oid)
        assert kind is not None
        data = self._source.read_stored(oid, (kind,), MAX_CHUNK)[2]
        self._target.store.put(object_key(oid), data)
        self._progress.advance(len(data))
        return len(data)

    # ---- refs

    def _move_refs(
        self, wanted: _Wanted, roots: Roots, have: dict[bytes, Commit], commits: Versions
    ) -> None:
        refs, store = self._target.refs, self._target.store
        for oid in [*wanted.single, *wanted.shallow]:
            made = have.get(oid)
            if made is not None and any(parent not in have for parent in made.parents):
                refs.make_shallow(made.image, oid, author=self._author, why="copied without these")
        self._progress.start("copying refs")
        for key, data in wanted.tags.items():
            self._put_tag(key, data)
        for (image, branch), keys in wanted.records.items():
            self._put_records(image, branch, keys)
        for image in {made.image for made in have.values()}:
            self._put_profiles(image, have)
        # What was cut in the copy only has its parents now.
        for oid, where in roots.shallow.items():
            made = have.get(oid)
            if made is None or oid in wanted.shallow or not made.parents:
                continue
            if all(parent in have for parent in made.parents):
                for key in where:
                    store.delete(key)

    def _put_tag(self, key: str, data: bytes) -> None:
        _, image, _, name = key.split("/")
        try:
            self._target.store.put_exclusive(key, data)
        except KeyExists:
            there, mine = self._target.refs.tag(image, name), self._source.refs.tag(image, name)
            if there is not None and mine is not None and there.commit != mine.commit:
                self._done.conflicts.append(f"tag {name} of {image} names another version there")
        else:
            self._done.refs += 1

    def _put_records(self, image: str, branch: str, keys: list[str]) -> None:
        """Records that are missing, by exclusive create of each: who pushes to the copy meanwhile
        wins or loses as against any other writer.
        """
        there = set(self._target.refs.record_keys(image, branch))
        known = [key for key in keys if key in there]
        if any(
            self._record(self._source, key) != self._record(self._target, key) for key in known[:1]
        ):
            self._conflict(image, branch)
            return
        # Their numbers say whether these follow upon those, or are others in their place.
        if there and not known and min(there) <= max(keys, default=""):
            self._conflict(image, branch)
            return
        # Into an empty place the newest goes first: a reader sees it at once. Else the next number.
        missing = [key for key in keys if key not in there]
        for key in missing if not there else reversed(missing):
            try:
                self._target.store.put_exclusive(key, _raw(self._source, key))
            except KeyExists:
                if self._record(self._source, key) != self._record(self._target, key):
                    self._conflict(image, branch)
                    return
            else:
                self._done.refs += 1

    def _put_profiles(self, image: str, have: dict[bytes, Commit]) -> None:
        """Those of versions that the copy has, unless it has one of its own."""
        there = {one.commit for one in profiles.listed(self._target, image)}
        for one in profiles.listed(self._source, image):
            if one.commit in have and one.commit not in there:
                with contextlib.suppress(Damaged, KeyNotFound):  # nothing needs it
                    data = profiles.stored(self._source, one)
                    profiles.prove(self._source, data, one.id)
                    self._target.store.put(one.key, data)
                    self._target.store.sync()
                    self._done.refs += 1

    def _record(self, repository: Repository, key: str) -> BranchRecord:
        return repository.refs.read_record(key)

    def _conflict(self, image: str, branch: str) -> None:
        self._done.conflicts.append(
            f"branch {branch} of {image} was moved in {self._target.url} on its own"
        )


def _raw(repository: Repository, key: str) -> bytes:
    repository.refs.read_record(key)  # proven first
    return repository.store.get(key, 0, MAX_RECORD)

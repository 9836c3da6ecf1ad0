"""Removal of what no ref reaches (docs/format.md, "Removal"): announced, and done a day later.

A run does what is due, applies the rules of retention, and announces what no ref reaches then. So
one run a night is all it takes. Nothing holds a lock: pushes go on, but for the time between an
hour before a removal begins and its end, when they wait.
"""

from __future__ import annotations

import secrets
import time
from array import array
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from blake3 import blake3

from ..errors import Busy, Damaged, KeyNotFound
from ..names import check_name
from ..progress import Progress
from . import profiles
from .commits import Commit
from .leases import MARK, Lease, refuse_others
from .listing import Listing
from .marking import MANY, Marking, Roots, Versions, history, read_roots
from .objects import ID_SIZE, Kind, kind_of, object_key
from .repository import Repository
from .retention import Choice, Rules, apply, choose
from .sweeps import MARGIN, NOTICE, PREFIX, Sweeps, announcement, begins

MAGIC = b"HRCXGC1\n"
_HASH = 32
MOST = 1_000_000  # objects in one announcement: 32 MB; the rest is for the next
BATCH = 512  # objects deleted between two looks at the lease
# Beyond the notice: the announcement has to be there a day before, and putting it takes a moment.
SLACK = 300.0


@dataclass(frozen=True)
class Announced:
    """A removal that was announced: its key, and when it begins (seconds since 1970)."""

    key: str
    begins: float


@dataclass
class VersionSize:
    """One version, why it stays (empty: it goes), and what only it holds; bytes as stored."""

    commit: Commit
    kept: list[str]
    only_objects: int = 0
    only_bytes: int = 0


@dataclass
class Plan:
    """What is needed and what is not, with the rules of retention applied. Bytes as stored."""

    objects: int = 0
    size: int = 0
    unreachable: array[int] = field(default_factory=lambda: array("Q"))  # places in the listing
    unreachable_size: int = 0
    choice: Choice = field(default_factory=Choice)
    versions: dict[bytes, VersionSize] = field(default_factory=dict)  # newest first; if asked for
    listing: Listing = field(default_factory=Listing)
    profiles: list[str] = field(default_factory=list)  # keys of those whose versions go


@dataclass
class Collected:
    """What one run did."""

    plan: Plan
    removed_objects: int = 0
    removed_bytes: int = 0
    announced: Announced | None = None  # by this run, or before and not due yet
    fresh: bool = False  # whether by this run


def announcements(repository: Repository) -> list[Announced]:
    """The removals that were announced and not done, the earliest first."""
    found = []
    for name in repository.store.children(PREFIX):
        begin = begins(name)
        if begin is None:
            continue
        try:
            head = repository.store.get(PREFIX + name, 0, len(MARK))
        except KeyNotFound:
            continue
        if head != MARK:
            found.append(Announced(PREFIX + name, begin))
    return sorted(found, key=lambda one: one.begins)


class Collector:
    """Retention and removal in one repository. `pinned` are commits that stay whatever the rules
    say, and why: versions that volumes lie on. `clock` gives seconds since 1970.
    """

    def __init__(
        self,
        repository: Repository,
        *,
        pinned: Mapping[bytes, str] | None = None,
        author: str = "",
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
        progress: Progress | None = None,
    ) -> None:
        self.repository, self.store = repository, repository.store
        self._pinned = dict(pinned or {})
        self._author, self._clock, self._sleep = author, clock, sleep
        self._progress = progress or Progress()

    # ---- what there is to do

    def plan(self, rules: Rules, image: str | None = None, *, versions: bool = False) -> Plan:
        """What `rules` drop and no ref reaches then. Changes nothing. With `versions`: also what
        only each version holds, which reads the index about twice. Raises Damaged.
        """
        if image is not None:
            self.repository.refs.require_image(check_name("image", image))
        listing = Listing.read(self.store)  # before the refs: what comes after is not for us
        recorded = [
            one
            for name in self.repository.refs.images()
            for one in profiles.listed(self.repository, name)
        ]
        roots = read_roots(self.repository)
        with Marking(self.repository, listing, self._progress) as marking:
            commits = marking.read_commits()
            reached = history(commits.get, roots.commits, roots.shallow)
            choice = choose(roots, reached, rules, image=image, pinned=self._pinned)
            plan = Plan(len(listing), sum(listing.sizes), choice=choice, listing=listing)
            reached_kept = {oid: made for oid, made in reached.items() if oid in choice.kept}
            also = self._also_kept(commits, reached_kept)
            kept = reached_kept | also
            plan.profiles = [one.key for one in recorded if one.commit not in kept]
            self._progress.start("reading the index")
            if not versions:
                marking.mark(1, reached_kept)
                marking.mark(1, also, tolerant=True)
            for number, (oid, made) in enumerate(kept.items() if versions else (), start=1):
                marking.mark(number, {oid: made}, tolerant=oid in also)
            for at, owner in enumerate(marking.owners):
                if owner == 0:
                    plan.unreachable.append(at)
                    plan.unreachable_size += listing.sizes[at]
            if versions:
                self._measure(plan, marking, kept)
        return plan

    def _also_kept(self, commits: Versions, kept: Mapping[bytes, Commit]) -> dict[bytes, Commit]:
        """Versions that volumes of this host lie on and no ref reaches; without those before."""
        found = ((oid, commits.get(oid)) for oid in self._pinned if oid not in kept)
        return {oid: made for oid, made in found if isinstance(made, Commit)}

    def _measure(self, plan: Plan, marking: Marking, kept: Mapping[bytes, Commit]) -> None:
        every = [*kept, *plan.choice.dropped]
        for number, (oid, made) in enumerate(plan.choice.dropped.items(), start=len(kept) + 1):
            marking.mark(number, {oid: made}, tolerant=True)
        sizes = [
            VersionSize(kept.get(oid) or plan.choice.dropped[oid], plan.choice.kept.get(oid, []))
            for oid in every
        ]
        for at, owner in enumerate(marking.owners):
            if 0 < owner < MANY:
                sizes[owner - 1].only_objects += 1
                sizes[owner - 1].only_bytes += plan.listing.sizes[at]
        both = dict(zip(every, sizes, strict=True))
        newest = sorted(both, key=lambda oid: (both[oid].commit.time, oid), reverse=True)
        plan.versions = {oid: both[oid] for oid in newest}

    # ---- doing it

    def run(self, rules: Rules, image: str | None = None, *, grace: bool = True) -> Collected:
        """Remove what is due, apply the rules, announce what no ref reaches then. Without `grace`
        that is removed at once: only where nobody pushes.

        Waits where a removal is due within the hour: pushes wait for it already. Raises Busy
        where another removal is at work; Damaged; StoreError. Any run takes up a broken one.
        """
        removed = self._remove_due()
        sweeps = Sweeps(self.store, self._clock)  # before the refs are read
        plan = self.plan(rules, image)
        if not plan.choice.nothing:
            apply(self.repository, plan.choice, sweeps, author=self._author, why="gc: retention")
        for key in plan.profiles:  # nothing needs one, so nobody is given notice
            self.store.delete(key)
        done = Collected(plan, *removed)
        pending = announcements(self.repository)
        if grace and pending:
            done.announced = pending[0]
        elif plan.unreachable:
            done.announced, done.fresh = self._announce(plan, grace), True
        if not grace:
            objects, size = self._remove(
                [*pending, *([done.announced] if done.fresh and done.announced else [])]
            )
            done.removed_objects += objects
            done.removed_bytes += size
            done.announced = None
        self.store.sweep()
        return done

    def _announce(self, plan: Plan, grace: bool) -> Announced:
        ids = b"".join(plan.listing.id(at) for at in plan.unreachable[:MOST])
        begin = float(int(self._clock() + (NOTICE + SLACK if grace else 0)))
        key = announcement(begin, secrets.token_hex(16))
        self.store.put_exclusive(key, MAGIC + blake3(ids).digest() + ids)
        return Announced(key, begin)

    def withdraw(self) -> int:
        """Take back announcements that are not due within the hour; how many."""
        now = self._clock()
        early = [one for one in announcements(self.repository) if one.begins > now + MARGIN]
        for one in early:
            self.store.delete(one.key)
        return len(early)

    def _remove_due(self) -> tuple[int, int]:
        due = [one for one in announcements(self.repository) if self._is_due(one)]
        if not due:
            # One that died when all was removed has left its lease, for which pushes would wait.
            refuse_others(self.store, "", self._clock)
            return 0, 0
        latest = due[-1].begins
        while (left := latest - self._clock()) > 0:
            self._progress.note(
                f"a removal begins in {left / 60:.0f} minutes: pushes wait for it already, and so "
                "does this"
            )
            self._sleep(left)
        return self._remove(due)

    def _is_due(self, one: Announced) -> bool:
        return one.begins <= self._clock() + MARGIN

    def _condemned(self, due: Iterable[Announced]) -> set[bytes]:
        found: set[bytes] = set()
        for one in due:
            try:
                data = self.store.get(one.key, 0, len(MAGIC) + _HASH + MOST * ID_SIZE + 1)
            except KeyNotFound:
                raise Busy(f"{self.store.url}: somebody else has done this removal") from None
            ids = data[len(MAGIC) + _HASH :]
            if not data.startswith(MAGIC) or data[len(MAGIC) :][:_HASH] != blake3(ids).digest():
                raise Damaged(
                    f"{self.store.url}: {one.key} is damaged: delete it, and run this again"
                )
            found.update(ids[at : at + ID_SIZE] for at in range(0, len(ids), ID_SIZE))
        return found

    def _remove(self, due: list[Announced]) -> tuple[int, int]:
        """Remove what was announced and is still not reached; (objects, bytes as stored)."""
        if not due:
            return 0, 0
        with Lease(self.store, due[0].begins, self._clock) as lease:
            condemned = self._condemned(due)  # after the lease is taken: else it was done already
            listing = Listing.read(self.store)
            roots = read_roots(self.repository)
            with Marking(self.repository, listing, self._progress) as marking:
                commits = marking.read_commits()
                reached = history(commits.get, roots.commits, roots.shallow)
                self._progress.start("reading the index")
                marking.mark(1, reached)
                marking.mark(1, self._also_kept(commits, reached), tolerant=True)
                # A commit that came after the announcement promises what is below it to whoever
                # pushes upon it: it goes with the next removal, or stays.
                young = [oid for oid in commits.listed if oid not in condemned]
                marking.mark(
                    1, history(commits.get, young, roots.shallow, tolerant=True), tolerant=True
                )
                doomed = {
                    listing.id(at): listing.sizes[at]
                    for at, owner in enumerate(marking.owners)
                    if owner == 0 and listing.id(at) in condemned
                }
                self._delete(doomed, commits, roots, marking, lease)
            for one in due:
                self.store.delete(one.key)
        return len(doomed), sum(doomed.values())

    def _delete(
        self,
        doomed: Mapping[bytes, int],
        commits: Versions,
        roots: Roots,
        marking: Marking,
        lease: Lease,
    ) -> None:
        self._progress.start("removing", sum(doomed.values()))

        def delete(oid: bytes) -> None:
            self.store.delete(object_key(oid))
            self._progress.advance(doomed[oid])

        # A commit that is there promises those before it: the newest goes first.
        ordered = history(
            commits.get, (o for o in doomed if kind_of(o) is Kind.COMMIT), (), tolerant=True
        )
        unreadable = [o for o in doomed if kind_of(o) is Kind.COMMIT and o not in ordered]
        for oid in [*unreadable, *(oid for oid in ordered if oid in doomed)]:
            lease.check()
            delete(oid)
            for key in roots.shallow.get(oid, ()):
                self.store.delete(key)
        for step in _steps(doomed, self.repository, marking):
            for at in range(0, len(step), BATCH):
                lease.check()
                for _ in marking.each(delete, step[at : at + BATCH]):
                    pass


def _steps(
    doomed: Mapping[bytes, int], repository: Repository, marking: Marking
) -> Iterable[list[bytes]]:
    """Nodes from the root down, then patches and chunks."""

    def level(oid: bytes) -> int:
        try:
            return repository.read_object(oid, (Kind.NODE,))[1][0]
        except Damaged:  # it promises nothing to anybody: when does not matter
            return -1

    nodes = [oid for oid in doomed if kind_of(oid) is Kind.NODE]
    by_level: dict[int, list[bytes]] = {}
    for oid, at in zip(nodes, marking.each(level, nodes), strict=True):
        by_level.setdefault(at, []).append(oid)
    for at in sorted(by_level, reverse=True):
        yield by_level[at]
    yield [oid for oid in doomed if kind_of(oid) is Kind.PATCH]
    yield [oid for oid in doomed if kind_of(oid) is Kind.CHUNK]

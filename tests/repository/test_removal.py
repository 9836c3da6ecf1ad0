"""Removal: what no ref reaches goes after a day's notice, and nothing else ever does."""

from __future__ import annotations

import contextlib
import os
import random
import threading
from unittest.mock import patch

import pytest

from horcrux_nbd.errors import Busy, Damaged, StoreUnavailable
from horcrux_nbd.repository import leases, sweeps
from horcrux_nbd.repository.leases import Lease
from horcrux_nbd.repository.objects import Kind, key_id, kind_of, object_key
from horcrux_nbd.repository.refs import Refs
from horcrux_nbd.repository.removal import Collector
from horcrux_nbd.repository.repository import Repository
from horcrux_nbd.repository.retention import Rules
from horcrux_nbd.repository.sweeps import NOTICE, Sweeps
from horcrux_nbd.repository.verify import verify
from horcrux_nbd.repository.writer import ObjectWriter

from .images import CHUNK, block, content, make_commit, make_patch, repository_in
from .memory_store import MemoryStore

HOUR = 3600.0
ALL = Rules()


class Clock:
    """The time of day for everything in this process that asks `sweeps`, and for collectors."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0
        self.lock = threading.RLock()  # held by whoever must not take long: nobody jumps

    def time(self) -> float:
        return self.now

    def jump(self, seconds: float) -> None:
        with self.lock:
            self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(sweeps, "time", clock)
    monkeypatch.setattr(Sweeps.__init__, "__defaults__", (clock.time,))
    return clock


def collector(repository: Repository, clock: Clock, **more: object) -> Collector:
    return Collector(repository, clock=clock.time, sleep=clock.jump, **more)  # type: ignore[arg-type]


def objects(store: MemoryStore) -> set[str]:
    return {key for key in {**store.objects, **store.pending} if key_id(key)}


def left_by_a_broken_push(repository: Repository, seed: str) -> str:
    with ObjectWriter(repository) as writer:
        oid = writer.write(Kind.CHUNK, content(seed))
        writer.barrier()
    return object_key(oid)


def test_announced_then_removed(clock: Clock) -> None:
    store = MemoryStore()
    repository = repository_in(store)
    make_commit(repository, {0: content("a"), 700: content("b")})
    sound = objects(store)
    junk = left_by_a_broken_push(repository, "junk")
    size = len(store.objects[junk])

    first = collector(repository, clock).run(ALL)
    assert (first.removed_objects, first.fresh) == (0, True)
    assert list(first.plan.unreachable)
    assert first.plan.unreachable_size == size
    assert first.announced is not None
    assert first.announced.begins >= clock.now + NOTICE
    assert junk in objects(store)

    clock.jump(2 * HOUR)  # too early, and one announcement at a time is enough
    again = collector(repository, clock).run(ALL)
    assert (again.removed_objects, again.fresh) == (0, False)
    assert again.announced == first.announced

    clock.jump(NOTICE)
    done = collector(repository, clock).run(ALL)
    assert (done.removed_objects, done.removed_bytes, done.announced) == (1, size, None)
    assert objects(store) == sound
    assert store.children("gc/") == []
    assert verify(store, data=True).ok


def test_a_run_at_the_same_time_each_night_waits_the_minutes(clock: Clock) -> None:
    store = MemoryStore()
    repository = repository_in(store)
    junk = left_by_a_broken_push(repository, "junk")
    collector(repository, clock).run(ALL)
    clock.jump(NOTICE)
    with pytest.raises(Busy):  # pushes wait as well
        make_commit(repository, {0: content("a")})
    collector(repository, clock).run(ALL)
    assert junk not in objects(store)


def test_what_a_ref_reaches_meanwhile_stays(clock: Clock) -> None:
    store = MemoryStore()
    repository = repository_in(store)
    junk = left_by_a_broken_push(repository, "a")
    collector(repository, clock).run(ALL)
    clock.jump(HOUR)
    make_commit(repository, {0: content("a")})
    clock.jump(NOTICE)
    assert collector(repository, clock).run(ALL).removed_objects == 0
    assert junk in objects(store)
    assert verify(store, data=True).ok


def test_a_commit_that_is_there_keeps_what_it_promises(clock: Clock) -> None:
    """Pushed after the announcement, then reset away: who lies on it may still push."""
    store = MemoryStore()
    repository = repository_in(store)
    base = make_commit(repository, {1: content("base")})
    junk = left_by_a_broken_push(repository, "a")
    collector(repository, clock).run(ALL)
    clock.jump(HOUR)
    lost = make_commit(repository, {0: content("a")})
    repository.refs.move("A", "main", base, lost, author="", why="reset")
    clock.jump(NOTICE)
    assert collector(repository, clock).run(ALL).removed_objects == 0
    assert {junk, object_key(lost)} <= objects(store)
    clock.jump(NOTICE + HOUR)
    collector(repository, clock).run(ALL)
    assert not {junk, object_key(lost)} & objects(store)
    assert verify(store, data=True).ok


def test_patches_keep_their_chains(clock: Clock) -> None:
    store = MemoryStore()
    repository = repository_in(store)
    base = repository.write_object(Kind.CHUNK, content("base"))
    one = make_patch(repository, (base,), {0: block("1")})
    two = make_patch(repository, (one,), {1: block("2")})
    make_commit(repository, {0: two})
    assert not collector(repository, clock).plan(ALL).unreachable


def test_commits_go_first_and_the_newest_of_them_first(clock: Clock) -> None:
    store = MemoryStore()
    repository = repository_in(store)
    line = [
        make_commit(repository, {n * 300: content(f"{n}")}, size=90_000 << 16) for n in range(4)
    ]
    repository.refs.move("A", "main", None, line[-1], author="", why="gone")
    collector(repository, clock).run(ALL, grace=False)
    gone = [key_id(key) for what, key in store.calls if what == "delete" and key_id(key)]
    kinds = [kind_of(oid) for oid in gone if oid]
    assert gone[:4] == line[::-1]
    assert kinds == sorted(kinds, key=lambda kind: -int(kind or 0))
    assert not objects(store)


def test_no_grace_removes_at_once_also_what_was_announced(clock: Clock) -> None:
    store = MemoryStore()
    repository = repository_in(store)
    left_by_a_broken_push(repository, "one")
    collector(repository, clock).run(ALL)
    left_by_a_broken_push(repository, "two")
    done = collector(repository, clock).run(ALL, grace=False)
    assert done.removed_objects == 2
    assert done.announced is None
    assert store.children("gc/") == []


def test_withdraw(clock: Clock) -> None:
    store = MemoryStore()
    repository = repository_in(store)
    left_by_a_broken_push(repository, "one")
    collector(repository, clock).run(ALL)
    assert collector(repository, clock).withdraw() == 1
    collector(repository, clock).run(ALL)
    clock.jump(NOTICE - HOUR / 2)  # writers rely on its end already
    assert collector(repository, clock).withdraw() == 0


def test_damage_stops_it(clock: Clock) -> None:
    store = MemoryStore()
    repository = repository_in(store)
    oid = make_commit(repository, {0: content("a"), 300: content("b")}, size=1000 << 16)
    left_by_a_broken_push(repository, "one")
    collector(repository, clock).run(ALL)
    before = objects(store)
    node = object_key(repository.read_commit(oid).index)
    for key in (node, object_key(oid), next(k for k in store.objects if "/heads/" in k)):
        sound = store.objects[key]
        for bad in (b"damaged", None):
            if bad is None and "/heads/" in key:
                continue
            store.objects.pop(key) if bad is None else store.objects.update({key: bad})
            clock.jump(2 * NOTICE)
            with pytest.raises(Damaged):
                collector(repository, clock).run(ALL)
            store.objects[key] = sound
            assert objects(store) == before
    assert collector(repository, clock).run(ALL).removed_objects == 1


def test_a_damaged_announcement_removes_nothing(clock: Clock) -> None:
    store = MemoryStore()
    repository = repository_in(store)
    junk = left_by_a_broken_push(repository, "one")
    done = collector(repository, clock).run(ALL).announced
    assert done is not None
    store.objects[done.key] = store.objects[done.key][:-1]
    clock.jump(2 * NOTICE)
    with pytest.raises(Damaged, match=r"gc/.*delete it"):
        collector(repository, clock).run(ALL)
    assert junk in objects(store)


class Breaks(MemoryStore):
    """Fails from the n-th deletion on."""

    left = -1

    def delete(self, key: str) -> None:
        if self.left == 0:
            raise StoreUnavailable("it went away")
        self.left -= 1
        super().delete(key)


def test_broken_off_anywhere_it_is_finished_by_the_next(clock: Clock) -> None:
    for broken in range(60):
        store = Breaks()
        repository = repository_in(store)
        base = make_commit(repository, {0: content("a")})
        for n in range(3):
            make_commit(repository, {n * 300: content(f"{n}")}, size=90_000 << 16, branch="other")
        head = repository.refs.head("A", "other")
        assert head is not None
        repository.refs.move("A", "other", None, head.commit, author="", why="gone")
        collector(repository, clock).run(ALL)
        clock.jump(NOTICE + HOUR)
        store.left = broken
        try:
            collector(repository, clock).run(ALL)
        except StoreUnavailable:
            store.left = -1
            with pytest.raises(Busy):  # nobody makes a ref in between
                repository.refs.make_tag("A", "v", base, author="", message="")
            assert verify(store, data=True).ok
            # The lease of a process that lives on is its own; here it is as if it had died.
            with patch.object(leases, "_is_stale", return_value=True):
                collector(repository, clock).run(ALL)
        else:
            assert broken > 5
            break
        assert store.children("gc/") == []
        assert len(objects(store)) == 3
        assert verify(store, data=True).ok


# ---- one at a time


def test_two_removers(clock: Clock) -> None:
    store = MemoryStore()
    with Lease(store, clock.now, clock.time):
        with pytest.raises(Busy, match=f"process {os.getpid()} "), Lease(store, 0, clock.time):
            pass
        assert len(store.children("gc/")) == 1
        with pytest.raises(Busy):
            sweeps.refuse_during_removal(store, clock.now)
    assert store.children("gc/") == []


def test_leases_of_the_dead(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore()
    Lease(store, clock.now, clock.time).__enter__()
    monkeypatch.setattr(os, "kill", _no_such_process)
    with Lease(store, clock.now, clock.time):
        pass
    assert store.children("gc/") == []
    Lease(store, clock.now, clock.time).__enter__()
    monkeypatch.setattr(leases, "_boot", lambda: "another host")
    with pytest.raises(Busy), Lease(store, clock.now, clock.time):
        pass
    clock.jump(leases.STALE + 1)
    with Lease(store, clock.now, clock.time):
        pass


def _no_such_process(pid: int, number: int) -> None:
    raise ProcessLookupError


def test_a_lease_is_renewed_and_given_up(clock: Clock) -> None:
    store = MemoryStore()
    with Lease(store, clock.now, clock.time) as lease:
        before = store.children("gc/")
        lease.check()
        assert store.children("gc/") == before
        clock.jump(leases.RENEW + 1)
        lease.check()
        assert len(store.children("gc/")) == 1
        assert store.children("gc/") != before
        clock.jump(leases.GIVE_UP + 1)
        with pytest.raises(Busy, match="stood still"):
            lease.check()


# ---- while others push


class Writers:
    """Pushes that use the same few chunks again and again, and branches that come and go."""

    def __init__(self, store: MemoryStore, clock: Clock, seed: int) -> None:
        self.repository = Repository.open(store)
        self.clock, self.rng = clock, random.Random(seed)
        self.pushed = self.refused = 0

    def run(self, name: str, rounds: int) -> None:
        rng = self.rng
        for _ in range(rounds):
            chunks = {
                rng.randrange(4): content(f"{rng.randrange(6)}") for _ in range(rng.randrange(1, 4))
            }
            try:
                make_commit(self.repository, chunks, branch=name, size=4 << 16)
                self.pushed += 1
                if rng.random() < 0.5:
                    head = self.repository.refs.head("A", name)
                    assert head is not None
                    self.repository.refs.move("A", name, None, head.commit, author="", why="")
            except Busy:
                self.refused += 1


def test_removal_while_others_push(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hours pass between any two steps of anybody, but not between a writer's last look and its
    ref: what the rules allow for. After each round all that refs reach is there.
    """
    real_confirm, real_write = ObjectWriter.confirm, ObjectWriter.write

    def confirm(self: ObjectWriter) -> None:
        clock.lock.acquire()  # until its ref is made: that takes less than an hour
        try:
            real_confirm(self)
        except BaseException:
            clock.lock.release()
            raise

    real_move = Refs.move

    def move(self: Refs, image: str, branch: str, commit: bytes | None, *args, **kw):  # type: ignore[no-untyped-def]
        try:
            return real_move(self, image, branch, commit, *args, **kw)
        finally:
            if commit is not None:
                clock.lock.release()

    rng = random.Random(1)
    removed = 0

    def collect(repository: Repository) -> None:
        nonlocal removed
        with contextlib.suppress(Busy):
            removed += collector(repository, clock).run(ALL).removed_objects

    def write(self: ObjectWriter, *args, **kw):  # type: ignore[no-untyped-def]
        """A writer that slept for hours or days; somebody on another host was awake."""
        if rng.random() < 0.05:
            for _ in range(rng.randrange(3)):
                clock.jump(rng.choice([0.1, 1, 24, 26]) * HOUR)
                collect(Repository(self.repository.store, "", CHUNK))
        return real_write(self, *args, **kw)

    monkeypatch.setattr(ObjectWriter, "confirm", confirm)
    monkeypatch.setattr(ObjectWriter, "write", write)
    monkeypatch.setattr(Refs, "move", move)
    pushed = refused = 0
    for seed in range(200):
        store = MemoryStore()
        repository = repository_in(store)
        writers = [Writers(store, clock, seed * 10 + n) for n in range(2)]
        threads = [
            threading.Thread(target=writer.run, args=(f"b{n}", 4))
            for n, writer in enumerate(writers)
        ]
        errors: list[BaseException] = []

        def nightly(repository: Repository = repository, errors: list = errors) -> None:  # type: ignore[type-arg]
            try:
                for _ in range(4):
                    collect(repository)
                    clock.jump(rng.choice([1, 12, 25]) * HOUR)
            except BaseException as error:
                errors.append(error)

        threads.append(threading.Thread(target=nightly))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        assert not errors, errors
        pushed += sum(writer.pushed for writer in writers)
        refused += sum(writer.refused for writer in writers)
        report = verify(store, data=True)  # also what a writer's thread hid
        assert report.ok, (seed, report.problems[:3])
    assert min(pushed / 300, removed / 100, refused / 10) > 1, (pushed, removed, refused)

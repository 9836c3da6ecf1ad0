"""Copies: whole or in part, only what is missing, never a ref before what it reaches."""

from __future__ import annotations

from pathlib import Path

import pytest

from horcrux_nbd.chunkstore import ChunkStore, open_store
from horcrux_nbd.errors import Damaged, NotFound, StoreUnavailable, UsageError
from horcrux_nbd.names import Version, parse_version
from horcrux_nbd.repository import profiles
from horcrux_nbd.repository.copy import Copied, copy
from horcrux_nbd.repository.objects import Kind, key_id, object_key
from horcrux_nbd.repository.profiles import Profile
from horcrux_nbd.repository.removal import Collector
from horcrux_nbd.repository.repository import Repository
from horcrux_nbd.repository.retention import Rules
from horcrux_nbd.repository.verify import verify

from ..servers.fixtures import moto_server, s3, ssh, sshd_server
from ..servers.moto_s3 import S3Server
from ..servers.sshd import Sshd
from .images import CHUNK, block, content, make_commit, make_patch, repository_in
from .memory_store import MemoryStore

__all__ = ["moto_server", "s3", "ssh", "sshd_server"]


def fill(store: ChunkStore) -> Repository:
    """Two images; a history of three, one with a patch; a tag; a branch that was deleted."""
    repository = repository_in(store)
    base = repository.write_object(Kind.CHUNK, content("base"))
    patch = make_patch(repository, (base,), {0: block("1")})
    wide = {n * 300: content(f"w{n}") for n in range(3)}
    line = [
        make_commit(repository, {**wide, 1: base}, size=1000 << 16),
        make_commit(repository, {**wide, 1: patch}, size=1000 << 16),
        make_commit(repository, {**wide, 1: content("c")}, size=1000 << 16),
    ]
    make_commit(repository, {0: content("b")}, image="B")
    repository.refs.make_tag("A", "v1", line[1], author="", message="")
    repository.refs.move("A", "gone", line[0], None, author="", why="")
    repository.refs.move("A", "gone", None, line[0], author="", why="")
    profiles.save(repository, "A", line[1], Profile(CHUNK, (1, 300, 0)))
    return repository


def keys(store: ChunkStore) -> set[str]:
    return {entry.key for entry in store.list()}


def same(one: ChunkStore, other: ChunkStore) -> bool:
    return {e.key: one.get(e.key) for e in one.list()} == {
        e.key: other.get(e.key) for e in other.list()
    }


@pytest.fixture
def source() -> Repository:
    return fill(MemoryStore())


def sync(source: Repository, store: ChunkStore, *versions: str) -> Copied:
    wanted = [parse_version(text) if "@" in text else text for text in versions]
    done = copy(source, store, wanted, author="T")
    report = verify(store, data=True)
    assert report.ok, report.problems
    return done


def test_a_whole_copy_and_only_what_is_new(source: Repository) -> None:
    store = MemoryStore()
    done = sync(source, store)
    assert same(source.store, store)
    assert (done.versions, done.known_objects, done.conflicts) == (4, 0, [])
    assert done.objects == sum(1 for key in store.objects if key_id(key))
    assert Repository.open(store).id == source.id

    assert sync(source, store) == Copied()
    make_commit(source, {1: content("new")}, size=1000 << 16)
    done = sync(source, store)
    assert (done.versions, done.objects, done.refs) == (1, 4, 1)  # chunk, leaf, root, commit
    assert same(source.store, store)


def test_order(source: Repository) -> None:
    """Whatever moment a reader looks at, what refs reach is there."""
    store = MemoryStore()
    copy(source, store)
    steps = []
    for what, key in store.calls:
        oid = key_id(key)
        if key.startswith("probe/"):
            continue
        step = "ref" if oid is None else Kind(oid[-1] & 15).name.replace("PATCH", "CHUNK")
        steps.append("sync" if what == "sync" else step)
    once = [step for step, before in zip(steps, ["", *steps], strict=False) if step != before]
    # The configuration; leaves and what is above them; all of a step durable before the next; and a
    # profile after all refs.
    assert " ".join(once) == "ref CHUNK sync NODE sync NODE sync COMMIT sync ref sync"


class Breaks(MemoryStore):
    left = -1

    def _use(self) -> None:
        if self.left == 0:
            raise StoreUnavailable("it went away")
        self.left -= 1

    def put(self, key: str, data: bytes) -> None:
        self._use()
        super().put(key, data)

    def put_exclusive(self, key: str, data: bytes) -> None:
        self._use()
        super().put_exclusive(key, data)


def test_broken_off_anywhere_it_goes_on(source: Repository) -> None:
    for broken in range(2, 99):
        store = Breaks()
        store.left = broken
        try:
            copy(source, store)
        except StoreUnavailable:
            store.pending.clear()  # and the power went as well
            store.left = -1
            before = len(keys(store))
            if any(key.startswith("refs/") for key in keys(store)):
                assert all("is missing" in p.what for p in verify(store, data=True).problems)
            done = sync(source, store)
            assert done.objects + done.refs == len(keys(store)) - before - (before == 0)
            assert same(source.store, store)
        else:
            assert broken > 15
            return


def test_one_image(source: Repository) -> None:
    store = MemoryStore()
    sync(source, store, "B")
    assert Repository.open(store).refs.images() == ["B"]
    with pytest.raises(NotFound, match="'C'"):
        sync(source, store, "C")
    sync(source, store)
    assert same(source.store, store)


def test_single_versions_come_without_those_before(source: Repository) -> None:
    store = MemoryStore()
    sync(source, store, "A@main", "A@v1")
    copied = Repository.open(store)
    head, tag = (source.resolve(Version("A", ref)) for ref in ("main", "v1"))
    assert copied.resolve(Version("A")).id == head.id
    assert copied.resolve(Version("A", "v1")).id == tag.id
    assert not store.exists(object_key(source.resolve(Version("A", "main~2")).id))
    with pytest.raises(NotFound, match="was removed"):
        copied.resolve(Version("A", "main~2"))
    assert not Collector(copied).plan(Rules()).unreachable

    make_commit(source, {1: content("next")}, size=1000 << 16)
    make_commit(source, {1: content("after")}, size=1000 << 16)
    done = sync(source, store, "A@main")
    assert done.versions == 2  # a branch has no gaps
    assert not store.exists(object_key(source.resolve(Version("A", "main~4")).id))

    sync(source, store)  # and all of it afterwards
    assert copied.resolve(Version("A", "main~4")).id
    assert copied.refs.shallow("A") == []
    assert not Collector(copied).plan(Rules()).unreachable
    assert same(source.store, store)


def test_a_version_without_a_name_gets_one(source: Repository) -> None:
    store = MemoryStore()
    oid = source.resolve(Version("A", "main~2")).id
    sync(source, store, "A@main~2")
    assert Repository.open(store).refs.tags("A") == [oid.hex()[:12]]
    assert sync(source, store, "A@main~2").objects == 0


def test_after_retention(source: Repository) -> None:
    """What the source dropped is not in a new copy, and stays in one that has it."""
    old = MemoryStore()
    sync(source, old)
    before = keys(old)
    Collector(source).run(Rules(last=1, tags=False), grace=False)
    new = MemoryStore()
    sync(source, new)
    assert keys(new) == keys(source.store)
    sync(source, old)
    assert keys(old) == before


def test_a_branch_that_went_its_own_way(source: Repository) -> None:
    store = MemoryStore()
    sync(source, store)
    copied = Repository.open(store)
    ours = make_commit(copied, {1: content("there")}, size=1000 << 16)
    assert sync(source, store).conflicts == []  # ahead of the source: nothing to do
    make_commit(source, {1: content("here")}, size=1000 << 16)
    make_commit(source, {0: content("b2")}, image="B")
    done = sync(source, store)
    assert ["branch main of A" in line for line in done.conflicts] == [True]
    assert copied.resolve(Version("A")).id == ours
    assert copied.resolve(Version("B")).id == source.resolve(Version("B")).id


def test_it_refuses(source: Repository) -> None:
    other = MemoryStore()
    fill(other)
    before = dict(other.objects)
    with pytest.raises(UsageError, match="another repository"):
        copy(source, other)
    assert other.objects == before


def test_damage_does_not_travel(source: Repository) -> None:
    memory = source.store
    assert isinstance(memory, MemoryStore)
    for key in [key for key in memory.objects if key_id(key)]:
        sound = memory.objects[key]
        for bad in (sound[:-1] + bytes([sound[-1] ^ 1]), None):
            memory.objects.pop(key) if bad is None else memory.objects.update({key: bad})
            store = MemoryStore()
            with pytest.raises(Damaged, match=key[-64:]):
                copy(source, store)
            assert not [k for k in keys(store) if k.startswith("refs/")]
            assert all(store.get(k) != bad for k in keys(store))
            memory.objects[key] = sound


def test_between_real_stores(tmp_path: Path, ssh: Sshd, s3: S3Server) -> None:
    with open_store(f"cp://{tmp_path}/from", create=True) as first:
        source = fill(first)
        for url in (f"cp://{tmp_path}/to", ssh.url(tmp_path / "ssh"), s3.url(s3.make_bucket())):
            with open_store(url, create=True) as store:
                sync(source, store)
                assert same(first, store)

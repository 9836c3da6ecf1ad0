"""Reading many commits at once, their order, and what only one version holds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from horcrux_nbd.chunkstore import open_store
from horcrux_nbd.chunkstore.base import ChunkStore
from horcrux_nbd.chunkstore.wrapper import WrapperStore
from horcrux_nbd.errors import Damaged
from horcrux_nbd.names import Version
from horcrux_nbd.repository.commits import Commit
from horcrux_nbd.repository.objects import Kind, object_key
from horcrux_nbd.repository.repository import Repository
from horcrux_nbd.units import KiB
from horcrux_nbd.versions.history import WINDOW, Commits, in_order, new_in, only_in
from horcrux_nbd.volume.cache import Cache
from tests.versions.support import BLOCK, Disk, small_repository
from tests.volume.support import IMAGE, noise

CHUNK = 64 * KiB


class Slow(WrapperStore):
    """A store that is far away, and counts."""

    delay = 0.006
    concurrency = 16

    def __init__(self, store: ChunkStore) -> None:
        super().__init__(store)
        self.gets: list[str] = []

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        self.gets.append(key)
        time.sleep(self.delay)
        return self.store.get(key, offset, length)


def history(url: str, count: int, every: int = 1) -> list[bytes]:
    """`count` versions on top of main without changes; `every` so many are one push."""
    with open_store(url) as store:
        repository = Repository.open(store)
        head = repository.resolve(Version(IMAGE))
        made, tip, ids = head.commit, head.id, [head.id]
        for number in range(1, count + 1):
            made = replace(made, parents=(tip,), message=f"number {number}")
            tip = repository.write_object(Kind.COMMIT, made.encode())
            ids.append(tip)
            if number % every == 0:
                repository.refs.move(IMAGE, "main", tip, ids[-1 - every], author="a", why="p")
    return ids


@pytest.fixture
def url(tmp_path: Path) -> str:
    return small_repository(tmp_path / "repo")


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    cache = Cache(tmp_path / "cache")
    yield cache
    cache.close()


@pytest.mark.parametrize("every", [1, 5])
def test_a_far_store_is_read_ahead(url: str, cache: Cache, every: int) -> None:
    ids = history(url, 200, every)
    with open_store(url) as store:
        slow = Slow(store)
        commits = Commits(Repository.open(slow), cache)
        slow.gets.clear()
        began = time.monotonic()
        found = list(commits.line(ids[-1], "main"))
        took = time.monotonic() - began
        assert [oid for oid, _ in found] == ids[::-1]
        # Each commit once, and each record at most once.
        assert len(slow.gets) == len(set(slow.gets)) <= 201 + 200 // every + 1
        if every == 1:
            assert took < 201 * Slow.delay
        # The second time nothing is asked at all.
        slow.gets.clear()
        again = Commits(Repository(slow, "", CHUNK), cache)
        assert list(again.line(ids[-1], "main")) == found
        assert slow.gets == []


def test_a_few_versions_do_not_read_the_whole_branch(url: str, cache: Cache) -> None:
    ids = history(url, 150)
    with open_store(url) as store:
        slow = Slow(store)
        commits = Commits(Repository(slow, "", CHUNK), cache)
        for _, (oid, _) in zip(range(10), commits.line(ids[-1], "main"), strict=False):
            assert oid in ids
        assert len(slow.gets) <= 2 * WINDOW + 3


def test_what_was_removed_on_purpose_ends_the_line(url: str, cache: Cache) -> None:
    ids = history(url, 3)
    root = Path(url.removeprefix("cp://"))
    (root / object_key(ids[1])).unlink()
    with open_store(url) as store:
        repository = Repository.open(store)
        with pytest.raises(Damaged, match=ids[1].hex()):
            list(Commits(repository, cache).line(ids[-1]))
        store.put(f"refs/{IMAGE}/shallow/{ids[2].hex()}", b"x")
        found = [oid for oid, _ in Commits(repository, cache).line(ids[-1])]
    assert found == [ids[3], ids[2]]


def test_order(url: str, cache: Cache) -> None:
    """Each before its parents, whatever the clocks of their writers said."""
    ids = history(url, 2)
    with open_store(url) as store:
        repository = Repository.open(store)
        base = repository.read_commit(ids[0])

        def child(parent: bytes, when: str) -> bytes:
            made = replace(base, parents=(parent,), time=when, message=when)
            return repository.write_object(Kind.COMMIT, made.encode())

        late = child(ids[0], "2030-01-01T00:00:00Z")
        early = child(late, "2001-01-01T00:00:00Z")
        found = [oid for oid, _ in in_order(Commits(repository, cache), [ids[2], early], 100)]
    assert sorted(found) == sorted([*ids, late, early])
    assert found.index(early) < found.index(late) < found.index(ids[0])
    assert found.index(ids[2]) < found.index(ids[1])
    assert found[-1] == ids[0]


def test_what_only_one_version_holds(url: str) -> None:
    disk = Disk("v", url)
    commits: list[Commit] = []
    for number, data in enumerate((noise(BLOCK, 1), noise(BLOCK, 2), noise(BLOCK, 1))):
        disk.write((CHUNK, data), (2 * CHUNK + number * BLOCK, noise(BLOCK, number)))
        commits.append(disk.commit(f"{number}").commit)
    disk.push()
    with open_store(url) as store:
        repository = Repository.open(store)
        everything = {
            oid: repository.read_commit(oid)
            for oid in (repository.resolve(Version(IMAGE, f"main~{back}")).id for back in range(4))
        }
        sizes = {entry.key: entry.size for entry in store.list("objects/")}
        for oid, commit in everything.items():
            only = only_in(repository, oid, everything)
            # As a removal finds it: what is reached by all, without what is reached by the others.
            alone = set(sizes) - _reached(
                repository, [one for other, one in everything.items() if other != oid]
            )
            alone -= {object_key(other) for other in everything if other != oid}
            alone -= {key for key in sizes if key not in _reached(repository, [commit])} - {
                object_key(oid)
            }
            assert only == (len(alone), sum(sizes[key] for key in alone))
        # The middle one has a page that no other has, its index node, and itself at least.
        middle = repository.resolve(Version(IMAGE, "main~1")).id
        assert only_in(repository, middle, everything)[0] >= 3


def _reached(repository: Repository, commits: list[Commit]) -> set[str]:
    """The slow and simple way."""
    from horcrux_nbd.repository.patch import Patch

    found = set()
    for commit in commits:
        index = repository.index(commit)
        found.update(object_key(oid) for oid in index.nodes())
        pending = [oid for _, oid in index.entries()]
        while pending:
            oid = pending.pop()
            if oid == bytes(32):
                continue
            found.add(object_key(oid))
            if oid[-1] & 15 == Kind.PATCH:
                plain = repository.read_object(oid, (Kind.PATCH,), commit.chunk_size)[1]
                pending += Patch.decode(plain, commit.chunk_size).chain
    return found


def test_what_is_new(url: str) -> None:
    disk = Disk("v", url)
    disk.write((CHUNK, noise(BLOCK, 1)), (3 * CHUNK, noise(BLOCK, 2)))
    made = disk.commit()
    disk.push()
    with open_store(url) as store:
        repository = Repository.open(store)
        parent = repository.read_commit(made.commit.parents[0])
        chunks, size = new_in(repository, made.commit, parent)
        assert chunks == 2
        # Its writer counted the index node, too.
        assert size < made.commit.new["bytes"] < size + 9 * KiB
        assert new_in(repository, parent, None)[0] == 8

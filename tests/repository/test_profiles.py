"""Profiles: kept with their version, found from later ones, gone with it, and never trusted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from horcrux_nbd.errors import Damaged
from horcrux_nbd.repository import profiles
from horcrux_nbd.repository.objects import MAX_PROFILE, Kind, object_id
from horcrux_nbd.repository.profiles import HEADER, MOST_CHUNKS, MOST_RUNS, RUN, Profile
from horcrux_nbd.repository.removal import Collector
from horcrux_nbd.repository.repository import Repository
from horcrux_nbd.repository.retention import Rules

from .images import CHUNK, content, make_commit, repository_in
from .memory_store import MemoryStore


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def repository(store: MemoryStore) -> Repository:
    return repository_in(store)


def keys(repository: Repository) -> list[str]:
    return [one.key for one in profiles.listed(repository, "A")]


@given(st.lists(st.integers(0, 2**48 - 1), unique=True, max_size=200))
def test_the_order_survives(chunks: list[int]) -> None:
    plain = Profile(CHUNK, tuple(chunks)).encode()
    assert Profile.decode(plain) == Profile(CHUNK, tuple(chunks))


def test_long_runs_and_too_many() -> None:
    long = Profile(CHUNK, (5, *range(100_000, 300_000)))
    plain = long.encode()
    assert len(plain) < 60
    assert Profile.decode(plain) == long
    scattered = Profile(CHUNK, tuple(range(0, 4 * MOST_RUNS, 2)))
    assert len(scattered.encode()) == MAX_PROFILE
    assert Profile.decode(scattered.encode()).chunks == scattered.chunks[:MOST_RUNS]


@given(st.binary(max_size=64))
def test_what_is_no_profile(data: bytes) -> None:
    try:
        found = Profile.decode(data)
    except Damaged:
        return
    assert found.encode()[1:2] == data[1:2]


def test_a_damaged_size_is_damage() -> None:
    plain = bytearray(Profile(CHUNK, (1,)).encode())
    plain[1] = 200
    with pytest.raises(Damaged):
        Profile.decode(bytes(plain))


def test_later_versions_use_it_until_they_have_their_own(repository: Repository) -> None:
    line = [make_commit(repository, {0: content(f"{n}")}) for n in range(3)]
    assert profiles.find(repository, "A", line[2], repository.read_commit) is None
    profiles.save(repository, "A", line[0], Profile(CHUNK, (3, 1)))
    assert profiles.find(repository, "A", line[2], repository.read_commit) == (
        line[0],
        Profile(CHUNK, (3, 1)),
    )
    profiles.save(repository, "A", line[1], Profile(CHUNK, (7,)))
    found = profiles.find(repository, "A", line[2], repository.read_commit)
    assert found == (line[1], Profile(CHUNK, (7,)))
    assert profiles.remove(repository, "A", line[1]) == 1
    assert profiles.remove(repository, "A", line[1]) == 0
    found = profiles.find(repository, "A", line[2], repository.read_commit)
    assert found is not None
    assert found[0] == line[0]


def test_a_new_one_takes_the_place_of_the_old(repository: Repository) -> None:
    commit = make_commit(repository, {0: content("a")})
    first = profiles.save(repository, "A", commit, Profile(CHUNK, (1,)))
    second = profiles.save(repository, "A", commit, Profile(CHUNK, (2,)))
    assert keys(repository) == [second] != [first]
    assert profiles.save(repository, "A", commit, Profile(CHUNK, (2,))) == second
    assert keys(repository) == [second]


def test_a_damaged_one_is_none(store: MemoryStore, repository: Repository) -> None:
    commit = make_commit(repository, {0: content("a")})
    key = profiles.save(repository, "A", commit, Profile(CHUNK, (1, 2)))
    data = store.objects[key]
    for harmed in (b"", data[:-1], data[:-2] + bytes([data[-2] ^ 1]) + data[-1:], data + b"x"):
        store.objects[key] = harmed
        with pytest.raises(Damaged):
            profiles.read(repository, profiles.listed(repository, "A")[0])
        assert profiles.find(repository, "A", commit, repository.read_commit) is None


def test_names_that_are_none_are_passed_over(store: MemoryStore, repository: Repository) -> None:
    commit = make_commit(repository, {0: content("a")})
    chunk = object_id(Kind.CHUNK, b"x").hex()
    for name in ("x", f"{commit.hex()}", f"{commit.hex()}-{chunk}", f"{chunk}-{chunk}"):
        store.objects[f"refs/A/profiles/{name}"] = b"x"
    assert keys(repository) == []


def test_it_goes_with_its_version_and_not_before(
    store: MemoryStore, repository: Repository
) -> None:
    line = [make_commit(repository, {0: content(f"{n}")}) for n in range(3)]
    kept = {profiles.save(repository, "A", one, Profile(CHUNK, (1,))) for one in line[1:]}
    gone = profiles.save(repository, "A", line[0], Profile(CHUNK, (1,)))
    Collector(repository).run(Rules())
    assert set(keys(repository)) == kept | {gone}
    Collector(repository).plan(Rules(last=2))
    assert set(keys(repository)) == kept | {gone}, "a plan changes nothing"
    Collector(repository).run(Rules(last=2))
    assert set(keys(repository)) == kept
    assert store.calls  # the run did write: retention has its own tests


def test_of_key() -> None:
    commit, oid = object_id(Kind.COMMIT, b"c"), object_id(Kind.PROFILE, b"p")
    key = f"refs/A/profiles/{commit.hex()}-{oid.hex()}"
    assert profiles.of_key(key) == ("A", oid)
    for other in ("refs/A/tags/x", "horcrux.json", "refs/A/profiles/x"):
        assert profiles.of_key(other) is None


def test_a_profile_takes_no_more_memory_than_it_may() -> None:
    """128 KiB of runs would name 2^30 chunks."""
    run = RUN.pack(0xFFFF << 48)
    bomb = HEADER.pack(1, 16, 0, MOST_RUNS) + run * MOST_RUNS
    with pytest.raises(Damaged, match="more than"):
        Profile.decode(bomb)
    many = Profile(64 << 10, tuple(range(MOST_CHUNKS + 5)))
    assert Profile.decode(many.encode()).chunks == tuple(range(MOST_CHUNKS))

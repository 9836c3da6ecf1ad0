"""A repository: made, opened, refused; and every way to name a version."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from horcrux_nbd.chunkstore import ChunkStore, open_store
from horcrux_nbd.errors import (
    Damaged,
    EnvironmentProblem,
    KeyExists,
    NotFound,
    StoreError,
    StoreUnavailable,
    UsageError,
)
from horcrux_nbd.names import Version, parse_version
from horcrux_nbd.repository.commits import Commit
from horcrux_nbd.repository.objects import NULL_ID, Kind, encode, object_id, object_key
from horcrux_nbd.repository.records import decode_record, encode_record
from horcrux_nbd.repository.repository import CONFIG_KEY, Repository, check_exclusive_create

from ..chunkstore.faulty import Fails
from .images import CHUNK, block, content, make_commit, make_patch, repository_in
from .memory_store import MemoryStore


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ChunkStore]:
    with open_store(str(tmp_path / "repository"), create=True) as store:
        yield store


@pytest.fixture
def memory() -> MemoryStore:
    return MemoryStore()


# ---- make and open


def test_create_and_open(store: ChunkStore) -> None:
    made = Repository.create(store, 1 << 20)
    opened = Repository.open(store)
    again = Repository.create(store, 1 << 16)  # it is there: it keeps what it has
    assert made.id == opened.id == again.id
    assert opened.chunk_size == again.chunk_size == 1 << 20
    assert opened.url == store.url
    assert [s.key for s in store.list()] == [CONFIG_KEY]
    config = json.loads(store.get(CONFIG_KEY))
    assert (config["format"], config["features"]) == (1, [])


def test_no_repository(store: ChunkStore) -> None:
    with pytest.raises(NotFound, match="holds no Horcrux repository") as caught:
        Repository.open(store)
    assert store.url in str(caught.value)


def test_an_occupied_place(memory: MemoryStore) -> None:
    memory.objects["photos/cat.jpg"] = b"meow"
    with pytest.raises(StoreError, match=r"holds something else already \(photos\)"):
        Repository.create(memory)
    assert memory.objects == {"photos/cat.jpg": b"meow"}
    assert memory.calls == []


def test_what_an_interrupted_create_leaves_is_no_hindrance(memory: MemoryStore) -> None:
    memory.objects["probe/123"] = b"first"
    Repository.create(memory)
    assert CONFIG_KEY in memory.objects


def test_create_after_each_fault(memory: MemoryStore) -> None:
    """The n-th call fails, for each n: an error, and the next create works."""
    n = 0
    while True:
        n += 1
        memory.objects.clear()
        flaky = Fails(memory, n)
        try:
            Repository.create(flaky, CHUNK)
        except StoreUnavailable:
            assert flaky.failures == 1
        if not flaky.failures:
            break
        flaky.heal()
        assert Repository.create(flaky, CHUNK).chunk_size == CHUNK
    assert n > 5


def test_many_creates_at_once(store: ChunkStore) -> None:
    found: list[str] = []
    errors: list[BaseException] = []
    start = threading.Barrier(12)

    def make() -> None:
        start.wait(10)
        try:
            found.append(Repository.create(store).id)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=make) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert errors == []
    assert len(found) == 12
    assert len(set(found)) == 1


def test_a_repository_that_appears_while_we_look(memory: MemoryStore) -> None:
    """Made by somebody else between our look for it and our look for anything else."""
    other = MemoryStore()
    theirs = Repository.create(other)
    real = memory.list

    def list_(prefix: str = "", after: str = "", limit: int | None = None) -> object:
        memory.objects.update(other.objects)
        return real(prefix, after, limit)

    memory.list = list_  # type: ignore[method-assign, assignment]
    assert Repository.create(memory).id == theirs.id


class IgnoresCondition(MemoryStore):
    """As some S3 servers do with If-None-Match."""

    def __init__(self, says_exists: bool) -> None:
        super().__init__()
        self.says_exists = says_exists

    def put_exclusive(self, key: str, data: bytes) -> None:
        there = key in self.objects
        self.objects[key] = data
        if there and self.says_exists:
            raise KeyExists(self.url, key)


@pytest.mark.parametrize("says_exists", [False, True])
def test_a_store_that_ignores_exclusive_create_is_refused(says_exists: bool) -> None:
    store = IgnoresCondition(says_exists)
    with pytest.raises(StoreError, match=r"ignores exclusive create.*Use it read-only"):
        Repository.create(store)
    assert store.objects == {}
    sound = MemoryStore()
    check_exclusive_create(sound)
    assert sound.objects == {}


@pytest.mark.parametrize("size", [0, 65535, 1 << 15, 1 << 27])
def test_create_with_a_wrong_chunk_size(memory: MemoryStore, size: int) -> None:
    with pytest.raises(UsageError, match="power of two"):
        Repository.create(memory, size)
    assert memory.calls == memory.reads == []


def config_with(memory: MemoryStore, **change: object) -> None:
    Repository.create(memory)
    members = decode_record(memory.objects[CONFIG_KEY], "it") | change
    memory.objects[CONFIG_KEY] = encode_record(members)


@pytest.mark.parametrize(
    "change", [{"format": 2}, {"hash": "blake4"}, {"features": ["encryption"]}, {"format": 10**9}]
)
def test_a_newer_repository_is_refused(memory: MemoryStore, change: dict[str, object]) -> None:
    config_with(memory, **change)
    with pytest.raises(EnvironmentProblem, match=r"newer than this program.*upgrade"):
        Repository.open(memory)
    with pytest.raises(EnvironmentProblem):
        Repository.create(memory)


def test_what_a_later_release_adds_without_a_feature_is_left_alone(memory: MemoryStore) -> None:
    config_with(memory, note="hello")
    Repository.open(memory)


@pytest.mark.parametrize(
    "change",
    [
        {"chunk_size": 1000},
        {"chunk_size": "65536"},
        {"chunk_size": None},
        {"format": "1"},
        {"format": True},
        {"features": None},
        {"features": [1]},
        {"id": 5},
        {"hash": None},
    ],
)
def test_a_damaged_configuration(memory: MemoryStore, change: dict[str, object]) -> None:
    config_with(memory, **change)
    with pytest.raises(Damaged, match=CONFIG_KEY):
        Repository.open(memory)


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"x" * 100_000, b'{"format": 1}'])
def test_a_configuration_that_is_none(memory: MemoryStore, data: bytes) -> None:
    memory.objects[CONFIG_KEY] = data
    with pytest.raises(Damaged, match=r"horcrux.json is damaged"):
        Repository.open(memory)


# ---- objects


def test_a_missing_object_is_damage_that_names_it(memory: MemoryStore) -> None:
    repository = repository_in(memory)
    oid = object_id(Kind.NODE, b"nowhere")
    with pytest.raises(Damaged, match=f"object {oid.hex()} is missing in memory://store"):
        repository.read_object(oid, (Kind.NODE,))


def test_an_id_of_another_kind_is_refused_unread(memory: MemoryStore) -> None:
    repository = repository_in(memory)
    oid = repository.write_object(Kind.NODE, b"x")
    memory.reads.clear()
    for kinds in ((Kind.CHUNK, Kind.PATCH), (Kind.COMMIT,)):
        with pytest.raises(Damaged, match="belongs"):
            repository.read_object(oid, kinds, CHUNK)
    with pytest.raises(Damaged):
        repository.read_object(NULL_ID, (Kind.NODE,))
    assert memory.reads == []


def test_an_object_that_is_too_long_is_not_read_whole(memory: MemoryStore) -> None:
    repository = repository_in(memory)
    oid = repository.write_object(Kind.CHUNK, content("x"))
    memory.pending[object_key(oid)] += bytes(50_000_000)
    asked: list[int | None] = []
    real = memory.get

    def get(key: str, offset: int = 0, length: int | None = None) -> bytes:
        asked.append(length)
        return real(key, offset, length)

    memory.get = get  # type: ignore[method-assign]
    with pytest.raises(Damaged):
        repository.read_object(oid, (Kind.CHUNK,), CHUNK)
    assert asked == [CHUNK + 16 + 1]


def test_read_chunk_and_what_it_asks(memory: MemoryStore) -> None:
    repository = repository_in(memory)
    base = repository.write_object(Kind.CHUNK, content("base"))
    one = make_patch(repository, (base,), {0: block("1")})
    two = make_patch(repository, (one, base), {1: block("2")})
    expected = bytearray(content("base"))
    expected[:4096], expected[4096:8192] = block("1"), block("2")
    memory.reads.clear()
    assert repository.read_chunk(two, CHUNK) == expected
    assert sorted(memory.reads) == sorted(("get", object_key(oid)) for oid in (base, one, two))
    assert repository.read_chunk(base, CHUNK) == content("base")
    with pytest.raises(Damaged):
        repository.read_chunk(two, 2 * CHUNK)
    memory.objects[object_key(one)] = encode(Kind.CHUNK, content("swapped"))
    with pytest.raises(Damaged, match=one.hex()):
        repository.read_chunk(two, CHUNK)


# ---- versions


class History:
    """main: five versions; other: a branch of its own; tags; an image B with one version."""

    def __init__(self, store: ChunkStore) -> None:
        self.repository = repository_in(store)
        self.main = [
            make_commit(self.repository, {0: content(str(n))}, message=f"version {n}")
            for n in range(5)
        ]
        self.other = make_commit(self.repository, {1: content("o")}, branch="other")
        self.b = make_commit(self.repository, {0: content("b")}, image="B")
        refs = self.repository.refs
        refs.make_tag("A", "v3", self.main[3], author="", message="")
        refs.make_tag("A", "other", self.main[0], author="", message="")  # a branch goes first
        refs.move("A", "gone", self.main[1], None, author="Ann", why="try")
        refs.move("A", "gone", None, self.main[1], author="Ann", why="done with it")

    def resolve(self, text: str) -> bytes:
        return self.repository.resolve(parse_version(text)).id


@pytest.fixture
def history(memory: MemoryStore) -> History:
    return History(memory)


def test_resolve(history: History) -> None:
    main = history.main
    cases = {
        "A": main[4],
        "A@main": main[4],
        "A@main~1": main[3],
        "A@main^": main[3],
        "A@main~": main[3],
        "A@main^^~2": main[0],
        "A@main~4": main[0],
        "A@v3": main[3],
        "A@v3~3": main[0],
        "A@other": history.other,
        f"A@{main[2].hex()}": main[2],
        f"A@{main[2].hex()[:12]}": main[2],
        f"A@{main[2].hex()[:12]}~1": main[1],
        f"A@{main[2].hex()[:7]}": main[2],  # odd
        "B": history.b,
    }
    assert {text: history.resolve(text) for text in cases} == cases
    found = history.repository.resolve(parse_version("A@v3"))
    assert found.commit.message == "version 3"
    assert found.version == Version("A", "v3")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("C", "no image 'C': there is A, B"),
        ("A@mian", "A has no version 'mian': did you mean main?"),
        ("A@x", "A has no version 'x': there is main, other, v3"),
        ("A@gone", "branch 'gone' of A was deleted by Ann at .*done with it"),
        ("A@main~5", "A@main~5: A@main has only 4 versions before it"),
        ("A@v3~999999999", "has only 3 versions before it"),
        ("B^", "B@main\\^: B@main has only 0 versions before it"),
        ("A@dead", "A has no version 'dead'"),
        ("A@" + "ab" * 32, "A has no version"),
    ],
)
def test_what_does_not_exist_is_answered_with_what_does(
    history: History, text: str, says: str
) -> None:
    if text == "B^":
        text = "B@main^"
    with pytest.raises(NotFound, match=says):
        history.resolve(text)


def test_an_id_names_a_version_of_its_image_only(history: History) -> None:
    for digits in (history.b.hex(), history.b.hex()[:10]):
        assert history.resolve(f"B@{digits}") == history.b
        with pytest.raises(NotFound):
            history.resolve(f"A@{digits}")


def test_an_id_of_something_else_is_no_version(history: History, memory: MemoryStore) -> None:
    index = history.repository.read_commit(history.main[0]).index
    memory.reads.clear()
    for digits in (index.hex(), index.hex()[:12]):
        with pytest.raises(NotFound):
            history.resolve(f"A@{digits}")
    assert ("get", object_key(index)) not in memory.reads


def test_an_ambiguous_id(memory: MemoryStore) -> None:
    """Versions are made until two share four digits: the birthday of 300 in 65,536."""
    repository = repository_in(memory)
    seen: dict[str, bytes] = {}
    for number in range(5000):
        commit = _bare_commit(repository, number)
        digits = commit.hex()[:4]
        if digits in seen:
            break
        seen[digits] = commit
    repository.refs.move("A", "main", commit, None, author="", why="")
    with pytest.raises(UsageError, match=r"is ambiguous .*write more digits") as caught:
        repository.resolve(Version("A", digits))
    assert commit.hex()[:8] in str(caught.value)
    assert seen[digits].hex()[:8] in str(caught.value)
    assert repository.resolve(Version("A", commit.hex()[:12])).id == commit
    # A damaged chunk with the same digits is nobody's business here.
    memory.objects[object_key(bytes.fromhex(digits) + bytes(29) + b"\1")] = b"damaged"
    assert repository.resolve(Version("A", commit.hex()[:12])).id == commit


def _bare_commit(repository: Repository, number: int) -> bytes:
    commit = Commit("A", 0, CHUNK, NULL_ID, message=str(number), time="2026-01-01T00:00:00Z")
    return repository.write_object(Kind.COMMIT, commit.encode())


def test_a_name_that_is_hex_is_a_name_first(history: History) -> None:
    digits = history.main[0].hex()[:6]
    history.repository.refs.make_tag("A", digits, history.main[4], author="", message="")
    assert history.resolve(f"A@{digits}") == history.main[4]


def test_history_that_was_removed_is_no_damage(history: History, memory: MemoryStore) -> None:
    gone, child = history.main[1], history.main[2]
    del memory.objects[object_key(gone)]
    with pytest.raises(Damaged, match=gone.hex()):
        history.resolve("A@main~3")
    memory.objects[f"refs/A/shallow/{child.hex()}"] = b"{}"
    with pytest.raises(NotFound, match=f"what was before A@{child.hex()[:12]} was removed"):
        history.resolve("A@main~3")
    assert history.resolve("A@main~2") == child


def test_resolve_with_the_store_away(history: History, memory: MemoryStore) -> None:
    away = Repository.open(memory)
    away.refs._store = away.store = Fails(memory, times=None)
    with pytest.raises(StoreUnavailable):
        away.resolve(Version("A"))


def test_damage_on_the_way(history: History, memory: MemoryStore) -> None:
    key = object_key(history.main[4])
    memory.objects[key] = memory.objects[key][:-1]
    with pytest.raises(Damaged, match=history.main[4].hex()):
        history.resolve("A")

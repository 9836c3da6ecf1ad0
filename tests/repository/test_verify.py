"""Verify finds every damage, names what it affects, and finds nothing in what is sound."""

from __future__ import annotations

import dataclasses
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from horcrux_nbd.chunkstore import ChunkStore, open_store
from horcrux_nbd.errors import (
    Damaged,
    EnvironmentProblem,
    HorcruxError,
    NotFound,
    StoreUnavailable,
)
from horcrux_nbd.names import Version
from horcrux_nbd.progress import Progress
from horcrux_nbd.repository import verify as verify_module
from horcrux_nbd.repository.affected import version_name
from horcrux_nbd.repository.commits import Commit
from horcrux_nbd.repository.index import encode_node
from horcrux_nbd.repository.objects import (
    NULL_ID,
    Kind,
    encode,
    key_id,
    kind_of,
    object_id,
    object_key,
)
from horcrux_nbd.repository.patch import Patch
from horcrux_nbd.repository.records import decode_record, encode_record
from horcrux_nbd.repository.refs import Refs
from horcrux_nbd.repository.repository import CONFIG_KEY, Repository
from horcrux_nbd.repository.verify import Report, verify

from ..chunkstore.faulty import Fails
from .images import CHUNK, TIME, block, content, make_commit, make_patch, repository_in
from .memory_store import MemoryStore

PROJECT = Path(__file__).resolve().parents[2]


class World:
    """Two images, four versions of one, patches with whole and open chains, a deleted branch."""

    def __init__(self, store: ChunkStore) -> None:
        self.store = store
        self.repository = repository = repository_in(store)
        base = repository.write_object(Kind.CHUNK, content("base"))
        one = make_patch(repository, (base,), {0: block("1")})
        two = make_patch(repository, (one, base), {1: block("2")})
        three = make_patch(repository, (two,), {2: block("3")})  # made without two at hand
        over_zeros = make_patch(repository, (NULL_ID,), {15: block("z")})
        wide = {n * 300: content(f"w{n}") for n in range(4)}
        self.versions = [
            make_commit(repository, {**wide, 0: base}, size=1000 * CHUNK),
            make_commit(repository, {**wide, 0: two, 5: over_zeros}, size=1000 * CHUNK),
            make_commit(repository, {**wide, 0: three, 300: content("x")}, size=1000 * CHUNK),
            make_commit(repository, {**wide, 0: content("flat")}, size=1000 * CHUNK),
        ]
        self.names = {version_name("A", oid): oid for oid in self.versions}
        b = make_commit(repository, {0: content("b"), 1: content("w1")}, image="B")
        self.names[version_name("B", b)] = b
        repository.refs.make_tag("A", "v1", self.versions[1], author="", message="")
        repository.refs.move("A", "gone", self.versions[0], None, author="", why="")
        repository.refs.move("A", "gone", None, self.versions[0], author="", why="")

    def readable(self, oid: bytes) -> bool:
        """Whether every byte of a version can be read."""
        repository = self.repository
        try:
            commit = repository.read_commit(oid)
            for _, entry in repository.index(commit).entries():
                repository.read_chunk(entry, commit.chunk_size)
        except Damaged:
            return False
        return True

    def unreadable(self) -> set[str]:
        return {name for name, oid in self.names.items() if not self.readable(oid)}


@pytest.fixture
def memory() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def world(memory: MemoryStore) -> World:
    world = World(memory)
    memory.sync()
    memory.reads.clear()
    return world


def affected(report: Report) -> set[str]:
    return {name for problem in report.problems for name in problem.affects}


# ---- sound


def test_a_sound_repository(world: World, memory: MemoryStore) -> None:
    report = verify(memory)
    assert report.ok
    assert (report.images, report.versions, report.patches) == (2, 5, 4)
    assert report.chunks == 7  # base, w1 to w3, x, flat, b
    assert report.unreferenced == 0
    assert report.nodes == sum(kind_of(oid) is Kind.NODE for oid in ids(memory))
    assert report.read_objects == report.nodes + report.versions + report.patches
    total = sum(len(data) for key, data in memory.objects.items() if key_id(key))
    assert report.bytes == total
    everything = verify(memory, data=True)
    assert everything.ok
    assert everything.read_objects == len(ids(memory))
    assert everything.read_bytes == total
    assert (everything.chunks, everything.nodes) == (report.chunks, report.nodes)


def ids(memory: MemoryStore) -> list[bytes]:
    return [oid for oid in map(key_id, memory.objects) if oid]


def test_structure_costs_one_listing_and_no_chunk(world: World, memory: MemoryStore) -> None:
    verify(memory)
    read = [oid for what, key in memory.reads if what == "get" and (oid := key_id(key))]
    assert not any(kind_of(oid) is Kind.CHUNK for oid in read)
    assert len(read) == len(set(read))
    assert memory.reads.count(("list", "objects/")) == 1
    assert not any(what == "stat" for what, _ in memory.reads)
    memory.reads.clear()
    verify(memory, data=True, image="B")
    chunks = [oid for what, key in memory.reads if what == "get" and (oid := key_id(key))]
    assert sum(kind_of(oid) is Kind.CHUNK for oid in chunks) == 2


def test_one_image_or_version(world: World, memory: MemoryStore) -> None:
    one = verify(memory, image="B")
    assert (one.images, one.versions, one.unreferenced) == (1, 1, None)
    version = verify(memory, version=Version("A", "main~1"), data=True)
    assert (version.images, version.versions, version.patches, version.ok) == (1, 1, 3, True)
    for wrong in (lambda: verify(memory, image="C"), lambda: verify(memory, version=Version("C"))):
        with pytest.raises(NotFound):
            wrong()


def test_what_no_ref_reaches_is_counted(world: World, memory: MemoryStore) -> None:
    world.repository.write_object(Kind.CHUNK, content("left over"))
    world.repository.write_object(Kind.NODE, b"odd")
    memory.sync()
    memory.objects["objects/README"] = b"hello"
    memory.objects["notes.txt"] = b"hello"
    report = verify(memory, data=True)
    assert report.ok
    assert report.unreferenced == 2
    assert report.unreferenced_bytes == CHUNK + 16 + 16 + 3
    assert report.strays == ["objects/README"]


def test_an_empty_repository() -> None:
    memory = MemoryStore()
    with pytest.raises(NotFound):
        verify(memory)
    repository_in(memory)
    assert verify(memory, data=True) == Report(unreferenced=0)


class Recorder(Progress):
    def __init__(self) -> None:
        self.stages: list[tuple[str, int | None]] = []
        self.done = 0

    def start(self, what: str, total: int | None = None) -> None:
        self.stages.append((what, total))
        self.done = 0

    def advance(self, count: int) -> None:
        self.done += count


def test_progress(world: World, memory: MemoryStore) -> None:
    progress = Recorder()
    verify(memory, data=True, progress=progress)
    what, total = progress.stages[-1]
    assert what == "reading objects"
    assert progress.done == total == 7 * (CHUNK + 16)


# ---- damage of objects

DAMAGE: dict[str, Callable[[bytes], bytes | None]] = {
    "missing": lambda data: None,
    "empty": lambda data: b"",
    "truncated": lambda data: data[:-1],
    "longer": lambda data: data + b"\0",
    "bit": lambda data: data[:-5] + bytes([data[-5] ^ 8]) + data[-4:],
    "header": lambda data: data[:9] + bytes([data[9] ^ 1]) + data[10:],
    "zeroed": lambda data: bytes(len(data)),
    "swapped": lambda data: encode(Kind.CHUNK, content("somebody else's")),
    "other kind": lambda data: encode(Kind.COMMIT, content("a commit", 100)),
    "bomb": lambda data: data[:8] + b"\xff\xff\xff\xff" + data[12:],
}


@pytest.mark.parametrize("how", sorted(DAMAGE))
def test_every_object_with_every_damage(how: str) -> None:
    """Each is found and named, and the versions that it names are those that cannot be read."""
    memory = MemoryStore()
    world = World(memory)
    memory.sync()
    sound = dict(memory.objects)
    everything = ids(memory)
    assert {kind_of(oid) for oid in everything} == set(Kind) - {Kind.PROFILE}
    for oid in everything:
        key = object_key(oid)
        memory.objects = dict(sound)
        data = DAMAGE[how](sound[key])
        if data is None:
            del memory.objects[key]
        else:
            memory.objects[key] = data
        report = verify(memory, data=True)
        assert [p.key for p in report.problems] == [key]
        assert oid.hex() in report.problems[0].what
        assert "\n" not in report.problems[0].what
        if kind_of(oid) is Kind.COMMIT:
            # What names it: refs, and the versions after it, whose history ends here.
            assert affected(report)
        else:
            assert affected(report) == world.unreadable()
            assert affected(report)
        structure = verify(memory)
        found_by_size = how in ("missing", "empty")
        assert structure.ok == (kind_of(oid) is Kind.CHUNK and not found_by_size) or how == "longer"
        if kind_of(oid) is Kind.COMMIT or how != "bit":
            continue
        for name, version in world.names.items():
            image = name.partition("@")[0]
            only = verify(memory, version=Version(image, version.hex()), data=True)
            assert only.ok == world.readable(version)


@pytest.mark.parametrize("seed", range(20))
def test_much_damage_at_once(seed: int) -> None:
    memory = MemoryStore()
    world = World(memory)
    memory.sync()
    rng = random.Random(seed)
    bad = rng.sample([o for o in ids(memory) if kind_of(o) is not Kind.COMMIT], rng.randint(2, 8))
    for oid in bad:
        data = DAMAGE[rng.choice(sorted(DAMAGE))](memory.objects[object_key(oid)])
        if data is None:
            del memory.objects[object_key(oid)]
        else:
            memory.objects[object_key(oid)] = data
    report = verify(memory, data=True)
    named = {key_id(problem.key) for problem in report.problems}
    # What only a damaged node or patch names cannot be missed; a missing one is not listed.
    assert named <= set(bad)
    assert affected(report) == world.unreadable()
    unseen = set(bad) - named
    assert all(object_key(oid) not in memory.objects for oid in unseen)


def test_a_damaged_object_that_nothing_names(world: World, memory: MemoryStore) -> None:
    """A later push would take it for present."""
    oid = world.repository.write_object(Kind.CHUNK, content("left over"))
    memory.sync()
    memory.objects[object_key(oid)] = encode(Kind.CHUNK, content("something else"))
    assert verify(memory).ok
    report = verify(memory, data=True)
    assert [(p.key, p.affects) for p in report.problems] == [(object_key(oid), ())]
    assert verify(memory, data=True, image="A").ok


# ---- contradictions: sound objects that do not make an image


def publish(world: World, root: bytes, size: int, chunk_size: int = CHUNK, image: str = "X") -> str:
    commit = Commit(image, size, chunk_size, root, time=TIME, author="")
    oid = world.repository.write_object(Kind.COMMIT, commit.encode())
    world.repository.refs.move(image, "main", oid, None, author="", why="")
    world.store.sync()
    return version_name(image, oid)


def leaf(world: World, *entries: bytes) -> bytes:
    table = b"".join(entries).ljust(256 * 32, b"\0")
    return world.repository.write_object(Kind.NODE, encode_node(0, table))


def one_problem(memory: MemoryStore, data: bool = False) -> tuple[str, str, tuple[str, ...]]:
    report = verify(memory, data=data)
    assert len(report.problems) == 1, report.problems
    problem = report.problems[0]
    return problem.key, problem.what, problem.affects


def test_an_index_that_names_no_chunk(world: World, memory: MemoryStore) -> None:
    root = leaf(world, NULL_ID, world.versions[0])
    name = publish(world, root, CHUNK * 2)
    key, what, names = one_problem(memory)
    assert (key, names) == (object_key(root), (name,))
    assert "as a chunk" in what


def test_an_index_of_the_wrong_height(world: World, memory: MemoryStore) -> None:
    base = object_id(Kind.CHUNK, content("base"))
    root = leaf(world, base, base)
    name = publish(world, root, CHUNK * 300)
    key, what, names = one_problem(memory)
    assert (key, names) == (object_key(root), (name,))
    assert "level 1" in what


def test_a_chunk_of_another_size(world: World, memory: MemoryStore) -> None:
    short = world.repository.write_object(Kind.CHUNK, content("short", CHUNK - 1))
    name = publish(world, leaf(world, short), CHUNK)
    assert verify(memory).ok
    key, what, names = one_problem(memory, data=True)
    assert (key, names) == (object_key(short), (name,))
    assert "65535 bytes" in what


def test_one_chunk_in_images_of_two_sizes(world: World, memory: MemoryStore) -> None:
    base = object_id(Kind.CHUNK, content("base"))
    publish(world, leaf(world, base), CHUNK * 2, CHUNK * 2)
    key, what, _ = one_problem(memory)
    assert key == object_key(base)
    assert "two chunk sizes" in what


def test_a_chain_that_does_not_hang_together(world: World, memory: MemoryStore) -> None:
    base = object_id(Kind.CHUNK, content("base"))
    other = world.repository.write_object(Kind.CHUNK, content("other"))
    one = object_id(Kind.PATCH, Patch((base,), {0: block("1")}).encode(CHUNK))
    liar = make_patch(world.repository, (one, other), {1: block("2")})
    name = publish(world, leaf(world, liar), CHUNK)
    key, what, names = one_problem(memory)
    assert (key, names) == (object_key(liar), (name,))
    assert "another chain" in what


def test_a_patch_that_fits_no_chunk(world: World, memory: MemoryStore) -> None:
    patch = make_patch(world.repository, (NULL_ID,), {0: block("1")}, 2 * CHUNK)
    name = publish(world, leaf(world, patch), CHUNK)
    key, what, names = one_problem(memory)
    assert (key, names) == (object_key(patch), (name,))
    assert "does not fit" in what


def test_data_behind_the_end(world: World, memory: MemoryStore) -> None:
    """It would show when the image grows."""
    base = object_id(Kind.CHUNK, content("base"))
    publish(world, leaf(world, base), CHUNK - 5)
    assert verify(memory).ok
    key, what, _ = one_problem(memory, data=True)
    assert key == object_key(base)
    assert "behind the end" in what


def test_an_entry_behind_the_end(world: World, memory: MemoryStore) -> None:
    base = object_id(Kind.CHUNK, content("base"))
    root = leaf(world, base, base)
    publish(world, root, CHUNK)
    key, what, _ = one_problem(memory, data=True)
    assert key == object_key(root)
    assert "behind the end" in what


def test_a_damaged_commit_of_a_tag(world: World, memory: MemoryStore) -> None:
    oid = world.repository.write_object(Kind.COMMIT, b"{}")
    world.repository.refs.make_tag("B", "broken", oid, author="", message="")
    memory.sync()
    key, what, names = one_problem(memory)
    assert (key, names) == (object_key(oid), ("B@broken",))
    assert "cannot be read" in what


# ---- refs and horcrux.json


def test_damaged_refs(world: World, memory: MemoryStore) -> None:
    tag = "refs/A/tags/v1"
    head = min(key for key in memory.objects if key.startswith("refs/A/heads/main/"))
    oldest = max(key for key in memory.objects if key.startswith("refs/A/heads/main/"))
    for key, names in ((tag, ("A@v1",)), (head, ("A@main",)), (oldest, ())):
        sound = memory.objects[key]
        for data in (b"", sound[:-9], sound.replace(b"a", b"b", 1), memory.objects[CONFIG_KEY]):
            memory.objects[key] = data
            assert one_problem(memory)[::2] == (key, names)
        memory.objects[key] = sound
    assert verify(memory).ok


def test_a_lost_record(world: World, memory: MemoryStore) -> None:
    keys = sorted(key for key in memory.objects if key.startswith("refs/A/heads/main/"))
    del memory.objects[keys[2]]
    key, what, _ = one_problem(memory)
    assert key == keys[1]
    assert "is missing" in what
    memory.objects.pop(keys[3])  # those at the beginning may have been removed
    assert verify(memory).ok


@pytest.mark.parametrize("data", [b"", b"{}", b"x" * 100, None])
def test_a_damaged_configuration(world: World, memory: MemoryStore, data: bytes | None) -> None:
    """Everything else is verified all the same."""
    if data is None:
        del memory.objects[CONFIG_KEY]
    else:
        memory.objects[CONFIG_KEY] = data
    chunk = object_key(object_id(Kind.CHUNK, content("flat")))
    del memory.objects[chunk]
    report = verify(memory)
    assert [problem.key for problem in report.problems] == [CONFIG_KEY, chunk]
    assert report.versions == 5


def test_a_newer_repository_is_refused(world: World, memory: MemoryStore) -> None:
    members = decode_record(memory.objects[CONFIG_KEY], "it") | {"format": 2}
    memory.objects[CONFIG_KEY] = encode_record(members)
    with pytest.raises(EnvironmentProblem):
        verify(memory)


def test_the_version_that_was_asked_for_is_damaged(world: World, memory: MemoryStore) -> None:
    del memory.objects[object_key(world.versions[3])]
    report = verify(memory, version=Version("A"))
    assert [problem.affects for problem in report.problems] == [("A@main",)]


def test_history_that_was_removed(world: World, memory: MemoryStore) -> None:
    """As gc does it: the versions after it are told to be the first."""
    gone, child = world.versions[2], world.versions[3]
    del memory.objects[object_key(gone)]
    key, _, names = one_problem(memory)
    assert (key, names) == (object_key(gone), (version_name("A", child),))
    memory.objects[f"refs/A/shallow/{child.hex()}"] = b"{}"
    report = verify(memory)
    assert report.ok
    assert report.versions == 4  # the last, the tagged one and its parent, and that of B


def test_versions_that_only_the_reflog_names_may_be_gone(world: World, memory: MemoryStore) -> None:
    refs = world.repository.refs
    refs.move("B", "main", world.versions[3], refs.heads("B")["main"].commit, author="", why="")
    report = verify(memory)
    assert report.ok
    assert report.unreferenced
    b = next(oid for name, oid in world.names.items() if name.startswith("B@"))
    del memory.objects[object_key(b)]
    assert verify(memory).ok


# ---- limits, and trouble with the store


def test_problems_and_versions_are_bounded(
    world: World, memory: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_module, "MAX_PROBLEMS", 3)
    monkeypatch.setattr(verify_module, "MAX_AFFECTED", 2)
    for oid in ids(memory):
        if kind_of(oid) is Kind.CHUNK:
            del memory.objects[object_key(oid)]
    report = verify(memory)
    assert len(report.problems) == 3
    assert report.more_problems == 4
    assert all(len(p.affects) <= 2 for p in report.problems)
    assert any(p.more for p in report.problems)


def test_trouble_with_the_store_is_raised(world: World, memory: MemoryStore) -> None:
    """At the n-th call, for each n, and without a thread that stays."""
    n = 0
    while True:
        n += 1
        flaky = Fails(memory, n)
        try:
            report = verify(flaky, data=True)
        except StoreUnavailable:
            assert flaky.failures == 1
            continue
        assert report.ok
        assert not flaky.failures
        break
    assert n > 30


def test_a_push_meanwhile_is_no_damage(world: World, memory: MemoryStore) -> None:
    """Refs are read before the listing: whatever they reach is listed."""
    real = Refs.tags
    pushed: list[bytes] = []

    def tags(self: Refs, image: str) -> list[str]:
        if not pushed:
            chunks = {n: content(f"meanwhile {n}") for n in range(5)}
            pushed.append(make_commit(world.repository, chunks, image="A", branch="main"))
        return real(self, image)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Refs, "tags", tags)
        report = verify(memory, data=True)
    assert pushed
    assert report.ok


LARGE = """
import resource, sys
from horcrux_nbd.chunkstore.base import Stat
from horcrux_nbd.repository.objects import Kind, object_id, object_key
from horcrux_nbd.repository.repository import Repository
from horcrux_nbd.repository.verify import verify
sys.path.insert(0, ".")
from tests.repository.memory_store import MemoryStore
from tests.repository.images import CHUNK

class Large(MemoryStore):
    def list(self, prefix="", after="", limit=None):
        if prefix != "objects/":
            yield from super().list(prefix, after, limit)
            return
        for n in range(300_000):
            oid = (n << 40).to_bytes(31, "big") + b"\\1"
            yield Stat(object_key(oid), 100, 0.0)

store = Large()
Repository.create(store, CHUNK)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
report = verify(store)
assert report.unreferenced == 300_000, report
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_for_many_objects() -> None:
    """37 bytes each, as promised: 300,000 are 11 MB. A set of ids would take 40."""
    result = subprocess.run(
        [sys.executable, "-c", LARGE],
        capture_output=True, text=True, cwd=PROJECT, timeout=100, check=True,
    )  # fmt: skip
    assert int(result.stdout) < 25 << 10


# ---- the real thing


@pytest.fixture
def local(tmp_path: Path) -> Iterator[ChunkStore]:
    with open_store(str(tmp_path / "repository"), create=True) as store:
        yield store


def test_on_a_local_store(local: ChunkStore, tmp_path: Path) -> None:
    world = World(local)
    local.sync()
    assert verify(local, data=True).ok
    keys = [s.key for s in local.list("objects/")]
    rng = random.Random(1)
    for key in rng.sample(keys, 6):
        path = tmp_path / "repository" / key
        sound = path.read_bytes()
        at = rng.randrange(len(sound))
        path.write_bytes(sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :])
        try:
            report = verify(local, data=True)
            assert [p.key for p in report.problems] == [key]
        finally:
            path.write_bytes(sound)
    assert dataclasses.replace(verify(local, data=True), read_bytes=0).ok
    assert world.unreadable() == set()


def test_a_folder_that_is_no_repository(local: ChunkStore) -> None:
    with pytest.raises(HorcruxError, match="holds no Horcrux repository"):
        verify(local)
    assert Repository.create(local)

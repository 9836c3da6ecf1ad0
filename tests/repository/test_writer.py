"""Writing: only what is missing, in an order that is safe at every moment, and bounded."""

from __future__ import annotations

import dataclasses
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from horcrux_nbd.chunkstore import ChunkStore, open_store
from horcrux_nbd.errors import Busy, StoreError, StoreUnavailable, UsageError
from horcrux_nbd.names import Version
from horcrux_nbd.repository import sweeps, writer
from horcrux_nbd.repository.commits import Commit
from horcrux_nbd.repository.index import levels_for
from horcrux_nbd.repository.objects import (
    NULL_ID,
    Kind,
    decode,
    key_id,
    kind_of,
    object_id,
    object_key,
)
from horcrux_nbd.repository.refs import BranchMoved
from horcrux_nbd.repository.repository import Repository
from horcrux_nbd.repository.verify import verify
from horcrux_nbd.repository.writer import (
    ObjectWriter,
    any_bytes,
    check_same_chunks,
    publish_commit,
    write_index,
)

from ..chunkstore.faulty import Fails
from .images import CHUNK, TIME, content, make_commit, repository_in
from .memory_store import MemoryStore


@pytest.fixture
def memory() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def repository(memory: MemoryStore) -> Repository:
    repository = repository_in(memory)
    memory.calls.clear()
    return repository


def push(
    repository: Repository, chunks: dict[int, bytes], known: list[bytes] | None = None
) -> writer.Written:
    """A version of `chunks` on A@main, as generate does it; what that wrote."""
    head = repository.refs.head("A", "main")
    parent = head.commit if head else None
    count = max(chunks) + 1
    with ObjectWriter(repository, len(chunks), known or ()) as out:
        futures = {n: out.submit(Kind.CHUNK, plain) for n, plain in sorted(chunks.items())}
        changes = ((n, future.result()) for n, future in futures.items())
        root = write_index(out, None, levels_for(count), changes)
        commit = Commit(
            "A", count * CHUNK, CHUNK, root, (parent,) if parent else (), "me", TIME, "m"
        )
        publish_commit(out, commit, "main", parent, "test")
        return out.written


def kinds_put(memory: MemoryStore) -> list[Kind | None]:
    ids = [key_id(key) for what, key in memory.calls if what == "put"]
    return [kind_of(oid) for oid in ids if oid is not None]


# ---- what is written


def test_only_what_is_missing(repository: Repository, memory: MemoryStore) -> None:
    chunks = {n: content(str(n % 7)) for n in range(40)}
    written = push(repository, chunks)
    assert written.objects == 7 + 1 + 1  # chunks, a leaf, the commit
    assert written.known_objects == 33
    stored = sum(len(data) for key, data in memory.objects.items() if key_id(key))
    assert written.bytes == stored
    memory.calls.clear()
    chunks[3] = content("new")
    written = push(repository, chunks)
    assert kinds_put(memory) == [Kind.CHUNK, Kind.NODE, Kind.COMMIT]
    assert repository.resolve(Version("A")).commit.parents


def test_zeros_are_not_stored(repository: Repository, memory: MemoryStore) -> None:
    with ObjectWriter(repository) as out:
        assert out.submit(Kind.CHUNK, bytes(CHUNK)).result() == NULL_ID
        assert out.write(Kind.CHUNK, bytes(CHUNK)) == NULL_ID
        almost = bytes(CHUNK - 1) + b"\1"
        assert out.submit(Kind.CHUNK, almost).result() == object_id(Kind.CHUNK, almost)
    assert kinds_put(memory) == [Kind.CHUNK]


def test_known_ids_are_not_looked_for(repository: Repository, memory: MemoryStore) -> None:
    plain = content("x")
    with ObjectWriter(repository, known=[object_id(Kind.CHUNK, plain)]) as out:
        memory.reads.clear()
        out.write(Kind.CHUNK, plain)
        assert memory.reads == []
    assert kinds_put(memory) == []


def test_many_objects_cost_one_listing(repository: Repository, memory: MemoryStore) -> None:
    chunks = {n: content(str(n), 512).ljust(CHUNK, b"\0") for n in range(1100)}
    push(repository, chunks)
    memory.reads.clear()
    memory.calls.clear()
    with ObjectWriter(repository, len(chunks)) as out:
        for plain in chunks.values():
            out.submit(Kind.CHUNK, plain)
        out.submit(Kind.CHUNK, content("new"))
        out.barrier()
        assert out.written.objects == 1
        assert out.written.known_objects == 1100
    assert [what for what, _ in memory.reads] == ["list"]
    assert kinds_put(memory) == [Kind.CHUNK]


def test_a_listing_that_is_too_long_ends_early(
    repository: Repository, memory: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    plains = [content(str(n), 512).ljust(CHUNK, b"\0") for n in range(50)]
    push(repository, dict(enumerate(plains)))
    monkeypatch.setattr(writer, "MAX_LISTED", 20)
    memory.calls.clear()
    with ObjectWriter(repository, writer.LIST_FROM) as out:
        for plain in plains:
            out.submit(Kind.CHUNK, plain)
        out.submit(Kind.CHUNK, content("new"))
        out.barrier()
    assert kinds_put(memory) == [Kind.CHUNK]


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("size", [0, 1, 16, CHUNK + 17])
def test_an_object_of_a_size_that_cannot_be_is_stored_anew(
    repository: Repository, memory: MemoryStore, listed: bool, size: int
) -> None:
    """What a power cut on somebody's NAS left is not taken for present."""
    plain = content("x")
    key = object_key(object_id(Kind.CHUNK, plain))
    memory.objects[key] = bytes(size)
    with ObjectWriter(repository, writer.LIST_FROM if listed else 0) as out:
        out.write(Kind.CHUNK, plain)
        out.barrier()
    assert repository.read_chunk(object_id(Kind.CHUNK, plain), CHUNK) == plain


def test_it_works_in_parallel(repository: Repository, memory: MemoryStore) -> None:
    meeting = threading.Barrier(4)  # broken unless four puts are under way at once
    real = memory.put

    def put(key: str, data: bytes) -> None:
        meeting.wait(20)
        real(key, data)

    memory.put = put  # type: ignore[method-assign]
    with ObjectWriter(repository) as out:
        for number in range(8):
            out.submit(Kind.CHUNK, content(str(number)))
        out.barrier()
    assert out.written.objects == 8


@pytest.mark.parametrize("length", [1 << 16, 1 << 20])
def test_what_waits_in_memory_is_bounded(
    repository: Repository, memory: MemoryStore, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    """In bytes, for chunks of any size; and one that is larger than the bound still passes."""
    monkeypatch.setattr(writer, "MEMORY", 4 << 16)
    gate = threading.Event()
    real = memory.put

    def put(key: str, data: bytes) -> None:
        gate.wait(20)
        real(key, data)

    memory.put = put  # type: ignore[method-assign]
    submitted: list[int] = []

    def submit() -> None:
        for number in range(8):
            out.submit(Kind.CHUNK, content(str(number), length))
            submitted.append(number)

    with ObjectWriter(repository) as out:
        thread = threading.Thread(target=submit)
        thread.start()
        expected = 4 if length == 1 << 16 else 1
        deadline = time.monotonic() + 20
        while len(submitted) < expected and time.monotonic() < deadline:
            time.sleep(0.01)
        thread.join(0.2)  # it must not get further
        assert len(submitted) == expected
        gate.set()
        thread.join(20)
        out.barrier()
    assert out.written.objects == 8


def test_any_bytes() -> None:
    assert not any_bytes(b"")
    for size in (1, 4096, CHUNK):
        assert not any_bytes(bytes(size))
        for at in (0, size // 2, size - 1):
            data = bytearray(size)
            data[at] = 1
            assert any_bytes(bytes(data))


def test_an_image_keeps_its_chunk_size() -> None:
    old = Commit("A", CHUNK, CHUNK, NULL_ID, time=TIME)
    check_same_chunks(old, CHUNK)
    with pytest.raises(UsageError, match=r"image A has chunks of 64.0 KiB, not 128.0 KiB"):
        check_same_chunks(old, 2 * CHUNK)


# ---- order


def test_the_order_of_writing(repository: Repository, memory: MemoryStore) -> None:
    """Chunks, nodes from the leaves up, sync, commit, sync, ref: seen by the store itself."""
    levels_seen: list[int] = []
    real = memory.put

    def put(key: str, data: bytes) -> None:
        oid = key_id(key)
        assert oid
        time.sleep(random.random() / 1000)  # so that threads overtake each other
        if kind_of(oid) is Kind.NODE:
            levels_seen.append(decode(data, oid, (Kind.NODE,), 9000)[1][0])
        real(key, data)

    memory.put = put  # type: ignore[method-assign]
    chunks = {n * 997: content(str(n)) for n in range(150)}
    push(repository, chunks)
    kinds = kinds_put(memory)
    puts = [what for what, _ in memory.calls]
    assert kinds.count(Kind.CHUNK) == 150
    assert kinds.count(Kind.NODE) > 100
    assert kinds[-1] is Kind.COMMIT
    assert levels_seen[-1] == 2
    # The last chunk may follow the first leaf, as leaves are made from chunks that are stored;
    # a parent never precedes a child (below), and durably nothing does:
    assert puts[-4:] == ["sync", "put", "sync", "exclusive"]
    assert puts.count("exclusive") == 1
    seen: set[bytes] = set()
    for what, key in memory.calls:
        oid = key_id(key) if what == "put" else None
        if oid is not None:
            if kind_of(oid) is Kind.NODE:
                node = repository.read_object(oid, (Kind.NODE,))[1]
                children = {node[at : at + 32] for at in range(8, len(node), 32)} - {NULL_ID}
                assert children <= seen, "a node before what it names"
            seen.add(oid)


def test_at_each_moment_a_power_cut_leaves_old_or_new(memory: MemoryStore) -> None:
    """After each call: all that was synced, some of the rest. What refs reach is always whole."""
    repository = repository_in(memory)
    make_commit(repository, {n: content(f"old {n}") for n in range(5)})
    states: list[dict[str, bytes]] = []
    rng = random.Random(5)
    for name in ("put", "sync", "put_exclusive"):

        def spy(*arguments: str, real: object = getattr(memory, name)) -> None:
            real(*arguments)  # type: ignore[operator]
            some = {k: v for k, v in memory.pending.items() if rng.random() < 0.5}
            states.append({**memory.objects, **some})

        setattr(memory, name, spy)
    push(repository, {n * 300: content(f"new {n}") for n in range(10)})
    heads = set()
    assert len(states) > 20
    for state in states:
        after = MemoryStore()
        after.objects = state
        report = verify(after, data=True)
        assert report.ok, report.problems
        heads.add(Repository.open(after).resolve(Version("A")).id)
    assert len(heads) == 2


# ---- failures


def test_a_failure_leaves_the_ref_and_a_rerun_sends_the_rest(memory: MemoryStore) -> None:
    """The n-th call of a push fails, for every n: the branch is old or new, and the rerun sends
    each object that is not there, and no other."""
    chunks = {n * 100: content(f"new {n}") for n in range(12)}
    base = MemoryStore()
    make_commit(repository_in(base), {0: content("old")})
    n = 0
    while True:
        n += 1
        memory.objects = dict(base.objects)
        memory.pending.clear()
        flaky = Fails(memory, n)
        flaky.heal()
        repository = Repository.open(flaky)
        old = repository.resolve(Version("A")).id
        flaky.fail(n)
        try:
            push(repository, chunks)
        except StoreUnavailable:
            assert Repository.open(memory).resolve(Version("A")).id == old
        if not flaky.failures:
            break
        flaky.heal()
        there = {**memory.objects, **memory.pending}
        memory.calls.clear()
        push(Repository.open(memory), chunks)
        sent = [key for what, key in memory.calls if what == "put"]
        assert len(sent) == len(set(sent))
        assert not there.keys() & set(sent)
        report = verify(memory, data=True)
        assert report.ok
        assert report.unreferenced == 0
    assert n > 30


def test_the_first_failure_ends_it(repository: Repository, memory: MemoryStore) -> None:
    """Not after hours of hashing for a store that is full."""
    flaky = Fails(memory, 1, None, error=lambda what: StoreError("test: full"), matching="put obj")
    repository = Repository.open(flaky)
    plains = iter(range(1000))

    def submit_all() -> None:
        for number in plains:
            out.submit(Kind.CHUNK, content(str(number)))

    with ObjectWriter(repository) as out:
        with pytest.raises(StoreError, match="full"):
            submit_all()
        with pytest.raises(StoreError, match="full"):
            out.barrier()
    assert next(plains) < 200


def test_an_object_that_failed_is_not_taken_for_stored(
    repository: Repository, memory: MemoryStore
) -> None:
    for matching in ("put objects/", "stat objects/"):
        flaky = Fails(memory, 1, matching=matching)
        with ObjectWriter(Repository.open(flaky)) as out:
            with pytest.raises(StoreUnavailable):
                out.write(Kind.CHUNK, content(matching))
            oid = out.write(Kind.CHUNK, content(matching))
            out.barrier()
        assert object_key(oid) in memory.objects


def test_a_reader_that_fails_ends_it_too(repository: Repository) -> None:
    def broken() -> bytes:
        raise OSError(5, "test: the disk")

    with ObjectWriter(repository) as out:
        out.run(CHUNK, broken)
        with pytest.raises(OSError, match="the disk"):
            out.barrier()


def test_the_branch_that_moved_meanwhile(repository: Repository, memory: MemoryStore) -> None:
    first = make_commit(repository, {0: content("0")})
    commit = repository.read_commit(first)
    with ObjectWriter(repository) as out:
        mine = dataclasses.replace(commit, message="mine", parents=(first,))
        make_commit(repository, {0: content("theirs")})
        with pytest.raises(BranchMoved):
            publish_commit(out, mine, "main", first, "late")
    assert (
        object_key(object_id(Kind.COMMIT, mine.encode())) in memory.objects
    )  # sent already: `--branch` has less to do


# ---- removal (docs/format.md, "Removal")


def announce(memory: MemoryStore, begins: float) -> str:
    key = sweeps.announcement(begins, "abc")
    memory.objects[key] = b""
    return key


@pytest.mark.parametrize("hours", [-100, -1, 0, 0.9])
def test_no_ref_moves_during_a_removal(
    repository: Repository, memory: MemoryStore, hours: float
) -> None:
    key = announce(memory, time.time() + hours * 3600)
    with pytest.raises(Busy, match="are being removed: try again"):
        push(repository, {0: content("x")})
    assert repository.refs.head("A", "main") is None
    del memory.objects[key]
    push(repository, {0: content("x")})


def test_a_removal_that_is_far_away_is_no_hindrance(
    repository: Repository, memory: MemoryStore
) -> None:
    announce(memory, time.time() + 5 * 3600)
    memory.reads.clear()
    push(repository, {0: content("x")})
    assert ("list", "objects/") not in memory.reads


@pytest.mark.parametrize("gone", [False, True])
@pytest.mark.parametrize("why", ["long", "met"])
def test_after_a_day_or_a_removal_it_looks_again(
    repository: Repository,
    memory: MemoryStore,
    monkeypatch: pytest.MonkeyPatch,
    why: str,
    gone: bool,
) -> None:
    """A removal that began and ended while we pushed may have taken what we found."""
    clock = [time.time()]
    monkeypatch.setattr(sweeps.Sweeps.__init__, "__defaults__", (lambda: clock[0],))
    old = ObjectWriter(repository).write(Kind.CHUNK, content("left by an old push"))
    memory.sync()
    key = announce(memory, clock[0] + 2 * 3600) if why == "met" else ""
    with ObjectWriter(repository) as out:
        assert out.write(Kind.CHUNK, content("left by an old push")) == old
        assert out.written.known_objects == 1
        clock[0] += (25 if why == "long" else 2) * 3600
        memory.objects.pop(key, None)
        if gone:
            del memory.objects[object_key(old)]
        root = write_index(out, None, 1, [(0, old)])
        commit = Commit("A", CHUNK, CHUNK, root, (), "me", TIME, "m")
        if gone:
            with pytest.raises(Busy, match="1 objects were removed while this ran: run it again"):
                publish_commit(out, commit, "main", None, "test")
            assert repository.refs.head("A", "main") is None
        else:
            publish_commit(out, commit, "main", None, "test")
    if gone:
        push(repository, {0: content("left by an old push")})
    assert verify(memory, data=True).ok


# ---- the real thing


@pytest.fixture
def local(tmp_path: Path) -> Iterator[ChunkStore]:
    with open_store(str(tmp_path / "repository"), create=True) as store:
        yield store


def test_on_a_local_store(local: ChunkStore) -> None:
    repository = repository_in(local)
    chunks = {n * 3: content(str(n)) for n in range(300)}
    written = push(repository, chunks)
    assert written.objects > 300
    with open_store(local.url) as other:
        report = verify(other, data=True)
        assert report.ok
        assert report.unreferenced == 0
        reader = Repository.open(other)
        commit = reader.resolve(Version("A")).commit
        found = {n: reader.read_chunk(oid, CHUNK) for n, oid in reader.index(commit).entries()}
    assert found == chunks
    assert push(repository, chunks).objects == 1  # a commit with a parent

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from horcrux_nbd.chunkstore import open_store
from horcrux_nbd.chunkstore.retry import RetryStore
from horcrux_nbd.errors import Damaged, StoreUnavailable
from horcrux_nbd.repository.objects import Kind, encode, object_id
from horcrux_nbd.repository.patch import Patch
from horcrux_nbd.repository.repository import Repository
from horcrux_nbd.repository.writer import ObjectWriter, write_index
from horcrux_nbd.volume.base import Base
from horcrux_nbd.volume.cache import Cache

from .support import (
    BLOCK,
    CHUNK,
    Watched,
    chunk_ids,
    make_image,
    noise,
    object_file,
    resolve,
)

CHUNKS = 40
SIZE = CHUNKS * CHUNK + 1000
# Chunks 30 to 37 are zeros.
DATA = {0: noise(30 * CHUNK), 38 * CHUNK: noise(2 * CHUNK + 1000, "end")}


def original(offset: int, length: int) -> bytes:
    image = DATA[0] + bytes(8 * CHUNK) + DATA[38 * CHUNK] + bytes(CHUNK)
    return image[offset : offset + length]


class Opened:
    """A base over a watched store."""

    def __init__(self, url: str, cache: Path, limit: float = 1.0, cache_size: int | None = None):
        self.url = url
        self.watched = Watched(open_store(url).store)  # type: ignore[attr-defined]
        self.store = RetryStore(self.watched, limit)
        self.cache = Cache(cache, cache_size)
        resolved = resolve(url)
        repository = Repository(self.store, "", resolved.commit.chunk_size)
        self.base = Base(repository, resolved.commit, self.cache)
        self.ids = chunk_ids(url)

    def read(self, offset: int, length: int) -> bytes:
        data = bytearray(noise(length, "left by the read before"))
        self.base.read_into(offset, memoryview(data))
        return bytes(data)

    def fetched(self) -> list[int]:
        return self.watched.chunk_gets(self.ids)

    def idle(self) -> None:
        assert self.base._background.wait_idle(20)

    def close(self) -> None:
        self.base.close()
        self.store.close()
        self.cache.close()


@pytest.fixture
def url(tmp_path: Path) -> str:
    return make_image(tmp_path / "repo", DATA, size=SIZE)


@pytest.fixture
def opened(tmp_path: Path, url: str) -> Iterator[Opened]:
    opened = Opened(url, tmp_path / "cache")
    yield opened
    opened.close()


def run(work: list[Callable[[], object]]) -> list[object]:
    """Run all at once; what they returned or raised."""
    results: list[object] = [None] * len(work)

    def one(index: int) -> None:
        try:
            results[index] = work[index]()
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=one, args=(n,), daemon=True) for n in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "hangs"
    return results


def test_any_range_reads_as_the_image(opened: Opened) -> None:
    chance = random.Random(1)
    for _ in range(200):
        offset = chance.randrange(SIZE)
        length = min(chance.choice([1, 512, 5000, CHUNK, 3 * CHUNK]), SIZE - offset)
        assert opened.read(offset, length) == original(offset, length)
    assert opened.read(SIZE - 10, 3 * CHUNK) == original(SIZE - 10, 10) + bytes(3 * CHUNK - 10)
    opened.idle()
    assert sorted(opened.fetched()) == sorted(opened.ids), "each once, and no zeros"


# ---- one fetch for each chunk, many at once


def test_one_fetch_however_many_wait(opened: Opened) -> None:
    opened.watched.open.clear()
    reads = [
        lambda n=n: opened.read(5 * CHUNK + n * 100, 100)  # type: ignore[misc]
        for n in range(32)
    ]

    def let_go() -> None:
        assert opened.watched.waiting.acquire(timeout=10)
        time.sleep(0.1)  # for the others to join; who comes later finds it in the cache
        opened.watched.open.set()

    results = run([*reads, let_go])
    assert results[:32] == [original(5 * CHUNK + n * 100, 100) for n in range(32)]
    assert opened.fetched() == [5]


def test_chunks_are_fetched_at_the_same_time(opened: Opened) -> None:
    """With 0.2 s behind each get, eight readers take 0.2 s and not 1.6 s."""
    opened.read(0, 1)  # the index
    opened.watched.delay = 0.2
    began = time.monotonic()
    results = run([lambda n=n: opened.read(n * CHUNK, CHUNK) for n in range(2, 26, 3)])  # type: ignore[misc]
    assert time.monotonic() - began < 1.2
    assert results == [original(n * CHUNK, CHUNK) for n in range(2, 26, 3)]
    assert opened.watched.most == 8


def test_the_chunks_of_one_request_are_fetched_at_the_same_time(opened: Opened) -> None:
    opened.read(0, 1)
    opened.watched.delay = 0.2
    began = time.monotonic()
    assert opened.read(10 * CHUNK + 5, 7 * CHUNK) == original(10 * CHUNK + 5, 7 * CHUNK)
    assert time.monotonic() - began < 1.2, "one after another it is 1.6 s"
    opened.idle()
    assert sorted(opened.fetched()) == [0, *range(10, 18)]


def test_a_reader_is_not_kept_waiting_by_read_ahead(opened: Opened) -> None:
    opened.read(0, 1)
    opened.watched.open.clear()
    opened.base.prefetch(2 * CHUNK, 20 * CHUNK)
    threads = opened.base._background._most
    for _ in range(threads):
        assert opened.watched.waiting.acquire(timeout=10)
    reader = threading.Thread(target=opened.read, args=(29 * CHUNK, 10))
    reader.start()
    assert opened.watched.waiting.acquire(timeout=10), "its own get is under way beside theirs"
    assert opened.fetched()[-1] == 29
    assert threads < opened.store.concurrency
    opened.watched.open.set()
    reader.join(10)


# ---- read-ahead


def test_a_sequential_reader_finds_its_chunks_there(opened: Opened) -> None:
    for offset in range(0, 30 * CHUNK, 16384):
        assert opened.read(offset, 16384) == original(offset, 16384)
        opened.idle()
    fetched = opened.fetched()
    assert set(range(30)) <= set(fetched)
    assert len(set(fetched)) == len(fetched), "none twice"


def test_read_ahead_goes_on_while_the_reader_waits(opened: Opened) -> None:
    opened.watched.delay = 0.05
    began = time.monotonic()
    for offset in range(0, 30 * CHUNK, 16384):
        opened.read(offset, 16384)
    elapsed = time.monotonic() - began
    assert elapsed < 30 * 0.05, "as long as one after another"
    fetched = opened.fetched()
    assert len(set(fetched)) == len(fetched)


def test_random_reads_fetch_nothing_else(opened: Opened) -> None:
    for number in (20, 3, 11, 28, 7):
        opened.read(number * CHUNK + 77, 512)
    opened.idle()
    assert opened.fetched() == [20, 3, 11, 28, 7]


def test_a_warm_reader_asks_the_store_for_nothing(opened: Opened) -> None:
    for number in range(CHUNKS):
        opened.read(number * CHUNK, CHUNK)
    opened.idle()
    before = len(opened.watched.gets)
    for number in range(CHUNKS):
        opened.read(number * CHUNK, CHUNK)
    opened.idle()
    assert len(opened.watched.gets) == before
    assert opened.base.present_bytes() == (33 * CHUNK, 33 * CHUNK)


def test_prefetch_brings_chunks_here_once(opened: Opened) -> None:
    opened.base.prefetch(CHUNK - 1, 3 * CHUNK)
    opened.base.prefetch(CHUNK, CHUNK)
    opened.idle()
    assert sorted(opened.fetched()) == [0, 1, 2, 3]
    opened.base.prefetch(0, SIZE)
    opened.idle()
    assert sorted(opened.fetched()) == sorted(opened.ids)


# ---- a cache that is too small, or wrong


def test_a_cache_without_room_only_costs_time(tmp_path: Path, url: str) -> None:
    opened = Opened(url, tmp_path / "cache", cache_size=1000)
    for _ in range(2):
        assert opened.read(3 * CHUNK, CHUNK) == original(3 * CHUNK, CHUNK)
    assert opened.fetched() == [3, 3]
    opened.close()


@pytest.mark.parametrize("damage", ["cut off", "swapped", "zeros"])
def test_a_damaged_cache_file_is_fetched_again(tmp_path: Path, url: str, damage: str) -> None:
    first = Opened(url, tmp_path / "cache")
    assert first.read(3 * CHUNK, 2 * CHUNK) == original(3 * CHUNK, 2 * CHUNK)
    first.idle()
    path = Path(first.cache._path("chunks", first.ids[3]))
    whole = path.read_bytes()
    other = Path(first.cache._path("chunks", first.ids[4])).read_bytes()
    path.write_bytes({"cut off": whole[:500], "swapped": other, "zeros": bytes(len(whole))}[damage])
    if damage == "cut off":  # an open file that shrinks is noticed too
        assert first.read(3 * CHUNK, CHUNK) == original(3 * CHUNK, CHUNK)
        assert first.fetched().count(3) == 2
        path.write_bytes(whole[:500])
    first.close()
    again = Opened(url, tmp_path / "cache")
    assert again.read(3 * CHUNK, 2 * CHUNK) == original(3 * CHUNK, 2 * CHUNK)
    assert again.fetched() == [3]
    again.close()


def test_damaged_nodes_in_the_cache_are_fetched_again(tmp_path: Path, url: str) -> None:
    first = Opened(url, tmp_path / "cache")
    first.read(0, 1)
    first.close()
    nodes = list((tmp_path / "cache" / "meta").glob("??/*"))
    assert nodes
    for node in nodes:
        node.write_bytes(node.read_bytes()[:-5] + b"wrong")
    again = Opened(url, tmp_path / "cache")
    assert again.read(0, CHUNK) == original(0, CHUNK)
    again.close()


# ---- a store that is damaged or away


def test_a_damaged_object_is_named_and_never_served(opened: Opened, url: str) -> None:
    bad = object_file(url, opened.ids[3])
    whole = bad.read_bytes()
    other = object_file(url, opened.ids[4]).read_bytes()
    for wrong in (b"", whole[:50], whole[:-1], whole[:99] + b"\0" + whole[100:], other):
        bad.write_bytes(wrong)
        with pytest.raises(Damaged, match=opened.ids[3].hex()):
            opened.read(3 * CHUNK + 5, 10)
        assert not opened.cache.has(opened.ids[3])
    bad.unlink()
    with pytest.raises(Damaged, match=f"{opened.ids[3].hex()} is missing"):
        opened.read(2 * CHUNK, 3 * CHUNK)
    assert opened.read(4 * CHUNK, CHUNK) == original(4 * CHUNK, CHUNK)
    bad.write_bytes(whole)
    assert opened.read(3 * CHUNK, CHUNK) == original(3 * CHUNK, CHUNK)
    assert opened.base.figures.fetch_errors >= 6


def test_a_store_that_heals_at_once_is_not_noticed(
    opened: Opened, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    bad = object_file(url, opened.ids[3])
    whole = bad.read_bytes()
    bad.write_bytes(whole[:500])
    asked: list[str] = []

    def heal(key: str) -> None:
        asked.append(key)
        if len(asked) == 2:
            bad.write_bytes(whole)

    opened.read(0, 1)
    opened.watched.fail = heal
    assert opened.read(3 * CHUNK, CHUNK) == original(3 * CHUNK, CHUNK)
    assert len(asked) == 2
    (line,) = caplog.messages
    assert opened.ids[3].hex() in line
    assert "fetched again" in line


def test_a_store_that_is_away_is_waited_for_up_to_the_limit(opened: Opened) -> None:
    opened.read(0, CHUNK)
    opened.watched.fail = lambda key: StoreUnavailable("the store is away")
    began = time.monotonic()
    results = run([lambda n=n: opened.read((5 + n) * CHUNK, 10) for n in range(4)] * 3)  # type: ignore[misc]
    assert all(isinstance(result, StoreUnavailable) for result in results)
    assert time.monotonic() - began < 4, "a limit of 1 s, tried once more by who came late"
    assert opened.read(100, 1000) == original(100, 1000), "what is here is served"
    opened.watched.fail = lambda key: None
    assert opened.read(5 * CHUNK, CHUNK) == original(5 * CHUNK, CHUNK)


def test_a_store_that_comes_back_in_time_costs_time_only(opened: Opened) -> None:
    failures = iter([StoreUnavailable("away")] * 3)
    opened.watched.fail = lambda key: next(failures, None)
    assert opened.read(5 * CHUNK, CHUNK) == original(5 * CHUNK, CHUNK)


def test_readers_of_the_cache_go_on_while_the_store_hangs(opened: Opened) -> None:
    opened.read(0, CHUNK)
    opened.watched.open.clear()
    waiting = threading.Thread(target=opened.read, args=(9 * CHUNK, 10), daemon=True)
    waiting.start()
    assert opened.watched.waiting.acquire(timeout=10)
    assert opened.read(10, CHUNK - 10) == original(10, CHUNK - 10)
    assert opened.read(32 * CHUNK, CHUNK) == bytes(CHUNK)
    opened.watched.open.set()
    waiting.join(10)
    assert not waiting.is_alive()


def test_a_failed_fetch_is_not_kept(opened: Opened, tmp_path: Path) -> None:
    opened.watched.fail = lambda key: StoreUnavailable("away")
    with pytest.raises(StoreUnavailable):
        opened.read(3 * CHUNK, 10)
    assert not list((tmp_path / "cache").glob("*/??/*"))


# ---- patches in the index


def test_patched_chunks(tmp_path: Path, url: str) -> None:
    """A version whose index names patches: over a chunk, over a patch, and over zeros."""
    ids = chunk_ids(url)
    with open_store(url) as store:
        repository = Repository.open(store)
        resolved = resolve(url)

        def patch(chain: tuple[bytes, ...], blocks: dict[int, bytes]) -> bytes:
            plain = Patch(chain, blocks).encode(CHUNK)
            oid = object_id(Kind.PATCH, plain)
            repository.write_object(Kind.PATCH, plain)
            assert encode(Kind.PATCH, plain)
            return oid

        first = patch((ids[2],), {0: noise(BLOCK, "a"), 5: noise(BLOCK, "b")})
        second = patch((first, ids[2]), {5: noise(BLOCK, "c"), 6: noise(BLOCK, "d")})
        on_zeros = patch((bytes(32),), {1: noise(BLOCK, "e")})
        changes = [(2, second), (3, patch((ids[3],), {15: noise(BLOCK, "f")})), (33, on_zeros)]
        with ObjectWriter(repository) as writer:
            tree = repository.index(resolved.commit)
            root = write_index(writer, tree, resolved.commit.levels, changes)
            writer.barrier()
    expected = bytearray(original(0, SIZE))
    for at, seed in ((2 * CHUNK, "a"), (2 * CHUNK + 5 * BLOCK, "c"), (2 * CHUNK + 6 * BLOCK, "d"),
                     (3 * CHUNK + 15 * BLOCK, "f"), (33 * CHUNK + BLOCK, "e")):  # fmt: skip
        expected[at : at + BLOCK] = noise(BLOCK, seed)
    opened = Opened(url, tmp_path / "cache")
    commit = opened.base.commit
    opened.base = opened.base.successor(type(commit)(**{**commit.__dict__, "index": root}))
    assert opened.read(0, SIZE) == expected
    opened.idle()
    gets = len(opened.watched.gets)
    assert opened.read(0, SIZE) == expected
    assert len(opened.watched.gets) == gets, "patched once, then from the cache"
    assert list(opened.base.extents(32 * CHUNK, 36 * CHUNK)) == [
        (32 * CHUNK, 33 * CHUNK, False), (33 * CHUNK, 34 * CHUNK, True),
        (34 * CHUNK, 36 * CHUNK, False),
    ]  # fmt: skip
    opened.close()


# ---- extents


def test_extents_come_from_the_index_alone(opened: Opened) -> None:
    pieces = list(opened.base.extents(100, SIZE))
    assert (pieces[0][0], pieces[-1][1]) == (100, SIZE)
    assert [a for _, a, _ in pieces[:-1]] == [b for b, *_ in pieces[1:]]
    holes = [(a, b) for a, b, data in pieces if not data]
    assert holes == [(30 * CHUNK, 38 * CHUNK)]
    assert opened.fetched() == []
    assert list(opened.base.extents(31 * CHUNK + 7, 31 * CHUNK + 8)) == [
        (31 * CHUNK + 7, 31 * CHUNK + 8, False)
    ]

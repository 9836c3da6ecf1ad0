"""The fill: by the profile first, then everything; behind readers, within bounds, never twice."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from horcrux_nbd.chunkstore import open_store
from horcrux_nbd.chunkstore.retry import RetryStore
from horcrux_nbd.errors import Damaged, StoreUnavailable
from horcrux_nbd.repository.objects import object_key
from horcrux_nbd.repository.repository import Repository
from horcrux_nbd.volume import fill
from horcrux_nbd.volume.base import Base
from horcrux_nbd.volume.cache import Cache
from horcrux_nbd.volume.fill import Filler
from horcrux_nbd.volume.options import FillOptions

from .support import CHUNK, Watched, chunk_ids, make_image, noise, resolve

CHUNKS = 600  # in three leaves of the index; 300 to 399 are zeros
LIMIT = 20.0


class World:
    def __init__(self, url: str, folder: Path, cache_size: int | None = None) -> None:
        self.url = url
        self.ids = chunk_ids(self.url)
        self.watched = Watched(open_store(self.url).store)  # type: ignore[attr-defined]
        self.store = RetryStore(self.watched, 1.0)
        self.cache = Cache(folder / "cache", cache_size)
        commit = resolve(self.url).commit
        self.base = Base(Repository(self.store, "", commit.chunk_size), commit, self.cache)
        self.filler: Filler | None = None

    def fill(self, mode: str, profile: tuple[int, ...] = (), rate: int = 0) -> Filler:
        self.filler = Filler(
            lambda: self.base, self.base.demand, FillOptions(mode, rate), lambda: profile
        )
        return self.filler

    def fetched(self) -> list[int]:
        return self.watched.chunk_gets(self.ids)

    def read(self, chunk: int) -> None:
        self.base.read_into(chunk * CHUNK, memoryview(bytearray(4096)))

    def close(self) -> None:
        if self.filler is not None:
            self.filler.stop()
        self.base.close()
        self.store.close()
        self.cache.close()


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    data = {0: noise(300 * CHUNK), 400 * CHUNK: noise(200 * CHUNK, "end")}
    return make_image(tmp_path_factory.mktemp("fill") / "repo", data)


@pytest.fixture
def world(url: str, tmp_path: Path) -> Iterator[World]:
    world = World(url, tmp_path)
    yield world
    world.close()


def test_the_profile_in_its_order(world: World) -> None:
    order = (450, 3, 299, 310, 599, 0)  # 310 is a hole
    filler = world.fill("profile", order)
    assert filler.idle.wait(LIMIT)
    assert sorted(world.fetched()) == [0, 3, 299, 450, 599]
    assert filler.figures()["stage"] == "done"
    assert filler.figures()["profile_chunks"] == 6
    for chunk in order:
        world.read(chunk)
    assert len(world.fetched()) == 5, "a reader finds them here"
    assert world.base.demand.missed == 0


def test_all_of_it_once(world: World) -> None:
    world.read(42)
    world.base._background.wait_idle(LIMIT)
    filler = world.fill("all", (500, 2))
    assert filler.idle.wait(LIMIT)
    assert sorted(world.fetched()) == sorted(world.ids), "each once, and no zeros"
    assert world.watched.most > 1, "several at once"


def test_none(world: World) -> None:
    filler = world.fill("none", (1, 2))
    assert filler.idle.wait(LIMIT)
    assert world.fetched() == []


def test_what_lies_where_readers_miss_comes_first(world: World) -> None:
    world.read(410)
    world.read(412)
    world.watched.gets.clear()
    assert world.fill("all").idle.wait(LIMIT)
    order = [number >> 8 for number in world.fetched()]
    assert order.index(0) > order.count(1) - 1 - fill.WORKERS
    assert set(order[:100]) == {1}


def test_it_goes_on_where_it_was(world: World) -> None:
    """A server that is started again fetches what is missing, and nothing twice."""
    world.watched.delay = 0.005
    filler = world.fill("all")
    while len(world.fetched()) < 60:
        time.sleep(0.005)
    filler.stop()
    deadline = time.monotonic() + LIMIT
    while world.watched.under_way and time.monotonic() < deadline:
        time.sleep(0.005)
    before = len(world.fetched())
    assert before < CHUNKS - 100, "it was ended in the middle"
    world.watched.delay = 0.0
    assert world.fill("all").idle.wait(LIMIT)
    assert sorted(world.fetched()) == sorted(world.ids)


def test_a_reader_is_not_behind_it(world: World) -> None:
    """While a reader waits, the fill begins next to nothing."""
    world.watched.delay = 0.05
    world.fill("all")
    while not world.fetched():
        time.sleep(0.001)
    began = time.monotonic()
    world.read(599)
    assert time.monotonic() - began < 0.5
    assert 599 in world.fetched()


def test_the_rate(world: World) -> None:
    """Noise does not compress: 64 KiB are 64 KiB on the line."""
    filler = world.fill("all", rate=64 * CHUNK)
    time.sleep(1.0)
    filler.stop()
    assert 0 < len(world.fetched()) <= 64 + 40


def test_a_full_cache_ends_it_and_nothing_is_evicted(url: str, tmp_path: Path) -> None:
    world = World(url, tmp_path, cache_size=200 * CHUNK)
    try:
        world.read(599)
        filler = world.fill("all")
        assert filler.idle.wait(LIMIT)
        assert filler.figures()["stage"] == "cache full"
        assert world.cache.size() < 200 * CHUNK
        assert world.cache.has(world.ids[599])
        assert len(world.fetched()) < 200
    finally:
        world.close()


def test_a_store_that_is_away_is_tried_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fill, "AGAIN", 0.05)
    asked = []

    def profile() -> tuple[int, ...]:
        asked.append(1)
        if len(asked) < 3:
            raise StoreUnavailable("away")
        return (7,)

    world.filler = Filler(lambda: world.base, world.base.demand, FillOptions("profile"), profile)
    assert world.filler.idle.wait(LIMIT)
    assert world.fetched() == [7]
    assert len(asked) == 3


def test_a_damaged_chunk_is_left_out_and_the_rest_comes(world: World) -> None:
    harmed = object_key(world.ids[7])
    world.watched.fail = lambda key: Damaged(f"{key} is damaged") if key == harmed else None
    assert world.fill("all").idle.wait(LIMIT)
    assert set(world.fetched()) == set(world.ids)
    assert not world.cache.has(world.ids[7])
    assert world.cache.has(world.ids[8])


def test_stop_is_quick_while_the_store_hangs(world: World) -> None:
    world.watched.open.clear()
    filler = world.fill("all")
    assert world.watched.waiting.acquire(timeout=LIMIT)
    began = time.monotonic()
    filler.stop()
    took = time.monotonic() - began
    world.watched.open.set()
    assert took < 6

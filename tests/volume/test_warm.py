"""The index comes to this host in the background."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from horcrux_nbd.chunkstore import open_store
from horcrux_nbd.errors import StoreUnavailable
from horcrux_nbd.names import Version
from horcrux_nbd.repository.repository import Repository
from horcrux_nbd.units import KiB
from horcrux_nbd.volume import warm
from horcrux_nbd.volume.base import Base
from horcrux_nbd.volume.cache import META, Cache
from horcrux_nbd.volume.warm import IndexWarmer
from tests.volume.support import IMAGE, Watched, make_image, noise

CHUNK = 64 * KiB
LIMIT = 30


class Setting:
    """An image with three leaves below a root, and a cache that has nothing of it."""

    def __init__(self, folder: Path) -> None:
        pieces = {number * 256 * CHUNK: noise(CHUNK, number) for number in range(3)}
        url = make_image(folder / "repo", pieces, size=600 * CHUNK)
        self.store = Watched(open_store(url))
        self.cache = Cache(folder / "cache")
        repository = Repository.open(self.store)
        self.base = Base(repository, repository.resolve(Version(IMAGE)).commit, self.cache)
        self.store.gets.clear()

    def nodes(self) -> int:
        return sum(entry.area == META for entry in self.cache.entries())


@pytest.fixture
def setting(tmp_path: Path) -> Iterator[Setting]:
    setting = Setting(tmp_path)
    yield setting
    setting.base.close()
    setting.store.close()


def test_all_nodes_and_no_chunk(setting: Setting) -> None:
    warmer = IndexWarmer(setting.base)
    assert warmer.done.wait(LIMIT)
    warmer.stop()
    assert setting.nodes() == len(setting.store.gets) == 4


def test_no_more_than_it_may(setting: Setting) -> None:
    warmer = IndexWarmer(setting.base, most=2)
    assert warmer.done.wait(LIMIT)
    assert setting.nodes() == 2  # the root, and one leaf
    warmer.stop()


def test_what_is_here_is_not_fetched(setting: Setting) -> None:
    IndexWarmer(setting.base).done.wait(LIMIT)
    setting.store.gets.clear()
    warmer = IndexWarmer(setting.base)
    assert warmer.done.wait(LIMIT)
    assert setting.store.gets == []


def test_a_store_that_is_away_is_asked_again(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warm, "AGAIN", 0.05)
    failures = [StoreUnavailable("away")] * 3

    def fail(key: str) -> Exception | None:
        return failures.pop() if failures else None

    setting.store.fail = fail
    warmer = IndexWarmer(setting.base)
    assert warmer.done.wait(LIMIT)
    assert setting.nodes() == 4


def test_it_stops_while_the_store_hangs(setting: Setting) -> None:
    setting.store.open.clear()
    warmer = IndexWarmer(setting.base)
    assert setting.store.waiting.acquire(timeout=LIMIT)
    setting.store.open.set()
    warmer.stop()
    assert not warmer._thread.is_alive()

"""Operations at once, right of way, and bandwidth."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from horcrux_nbd.chunkstore.limit import LimitedStore
from horcrux_nbd.chunkstore.local import LocalStore
from horcrux_nbd.chunkstore.url import parse_store_url
from horcrux_nbd.chunkstore.wrapper import T, WrapperStore
from horcrux_nbd.errors import StoreError

from .faulty import Counts, IsSlow


class Gate(WrapperStore):
    """Operations stay inside until `open` is set; `inside` holds them meanwhile."""

    def __init__(self, store: LocalStore) -> None:
        super().__init__(store)
        self.open = threading.Event()
        self.inside: list[str] = []
        self.changed = threading.Condition()

    def _do(self, what: str, operation: Callable[[], T]) -> T:
        with self.changed:
            self.inside.append(what)
            self.changed.notify_all()
        assert self.open.wait(20)
        return operation()

    def wait_for(self, count: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.inside) >= count, 20)


@pytest.fixture
def local(tmp_path: Path) -> LocalStore:
    store = LocalStore(parse_store_url(str(tmp_path / "store")))
    store.prepare()
    for i in range(20):
        store.put(f"k{i}", b"x" * 1000)
    return store


def test_no_more_at_once_than_allowed(local: LocalStore) -> None:
    counts = Counts(IsSlow(local, 0.005))
    store = LimitedStore(counts, 3)
    assert store.concurrency == 3
    with ThreadPoolExecutor(12) as threads:
        list(threads.map(lambda i: store.get(f"k{i % 20}"), range(60)))
    assert counts.most == 3
    assert len(counts.calls) == 60


def test_the_background_leaves_a_place_free(local: LocalStore) -> None:
    gate = Gate(local)
    store = LimitedStore(gate, 4)
    background = store.background()
    with ThreadPoolExecutor(12) as threads:
        behind = [threads.submit(background.get, f"k{i}") for i in range(8)]
        gate.wait_for(3)
        # All three of its places are taken, and five more wait; a reader gets through at once.
        ahead = threads.submit(store.get, "k19")
        gate.wait_for(4)
        assert gate.inside[3] == "get k19"
        assert len(gate.inside) == 4
        gate.open.set()
        for future in [*behind, ahead]:
            assert future.result(20) == b"x" * 1000


def test_readers_go_before_the_background(local: LocalStore) -> None:
    gate = Gate(local)
    store = LimitedStore(gate, 2)
    background = store.background()
    with ThreadPoolExecutor(12) as threads:
        first = [threads.submit(store.get, f"k{i}") for i in range(2)]
        gate.wait_for(2)
        late = [threads.submit(background.get, f"k{i}") for i in range(10, 13)]
        soon = [threads.submit(store.get, f"k{i}") for i in range(2, 5)]
        with store._places._changed:
            assert store._places._changed.wait_for(lambda: store._places._waiting == 3, 20)
        gate.open.set()
        for future in [*first, *late, *soon]:
            future.result(20)
    order = [int(what.removeprefix("get k")) for what in gate.inside[2:]]
    assert sorted(order[:3]) == [2, 3, 4]


def test_one_place_serves_the_background_too(local: LocalStore) -> None:
    store = LimitedStore(local, 1)
    assert store.background().get("k1") == b"x" * 1000


def test_no_places_is_an_error(local: LocalStore) -> None:
    with pytest.raises(ValueError, match="0 operations"):
        LimitedStore(local, 0)


@pytest.mark.parametrize("way", ["get", "put"])
def test_bandwidth(local: LocalStore, way: str) -> None:
    store = LimitedStore(local, 4, download=20_000, upload=20_000)
    began = time.monotonic()
    with ThreadPoolExecutor(4) as threads:
        if way == "get":
            list(threads.map(lambda i: store.get(f"k{i}"), range(12)))
        else:
            list(threads.map(lambda i: store.put(f"p{i}", b"x" * 1000), range(12)))
    # 12,000 bytes at 20,000 a second; up to four pass together before the first is paid.
    assert 0.35 < time.monotonic() - began < 3


def test_one_way_does_not_hold_up_the_other(local: LocalStore) -> None:
    store = LimitedStore(local, 4, upload=1000)
    store.put("p", b"x" * 60_000)  # a debt of a minute
    began = time.monotonic()
    for i in range(20):
        store.get(f"k{i}")
    assert time.monotonic() - began < 5


def test_close_ends_the_waiting(local: LocalStore) -> None:
    gate = Gate(local)
    store = LimitedStore(gate, 1)
    with ThreadPoolExecutor(4) as threads:
        inside = threads.submit(store.get, "k0")
        gate.wait_for(1)
        waiting = [threads.submit(store.get, "k1"), threads.submit(store.background().get, "k2")]
        store.close()
        for future in waiting:
            with pytest.raises(StoreError, match="closed"):
                future.result(20)
        gate.open.set()
        assert inside.result(20)


def test_closing_the_background_closes_nothing(local: LocalStore) -> None:
    store = LimitedStore(local, 2)
    store.background().close()
    assert store.get("k1") == b"x" * 1000

"""Waiting for a store that is away: what is tried again, for how long, and who won."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

import pytest

from horcrux_nbd.chunkstore.local import LocalStore
from horcrux_nbd.chunkstore.retry import RetryStore
from horcrux_nbd.chunkstore.url import parse_store_url
from horcrux_nbd.errors import (
    KeyExists,
    KeyNotFound,
    StoreError,
    StoreFull,
    StoreMissing,
    StoreRefused,
    StoreUnavailable,
)

from .faulty import Counts, Fails, LosesAnswers


@pytest.fixture
def local(tmp_path: Path) -> LocalStore:
    store = LocalStore(parse_store_url(str(tmp_path / "store")))
    store.prepare()
    return store


def quick(store: Fails | Counts) -> RetryStore:
    return RetryStore(store, 20.0, first_pause=0.001, longest_pause=0.002)


@pytest.mark.parametrize("times", [1, 2, 7])
def test_every_operation_is_tried_again(local: LocalStore, times: int) -> None:
    fails = Fails(local)
    store = quick(fails)
    for operation in (
        store.prepare,
        store.check,
        lambda: store.put("a", b"1"),
        lambda: store.put_exclusive("b", b"2"),
        lambda: store.get("a"),
        lambda: store.stat("a"),
        lambda: store.exists("a"),
        lambda: store.children(""),
        lambda: store.delete("b"),
    ):
        fails.fail(1, times)
        operation()
    assert fails.failures == 9 * times
    assert store.get("a") == b"1"


@pytest.mark.parametrize(
    "error", [StoreError, StoreRefused, StoreMissing, StoreFull, lambda _: KeyNotFound("u", "k")]
)
def test_other_errors_are_final(local: LocalStore, error: type[StoreError]) -> None:
    local.put("a", b"1")
    fails = Fails(local, times=None, error=error)
    with pytest.raises(StoreError):
        quick(fails).get("a")
    assert fails.failures == 1


def test_the_limit_is_a_time(local: LocalStore) -> None:
    store = RetryStore(Fails(local, times=None), 0.5, first_pause=0.01, longest_pause=0.05)
    began = time.monotonic()
    with pytest.raises(StoreUnavailable, match=r"test: get a fails \(gave up after \d+ attempts"):
        store.get("a")
    assert 0.3 < time.monotonic() - began < 1.5


def test_no_attempt_begins_that_could_end_too_late(local: LocalStore) -> None:
    fails = Fails(local, times=None)
    fails.store.timeout = 5.0
    store = RetryStore(fails, 5.0, first_pause=0.01)
    began = time.monotonic()
    with pytest.raises(StoreUnavailable, match="1 attempt "):
        store.get("a")
    assert time.monotonic() - began < 1
    assert store.timeout == 5.0


def test_pauses_grow_and_differ(local: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    class Event(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            assert timeout is not None
            pauses.append(timeout)
            return False

    store = RetryStore(Fails(local, times=12), 1000, stop=Event(), first_pause=0.1, longest_pause=2)
    store.put("a", b"1")
    ceilings = [min(0.1 * 2**i, 2) for i in range(12)]
    assert all(c / 2 <= p <= c for p, c in zip(pauses, ceilings, strict=True))
    assert len({round(p / c, 6) for p, c in zip(pauses, ceilings, strict=True)}) > 3


def test_it_grows_louder(local: LocalStore, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "horcrux_nbd.chunkstore")
    quick(Fails(local, times=6)).put("a", b"1")
    levels = [record.levelno for record in caplog.records]
    assert levels[0] == logging.DEBUG
    assert levels == sorted(levels)
    assert levels[-1] == logging.WARNING
    assert "works again after 7 attempts" in caplog.records[-1].message


def test_success_says_nothing(local: LocalStore, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "horcrux_nbd.chunkstore")
    quick(Counts(local)).put("a", b"1")
    assert not caplog.records


def test_stop_ends_the_waiting(local: LocalStore) -> None:
    stop = threading.Event()
    store = RetryStore(Fails(local, times=None), 60, stop=stop, first_pause=30)
    threading.Timer(0.1, stop.set).start()
    began = time.monotonic()
    with pytest.raises(StoreUnavailable, match="shutting down"):
        store.get("a")
    assert time.monotonic() - began < 10


def test_close_ends_the_waiting(local: LocalStore) -> None:
    store = RetryStore(Fails(local, times=None), 60, first_pause=30)
    threading.Timer(0.1, store.close).start()
    with pytest.raises(StoreUnavailable, match="shutting down"):
        store.get("a")


def test_a_lost_answer_of_ours_is_a_win(local: LocalStore) -> None:
    store = quick(LosesAnswers(local, times=2))
    store.put_exclusive("refs/1", b"token of mine")
    assert local.get("refs/1") == b"token of mine"


def test_a_lost_answer_and_another_one_won(local: LocalStore) -> None:
    """Our first attempt fails without effect, somebody else comes between, and we come again."""

    class Between(Fails):
        def put_exclusive(self, key: str, data: bytes) -> None:
            if not self.failures:
                local.put(key, b"token of another")
            super().put_exclusive(key, data)

    with pytest.raises(KeyExists):
        quick(Between(local)).put_exclusive("refs/1", b"token of mine")
    assert local.get("refs/1") == b"token of another"


def test_what_was_there_before_is_not_ours_even_if_alike(local: LocalStore) -> None:
    local.put("refs/1", b"same")
    with pytest.raises(KeyExists):
        quick(Counts(local)).put_exclusive("refs/1", b"same")


def test_reading_back_who_won_is_tried_again_too(local: LocalStore) -> None:
    lost = LosesAnswers(local, times=1, matching="put")
    fails = Fails(lost, times=2, matching="get")
    quick(fails).put_exclusive("refs/1", b"mine")
    assert (lost.failures, fails.failures) == (1, 2)


@pytest.mark.parametrize("limit", [None, 3, 10, 12])
def test_a_listing_goes_on_where_it_broke(local: LocalStore, limit: int | None) -> None:
    keys = [f"a/{i:02}" for i in range(10)]
    for key in keys:
        local.put(key, b"")
    for nth in range(1, 11):
        fails = Fails(local, nth, 2)
        assert [s.key for s in quick(fails).list("a/", "", limit)] == keys[:limit]


def test_a_listing_has_its_limit_too(local: LocalStore) -> None:
    for i in range(4):
        local.put(f"a{i}", b"")
    store = RetryStore(Fails(local, 3, None), 0.2, first_pause=0.01, longest_pause=0.02)
    listing = store.list()
    assert [next(listing).key, next(listing).key] == ["a0", "a1"]
    with pytest.raises(StoreUnavailable, match="gave up"):
        next(listing)

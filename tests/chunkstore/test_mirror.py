"""Several stores with the same objects."""

from __future__ import annotations

from pathlib import Path

import pytest

from horcrux_nbd.chunkstore.local import LocalStore
from horcrux_nbd.chunkstore.mirror import MirrorStore
from horcrux_nbd.chunkstore.url import parse_store_url
from horcrux_nbd.errors import KeyNotFound, StoreRefused, StoreUnavailable

from .faulty import Counts, Fails, FlipsLastByte


@pytest.fixture
def stores(tmp_path: Path) -> list[LocalStore]:
    made = [LocalStore(parse_store_url(str(tmp_path / name))) for name in ("one", "two", "three")]
    for number, store in enumerate(made):
        store.prepare()
        for key in ("a/1", "a/2", "b"):
            store.put(key, b"%d" % number)
    return made


def test_reads_come_from_the_first(stores: list[LocalStore]) -> None:
    mirror = MirrorStore(stores)
    assert mirror.get("b") == b"0"
    assert mirror.url == stores[0].url


def test_a_missing_object_comes_from_the_next(stores: list[LocalStore]) -> None:
    stores[0].delete("b")
    mirror = MirrorStore(stores)
    assert mirror.get("b") == b"1"
    assert mirror.exists("b")
    assert mirror.stat("b").size == 1
    stores[1].delete("b")
    assert mirror.get("b") == b"2"
    stores[2].delete("b")
    assert not mirror.exists("b")
    with pytest.raises(KeyNotFound):
        mirror.get("b")


@pytest.mark.parametrize("error", [StoreUnavailable, StoreRefused])
def test_a_store_that_is_away(stores: list[LocalStore], error: type[StoreRefused]) -> None:
    mirror = MirrorStore([Fails(stores[0], times=None, error=error), *stores[1:]])
    assert mirror.get("b") == b"1"
    assert mirror.children("a/") == ["1", "2"]
    assert mirror.exists("b")
    mirror.check()


def test_not_found_is_said_only_if_all_say_so(stores: list[LocalStore]) -> None:
    mirror = MirrorStore([stores[0], Fails(stores[1], times=None)])
    with pytest.raises(StoreUnavailable):
        mirror.get("nothing")
    with pytest.raises(StoreUnavailable):
        mirror.exists("nothing")


def test_a_store_that_was_away_is_not_waited_for_each_time(stores: list[LocalStore]) -> None:
    away = Fails(stores[0], times=None)
    mirror = MirrorStore([away, stores[1]], ask_again=3600)
    for _ in range(10):
        assert mirror.get("b") == b"1"
    assert away.failures == 1
    stores[1].delete("b")
    away.heal()
    assert mirror.get("b") == b"0"  # asked last, but asked


def test_a_store_that_was_away_is_asked_again_later(stores: list[LocalStore]) -> None:
    mirror = MirrorStore([Fails(stores[0], times=1), stores[1]], ask_again=0)
    assert [mirror.get("b"), mirror.get("b")] == [b"1", b"0"]


def test_writes_go_to_the_first_only(stores: list[LocalStore]) -> None:
    mirror = MirrorStore(stores)
    mirror.put("new", b"x")
    mirror.put_exclusive("new2", b"x")
    mirror.delete("b")
    assert stores[0].exists("new")
    assert stores[0].exists("new2")
    assert not stores[0].exists("b")
    assert not stores[1].exists("new")
    assert not stores[1].exists("new2")
    assert stores[1].exists("b")
    with pytest.raises(StoreUnavailable):
        MirrorStore([Fails(stores[0], times=None), stores[1]]).put("x", b"")
    assert not stores[1].exists("x")


def test_copies(stores: list[LocalStore]) -> None:
    stores[1].delete("b")
    mirror = MirrorStore([FlipsLastByte(stores[0]), *stores[1:]])
    assert [data for _, data in mirror.copies("b")] == [b"1", b"2"]
    assert [store.url for store, _ in mirror.copies("b")] == [stores[0].url, stores[2].url]
    assert list(mirror.copies("nothing")) == []


def test_copies_are_read_one_by_one(stores: list[LocalStore]) -> None:
    second = Counts(stores[1])
    for _, data in MirrorStore([stores[0], second]).copies("b"):
        assert data == b"0"
        break
    assert second.calls == []


@pytest.mark.parametrize("limit", [None, 2])
def test_a_listing_goes_on_with_the_next(stores: list[LocalStore], limit: int | None) -> None:
    for nth in (1, 2, 3):
        mirror = MirrorStore([Fails(stores[0], nth, None), stores[1]])
        assert [stat.key for stat in mirror.list("", "", limit)] == ["a/1", "a/2", "b"][:limit]


def test_a_listing_that_nobody_can_give(stores: list[LocalStore]) -> None:
    mirror = MirrorStore([Fails(store, times=None) for store in stores])
    with pytest.raises(StoreUnavailable):
        list(mirror.list())


def test_no_stores() -> None:
    with pytest.raises(ValueError, match="no stores"):
        MirrorStore([])

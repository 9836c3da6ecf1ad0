from __future__ import annotations

from horcrux_nbd.repository.index import FANOUT
from horcrux_nbd.volume import demand
from horcrux_nbd.volume.demand import Demand


def test_the_order_of_the_first_reads() -> None:
    seen = Demand()
    for chunk in (5, 3, 5, 9, 3):
        seen.touch(chunk)
    assert seen.touched() == [5, 3, 9]


def test_it_is_bounded(monkeypatch: object) -> None:
    seen = Demand()
    for chunk in range(demand.MOST_TOUCHED + 10):
        seen.touch(chunk)
    assert seen.touched() == list(range(demand.MOST_TOUCHED))


def test_who_waits() -> None:
    seen = Demand()
    with seen.miss(1):
        with seen.miss(2):
            assert seen.waiting == 2
        assert seen.waiting == 1
    assert (seen.waiting, seen.missed) == (0, 2)


def test_the_hottest_leaf() -> None:
    seen = Demand()
    assert seen.hottest(set()) is None
    for chunk in (0, FANOUT, FANOUT + 7, 9 * FANOUT):
        with seen.miss(chunk):
            pass
    assert seen.hottest(set()) == 1
    assert seen.hottest({1}) in (0, 9)
    assert seen.hottest({0, 1, 9}) is None
    for chunk in range(demand.LATELY):  # what was long ago is forgotten
        with seen.miss(5 * FANOUT + chunk % 7):
            pass
    assert seen.hottest({5}) is None

"""The oracle finds what it is there for: each kind of loss, once."""

from __future__ import annotations

from tests.volume.support import noise

from .oracle import SECTOR, Oracle

IMAGE = noise(20 * SECTOR)


def written(oracle: Oracle, image: bytearray, sectors: range, *, zero: bool = False) -> int:
    version = oracle.begins(sectors, zero=zero)
    data = bytes(len(sectors) * SECTOR) if zero else oracle.data(sectors, version)
    image[sectors.start * SECTOR : sectors.stop * SECTOR] = data
    oracle.acknowledged(sectors)
    return version


def flushed(oracle: Oracle) -> None:
    oracle.flushed(oracle.now())


def test_what_was_acknowledged_survives_a_kill() -> None:
    oracle, image = Oracle(IMAGE), bytearray(IMAGE)
    assert oracle.survived(bytes(image), power_cut=False) == []
    before = bytes(image)
    version = written(oracle, image, range(3, 5))
    (third, fourth) = oracle.survived(before, power_cut=False)
    assert third == f"sector 3: original of sector 3, allowed [{version}]"
    assert fourth.startswith("sector 4:")


def test_a_power_cut_may_take_what_was_not_flushed() -> None:
    for back in (0, 1, 2):
        oracle, image = Oracle(IMAGE), bytearray(IMAGE)
        states = [bytes(image)]
        for number in range(2):
            written(oracle, image, range(3, 4))
            states.append(bytes(image))
            if number == 0:
                flushed(oracle)
        assert bool(oracle.survived(states[2 - back], power_cut=True)) == (back == 2)


def test_neither_zeros_nor_garbage_nor_a_neighbour_is_allowed() -> None:
    for wrong in (bytes(SECTOR), noise(SECTOR, "x"), IMAGE[:SECTOR]):
        oracle, image = Oracle(IMAGE), bytearray(IMAGE)
        image[7 * SECTOR : 8 * SECTOR] = wrong
        (line,) = oracle.survived(bytes(image), power_cut=True)
        assert line.startswith("sector 7:")
    oracle, image = Oracle(IMAGE), bytearray(IMAGE)
    written(oracle, image, range(7, 8), zero=True)
    assert oracle.survived(bytes(image), power_cut=True) == []


def test_after_a_kill_a_power_cut_may_go_back_to_what_was_flushed() -> None:
    oracle, image = Oracle(IMAGE), bytearray(IMAGE)
    written(oracle, image, range(1))
    flushed(oracle)
    old = bytes(image)
    written(oracle, image, range(1))
    assert oracle.survived(bytes(image), power_cut=False) == []
    assert oracle.survived(old, power_cut=True) == []
    assert oracle.survived(bytes(image), power_cut=True) != [], "a cut settles it"


def test_a_request_under_way_may_be_there_or_not() -> None:
    for there in (True, False):
        oracle, image = Oracle(IMAGE), bytearray(IMAGE)
        version = oracle.begins(range(2, 3))
        if there:
            image[2 * SECTOR : 3 * SECTOR] = oracle.data(range(2, 3), version)
        assert oracle.survived(bytes(image), power_cut=False) == []


def test_a_version_is_one_moment() -> None:
    oracle, image = Oracle(IMAGE), bytearray(IMAGE)
    since = oracle.now()
    states = [bytes(image)]
    for sector in (1, 2, 3):
        written(oracle, image, range(sector, sector + 1))
        states.append(bytes(image))
    allowed = oracle.allowed(since)
    writers = [("a writer", range(10))]
    for state in states:
        assert oracle.one_moment(state, allowed, writers) == []
    image[2 * SECTOR : 3 * SECTOR] = IMAGE[2 * SECTOR : 3 * SECTOR]  # the third without the second
    (line,) = oracle.one_moment(bytes(image), allowed, writers)
    assert "sector 2: version 0, but a writer wrote 2 there before 3" in line
    assert oracle.one_moment(bytes(image), allowed, [("a", [1, 2]), ("b", [3])]) == []

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable

import pytest

from horcrux_nbd.errors import Damaged, StoreUnavailable
from horcrux_nbd.volume import fetch
from horcrux_nbd.volume.fetch import Background, SingleFlight

OID = b"\x01" * 32


def start(*work: Callable[[], object]) -> list[threading.Thread]:
    threads = [threading.Thread(target=task, daemon=True) for task in work]
    for thread in threads:
        thread.start()
    return threads


def join(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive(), "hangs"


def until(condition: Callable[[], bool], limit: float = 10) -> None:
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


class Source:
    """Something to fetch from that waits for `go_on`."""

    def __init__(self) -> None:
        self.calls: list[bytes] = []
        self.fetching, self.go_on = threading.Event(), threading.Event()
        self.error: BaseException | None = None

    def fetch(self, oid: bytes) -> bytes:
        self.calls.append(oid)
        self.fetching.set()
        assert self.go_on.wait(10)
        if self.error is not None:
            raise self.error
        return oid * 2


def waiters(flights: SingleFlight, source: Source, count: int) -> tuple[list[object], list[int]]:
    """`count` callers at once, the first of which leads; (their outcomes, indices) when done."""
    outcomes: list[object] = [None] * count

    def work(index: int) -> None:
        try:
            outcomes[index] = flights.get(OID)
        except BaseException as error:
            outcomes[index] = error

    threads = start(lambda: work(0))
    assert source.fetching.wait(10)
    threads += start(*(lambda n=n: work(n) for n in range(1, count)))
    # Let them all be waiting: none has ended, and the flight is the one of the first.
    until(lambda: all(thread.is_alive() for thread in threads))
    time.sleep(0.05)
    source.go_on.set()
    join(threads)
    return outcomes, list(range(count))


def test_one_fetch_for_all_who_wait() -> None:
    source = Source()
    outcomes, _ = waiters(SingleFlight(source.fetch, 10), source, 32)
    assert outcomes == [OID * 2] * 32
    assert source.calls == [OID]


def test_different_objects_are_fetched_at_the_same_time() -> None:
    barrier = threading.Barrier(8)

    def fetch_(oid: bytes) -> bytes:
        barrier.wait(10)  # breaks if they came one after another
        return oid

    flights = SingleFlight(fetch_, 10)
    join(start(*(lambda n=n: flights.get(bytes([n]) * 32) for n in range(8))))
    assert not barrier.broken


def test_all_get_the_error_of_the_fetch_and_the_next_tries_again() -> None:
    source = Source()
    source.error = Damaged("object is damaged")
    flights = SingleFlight(source.fetch, 10)
    outcomes, _ = waiters(flights, source, 5)
    assert outcomes == [source.error] * 5
    assert len(source.calls) == 1
    source.error = None
    assert flights.get(OID) == OID * 2


def test_who_came_late_to_a_flight_that_failed_tries_once_more() -> None:
    """It may have waited but a moment, and the store may be back."""
    source = Source()
    source.error = StoreUnavailable("the store is away")
    flights = SingleFlight(source.fetch, 10)
    outcomes, _ = waiters(flights, source, 5)
    assert all(isinstance(outcome, StoreUnavailable) for outcome in outcomes)
    assert 2 <= len(source.calls) <= 5, "once more, and not for ever"


def test_who_waited_long_gets_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "PATIENCE", 0.0)
    source = Source()
    source.error = StoreUnavailable("the store is away")
    outcomes, _ = waiters(SingleFlight(source.fetch, 10), source, 5)
    assert outcomes == [source.error] * 5
    assert len(source.calls) == 1


def test_a_waiter_gives_up_when_the_fetch_hangs() -> None:
    source = Source()
    flights = SingleFlight(source.fetch, 0.05)
    leader = start(lambda: flights.get(OID))
    assert source.fetching.wait(10)
    with pytest.raises(StoreUnavailable, match=f"object {OID.hex()} did not come within"):
        flights.get(OID)
    source.go_on.set()
    join(leader)


def test_the_result_is_present_before_the_flight_ends() -> None:
    """Else whoever comes right after the flight finds nothing, and fetches again."""
    present: set[bytes] = set()
    calls: list[bytes] = []

    def fetch_(oid: bytes) -> bytes:
        calls.append(oid)
        present.add(oid)
        return oid

    flights = SingleFlight(fetch_, 10)

    def reader() -> None:
        for number in range(200):
            oid = number.to_bytes(32)
            if oid not in present:
                flights.get(oid)

    join(start(*[reader] * 4))
    assert len(calls) >= 200
    assert set(calls) == present


def test_a_failed_flight_leaves_nothing_behind() -> None:
    """A traceback holds the buffers of the readers above it, which are nbdkit's own memory."""

    class Buffer:
        gone = False

        def __del__(self) -> None:
            Buffer.gone = True

    def fail(oid: bytes) -> bytes:
        raise Damaged("object is damaged")

    flights = SingleFlight(fail, 10)

    def read() -> None:
        buffer = Buffer()
        try:
            flights.get(OID)
        finally:
            assert buffer

    gc.disable()
    try:
        try:
            read()
        except Damaged as error:
            del error
        assert Buffer.gone, "a cycle keeps it until the collector comes"
    finally:
        gc.enable()


# ---- in the background


def test_the_newest_wish_comes_first() -> None:
    done: list[int] = []
    busy, go_on = threading.Event(), threading.Event()

    def work(number: int) -> None:
        if number == 0:
            busy.set()
            assert go_on.wait(10)
        done.append(number)

    background = Background(work, 1)
    background.wish([0])
    assert busy.wait(10)
    background.wish([1, 2, 3])
    background.wish([10, 11])
    background.wish([3, 10])  # known already
    go_on.set()
    assert background.wait_idle(10)
    assert done == [0, 10, 11, 1, 2, 3]
    background.stop()


def test_old_wishes_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "MAX_WISHES", 4)
    done: list[int] = []
    busy, go_on = threading.Event(), threading.Event()

    def work(number: int) -> None:
        busy.set()
        assert go_on.wait(10)
        done.append(number)

    background = Background(work, 1)
    background.wish([0])
    assert busy.wait(10)
    background.wish(range(1, 4))
    background.wish(range(4, 7))
    go_on.set()
    assert background.wait_idle(10)
    assert done == [0, 4, 5, 6, 1]
    background.wish([2])
    assert background.wait_idle(10)
    assert done[-1] == 2, "a wish that was forgotten can be made again"
    background.stop()


def test_threads_begin_with_the_first_wish_and_there_are_no_more_than_allowed() -> None:
    before = threading.active_count()
    barrier = threading.Barrier(4)

    def work(number: int) -> None:
        barrier.wait(10)

    background = Background(work, 4)
    assert threading.active_count() == before, "nbdkit forks after the volume was opened"
    background.wish(range(8))
    assert background.wait_idle(10)
    assert threading.active_count() == before + 4
    background.stop()
    assert threading.active_count() == before


def test_a_failed_wish_harms_nobody() -> None:
    done: list[int] = []

    def work(number: int) -> None:
        if number == 1:
            raise StoreUnavailable("away")
        done.append(number)

    background = Background(work, 2)
    background.wish(range(4))
    assert background.wait_idle(10)
    assert sorted(done) == [0, 2, 3]
    background.wish([1])
    assert background.wait_idle(10)
    background.stop()


def test_a_stop_ends_work_and_waits_a_limited_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "STOP_LIMIT", 0.2)
    busy, go_on = threading.Event(), threading.Event()
    done: list[int] = []

    def work(number: int) -> None:
        busy.set()
        assert go_on.wait(10)
        done.append(number)

    background = Background(work, 4)
    background.wish(range(20))
    assert busy.wait(10)
    began = time.monotonic()
    background.stop()
    assert 0.15 < time.monotonic() - began < 1, "for all threads together"
    go_on.set()
    background.wish([99])
    assert background.wait_idle(10)
    assert len(done) <= 4
    assert 99 not in done

"""The window: wide where the line is free, narrow where fetches wait for each other."""

from __future__ import annotations

import threading

from horcrux_nbd.volume.window import MEMORY, Window


class Line:
    """A line with a latency and so many fetches at once; more wait in a queue."""

    def __init__(self, latency: float, carries: float) -> None:
        self.now, self.latency, self.carries = 0.0, latency, carries

    def clock(self) -> float:
        return self.now

    def rounds(self, window: Window, count: int) -> float:
        """The mean size of the window over the later half of `count` rounds."""
        sizes = []
        for number in range(count):
            size = window.size
            began = [window.enter(lambda: 0) for _ in range(size)]
            self.now += self.latency * max(1.0, size / self.carries)
            for one in began:
                assert one is not None
                window.leave(one)
            if number >= count // 2:
                sizes.append(size)
        return sum(sizes) / len(sizes)


def test_it_opens_to_what_the_line_carries() -> None:
    line = Line(0.020, 1000)
    window = Window(32, line.clock)
    assert line.rounds(window, 20) == 32


def test_it_closes_where_a_queue_begins() -> None:
    line = Line(0.020, 6)
    window = Window(32, line.clock)
    assert 6 <= line.rounds(window, 100) <= 16


def test_it_shrinks_where_others_come_onto_the_line() -> None:
    line = Line(0.020, 1000)
    window = Window(32, line.clock)
    line.rounds(window, 20)
    line.carries = 4
    assert line.rounds(window, 60) <= 12


def test_a_line_that_became_slower_is_learnt() -> None:
    line = Line(0.005, 1000)
    window = Window(32, line.clock)
    line.rounds(window, 20)
    line.latency = 0.080
    assert line.rounds(window, int(3 * MEMORY / 0.080)) > 16


def test_readers_come_first() -> None:
    window = Window(8)
    waiting = [1]
    first = [window.enter(lambda: 1, 0.5) for _ in range(2)]  # half of the four of the beginning
    entered = threading.Event()

    def another() -> None:
        if window.enter(lambda: waiting[0], 0.5) is not None:
            entered.set()

    thread = threading.Thread(target=another)
    thread.start()
    assert not entered.wait(0.2)
    waiting[0] = 0
    assert entered.wait(5)
    thread.join(5)
    assert None not in first


def test_none_enters_while_a_reader_waits_alone() -> None:
    window = Window(8)
    thread = threading.Thread(target=lambda: window.enter(lambda: 1, 0.0))
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
    window.stop()
    thread.join(5)
    assert not thread.is_alive()
    assert window.enter(lambda: 0) is None

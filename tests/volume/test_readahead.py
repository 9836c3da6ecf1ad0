from __future__ import annotations

import itertools
import random
import threading

from horcrux_nbd.units import KiB, MiB
from horcrux_nbd.volume.readahead import LAST_WINDOW, STREAMS, ReadAhead

CHUNK = 512 * KiB


def follow(ahead: ReadAhead, chunks: range) -> list[range]:
    return [ahead.observe(n, n) for n in chunks]


def test_a_sequential_reader_is_read_ahead_of_without_gap_or_twice() -> None:
    ahead = ReadAhead(CHUNK, 1000)
    asked = list(itertools.chain(*follow(ahead, range(10, 100))))
    assert asked == list(range(12, 99 + 1 + LAST_WINDOW // CHUNK)), "each once, ascending"


def test_the_window_doubles_up_to_its_limit() -> None:
    ahead = ReadAhead(64 * KiB, 10_000)
    lead = [(span.stop - 1 - n) * 64 * KiB for n, span in enumerate(follow(ahead, range(300))) if n]
    assert lead[:4] == [128 * KiB, 256 * KiB, 512 * KiB, MiB]
    assert lead[-1] == LAST_WINDOW


def test_small_reads_within_a_chunk_ask_once() -> None:
    ahead = ReadAhead(CHUNK, 1000)
    asked = [ahead.observe(chunk, chunk) for chunk in range(5) for _ in range(128)]
    flat = list(itertools.chain(*asked))
    assert len(flat) == len(set(flat))
    assert sum(bool(span) for span in asked) == 4


def test_streams_that_take_turns_keep_their_windows() -> None:
    """A backup beside a scan: each read of the one comes between two of the other."""
    ahead = ReadAhead(CHUNK, 100_000)
    starts = [1000 * n for n in range(STREAMS)]
    asked: dict[int, list[int]] = {start: [] for start in starts}
    for step in range(60):
        for start in starts:
            for _ in range(4):  # four reads of each chunk
                asked[start] += ahead.observe(start + step, start + step)
    for start, chunks in asked.items():
        assert chunks == list(range(start + 2, start + 60 + LAST_WINDOW // CHUNK))


def test_a_random_reader_costs_nothing() -> None:
    ahead = ReadAhead(CHUNK, 1 << 27)
    chance = random.Random(1)
    asked = [ahead.observe(n, n) for n in (chance.randrange(1 << 27) for _ in range(5000))]
    assert not any(asked)


def test_reads_of_several_chunks_make_a_stream() -> None:
    ahead = ReadAhead(64 * KiB, 10_000)
    asked: list[int] = []
    for at in range(0, 64 * MiB, MiB):
        asked += ahead.observe(at // (64 * KiB), (at + MiB - 1) // (64 * KiB))
    assert len(asked) == len(set(asked))
    assert asked[0] == 32
    # Unaligned: each read begins in the chunk that the one before ended in.
    ahead, asked = ReadAhead(64 * KiB, 10_000), []
    for at in range(1000, 64 * MiB, MiB):
        asked += ahead.observe(at // (64 * KiB), (at + MiB - 1) // (64 * KiB))
    assert asked
    assert len(asked) == len(set(asked))


def test_nothing_is_asked_for_behind_the_end() -> None:
    ahead = ReadAhead(CHUNK, 50)
    asked = list(itertools.chain(*follow(ahead, range(40, 50))))
    assert asked == list(range(42, 50))


def test_chunks_larger_than_the_window() -> None:
    ahead = ReadAhead(64 * MiB, 100)
    assert list(itertools.chain(*follow(ahead, range(5)))) == [2, 3, 4, 5]


def test_threads_may_race() -> None:
    ahead = ReadAhead(CHUNK, 100_000)
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        chance = random.Random(seed)
        try:
            for _ in range(3000):
                first = chance.randrange(300)
                ahead.observe(first, first + chance.randrange(3))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert errors == []
    assert len(ahead._streams) <= STREAMS + 6

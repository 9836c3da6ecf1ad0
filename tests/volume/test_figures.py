"""Counts and histograms of a served volume."""

from __future__ import annotations

import threading

import pytest

from horcrux_nbd.volume.figures import BOUNDS, Figures, Histogram


def test_each_duration_is_in_the_first_bucket_that_holds_it() -> None:
    histogram = Histogram()
    for seconds in (0.0, 0.001, 0.0011, 60.0, 61.0, 1e9):
        histogram.add(seconds)
    value = histogram.to_json()
    counts = dict(zip((*BOUNDS, "more"), value["counts"], strict=True))
    assert counts[0.001] == 2
    assert counts[0.002] == 1
    assert counts[60.0] == 1
    assert counts["more"] == 2
    assert sum(value["counts"]) == 6
    assert value["sum"] == pytest.approx(0.0021 + 121 + 1e9)


def test_what_fails_is_timed_too() -> None:
    histogram = Histogram()
    with pytest.raises(KeyError), histogram.timed():
        raise KeyError
    assert sum(histogram.to_json()["counts"]) == 1


def test_many_threads_lose_no_count() -> None:
    figures = Figures()

    def work() -> None:
        for _ in range(2000):
            figures.fetched(10, 5)
            figures.failed()
            figures.fetches.add(0.01)
            figures.cache_hits += 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    value = figures.to_json()
    assert (value["fetched_chunks"], value["fetched_bytes"]) == (16000, 160000)
    assert value["fetch_errors"] == value["cache_hits"] == 16000
    assert sum(value["fetch_seconds"]["counts"]) == 16000

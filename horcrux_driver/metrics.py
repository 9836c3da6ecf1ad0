"""Figures for Prometheus, on a Unix socket or a port of choice, at /metrics.

What the driver does itself is counted here; what a volume does is asked of its nbdkit when somebody
scrapes (control.py), so a driver that was restarted has lost no count of a volume. Counters of a
volume begin anew with its server, which Prometheus knows to handle.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from aiohttp import web
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from horcrux_nbd import __version__, config, control, host, paths, server
from horcrux_nbd.errors import HorcruxError
from horcrux_nbd.volume.cache import Cache

from . import records

log = logging.getLogger(__name__)

ASK_LIMIT = 2.0  # seconds for one server; one that is busy must not fail the scrape
THREADS = 16
BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)

_COUNTERS = {  # of a server's figures: name of the metric, help
    "fetched_bytes": ("horcrux_fetched_bytes", "Bytes of content that came from the repository"),
    "received_bytes": ("horcrux_received_bytes", "The same as stored: compressed, over the line"),
    "fetched_chunks": ("horcrux_fetched_chunks", "Chunks and patches from the repository"),
    "fetch_errors": ("horcrux_fetch_errors", "Fetches that failed in the end"),
    "cache_hits": ("horcrux_cache_hits", "Pieces of reads that the cache of this host had"),
}
_HISTOGRAMS = {
    "fetch_seconds": ("horcrux_fetch_seconds", "How long chunks took to come"),
    "flush_seconds": ("horcrux_flush_seconds", "How long flushes took"),
}


class Metrics:
    """Everything that there is to scrape."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._calls = Histogram(
            "horcrux_driver_call_seconds",
            "Calls of Docker by kind and outcome (ok, error)",
            ["call", "outcome"],
            buckets=BUCKETS,
            registry=self.registry,
        )
        self.registry.register(_Volumes())

    def called(self, call: str, seconds: float, ok: bool) -> None:
        """Docker called the endpoint `call` (Mount, Get, …), and it took so long."""
        self._calls.labels(call, "ok" if ok else "error").observe(seconds)

    def text(self) -> bytes:
        """In Prometheus' text format. Takes as long as the slowest server, ASK_LIMIT at most."""
        return generate_latest(self.registry)

    def application(self) -> web.Application:
        """Answers GET /metrics."""
        application = web.Application()
        application.router.add_get("/metrics", self._answer)
        return application

    async def _answer(self, request: web.Request) -> web.Response:
        body = await asyncio.to_thread(self.text)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})


class _Volumes:
    """Asks each server on every scrape."""

    def describe(self) -> list[Metric]:
        return []  # else the registry would collect once just to learn the names

    def collect(self) -> Iterator[Metric]:
        began = time.monotonic()
        build = InfoMetricFamily("horcrux_driver", "The driver's version")
        build.add_metric([], {"version": __version__})
        yield build
        yield from _wanted()
        yield from _cache()
        names = host.names()
        with ThreadPoolExecutor(THREADS, "scrape") as pool:
            found = dict(zip(names, pool.map(_figures, names), strict=True))
        yield from _states(found)
        yield from _served({name: one for name, one in found.items() if one is not None})
        yield GaugeMetricFamily(
            "horcrux_scrape_seconds", "How long these took", time.monotonic() - began
        )


def _figures(name: str) -> dict[str, Any] | None:
    """What a server says of itself; None where none runs or it does not answer."""
    try:
        running = server.running(name)
        if running is None:
            return None
        path = server.folder_of(name) / server.CONTROL
        told = control.ask(path, "figures", timeout=ASK_LIMIT)
        return {**told, "restarts": running.restarts}
    except (HorcruxError, OSError, ValueError) as error:
        log.debug("volume %s: no figures: %s", name, error)
        return None


def _wanted() -> Iterator[Metric]:
    mounts = GaugeMetricFamily(
        "horcrux_docker_mounts", "Mounts that Docker holds of a volume", labels=["volume"]
    )
    for name in records.names():
        try:
            record = records.load(name)
        except HorcruxError:
            continue
        if record is not None:
            mounts.add_metric([name], sum(one.count for one in record.mounts.values()))
    yield mounts


def _cache() -> Iterator[Metric]:
    folder = paths.cache()
    if not folder.is_dir():
        return
    cache = Cache(folder, config.load().cache_size)
    try:
        yield GaugeMetricFamily("horcrux_cache_bytes", "Bytes in the cache", cache.size())
        yield GaugeMetricFamily("horcrux_cache_limit_bytes", "Most bytes of it", cache.limit)
    finally:
        cache.close()


def _states(found: dict[str, dict[str, Any] | None]) -> Iterator[Metric]:
    volumes = GaugeMetricFamily("horcrux_volumes", "Volumes of this host", labels=["state"])
    count = dict.fromkeys(("idle", "served", "mounted", "broken"), 0)
    for name, figures in found.items():
        count[_state(name, figures)] += 1
    for state, number in count.items():
        volumes.add_metric([state], number)
    yield volumes


def _state(name: str, figures: dict[str, Any] | None) -> str:
    try:
        if host.problem(name):
            return "broken"
        if host.mounts(name):
            return "mounted"
    except (HorcruxError, OSError):
        return "broken"
    return "idle" if figures is None else "served"


def _served(found: dict[str, dict[str, Any]]) -> Iterator[Metric]:
    for key, (name, told) in _COUNTERS.items():
        counter = CounterMetricFamily(name, told, labels=["volume"])
        for volume, figures in found.items():
            counter.add_metric([volume], figures.get(key, 0))
        yield counter
    for key, (name, told) in _HISTOGRAMS.items():
        histogram = HistogramMetricFamily(name, told, labels=["volume"])
        for volume, figures in found.items():
            if key in figures:
                histogram.add_metric([volume], *_buckets(figures[key]))
        yield histogram
    dirty = GaugeMetricFamily(
        "horcrux_dirty_bytes", "Bytes written or zeroed and in no commit", labels=["volume"]
    )
    restarts = CounterMetricFamily(
        "horcrux_server_restarts", "Servers that died and were started again", labels=["volume"]
    )
    for volume, figures in found.items():
        dirty.add_metric([volume], figures.get("dirty_bytes", 0))
        restarts.add_metric([volume], figures["restarts"])
    yield dirty
    yield restarts


def _buckets(value: dict[str, Any]) -> tuple[list[tuple[str, float]], float]:
    """Prometheus counts what took at most so long, and so includes the buckets before."""
    bounds = [*(str(bound) for bound in value["bounds"]), "+Inf"]
    total, buckets = 0, []
    for bound, count in zip(bounds, value["counts"], strict=True):
        total += count
        buckets.append((bound, float(total)))
    return buckets, float(value["sum"])

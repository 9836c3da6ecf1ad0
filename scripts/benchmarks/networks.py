"""The networks that benchmarks put between a client and its store.

A proxy process of ours (`tests/servers/proxy.py`) makes them: it delays each way by half the
round-trip time, and all connections together share the bandwidth.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from tests.servers.process import stop


@dataclass(frozen=True)
class Line:
    """`rtt` in milliseconds of round trip, `rate` in megabytes a second each way (0: no limit)."""

    name: str
    rtt: float
    rate: float


LINES = (
    Line("0.2 ms", 0.2, 0),
    Line("5 ms, 1 Gb/s", 5, 125),
    Line("20 ms, 1 Gb/s", 20, 125),
    Line("80 ms, 100 Mb/s", 80, 12.5),
)
BY_NAME = {"lan": LINES[0], "metro": LINES[1], "region": LINES[2], "far": LINES[3]}


@contextlib.contextmanager
def behind(line: Line, port: int) -> Iterator[int]:
    """A port through which the server on loopback's `port` is reached over `line`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.servers.proxy", str(port),
         "--rtt", str(line.rtt), "--rate", str(line.rate)],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline())
    finally:
        stop(process)

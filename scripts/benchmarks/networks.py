"""The networks that benchmarks put between a client and its store.

A proxy process of ours (`tests/servers/proxy.py`) makes them: it delays each way by half the
round-trip time, and all connections together share the bandwidth.
"""

from __future__ import annotations

import contextlib
import signal
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


class Far:
    """A server as it is reached over a line."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self.port = int(self._line())

    def _line(self) -> bytes:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def fetched(self) -> int:
        """Bytes that came from the server so far."""
        self._process.send_signal(signal.SIGUSR1)
        return int(self._line().split()[1])


@contextlib.contextmanager
def behind(line: Line, port: int) -> Iterator[Far]:
    """The server on loopback's `port`, with `line` in front of it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.servers.proxy", str(port),
         "--rtt", str(line.rtt), "--rate", str(line.rate)],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    try:
        yield Far(process)
    finally:
        stop(process)

"""What Prometheus finds: read by its own parser, over the socket or the port of choice."""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from horcrux_nbd import host
from tests.servers.process import free_port

from .conftest import clean_host
from .support import PROGRAM, DriverProcess, UnixConnection, wait_for

Figures = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture
def measured(configured: Path, tmp_path: Path) -> Iterator[DriverProcess]:
    process = DriverProcess(tmp_path)
    process.words += ["--metrics", str(tmp_path / "metrics.sock")]
    process.start()
    yield process
    process.stop()
    process.socket.unlink(missing_ok=True)
    clean_host()


def scrape(connection: http.client.HTTPConnection) -> Figures:
    connection.request("GET", "/metrics")
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    assert response.status == 200
    assert response.headers["Content-Type"].startswith("text/plain")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_volume_in_figures(measured: DriverProcess, tmp_path: Path) -> None:
    socket = tmp_path / "metrics.sock"
    assert socket.stat().st_mode & 0o777 == 0o600

    def now() -> Figures:
        return scrape(UnixConnection(socket))

    of_v = (("volume", "v"),)
    found = now()
    assert found["horcrux_volumes", (("state", "mounted"),)] == 0
    measured.ask("Create", Name="v", Opts=None)
    assert now()["horcrux_volumes", (("state", "idle"),)] == 1
    where = Path(measured.ask("Mount", Name="v", ID="1")["Mountpoint"])
    (where / "new").write_bytes(os.urandom(1 << 20))
    subprocess.run(["sync", "--file-system", str(where)], check=True, timeout=60)
    (where / "hello").read_text()
    measured.error("Mount", Name="none", ID="1")
    found = now()
    assert found["horcrux_volumes", (("state", "mounted"),)] == 1
    assert found["horcrux_docker_mounts", of_v] == 1
    assert found["horcrux_fetched_bytes_total", of_v] > 0
    assert found["horcrux_fetched_chunks_total", of_v] > 0
    assert found["horcrux_fetch_errors_total", of_v] == 0
    assert found["horcrux_cache_hits_total", of_v] > 0
    assert found["horcrux_dirty_bytes", of_v] >= 1 << 20
    assert found["horcrux_cache_bytes", ()] > 0
    assert found["horcrux_server_restarts_total", of_v] == 0
    chunks = found["horcrux_fetch_seconds_count", of_v]
    assert chunks > 0
    assert found["horcrux_fetch_seconds_bucket", (("le", "+Inf"), *of_v)] == chunks
    assert 0 < found["horcrux_fetch_seconds_sum", of_v] < 60
    assert found["horcrux_flush_seconds_count", of_v] > 0
    calls = "horcrux_driver_call_seconds_count"
    assert found[calls, (("call", "Mount"), ("outcome", "ok"))] == 1
    assert found[calls, (("call", "Mount"), ("outcome", "error"))] == 1
    measured.ask("Unmount", Name="v", ID="1")
    found = now()
    assert found["horcrux_volumes", (("state", "idle"),)] == 1
    assert ("horcrux_dirty_bytes", of_v) not in found


def test_a_server_that_does_not_answer_does_not_stop_it(
    measured: DriverProcess, tmp_path: Path
) -> None:
    measured.ask("Create", Name="v", Opts=None)
    serving = host.serve("v")
    os.kill(serving.pid, signal.SIGSTOP)
    try:
        found = scrape(UnixConnection(tmp_path / "metrics.sock"))
        assert found["horcrux_volumes", (("state", "idle"),)] == 1
        assert found["horcrux_scrape_seconds", ()] < 10
    finally:
        os.kill(serving.pid, signal.SIGCONT)
        host.stop("v")


def test_on_a_port(configured: Path, tmp_path: Path) -> None:
    port = free_port()
    process = DriverProcess(tmp_path)
    process.words += ["--metrics", f"127.0.0.1:{port}"]
    process.start()
    try:
        wait_for(lambda: scrape(http.client.HTTPConnection("127.0.0.1", port, timeout=10)), "them")
    finally:
        process.stop()


@pytest.mark.parametrize("address", ["9748", "somewhere:1", "127.0.0.1:70000", "relative.sock"])
def test_a_place_that_is_none(address: str, configured: Path, tmp_path: Path) -> None:
    process = DriverProcess(tmp_path)
    done = subprocess.run(
        [PROGRAM, "--socket", process.socket, "--metrics", address],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "no place to listen" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr

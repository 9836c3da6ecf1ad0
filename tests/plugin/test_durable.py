"""What is durable: flush, FUA, an orderly end, and clients that leave."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.servers.nbdkit import connected, traced
from tests.volume.support import (
    BLOCK,
    CHUNK,
    noise,
)

from .support import (
    nbd,
    needs_nbdkit,
    original,
    serve,
)

pytestmark = needs_nbdkit


def test_a_flush_on_any_connection_covers_the_writes_of_all(tmp_path: Path, url: str) -> None:
    with serve(tmp_path, url) as server:
        handles = [server.connect() for _ in range(4)]
        for number, handle in enumerate(handles):
            handle.pwrite(noise(5000, number), number * CHUNK + 100)
            for other in handles:
                assert other.pread(5000, number * CHUNK + 100) == noise(5000, number)
        handles[3].flush()
        server.kill()
        server.start()
        with connected(server) as handle:
            for number in range(4):
                assert handle.pread(5000, number * CHUNK + 100) == noise(5000, number)


def test_fua_is_durable_by_itself(tmp_path: Path, url: str) -> None:
    fua = nbd().CMD_FLAG_FUA
    with serve(tmp_path, url) as server:
        handle = server.connect()
        handle.pwrite(noise(5000), 100, fua)
        handle.trim(CHUNK, 2 * CHUNK, fua)
        handle.zero(CHUNK, 4 * CHUNK, fua)
        handle.zero(10, 6 * CHUNK, fua)
        server.kill()
        server.start()
        with connected(server) as again:
            assert again.pread(5000, 100) == noise(5000)
            assert again.pread(CHUNK, 2 * CHUNK) == bytes(CHUNK)
            assert again.pread(CHUNK, 4 * CHUNK) == bytes(CHUNK)
            assert again.pread(11, 6 * CHUNK) == bytes(10) + original(6 * CHUNK + 10, 1)


def test_an_orderly_end_keeps_everything(tmp_path: Path, url: str) -> None:
    with serve(tmp_path, url) as server:
        with connected(server) as handle:
            handle.pwrite(noise(5000), 100)
        assert server.stop() == 0
        assert server.said() == ""
        server.start()
        with connected(server) as handle:
            assert handle.pread(5000, 100) == noise(5000)


def test_fua_and_an_orderly_end_reach_the_disk(tmp_path: Path, url: str) -> None:
    """What was only acknowledged survives the death of the process, so the disk is asked here."""
    fua = nbd().CMD_FLAG_FUA
    with serve(tmp_path, url) as server:
        handle = server.connect()
        with traced(server) as synced:
            handle.pwrite(noise(BLOCK), 0)
        assert not {"data-000000", "map"} & set(synced)
        for request in (
            lambda: handle.pwrite(noise(BLOCK), BLOCK, fua),
            lambda: handle.pwrite(noise(BLOCK), 0, fua),
            lambda: handle.trim(BLOCK, 0, fua),
            lambda: handle.zero(BLOCK, BLOCK, fua),
        ):
            with traced(server) as synced:
                request()
            assert synced, "FUA without a sync"
        handle.pwrite(noise(BLOCK), 2 * BLOCK)
        with traced(server) as synced:
            handle.shutdown()
            assert server.stop() == 0
        assert synced == ["data-000000", "map"]


def test_a_client_that_leaves_with_requests_under_way_loses_nothing(
    tmp_path: Path, url: str
) -> None:
    """nbdkit 1.32.5 aborts then, in its own code; what was flushed is there after a restart."""
    with serve(tmp_path, url) as server:
        with connected(server) as handle:
            handle.pwrite(noise(CHUNK), 0)
            handle.flush()
        for turn in range(5):
            leaving = server.connect()
            buffers = [nbd().Buffer.from_bytearray(bytearray(noise(CHUNK, n))) for n in range(32)]
            for number, buffer in enumerate(buffers):
                leaving.aio_pwrite(buffer, (5 + number % 8) * CHUNK)
                leaving.aio_pread(nbd().Buffer(CHUNK), number * CHUNK)
            leaving.poll(1)
            del leaving
            assert server.process is not None
            try:
                server.process.wait(0.3)
            except subprocess.TimeoutExpired:
                server.kill()
            server.start()
            with connected(server) as handle:
                assert handle.pread(CHUNK, 0) == noise(CHUNK), f"turn {turn}"
                for number in range(5, 13):
                    handle.pread(CHUNK, number * CHUNK)

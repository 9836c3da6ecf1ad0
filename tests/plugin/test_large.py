"""An image of 64 TiB."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.servers.nbdkit import connected
from tests.volume.support import (
    BLOCK,
    make_image,
    noise,
)

from .support import (
    needs_nbdkit,
    run,
    serve,
)

pytestmark = needs_nbdkit


def rss(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(x for x in status.splitlines() if x.startswith("VmHWM:")).split()[1]) * 1024


@pytest.mark.slow
def test_64_tib_cost_what_is_in_them(tmp_path: Path) -> None:
    """Open, walk and trim the whole; the figures themselves are in the README."""
    size = (64 << 40) + 512
    pieces = {at << 40: noise(1000, at) for at in range(0, 64, 7)}
    url = make_image(tmp_path / "repo", pieces, size=size)
    with serve(tmp_path, url) as server, connected(server) as handle:
        assert handle.get_size() == size
        for at, data in pieces.items():
            assert handle.pread(1000, at) == data
        chance = random.Random(5)
        for _ in range(1500):  # more groups than are looked at one by one
            handle.pwrite(b"x" * BLOCK, chance.randrange(size // BLOCK) * BLOCK)
        handle.flush()
        mapped = run("nbdinfo", "--map", server.uri)
        assert len(mapped.splitlines()) > 1500
        step = (1 << 32) - BLOCK  # a request has 32 bits for its length
        for at in range(0, size, step):
            handle.trim(min(step, size - at), at)
        handle.flush()
        assert "hole,zero" in run("nbdinfo", "--map", "--totals", server.uri)
        assert rss(server.pid) < 150 << 20
        overlay = tmp_path / "overlay"
        assert int(run("du", "-s", "-B1", overlay).split()[0]) < 4 << 20
        server.kill()
        server.start()
        with connected(server) as again:
            assert again.pread(BLOCK, 7 << 40) == bytes(BLOCK)

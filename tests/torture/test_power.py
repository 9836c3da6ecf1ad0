"""Power cuts below overlay, cache and store lose nothing that was flushed, committed or pushed."""

from __future__ import annotations

import os
import secrets
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.attach.conftest import needs_fuse
from tests.servers.nbdkit import MISSING, available

from .power import in_namespace
from .world import Tally

CUTS = int(os.environ.get("HORCRUX_CUTS", "200"))
BESIDE = 2  # machines at a time

pytestmark = [pytest.mark.skipif(not available(), reason=MISSING), needs_fuse]


@pytest.mark.slow
@pytest.mark.timeout(120 + 3 * CUTS)
def test_power_cuts(tmp_path: Path) -> None:
    """HORCRUX_CUTS and HORCRUX_SEED say how many, and repeat what was found."""
    seed = os.environ.get("HORCRUX_SEED") or secrets.token_hex(4)
    print(f"repeat with: HORCRUX_CUTS={CUTS} HORCRUX_SEED={seed}")

    def machine(number: int) -> Tally:
        folder = tmp_path / str(number)
        folder.mkdir()
        return in_namespace(folder, CUTS // BESIDE, f"{seed}/{number}")

    with ThreadPoolExecutor(BESIDE) as pool:
        tallies = list(pool.map(machine, range(BESIDE)))
    for tally in tallies:
        print(tally)
        assert tally.violations == []
        assert tally.cuts >= CUTS // BESIDE
    assert sum(tally.requests for tally in tallies) > 5 * CUTS, "hardly any load"
    if CUTS >= 100:
        assert sum(tally.versions for tally in tallies), "no commit came of it"
        assert sum(tally.pushes for tally in tallies)

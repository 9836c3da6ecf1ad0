"""SIGKILL at random moments loses nothing that was acknowledged, and no version is between."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import pytest

from tests.attach.conftest import needs_fuse
from tests.servers.nbdkit import MISSING, available

from .kills import torture

KILLS = int(os.environ.get("HORCRUX_KILLS", "100"))

pytestmark = [pytest.mark.skipif(not available(), reason=MISSING), needs_fuse]


@pytest.mark.slow
@pytest.mark.timeout(120 + 3 * KILLS)
def test_killed_again_and_again(horcrux_host: Path) -> None:
    """HORCRUX_KILLS and HORCRUX_SEED say how often, and repeat what was found."""
    seed = os.environ.get("HORCRUX_SEED") or secrets.token_hex(4)
    print(f"repeat with: scripts/torture --kills {KILLS} --seed {seed}")
    tally = torture(horcrux_host, kills=KILLS, seed=seed)
    print(tally)
    assert tally.violations == []
    assert tally.requests > 20 * KILLS, "hardly any load"
    assert tally.versions, "no commit came of it"
    assert tally.attaches
    assert tally.recoveries

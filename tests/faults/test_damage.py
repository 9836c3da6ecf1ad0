"""Any file may be damaged in any way: an error that names it or the right bytes, and no memory.

A sample in the usual run, all 10,000 cases with --long. A failure names its case: `python -m
tests.faults.damage WORLD --cases N --seed S` does it again.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).resolve().parents[2]
MEMORY = 160 << 10  # KiB; Python and the libraries take 30 MiB of it


def damage(world: str, cases: int, seed: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.faults.damage", world]
    done = subprocess.run(
        [*command, "--cases", str(cases), "--seed", str(seed)],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=3000,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    print(done.stdout)
    assert found["wrong"] == []
    assert found["cases"] > cases * 0.9
    assert found["kib_most"] < MEMORY
    return found


EVERY_OBJECT = {"chunk", "patch", "node", "commit", "heads", "tags", "horcrux.json"}
EVERY_FILE = {
    "volume.json", "map", "recent", "flushed", "data", "objects", "packs", "lock", "reflog",
    "chunks", "meta", "usage",
}  # fmt: skip


def kinds(found: dict[str, Any]) -> set[str]:
    return {outcome.split(":")[0] for outcome in found["outcomes"]}


def test_objects_and_refs() -> None:
    """Named by verify, healed by a mirror, mended by repair: for each case anew."""
    assert kinds(damage("repository", 200, 1)) == EVERY_OBJECT


def test_what_a_host_keeps() -> None:
    assert kinds(damage("volume", 300, 1)) == EVERY_FILE


@pytest.mark.long
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("world", ["repository", "volume"])
def test_ten_thousand_cases(world: str) -> None:
    damage(world, 5200, 7)

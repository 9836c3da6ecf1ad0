"""`scripts/torture`."""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import sys
import tempfile
from pathlib import Path

from tests.servers import nbdkit

from .kills import environment, torture
from .power import in_namespace

SHOWN = 20  # violations


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/torture",
        description="A served volume under random load from several connections, with commits and "
        "attaches, killed at random moments; after each kill every sector is compared with what "
        "was acknowledged. Or, with --cuts, all of it on a disk that forgets what was not synced. "
        "Exit status 1 for a violation.",
    )
    parser.add_argument("--kills", type=int, default=100, metavar="N", help="(default: 100)")
    parser.add_argument("--cuts", type=int, metavar="N", help="power cuts in the place of kills")
    parser.add_argument("--seed", metavar="S", help="repeat a run (default: a new one)")
    parser.add_argument("--minutes", type=float, metavar="M", help="end after so long, kills or no")
    asked = parser.parse_args()
    if asked.kills < 1 or (asked.minutes is not None and asked.minutes <= 0):
        parser.error("--kills and --minutes are above 0")
    if os.geteuid() != 0:
        parser.error("attaching takes root")
    if not nbdkit.available():
        parser.error(nbdkit.MISSING)
    seed = asked.seed or secrets.token_hex(4)
    print(f"seed {seed}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="horcrux-torture-"))
    if asked.cuts:
        what = f"--cuts {asked.cuts}"
        tally = in_namespace(folder, asked.cuts, seed)
    else:
        what = f"--kills {asked.kills}"
        environment(folder / "root", folder / "run")
        tally = torture(folder, kills=asked.kills, seed=seed, minutes=asked.minutes)
    print(tally)
    for line in tally.violations[:SHOWN]:
        print(line)
    if tally.violations:
        print(f"kept: {folder}; again: scripts/torture {what} --seed {seed}")
        return 1
    shutil.rmtree(folder)
    return 0


sys.exit(main())

"""The way in: generate against restic's backup of the same directory."""

from __future__ import annotations

import os
import shutil
import statistics
from pathlib import Path

from .common import Table, cli, database, folder_bytes, in_turn, mb, median_ratio, need, run, timed

TITLE = "Generate"
SCALE = int(os.environ.get("SCALE", "150"))  # of pgbench; 150 is about 2.5 GB
ROUNDS = 3


def main(scratch: Path) -> Table:
    need("restic", "restic")
    data = database(scratch, SCALE)
    size = folder_bytes(data)
    environment = {**os.environ, "RESTIC_PASSWORD": "bench", "RESTIC_CACHE_DIR": f"{scratch}/rc"}
    stored: dict[str, int] = {}

    def ours() -> float:
        shutil.rmtree(scratch / "repo-h", ignore_errors=True)
        seconds = timed(lambda: cli("generate", "PG", data, scratch / "repo-h"))
        stored["Horcrux"] = folder_bytes(scratch / "repo-h")
        return seconds

    def restic() -> float:
        shutil.rmtree(scratch / "repo-r", ignore_errors=True)
        run(
            "restic", "init", "-r", scratch / "repo-r", "--repository-version", "2", env=environment
        )
        seconds = timed(
            lambda: run("restic", "backup", "-q", "-r", scratch / "repo-r", data, env=environment)
        )
        stored["restic"] = folder_bytes(scratch / "repo-r")
        return seconds

    a, b = in_turn(ROUNDS, ours, restic)
    table = Table(
        f"generate of a PostgreSQL directory ({size / 1e9:.1f} GB) to cp://",
        ["program", "time", "rate", "stored"],
    )
    for name, found in (("Horcrux", a), ("restic", b)):
        seconds = statistics.median(found)
        table.rows.append(
            (name, f"{seconds:.1f} s", mb(size / seconds), f"{stored[name] / 1e6:,.0f} MB")
        )
    table.notes.append(
        f"Speed against restic: {1 / median_ratio(a, b):.1f} × (median of {ROUNDS} pairs)."
    )
    return table

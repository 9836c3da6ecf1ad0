"""How long a commit holds up the writers of a database under load."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import time
from pathlib import Path

from .common import Bar, Table, cli, database, postgres, postgres_bin

TITLE = "Freeze"
SCALE = int(os.environ.get("SCALE", "20"))
COMMITS = 10 * int(os.environ.get("ROUNDS", "2"))
PAUSE = 1.0  # seconds between commits
ASKED = 0.05  # seconds


def main(scratch: Path) -> Table:
    data = database(scratch, SCALE)
    repository, mount = scratch / "repo-freeze", scratch / "mnt-freeze"
    shutil.rmtree(repository, ignore_errors=True)
    mount.mkdir(exist_ok=True)
    cli("generate", "-q", "PG", data, repository)
    cli("create", "freeze", repository, "PG")
    cli("mount", "freeze", mount)
    socket = scratch / "pgsocket"
    frozen: list[float] = []
    changed: list[int] = []
    try:
        with postgres(mount, socket):
            load = subprocess.Popen(
                (
                    *("runuser", "-u", "postgres", "--", str(postgres_bin() / "pgbench")),
                    *("-h", str(socket), "-c", "4", "-N", "-T", "600", "bench"),
                ),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
            )
            try:
                time.sleep(3)
                for number in range(COMMITS):
                    told = json.loads(cli("commit", "freeze", "-m", f"{number}", "--json"))
                    frozen.append(told["freeze"]["frozen_seconds"])
                    changed.append(told["freeze"]["changed_bytes"])
                    time.sleep(PAUSE)
                alive = load.poll() is None
            finally:
                load.terminate()
                load.wait(30)
            if not alive:
                raise RuntimeError("pgbench ended: the database failed under the commits")
    finally:
        cli("umount", "freeze")
        cli("rm", "--force", "freeze")
    table = Table("Commits of a PostgreSQL database under pgbench", ["", "median", "worst", "bar"])
    middle, worst = statistics.median(frozen), max(frozen)
    table.rows.append(
        ("freeze", f"{middle * 1000:.0f} ms", f"{worst * 1000:.0f} ms", f"{ASKED * 1000:.0f} ms")
    )
    size = f"{statistics.median(changed) / 1e6:.1f} MB"
    table.rows.append(("changed in each", size, f"{max(changed) / 1e6:.1f} MB", ""))
    table.notes.append(
        f"{COMMITS} commits, one each second, four clients of `pgbench -N`; from the order to "
        "freeze to the answer that it is thawed. Volume mounted by the way that the machine has."
    )
    table.bars.append(Bar("50 ms against the median freeze", 1.0, ASKED / middle))
    return table

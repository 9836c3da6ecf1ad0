"""The way in: generate, against backups of the same directory by others."""

from __future__ import annotations

import os
import shutil
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from .common import (
    BIN,
    Bar,
    Table,
    database,
    folder_bytes,
    in_turn,
    mb,
    median_ratio,
    need,
    run,
    timed,
)

TITLE = "Generate"
SCALE = int(os.environ.get("SCALE", "150"))  # of pgbench; 150 is about 2.5 GB
ROUNDS = int(os.environ.get("ROUNDS", "5"))


def main(scratch: Path) -> Table:
    data = database(scratch, SCALE)
    size = folder_bytes(data)
    environment = {
        **os.environ,
        "RESTIC_PASSWORD": "bench",
        "RESTIC_CACHE_DIR": f"{scratch}/restic-cache",
        "BORG_BASE_DIR": f"{scratch}/borg-base",
        "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes",
    }
    target = scratch / "repo-way-in"
    stored: dict[str, int] = {}

    def program(
        name: str, make: Sequence[str | Path], write: Sequence[str | Path]
    ) -> Callable[[], float]:
        def once() -> float:
            for folder in (target, scratch / "restic-cache", scratch / "borg-base"):
                shutil.rmtree(folder, ignore_errors=True)
            if make:
                run(*make, env=environment)
            os.sync()
            seconds = timed(lambda: run(*write, env=environment))
            stored[name] = folder_bytes(target)
            return seconds

        return once

    restic, borg = need("restic", "restic"), need("borg", "borgbackup")
    casync = need("casync", "casync")
    programs = {
        "Horcrux": program(
            "Horcrux", (), (BIN / "horcrux-cli", "generate", "-q", "PG", data, target)
        ),
        "restic": program(
            "restic",
            (restic, "init", "-r", target, "--repository-version", "2"),
            (restic, "backup", "-q", "-r", target, data),
        ),
        "borg": program(
            "borg",
            (borg, "init", "-e", "none", target),
            (borg, "create", "-C", "zstd,3", f"{target}::bench", data),
        ),
        "casync": program(
            "casync", (), (casync, "make", f"--store={target}", scratch / "bench.caidx", data)
        ),
    }
    found = dict(zip(programs, in_turn(ROUNDS, *programs.values()), strict=True))
    shutil.rmtree(target, ignore_errors=True)
    table = Table(
        f"generate of a PostgreSQL directory ({size / 1e9:.1f} GB) to cp://",
        ["program", "time", "rate", "stored", "Horcrux's speed against it"],
    )
    ratios = {name: 1 / median_ratio(found["Horcrux"], times) for name, times in found.items()}
    for name, times in found.items():
        seconds = statistics.median(times)
        table.rows.append(
            (
                name, f"{seconds:.1f} s", mb(size / seconds), f"{stored[name] / 1e6:,.0f} MB",
                f"{ratios[name]:.1f} ×",
            )
        )  # fmt: skip
    table.bars += [
        Bar("generate, against restic", 2, ratios["restic"]),
        Bar("generate, against borg", 3, ratios["borg"]),
    ]
    table.notes.append(
        f"Medians of {ROUNDS} rounds, in turn; the source is in the page cache. borg with zstd,3 "
        "and no encryption; restic encrypts always, and compresses by default."
    )
    return table

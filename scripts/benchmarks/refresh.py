"""A directory whose files changed a little becomes the next version: what is new of it."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import zstandard

from .common import Table, cli, database, run, timed
from .page_updates import PAGE, update

TITLE = "Refresh"
SCALE = int(os.environ.get("SCALE", "20"))
PART = 0.01  # of the pages


def main(scratch: Path) -> Table:
    repository, data = scratch / "repo-refresh", scratch / "refreshed"
    shutil.rmtree(repository, ignore_errors=True)
    shutil.rmtree(data, ignore_errors=True)
    run("cp", "-a", "--reflink=auto", database(scratch, SCALE), data)
    table = Table(
        "A PostgreSQL directory of which 1 % of the pages changed",
        ["", "first version", "refresh", "refresh, files moved too"],
    )
    chance = random.Random(5)
    pages = sum(path.stat().st_size for path in data.glob("base/*/*")) // PAGE

    def version(*options: str) -> tuple[float, int]:
        answers: list[str] = []
        words = ("generate", "-q", "--json", *options, "PG", str(data), str(repository))
        took = timed(lambda: answers.append(cli(*words)))
        return took, int(json.loads(answers[0])["stored_bytes"])

    first = version()
    changed = update(data, chance, int(pages * PART))
    second = version("--onto")
    changed_too = update(data, chance, int(pages * PART))
    largest = max(data.glob("base/*/*"), key=lambda path: path.stat().st_size)
    with open(largest, "ab") as file:  # it grows, others move, come and go
        file.write(grown := chance.randbytes(PAGE * 100))
    run("mv", data / "base", data / "moved")
    (data / "new").write_bytes(new := chance.randbytes(1 << 20))
    (data / "PG_VERSION").unlink()
    third = version("--onto")
    sizes = (len(changed), len(changed_too) + len(grown) + len(new))
    packed = [len(zstandard.compress(c, 3)) for c in (changed, changed_too + grown + new)]
    table.rows += [
        ("changed", "", *(f"{size / 1e6:.1f} MB" for size in sizes)),
        ("changed, in one zstd stream", "", *(f"{size / 1e6:.1f} MB" for size in packed)),
        ("stored", *(f"{stored / 1e6:.1f} MB" for _, stored in (first, second, third))),
        (
            "stored against that",
            "",
            f"{second[1] / packed[0]:.2f} ×",
            f"{third[1] / packed[1]:.2f} ×",
        ),
        ("time", *(f"{took:.1f} s" for took, _ in (first, second, third))),
    ]
    table.notes.append(
        f"`horcrux-cli generate --onto`; pgbench scale {SCALE}; in the last column the largest "
        "file grew by 100 pages, the folder of the tables was renamed, one file came, one went."
    )
    shutil.rmtree(data)
    return table

"""A thousand changed pages of a database: what is pushed, how long that takes, and the freeze."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import statistics
from pathlib import Path

import zstandard

from .common import Bar, Table, cli, database, median_ratio, need, run, timed

TITLE = "Page updates"
SCALE = int(os.environ.get("SCALE", "150"))  # of pgbench; 150 is about 2.5 GB
PAGES = 1000
PAGE = 8192
ROUNDS = int(os.environ.get("ROUNDS", "3"))


def update(folder: Path, chance: random.Random, count: int = PAGES) -> bytes:
    """Change `count` random pages of the database's files as updates of rows do: some text in each
    is another. What the pages hold then, one after another.
    """
    files = [path for path in folder.glob("base/*/*") if path.stat().st_size > 1 << 20]
    pages = [(path, at) for path in files for at in range(path.stat().st_size // PAGE)]
    changed = []
    for path, number in sorted(chance.sample(pages, count)):
        with open(path, "r+b") as file:
            file.seek(number * PAGE)
            page = bytearray(file.read(PAGE))
            for _ in range(4):
                at = chance.randrange(512, PAGE - 64)
                text = hashlib.md5(chance.randbytes(8)).hexdigest().encode()
                page[at : at + len(text)] = text
            file.seek(number * PAGE)
            file.write(page)
        changed.append(bytes(page))
    os.sync()
    return b"".join(changed)


def main(scratch: Path) -> Table:
    need("restic", "restic")
    data = database(scratch, SCALE)
    repository, mount = scratch / "repo-pages", scratch / "mnt-pages"
    shutil.rmtree(repository, ignore_errors=True)
    mount.mkdir(exist_ok=True)
    environment = {**os.environ, "RESTIC_PASSWORD": "bench", "RESTIC_CACHE_DIR": f"{scratch}/rc"}
    backup = ("restic", "backup", "-q", "-r", scratch / "repo-pr", mount)
    cli("generate", "-q", "PG", data, repository)
    cli("create", "pages", repository, "PG")
    cli("mount", "pages", mount)
    ours: list[float] = []
    theirs: list[float] = []
    ratios: list[float] = []
    frozen: list[float] = []
    chance = random.Random(7)
    try:
        run(
            "restic",
            "init",
            "-r",
            scratch / "repo-pr",
            "--repository-version",
            "2",
            env=environment,
        )
        run(*backup, env=environment)
        for number in range(ROUNDS + 1):  # the first does not count
            changed = update(mount, chance)
            answers: list[str] = []

            def commit_and_push(answers: list[str] = answers, number: int = number) -> None:
                answers.append(cli("commit", "pages", "-m", f"round {number}", "--push", "--json"))

            # Each goes first as often as the other: what was written is in the page cache.
            if number % 2:
                theirs.append(timed(lambda: run(*backup, env=environment)))
                ours.append(timed(commit_and_push))
            else:
                ours.append(timed(commit_and_push))
                theirs.append(timed(lambda: run(*backup, env=environment)))
            told = json.loads(answers[0])["pages"]
            ratios.append(told["push"]["bytes"] / len(zstandard.compress(changed, 3)))
            frozen.append(told["frozen_seconds"])
    finally:
        cli("umount", "pages")
    ours, theirs, ratios, frozen = ours[1:], theirs[1:], ratios[1:], frozen[1:]
    table = Table(
        f"{PAGES:,} random pages of 8 KiB changed in a PostgreSQL database",
        ["", "measured", "bar"],
    )
    table.rows += [
        ("pushed, against the changed pages in one zstd stream", _times(ratios), "1.5 ×"),
        ("commit + push", f"{statistics.median(ours):.2f} s", ""),
        ("restic backup of the same files", f"{statistics.median(theirs):.2f} s", ""),
        ("commit + push, against restic", f"{median_ratio(ours, theirs):.3f} ×", "0.1 ×"),
        ("freeze, nothing else going on", f"{statistics.median(frozen) * 1000:.0f} ms", "50 ms"),
    ]
    table.bars += [
        Bar("1,000 pages: 1.5 × compressed against pushed", 1.0, 1.5 / statistics.median(ratios)),
        Bar("1,000 pages: restic's time against ours", 10.0, 1 / median_ratio(ours, theirs)),
    ]
    table.notes.append(
        f"Volume mounted by nbdfuse + loop; cp:// repository; medians of {ROUNDS} rounds after one "
        "that does not count; `horcrux-cli commit --push`, its start included."
    )
    return table


def _times(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} ×"

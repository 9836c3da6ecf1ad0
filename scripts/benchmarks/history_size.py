"""log, diff and checkout of an image of 1 TiB with 1,000 versions: time and store requests."""

from __future__ import annotations

import contextlib
import io
import os
import random
import shutil
import statistics
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from horcrux_nbd.chunkstore import open_store
from horcrux_nbd.chunkstore.local import LocalStore
from horcrux_nbd.repository.commits import Commit, now
from horcrux_nbd.repository.index import Index
from horcrux_nbd.repository.objects import NULL_ID, Kind
from horcrux_nbd.repository.repository import Repository
from horcrux_nbd.repository.writer import ObjectWriter, write_index
from horcrux_nbd.units import KiB, TiB

from .common import Table, cli, timed

TITLE = "History"
VERSIONS = 1000
SIZE = 1 * TiB
CHUNK = 512 * KiB
ROUNDS = 3
OPERATIONS = ("get", "put", "put_exclusive", "stat", "list", "children", "delete")


def make(url: str) -> None:
    """An image of which each version changes three chunks anywhere."""
    chance = random.Random(1)
    with open_store(url, create=True) as store:
        repository = Repository.create(store, CHUNK)
        tree: Index | None = None
        tip: bytes | None = None
        for number in range(VERSIONS):
            with ObjectWriter(repository) as writer:
                numbers = sorted(chance.sample(range(SIZE // CHUNK), 3))
                changes = [
                    (n, writer.write(Kind.CHUNK, f"{number} {n}".encode().ljust(CHUNK, b"\0")))
                    for n in numbers
                ]
                commit = Commit("BIG", SIZE, CHUNK, NULL_ID)
                root = write_index(writer, tree, commit.levels, changes)
                writer.barrier()
                commit = Commit(
                    "BIG",
                    SIZE,
                    CHUNK,
                    root,
                    (tip,) if tip else (),
                    "bench",
                    now(),
                    f"version {number}",
                )
                new = writer.write(Kind.COMMIT, commit.encode())
                writer.barrier()
            repository.refs.move("BIG", "main", new, tip, author="bench", why="bench")
            tip, tree = new, repository.index(commit)


@contextlib.contextmanager
def counted(folder: Path) -> Iterator[Counter[str]]:
    """Count the operations on the store in `folder`."""
    counts: Counter[str] = Counter()
    originals = {name: getattr(LocalStore, name) for name in OPERATIONS}

    def counting(name: str) -> Any:
        def call(self: LocalStore, *args: Any, **kwargs: Any) -> Any:
            if self.url.endswith(str(folder)):
                counts[name] += 1
            return originals[name](self, *args, **kwargs)

        return call

    for name in OPERATIONS:
        setattr(LocalStore, name, counting(name))
    try:
        yield counts
    finally:
        for name, original in originals.items():
            setattr(LocalStore, name, original)


def requests(folder: Path, *words: str) -> int:
    """The store requests of a command with an empty cache."""
    from horcrux_nbd.cli.main import main as command

    _forget()
    with counted(folder) as counts, contextlib.redirect_stdout(io.StringIO()):
        status = command([str(word) for word in words])
    if status:
        raise RuntimeError(f"horcrux-cli {' '.join(words)} failed")
    return sum(counts.values())


def _forget() -> None:
    shutil.rmtree(Path(os.environ["HORCRUX_ROOT"]) / "cache", ignore_errors=True)


def main(scratch: Path) -> Table:
    folder = scratch / "repo-history"
    shutil.rmtree(folder, ignore_errors=True)
    make(f"cp://{folder}")
    cli("create", "big", folder, "BIG")
    table = Table(
        f"an image of 1 TiB (sparse) with {VERSIONS:,} versions",
        ["command", "cold", "again", "store requests (cold)"],
    )
    for words in (
        ("--version",),
        ("log", "BIG", "-n", str(VERSIONS)),
        ("log", "BIG"),
        ("diff", "BIG", f"main~{VERSIONS - 1}", "main", "--stat"),
        ("diff", "BIG", "main~1", "main", "--stat"),
        ("checkout", "big", f"main~{VERSIONS // 2}"),
    ):
        cold, again = [], []
        for _ in range(ROUNDS):
            _forget()
            cold.append(timed(lambda words=words: cli(*words)))  # type: ignore[misc]
            again.append(timed(lambda words=words: cli(*words)))  # type: ignore[misc]
        cli("checkout", "big", "main")
        table.rows.append(
            (
                " ".join(words),
                f"{statistics.median(cold):.2f} s",
                f"{statistics.median(again):.2f} s",
                "" if words[0] == "--version" else f"{requests(folder, *words):,}",
            )
        )
        cli("checkout", "big", "main")
    table.notes.append(
        f"cp:// repository; cold: nothing of it on this host; medians of {ROUNDS}; the start of "
        "horcrux-cli (Python and its imports; the first row) included."
    )
    cli("rm", "--force", "big")
    return table

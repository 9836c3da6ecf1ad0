"""What encryption costs: generate, and cold reads of every chunk, beside a plain repository."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from horcrux_nbd.chunkstore import open_store
from horcrux_nbd.names import Version
from horcrux_nbd.repository.objects import Kind
from horcrux_nbd.repository.repository import Repository
from horcrux_nbd.units import KiB, MiB

from .common import Table, cli, compressible, in_turn, median_ratio, timed

TITLE = "Encryption"
SIZE = int(os.environ.get("SCALE", "60")) * 16 * MiB
CHUNK = 512 * KiB
ROUNDS = int(os.environ.get("ROUNDS", "5"))


def main(scratch: Path) -> Table:
    source, key = scratch / "encryption.raw", scratch / "encryption.key"
    if not source.exists():
        compressible(source, SIZE)
    key.unlink(missing_ok=True)
    cli("key", "make", key)
    folders = {False: scratch / "plain", True: scratch / "encrypted"}

    def generate(encrypt: bool) -> Callable[[], float]:
        def work() -> float:
            shutil.rmtree(folders[encrypt], ignore_errors=True)
            words = ["--encrypt", "--key-file", key] if encrypt else []
            return timed(lambda: cli("generate", "-q", *words, "A", source, folders[encrypt]))

        return work

    def read(encrypt: bool) -> Callable[[], float]:
        def work() -> float:
            with open_store(str(folders[encrypt])) as store:
                repository = Repository.open(store)
                commit = repository.resolve(Version("A")).commit
                ids = [oid for _, oid in repository.index(commit).entries()]

                def all_of_them() -> None:
                    for oid in ids:
                        repository.read_object(oid, (Kind.CHUNK,), CHUNK)

                return timed(all_of_them)

        return work

    rows = []
    for what, work in (("generate", generate), ("cold read, one after another", read)):
        plain, encrypted = in_turn(ROUNDS, work(False), work(True))
        middle = [sorted(times)[len(times) // 2] for times in (plain, encrypted)]
        rates = [f"{SIZE / seconds / 1e6:,.0f} MB/s" for seconds in middle]
        rows.append([what, *rates, f"{median_ratio(encrypted, plain):.2f} ×"])
    stored = [sum(p.stat().st_size for p in f.rglob("*") if p.is_file()) for f in folders.values()]
    rows.append(["stored", *(f"{size / 1e6:,.1f} MB" for size in stored),
                 f"{stored[1] / stored[0]:.4f} ×"])  # fmt: skip
    return Table(TITLE, ["what", "plain", "encrypted", "time against plain"], rows)

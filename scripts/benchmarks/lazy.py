"""The first contact: attach to first query of a database far away, and 200 selects after it."""

from __future__ import annotations

import os
import random
import shutil
import statistics
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from .common import Bar, Missing, Table, database, folder_bytes, need, postgres, postgres_bin, query
from .networks import BY_NAME, Line, behind
from .peers import OURS, PEERS, Peer, World, world

TITLE = "First query"
SCALE = int(os.environ.get("SCALE", "150"))  # of pgbench; 150 is about 2.5 GB
ROUNDS = int(os.environ.get("ROUNDS", "5"))
SELECTS = 200
NETWORKS = os.environ.get("NETWORKS", "region").split(",")
ONLY = os.environ.get("PEERS", "")  # words; only peers with one of them in their name


@dataclass(frozen=True)
class Contact:
    """Seconds to the first answer, seconds for the selects after it, bytes over the line."""

    first: float
    selects: float
    fetched: int


def selects(socket: Path, rows: int) -> None:
    """Single-row selects by key, one after another, over one connection."""
    chance = random.Random(4711)
    words = "".join(
        f"SELECT abalance FROM pgbench_accounts WHERE aid = {chance.randrange(1, rows)};\n"
        for _ in range(SELECTS)
    )
    subprocess.run(
        ["runuser", "-u", "postgres", "--", postgres_bin() / "psql", "-h", socket, "-d", "bench",
         "-qAt", "-v", "ON_ERROR_STOP=1"],
        input=words.encode(), stdout=subprocess.DEVNULL, check=True, cwd="/",
    )  # fmt: skip


def contact(made: World, peer: Peer, line: Line, work: Path, socket: Path) -> Contact:
    """One attach with nothing cached, until the selects are through."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    work.chmod(0o755)
    os.sync()  # what the round before wrote is not our matter
    with behind(line, made.port(peer.kind)) as far:
        began = time.monotonic()
        with peer.mounted(made, far, work) as data, postgres(data, socket):
            query(socket, "SELECT abalance FROM pgbench_accounts WHERE aid = 4711")
            first, fetched = time.monotonic() - began, far.fetched()
            selects(socket, SCALE * 100_000)
            then = time.monotonic() - began - first
    return Contact(first, then, fetched)


def measure(scratch: Path, line: Line) -> dict[str, list[Contact]]:
    """Every program in turn, in rounds; one that fails says so once and is left out."""
    data = database(scratch, SCALE)
    found: dict[str, list[Contact]] = {}
    chosen = [p for p in (*OURS, *PEERS) if any(word in p.name for word in ONLY.split(","))]
    with world(scratch, data) as made:
        for _ in range(ROUNDS):
            for peer in chosen:
                if found.get(peer.name) == []:
                    continue
                results = found.setdefault(peer.name, [])
                try:
                    results.append(
                        contact(made, peer, line, scratch / "work", scratch / "pgsocket")
                    )
                    print(f"  {peer.name}: {results[-1]}", flush=True)
                except (Missing, RuntimeError, subprocess.CalledProcessError) as error:
                    print(f"  {peer.name}: not measured: {error}", flush=True)
        shutil.rmtree(scratch / "work", ignore_errors=True)
    return found


def main(scratch: Path) -> Table:
    need("nbdfuse", "libnbd-bin")
    table = Table(
        "first contact with a PostgreSQL database far away",
        ["network", "program", "first query", f"{SELECTS} selects then", "fetched until the first"],
    )
    for network in NETWORKS:
        line = BY_NAME[network]
        found = measure(scratch, line)
        size = folder_bytes(scratch / "pgdata")
        for name, contacts in found.items():
            if contacts:
                table.rows.append(
                    (
                        line.name,
                        name,
                        f"{statistics.median(c.first for c in contacts):.2f} s",
                        f"{statistics.median(c.selects for c in contacts):.2f} s",
                        f"{statistics.median(c.fetched for c in contacts) / size:.2%}",
                    )
                )
        if line is BY_NAME["region"]:
            table.bars += bars(found, size)
    table.notes.append(
        f"Medians of {ROUNDS} rounds, the programs in turn; nothing of the data is on this host. "
        "From making the volume to the answer: attach, mount, start of PostgreSQL, a query by key."
    )
    return table


def bars(found: dict[str, list[Contact]], size: int) -> list[Bar]:
    """The issue's bars: against the best lazy peer and the best full copy, ours being our best."""
    firsts, thens, fetched = (
        {n: statistics.median(getattr(c, what) for c in cs) for n, cs in found.items() if cs}
        for what in ("first", "selects", "fetched")
    )
    ours = [peer.name for peer in OURS if peer.name in firsts]
    lazy = [peer.name for peer in PEERS if peer.lazy and peer.name in firsts]
    whole = [peer.name for peer in PEERS if not peer.lazy and peer.name in firsts]
    if not ours or not lazy:
        return []
    first, then = min(firsts[name] for name in ours), min(thens[name] for name in ours)
    made = [
        Bar("first query, against the best lazy peer", 2, min(firsts[n] for n in lazy) / first),
        Bar("200 selects, against the best lazy peer", 3, min(thens[n] for n in lazy) / then),
        Bar(
            "part of the image fetched for the first query (2 % over it)",
            1,
            0.02 / (min(fetched[name] for name in ours) / size),
        ),
    ]
    if whole:
        best = min(firsts[name] for name in whole)
        made.append(Bar("first query, against the best whole copy", 20, best / first))
    return made

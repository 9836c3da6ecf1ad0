"""Warm reads against nbdkit's file plugin, the limit of what an NBD server does here."""

from __future__ import annotations

import json
import os
import secrets
import statistics
from pathlib import Path

from horcrux_nbd.server import plugin_path

from .common import Table, cli, in_turn, median_ratio, nbdkit, need, run

TITLE = "Warm reads"
SIZE = 512 << 20
SECONDS = int(os.environ.get("SECONDS", "3"))
ROUNDS = int(os.environ.get("ROUNDS", "5"))

JOBS = {
    "1 MiB sequential read": ["--rw=read", "--bs=1m", "--iodepth=8"],
    "4 KiB random read, depth 32": ["--rw=randread", "--bs=4k", "--iodepth=32"],
    "4 KiB random read, depth 1": ["--rw=randread", "--bs=4k", "--iodepth=1"],
}


def fio(socket: Path, words: list[str]) -> float:
    """Bytes a second that fio reads through `socket`."""
    answer = run(
        "fio", "--name=warm", "--ioengine=nbd", f"--uri=nbd+unix:///?socket={socket}",
        f"--size={SIZE}", "--time_based", f"--runtime={SECONDS}", "--output-format=json", *words,
    )  # fmt: skip
    return float(json.loads(answer[answer.index("{") :])["jobs"][0]["read"]["bw_bytes"])


def main(scratch: Path) -> Table:
    need("fio", "fio")
    table = Table(
        "Warm reads, everything in the cache", ["what", "Horcrux", "nbdkit file", "ratio"]
    )
    raw = scratch / "warm.raw"
    if not raw.exists():
        with raw.open("wb") as file:
            for _ in range(SIZE >> 20):
                file.write(secrets.token_bytes(1 << 20))
        cli("generate", "WARM", raw, scratch / "warm-repo")
    ours, theirs = scratch / "warm.sock", scratch / "file.sock"
    words = (f"repo=cp://{scratch}/warm-repo", "name=WARM", f"overlay={scratch}/warm-overlay",
             f"cache={scratch}/cache", "cache_size=20G")  # fmt: skip
    with (
        nbdkit(ours, "python", plugin_path(), *words),
        nbdkit(theirs, "file", raw),
    ):
        run("nbdcopy", f"nbd+unix:///?socket={ours}", "null:")
        for name, job in JOBS.items():
            a, b = in_turn(ROUNDS, lambda job=job: fio(ours, job), lambda job=job: fio(theirs, job))  # type: ignore[misc]
            ratio = median_ratio(a, b)
            table.rows.append((name, _figure(a, job), _figure(b, job), f"{ratio:.2f} ×"))
    table.notes.append(f"fio over the Unix socket, {ROUNDS} pairs of {SECONDS} s, medians.")
    return table


def _figure(rates: list[float], job: list[str]) -> str:
    rate = statistics.median(rates)
    return f"{rate / 4096:,.0f} IOPS" if "--bs=4k" in job else f"{rate / (1 << 20):,.0f} MiB/s"

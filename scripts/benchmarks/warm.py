"""What is local, against nbdkit's file plugin, the limit of what an NBD server does here, and its
copy-on-write filter.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from horcrux_nbd.server import filters, plugin_path

from .common import Bar, Table, cli, in_turn, median_ratio, nbdkit, need, run

TITLE = "Warm path"
DATA = 128 << 20  # random bytes at the begin of the image: what is read
SIZE = 4 << 30  # of the image; the rest is a hole: what is written
SECONDS = int(os.environ.get("SECONDS", "2"))
ROUNDS = int(os.environ.get("ROUNDS", "5"))

FILE, COW, EXT4 = "nbdkit file", "nbdkit file + cow", "local ext4"


@dataclass(frozen=True)
class Job:
    """A bar: what fio does, against whom, and the ratio that is asked for."""

    what: str
    peer: str
    asked: float
    words: tuple[str, ...]


READ = ("--offset=0", f"--size={DATA}")
# A run of two seconds writes less than a tenth of it, so it writes most blocks for the first time.
WRITE = (f"--offset={DATA}", f"--size={SIZE - DATA}")
RANDOM_READ, RANDOM_WRITE = ("--rw=randread", "--bs=4k"), ("--rw=randwrite", "--bs=4k")
DEEP, ONE, MANY = "--iodepth=32", "--iodepth=1", "--iodepth=8"
JOBS = (
    Job("4 KiB random read, depth 32", COW, 1.0, (*RANDOM_READ, DEEP, *READ)),
    Job("4 KiB random read, depth 32", FILE, 0.9, (*RANDOM_READ, DEEP, *READ)),
    Job("4 KiB random read, depth 1", FILE, 0.9, (*RANDOM_READ, ONE, *READ)),
    Job("1 MiB sequential read", COW, 1.0, ("--rw=read", "--bs=1m", MANY, *READ)),
    Job("1 MiB sequential write", COW, 1.0, ("--rw=write", "--bs=1m", MANY, *WRITE)),
    Job("4 KiB random write, depth 32", COW, 1.0, (*RANDOM_WRITE, DEEP, *WRITE)),
    Job("4 KiB first write + flush, depth 1", FILE, 0.8,
        (*RANDOM_WRITE, ONE, "--fsync=1", *WRITE)),
    Job("4 KiB overwrite + flush, depth 1", FILE, 0.8,
        (*RANDOM_WRITE, ONE, "--fsync=1", f"--offset={DATA}", "--size=32m", "--randrepeat=0")),
)  # fmt: skip


def fio(target: str, words: tuple[str, ...]) -> float:
    """Bytes a second that fio moves."""
    answer = run(
        "fio", "--name=warm", f"--ioengine={'nbd' if 'nbd+unix' in target else 'psync'}", target,
        "--time_based", f"--runtime={SECONDS}", "--output-format=json", *words,
    )  # fmt: skip
    job = json.loads(answer[answer.index("{") :])["jobs"][0]
    return float(job["read"]["bw_bytes"] + job["write"]["bw_bytes"])


def uri(socket: Path) -> str:
    return f"--uri=nbd+unix:///?socket={socket}"


def main(scratch: Path) -> Table:
    need("fio", "fio")
    table = Table("Warm path: all is local", ["what", "Horcrux", "peer", "", "ratio", "asked"])
    raw = scratch / "warm.raw"
    if not raw.exists():
        with raw.open("wb") as file:
            for _ in range(DATA >> 20):
                file.write(secrets.token_bytes(1 << 20))
            file.truncate(SIZE)
        cli("generate", "WARM", raw, scratch / "warm-repo")
    native = filters()
    table.notes.append(
        f"fio over the Unix socket, {ROUNDS} pairs of {SECONDS} s, medians; served "
        + ("with the native filter." if native else "by Python alone: no native filter here.")
    )
    for job in JOBS:
        a, b = _pairs(scratch, raw, native, job)
        _row(table, job, a, b)
    _mounted(table, scratch)
    return table


def _pairs(scratch: Path, raw: Path, native: list[str], job: Job) -> list[list[float]]:
    """Both on fresh overlays, so that each job meets the same."""
    ours, theirs = scratch / "warm.sock", scratch / "peer.sock"
    overlay, copy = scratch / "warm-overlay", scratch / "peer.raw"
    shutil.rmtree(overlay, ignore_errors=True)
    words = (f"repo=cp://{scratch}/warm-repo", "name=WARM", f"overlay={overlay}",
             f"cache={scratch}/cache", "cache_size=20G")  # fmt: skip
    if job.peer == COW:
        peer: tuple[str | Path, ...] = ("--filter=cow", "file", raw, "cow-on-read=true")
    elif "write" in job.what:
        copy.unlink(missing_ok=True)
        with copy.open("wb") as file:
            file.truncate(SIZE)
        peer = ("file", copy)
    else:
        peer = ("file", raw)
    with nbdkit(ours, *native, "python", plugin_path(), *words), nbdkit(theirs, *peer):
        targets = [uri(ours), uri(theirs)]
        prepare: tuple[str, ...] = ("--rw=read", *READ)
        if "overwrite" in job.what:
            prepare = ("--rw=write", "--end_fsync=1", f"--offset={DATA}", "--size=32m")
        for target in targets if "read" in job.what or "overwrite" in job.what else ():
            for _ in range(2):  # fetched, then found in the cache
                run("fio", "--name=warm", "--ioengine=nbd", target, "--bs=1m", *prepare)
        return in_turn(
            ROUNDS, lambda: fio(targets[0], job.words), lambda: fio(targets[1], job.words)
        )


def _row(table: Table, job: Job, a: list[float], b: list[float]) -> None:
    ratio = median_ratio(a, b)
    print(f"{job.what}, against {job.peer}: {ratio:.2f}", file=sys.stderr)
    table.rows.append((job.what, _figure(a, job), _figure(b, job), job.peer, f"{ratio:.2f} ×",
                       f"{job.asked:.1f} ×"))  # fmt: skip
    table.bars.append(Bar(f"{job.what}, against {job.peer}", job.asked, ratio))


def _figure(rates: list[float], job: Job) -> str:
    rate = statistics.median(rates)
    return f"{rate / 4096:,.0f} IOPS" if "4 KiB" in job.what else f"{rate / (1 << 20):,.0f} MiB/s"


# ---- on the mounted disk


def _mounted(table: Table, scratch: Path) -> None:
    """Reads from the kernel's page cache, which no server is asked for."""
    if os.geteuid() != 0:
        table.notes.append("Not measured: reads on the mounted disk (takes root).")
        return
    job = Job("page-cache reads, mounted", EXT4, 1.0, ("--rw=randread", "--bs=4k", "--size=256m"))
    source, local = scratch / "warm-tree", scratch / "warm-ext4"
    if not (source / "file").exists():
        source.mkdir(exist_ok=True)
        (source / "file").write_bytes(secrets.token_bytes(256 << 20))
        cli("generate", "TREE", source, scratch / "warm-repo")
    with _ext4(local, source / "file"), _volume(scratch) as mount:
        targets = [f"--filename={folder / 'file'}" for folder in (mount, local)]
        for target in targets:
            run("fio", "--name=warm", "--ioengine=psync", target, "--rw=read", "--bs=1m")
        a, b = in_turn(
            ROUNDS,
            lambda: fio(targets[0], (*job.words, "--invalidate=0")),
            lambda: fio(targets[1], (*job.words, "--invalidate=0")),
        )
    _row(table, job, a, b)


@contextlib.contextmanager
def _ext4(folder: Path, content: Path) -> Iterator[None]:
    image = folder.with_suffix(".img")
    with image.open("wb") as file:
        file.truncate(512 << 20)
    run("mke2fs", "-q", "-t", "ext4", image)
    folder.mkdir(exist_ok=True)
    run("mount", "-o", "loop,noatime", image, folder)
    try:
        shutil.copy(content, folder / "file")
        yield
    finally:
        run("umount", folder)


@contextlib.contextmanager
def _volume(scratch: Path) -> Iterator[Path]:
    mount = scratch / "warm-mount"
    mount.mkdir(exist_ok=True)
    cli("create", "warm", scratch / "warm-repo", "TREE")
    try:
        cli("mount", "warm", mount)
        yield mount
    finally:
        cli("umount", "warm")
        with contextlib.suppress(RuntimeError, subprocess.SubprocessError):
            cli("rm", "--force", "warm")

"""The warm path over the kernel's NBD client: as a mounted volume has it. Inside `scripts/vm`:

scripts/vm run -- .venv/bin/python -m scripts.benchmarks.kernel_nbd
"""

from __future__ import annotations

import contextlib
import json
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

from horcrux_nbd.native import build
from horcrux_nbd.server import plugin_path

from .common import Table, cli, in_turn, median_ratio, nbdkit, need, run

DATA, SIZE = 64 << 20, 512 << 20
ROUNDS, SECONDS = 5, 1
CONNECTIONS = 4

READ, WRITE = ("--offset=0", f"--size={DATA}"), (f"--offset={DATA}", f"--size={SIZE - DATA}")
JOBS = {
    "4 KiB random read, depth 32": ("--rw=randread", "--bs=4k", "--iodepth=32", *READ),
    "4 KiB random read, depth 1": ("--rw=randread", "--bs=4k", "--iodepth=1", *READ),
    "1 MiB sequential read": ("--rw=read", "--bs=1m", "--iodepth=8", *READ),
    "1 MiB sequential write": ("--rw=write", "--bs=1m", "--iodepth=8", *WRITE),
    "4 KiB random write, depth 32": ("--rw=randwrite", "--bs=4k", "--iodepth=32", *WRITE),
    "4 KiB write + flush, depth 1": (
        "--rw=randwrite", "--bs=4k", "--iodepth=1", "--fsync=1", *WRITE,
    ),
}  # fmt: skip


def fio(device: str, words: tuple[str, ...]) -> float:
    """Bytes a second that fio moves."""
    answer = run(
        "fio", "--name=warm", "--ioengine=libaio", "--direct=1", f"--filename={device}",
        "--time_based", f"--runtime={SECONDS}", "--output-format=json", *words,
    )  # fmt: skip
    job = json.loads(answer[answer.index("{") :])["jobs"][0]
    return float(job["read"]["bw_bytes"] + job["write"]["bw_bytes"])


@contextlib.contextmanager
def attached(device: str, socket: Path) -> Iterator[str]:
    run(need("nbd-client", "nbd-client"), "-unix", socket, device, "-C", str(CONNECTIONS), "-b4096")
    try:
        yield device
    finally:
        run(need("nbd-client", "nbd-client"), "-d", device)


def main(scratch: Path) -> Table:
    run("modprobe", "nbd")
    native = build.found()
    title = "Warm path over kernel NBD" + ("" if native else ", without the native filter")
    table = Table(
        title, ["what", "Horcrux", "nbdkit file", "nbdkit file + cow", "of file", "of cow"]
    )
    raw, empty = scratch / "raw", scratch / "empty"
    with raw.open("wb") as file:
        file.write(secrets.token_bytes(DATA))
        file.truncate(SIZE)
    with empty.open("wb") as file:
        file.truncate(SIZE)
    cli("generate", "WARM", raw, scratch / "repo")
    words = (f"repo=cp://{scratch}/repo", "name=WARM", f"overlay={scratch}/overlay",
             f"cache={scratch}/cache", "cache_size=10G")  # fmt: skip
    ours, file_, cow = (scratch / name for name in ("ours.sock", "file.sock", "cow.sock"))
    filters = [f"--filter={native}"] if native else []
    with (
        nbdkit(ours, *filters, "python", plugin_path(), *words),
        nbdkit(file_, "file", raw),
        nbdkit(cow, "--filter=cow", "file", raw, "cow-on-read=true"),
        attached("/dev/nbd0", ours) as a,
        attached("/dev/nbd1", file_) as b,
        attached("/dev/nbd2", cow) as c,
    ):
        for device in (a, b, c):
            for _ in range(2):
                run("fio", "--name=warm", "--ioengine=libaio", "--direct=1", "--bs=1m",
                    f"--filename={device}", "--rw=read", *READ)  # fmt: skip
        for what, job in JOBS.items():
            figures = in_turn(ROUNDS, *(lambda d=d, job=job: fio(d, job) for d in (a, b, c)))
            unit = 4096 if "4 KiB" in what else 1 << 20
            table.rows.append((
                what, *(f"{sorted(f)[len(f) // 2] / unit:,.0f}" for f in figures),
                f"{median_ratio(figures[0], figures[1]):.2f} ×",
                f"{median_ratio(figures[0], figures[2]):.2f} ×",
            ))  # fmt: skip
    table.notes.append(
        f"fio, direct I/O, {CONNECTIONS} connections, {ROUNDS} rounds of {SECONDS} s; IOPS and "
        "MiB/s; in a VM without hardware acceleration: read the ratios. "
        "The cow filter flushes nothing."
    )
    return table


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="horcrux-nbd-", dir="/var/tmp") as folder:
        print(main(Path(folder)).markdown())

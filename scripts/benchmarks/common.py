"""What the benchmarks share: data, timing in pairs, servers, tables."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from horcrux_nbd.attach.sockets import listener
from tests.servers.process import stop

POSTGRES = Path("/usr/lib/postgresql")
BIN = Path(sys.executable).parent


class Missing(Exception):
    """A program that a benchmark needs; its message says how to get it."""


@dataclass(frozen=True)
class Bar:
    """A ratio that was measured, against the one that is asked for: higher is better in both."""

    what: str
    asked: float
    measured: float

    @property
    def reached(self) -> bool:
        return self.measured >= self.asked


@dataclass
class Table:
    """Rows of text under `head`, with notes below. `figures` are the numbers behind them."""

    title: str
    head: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)

    def markdown(self) -> str:
        lines = [f"### {self.title}", "", "| " + " | ".join(self.head) + " |"]
        lines.append("|" + "---|" * len(self.head))
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        return "\n".join([*lines, "", *(f"{note}  " for note in self.notes), ""])


def need(program: str, package: str) -> str:
    """The path of a program, or Missing."""
    found = shutil.which(program, path=os.environ["PATH"] + ":/usr/sbin:/sbin")
    if found is None:
        raise Missing(f"needs {program}: apt-get install {package}")
    return found


def run(*argv: str | Path, **options: object) -> str:
    """Standard output of a program that must succeed."""
    result = subprocess.run(
        [str(word) for word in argv],
        capture_output=True,
        text=True,
        check=False,
        **options,  # type: ignore[call-overload]
    )
    if result.returncode:
        raise RuntimeError(f"{argv[0]} failed: {result.stderr.strip()[-500:]}")
    return str(result.stdout)


def timed(work: Callable[[], object]) -> float:
    """Seconds that `work` takes."""
    began = time.monotonic()
    work()
    return time.monotonic() - began


def in_turn(rounds: int, *works: Callable[[], float]) -> list[list[float]]:
    """Each work's results, measured A B A B …, after one round that does not count."""
    found: list[list[float]] = [[] for _ in works]
    for number in range(rounds + 1):
        for results, work in zip(found, works, strict=True):
            value = work()
            if number:
                results.append(value)
    return found


def median_ratio(mine: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of the ratios, pair by pair."""
    return statistics.median(a / b for a, b in zip(mine, theirs, strict=True))


def postgres_bin() -> Path:
    """The folder of PostgreSQL's programs."""
    found = sorted(POSTGRES.glob("*/bin/initdb"))
    if not found:
        raise Missing("needs PostgreSQL: apt-get install postgresql")
    return found[-1].parent


def as_postgres(*argv: str | Path) -> str:
    return run("runuser", "-u", "postgres", "--", *argv, cwd="/")


@contextlib.contextmanager
def postgres(data: Path, socket: Path) -> Iterator[None]:
    """A PostgreSQL on the data directory `data`, on a Unix socket in `socket`."""
    ctl = postgres_bin() / "pg_ctl"
    options = f"-k {socket} -c listen_addresses="
    as_postgres(ctl, "-D", data, "-o", options, "-l", socket / "log", "-w", "-s", "start")
    try:
        yield
    finally:
        as_postgres(ctl, "-D", data, "-m", "fast", "-w", "-s", "stop")


def query(socket: Path, sql: str) -> str:
    return as_postgres(postgres_bin() / "psql", "-h", socket, "-d", "bench", "-Atc", sql).strip()


def database(scratch: Path, scale: int) -> Path:
    """A stopped PostgreSQL data directory with pgbench's tables at `scale` (about 15 MB each).

    The filler columns, which pgbench leaves empty and which would compress 21 to 1, get text that
    compresses like real data, about 3 to 1.
    """
    data, socket = scratch / "pgdata", scratch / "pgsocket"
    if (data / "done").exists():
        return data
    shutil.rmtree(data, ignore_errors=True)
    socket.mkdir(exist_ok=True)
    for folder in (scratch, socket):
        shutil.chown(folder, "postgres")
    as_postgres(postgres_bin() / "initdb", "-D", data, "--auth=trust", "--no-sync")
    with postgres(data, socket):
        as_postgres(postgres_bin() / "createdb", "-h", socket, "bench")
        as_postgres(
            postgres_bin() / "pgbench", "-i", "-q", "-s", str(scale), "-I", "dtg", "-h", socket,
            "bench",
        )  # fmt: skip
        query(
            socket,
            "CREATE TABLE filled AS SELECT aid, bid, abalance,"
            " (left(md5(aid::text) || md5((-aid)::text) || md5((aid / 50)::text), 84))::char(84)"
            " AS filler"
            " FROM pgbench_accounts; DROP TABLE pgbench_accounts;"
            " ALTER TABLE filled RENAME TO pgbench_accounts;",
        )
        as_postgres(postgres_bin() / "pgbench", "-i", "-I", "vp", "-h", socket, "bench")
        query(socket, "CHECKPOINT")
    (data / "done").touch()
    shutil.chown(data / "done", "postgres")
    return data


def compressible(path: Path, size: int, seed: int = 1) -> None:
    """A file of `size` bytes in rows that compress about 3 to 1 with zstd, as real tables do."""
    chance = random.Random(seed)
    words = [chance.randbytes(6).hex().encode() for _ in range(4096)]
    with path.open("wb") as file:
        left = size
        while left > 0:
            rows = bytearray()
            while len(rows) < 1 << 20:
                number = chance.getrandbits(32)
                rows += b"%010d %s %s %s 2026-01-%02d shipped  0.00 EUR  %s\n" % (
                    number, words[number & 4095], words[number >> 12 & 4095],
                    chance.randbytes(9).hex().encode(), number % 28 + 1, words[number >> 20],
                )  # fmt: skip
            file.write(rows[: min(left, 1 << 20)])
            left -= 1 << 20


def folder_bytes(folder: Path) -> int:
    """Bytes that the files below `folder` take."""
    return sum(p.lstat().st_blocks * 512 for p in folder.rglob("*") if not p.is_dir())


@contextlib.contextmanager
def nbdkit(
    socket: Path, *words: str | Path, threads: int = 16
) -> Iterator[subprocess.Popen[bytes]]:
    """An nbdkit that listens on `socket`."""
    need("nbdkit", "nbdkit nbdkit-plugin-python")
    with contextlib.suppress(FileNotFoundError):
        socket.unlink()
    process = subprocess.Popen(
        ["nbdkit", "-f", "-U", str(socket), "-t", str(threads), *map(str, words)],
        start_new_session=True,  # `stop` ends a process group
    )
    try:
        deadline = time.monotonic() + 60
        while not listener(socket):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("nbdkit did not start")
            time.sleep(0.01)
        yield process
    finally:
        stop(process, 30)


def rss(pid: int) -> int:
    """Resident bytes of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def cli(*words: str | Path) -> str:
    """What horcrux-cli prints."""
    return run(BIN / "horcrux-cli", *words)


def mb(rate: float) -> str:
    return f"{rate / 1e6:,.0f} MB/s"

"""Memory: of a server with a very large image, with a very large cache, and of 100 servers."""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import subprocess
import sys
from pathlib import Path

from horcrux_nbd.chunkstore import open_store
from horcrux_nbd.generate import generate
from horcrux_nbd.server import plugin_path
from horcrux_nbd.units import GiB, KiB, TiB, format_size
from tests.servers.nbdkit import libnbd

from .common import Bar, Missing, Table, nbdkit, rss
from .open_size import Sparse

TITLE = "Memory"
CACHED = int(os.environ.get("CACHED", str(TiB // (512 * KiB))))  # files: 1 TiB in chunks of 512 KiB
VOLUMES = int(os.environ.get("VOLUMES", "100"))
READS = 5000
LIMIT = 150 << 20  # the bar

# Largest resident size of a process that evicts a tenth of a cache.
TRIM = """
import resource, sys
from pathlib import Path
from horcrux_nbd.volume.cache import Cache
cache = Cache(Path(sys.argv[1]), int(sys.argv[2]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
cache.trim(int(sys.argv[2]), 0.9)
print(before * 1024, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def pss(pids: list[int]) -> int:
    """Bytes that processes take together, shared pages once."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total


def served(scratch: Path, url: str, number: int) -> tuple[str | Path, ...]:
    return (
        "python", plugin_path(), f"repo={url}", "name=s65536",
        f"overlay={scratch / f'memory-overlay-{number}'}", f"cache={scratch / 'memory-cache'}",
        "cache_size=1T",
    )  # fmt: skip


def large_image(scratch: Path, url: str) -> tuple[int, int]:
    """Resident bytes of a server of 64 TiB when it has opened, and after reads all over it."""
    nbd = libnbd()
    if nbd is None:
        raise Missing("needs libnbd: apt-get install python3-libnbd")
    socket, size, chance = scratch / "memory.sock", 64 * TiB, random.Random(1)
    with nbdkit(socket, *served(scratch, url, 0)) as process:
        handle = nbd.NBD()
        handle.connect_unix(str(socket))
        opened = rss(process.pid)
        for _ in range(READS):
            handle.pread(4096, chance.randrange(size // 4096) * 4096)
            handle.pwrite(bytes(4096), chance.randrange(size // 4096) * 4096)
        for piece in range(Sparse.PIECES):
            handle.pread(4096, piece * (size // Sparse.PIECES >> 20 << 20))
        return opened, rss(process.pid)


def large_cache(scratch: Path) -> tuple[int, int]:
    """Bytes before and at an eviction of a tenth of a cache of CACHED chunks (files of holes)."""
    folder, length = scratch / "memory-full-cache", 512 * KiB + 32
    for shard in range(256):
        (folder / "chunks" / f"{shard:02x}").mkdir(parents=True)
    for number in range(CACHED):
        name = secrets.token_hex(31) + "01"
        fd = os.open(folder / "chunks" / name[:2] / name, os.O_WRONLY | os.O_CREAT)
        os.ftruncate(fd, length)
        when = 1_700_000_000 + number * 3
        os.utime(fd, (when, when))
        os.close(fd)
    limit = str(CACHED * length - 1)
    found = subprocess.run(
        [sys.executable, "-c", TRIM, folder, limit], capture_output=True, text=True, check=True
    )
    before, after = map(int, found.stdout.split())
    return before, after


def many_volumes(scratch: Path, url: str) -> tuple[int, int]:
    """Bytes of VOLUMES servers together, and of the largest one."""
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(
                nbdkit(scratch / f"m{n}.sock", *served(scratch, url, n + 1), threads=4)
            )
            for n in range(VOLUMES)
        ]
        pids = [process.pid for process in processes]
        return pss(pids), max(map(rss, pids))


def main(scratch: Path) -> Table:
    table = Table("memory", ["what", "memory"])
    url = f"cp://{scratch}/memory-repo"
    with open_store(url, create=True) as store:
        generate(Sparse(64 * TiB), store, f"s{64 * TiB // GiB}", author="bench", message="sparse")
    opened, used = large_image(scratch, url)
    table.rows.append(("a server of a 64 TiB image, opened", format_size(opened)))
    table.rows.append((f"after {READS:,} reads and writes all over it", format_size(used)))
    before, after = large_cache(scratch)
    size = format_size(CACHED * 512 * KiB)
    table.rows.append((f"a process with a cache of {size}", format_size(before)))
    table.rows.append(("while it evicts a tenth of it", format_size(after)))
    together, largest = many_volumes(scratch, url)
    table.rows.append((f"{VOLUMES} servers together", format_size(together)))
    table.rows.append(("the largest of them", format_size(largest)))
    table.bars.append(Bar("memory of a 64 TiB image (150 MiB over it)", 1, LIMIT / opened))
    table.notes.append(
        "Resident sizes of nbdkit; of many servers the proportional ones, with shared pages once. "
        "The cache's files are holes: what counts is how many there are."
    )
    return table

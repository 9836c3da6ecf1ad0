"""Opening a volume: does it depend on the size of the image?"""

from __future__ import annotations

import secrets
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

from horcrux_nbd.chunkstore import open_store
from horcrux_nbd.generate import generate
from horcrux_nbd.server import plugin_path
from horcrux_nbd.source import Source
from horcrux_nbd.units import GiB, MiB, TiB, format_size

from .common import Table, nbdkit, rss, run

TITLE = "Opening a volume"


class Sparse(Source):
    """An image of `size` bytes with 64 MiB of data, spread over all of it."""

    filesystem = None
    PIECES = 128

    def __init__(self, size: int) -> None:
        self.size = size
        self._data = secrets.token_bytes(512 * 1024)

    def extents(self) -> Iterator[tuple[int, int]]:
        step = self.size // self.PIECES // MiB * MiB
        return ((n * step, len(self._data)) for n in range(self.PIECES))

    def read(self, offset: int, length: int) -> bytes:
        return offset.to_bytes(8, "big") + self._data[8:length]

    def problems(self) -> list[str]:
        return []

    def close(self) -> None:
        pass


def measure(scratch: Path, url: str, name: str) -> tuple[float, int]:
    """Seconds from starting nbdkit to the first answer; resident bytes of it then."""
    socket = scratch / "open.sock"
    overlay = scratch / f"overlay-{secrets.token_hex(4)}"
    began = time.monotonic()
    with nbdkit(
        socket, "python", plugin_path(), f"repo={url}", f"name={name}", f"overlay={overlay}",
        f"cache={scratch / 'cache'}",
    ) as process:  # fmt: skip
        run("nbdinfo", "--size", f"nbd+unix:///?socket={socket}")
        return time.monotonic() - began, rss(process.pid)


def main(scratch: Path) -> Table:
    table = Table(
        "Opening a volume: nbdkit start, version looked up, first answer",
        ["image", "time", "memory"],
    )
    url = f"cp://{scratch}/sizes"
    sizes = (1 * GiB, 1 * TiB, 64 * TiB)
    with open_store(url, create=True) as store:
        for size in sizes:
            name = f"s{size // GiB}"
            generate(Sparse(size), store, name, author="bench", message="sparse")
    for size in sizes:
        found = [measure(scratch, url, f"s{size // GiB}") for _ in range(6)][1:]
        table.rows.append(
            (
                format_size(size),
                f"{statistics.median(t for t, _ in found):.2f} s",
                format_size(max(m for _, m in found)),
            )
        )
    table.notes.append("Medians of 5; memory is the largest resident size of the nbdkit process.")
    return table

"""What a volume holds, told from its files without opening it: it may be served by somebody."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import KeyRequired, NotFound, StoreError
from ..repository.index import Index
from .cache import Cache
from .layer import BLOCK_SIZE, Layer
from .state import VolumeState, base_commit, layer_folder

# Beyond this many chunks (128 GiB at 512 KiB) counting what is cached would take seconds.
MAX_COUNTED = 262_144


@dataclass(frozen=True)
class Survey:
    """Bytes, whole blocks or chunks. `cached` and `data` are None where counting takes too long."""

    written: int = 0  # in the overlay
    zeroed: int = 0
    disk: int = 0  # taken by the overlay on this host
    cached: int | None = None  # of the base, in this host's cache
    data: int | None = None  # of the base that is not zeros, as far as its index is on this host


def survey(folder: Path, state: VolumeState, cache_folder: Path) -> Survey:
    """Look at a volume's map and cache. Takes no lock and fetches nothing. Raises Damaged."""
    written = zeroed = disk = 0
    for name in state.layers:
        layer = Layer(layer_folder(folder, name), bytes.fromhex(name.id), state.size)
        layer.open(read_only=True)
        data, zero = layer.blocks.count()
        written, zeroed = written + data * BLOCK_SIZE, zeroed + zero * BLOCK_SIZE
        disk += layer.allocated()
        layer.close()
    try:
        cached, total = _cached(folder, state, cache_folder)
    except (KeyRequired, StoreError):  # what is written here can be told all the same
        cached = total = None
    return Survey(written, zeroed, disk, cached, total)


def _cached(folder: Path, state: VolumeState, cache_folder: Path) -> tuple[int | None, int | None]:
    if not (cache_folder / "meta").is_dir():
        return 0, None
    cache = Cache(cache_folder)
    commit = base_commit(folder, state)

    def load(oid: bytes) -> bytes:
        node = cache.read(oid)
        if node is None:
            raise NotFound(f"node {oid.hex()} is not on this host")  # nor is what is below it
        return node

    index = Index(commit.index, commit.levels, load)
    unknown: list[Exception] = []
    here = total = 0
    for _, oid in index.entries(missing=unknown.append):
        total += 1
        if total > MAX_COUNTED:
            return None, None
        here += cache.has(oid)
    return here * state.chunk_size, None if unknown else total * state.chunk_size

"""What the tests of volumes share: images made from bytes, and a store that can be watched."""

from __future__ import annotations

import gc
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from horcrux_nbd.chunkstore import open_store
from horcrux_nbd.chunkstore.base import ChunkStore
from horcrux_nbd.chunkstore.wrapper import WrapperStore
from horcrux_nbd.generate import generate
from horcrux_nbd.names import Version
from horcrux_nbd.repository.objects import object_key
from horcrux_nbd.repository.repository import Repository, Resolved
from horcrux_nbd.source.base import Source
from horcrux_nbd.units import KiB
from horcrux_nbd.volume.state import create_volume
from horcrux_nbd.volume.volume import Volume

T = TypeVar("T")

IMAGE = "AMCC"
CHUNK = 64 * KiB
BLOCK = 4096


class BytesSource(Source):
    """An image in memory: `pieces` by their offset, zeros between them."""

    filesystem = None

    def __init__(self, size: int, pieces: dict[int, bytes]) -> None:
        self.size, self._pieces = size, pieces

    def extents(self) -> Iterator[tuple[int, int]]:
        for offset, data in sorted(self._pieces.items()):
            yield offset, len(data)

    def read(self, offset: int, length: int) -> bytes:
        found = bytearray(length)
        for start, data in self._pieces.items():
            low, high = max(start, offset), min(start + len(data), offset + length)
            if low < high:
                found[low - offset : high - offset] = data[low - start : high - start]
        return bytes(found)

    def problems(self) -> list[str]:
        return []

    def close(self) -> None:
        pass


def noise(length: int, seed: object = 0) -> bytes:
    """Bytes that do not compress and, for another seed, are others."""
    return random.Random(repr(seed)).randbytes(length)


def make_image(
    place: Path | str,
    data: bytes | dict[int, bytes],
    *,
    size: int | None = None,
    image: str = IMAGE,
    chunk_size: int = CHUNK,
) -> str:
    """A repository in a folder, or at a URL, with an image of `data`; its URL. Called again: a new
    version.
    """
    pieces = {0: data} if isinstance(data, bytes) else data
    size = size if size is not None else max(at + len(piece) for at, piece in pieces.items())
    url = place if isinstance(place, str) else f"cp://{place}"
    with open_store(url, create=True) as store, BytesSource(size, pieces) as source:
        generate(source, store, image, chunk_size=chunk_size, author="test", message="a version")
    return url


def resolve(url: str, image: str = IMAGE, ref: str = "main") -> Resolved:
    """A version of an image."""
    with open_store(url) as store:
        return Repository.open(store).resolve(Version(image, ref))


def chunk_ids(url: str, image: str = IMAGE) -> dict[int, bytes]:
    """Chunk number → object id of the version on main."""
    with open_store(url) as store:
        repository = Repository.open(store)
        commit = repository.resolve(Version(image)).commit
        return dict(repository.index(commit).entries())


def object_file(url: str, oid: bytes) -> Path:
    """Where a local repository keeps an object."""
    return Path(url.removeprefix("cp://")) / object_key(oid)


def make_volume(folder: Path, url: str, image: str = IMAGE) -> Path:
    """A volume of a version on main, in `folder`."""
    with open_store(url) as store:
        repository = Repository.open(store)
        create_volume(folder, repository, repository.resolve(Version(image)))
    return folder


def read(volume: Volume, offset: int, length: int) -> bytes:
    """As a request is read: natively what can be, then by Python."""
    data = memoryview(bytearray(length))
    done = volume.native.read(offset, data) if volume.native is not None else 0
    if done < length:
        volume.read_into(offset + done, data[done:])
    return bytes(data)


def flush(volume: Volume) -> None:
    """As a request is flushed: natively if it can be, else by Python."""
    if volume.native is None or not volume.native.flush():
        volume.flush()


def write(volume: Volume, offset: int, data: bytes) -> None:
    """As a request is written: natively if it can be, else by Python."""
    if volume.native is None or not volume.native.write(offset, data):
        volume.write(offset, memoryview(bytearray(data)))


def abandon(volume: Volume) -> None:
    """What the death of the process leaves of a volume: nothing flushed, the lock gone."""
    volume.base.close()
    overlay = volume.overlay
    if overlay is not None:
        for layer in overlay.layers:
            layer._log.close()
            layer._recent.close()
            layer._journal.close()
            layer._files = {}
    for resource in volume._resources:
        if getattr(resource.close, "__name__", "") == "release":
            resource.close()
    volume._resources.clear()


class Watched(WrapperStore):
    """A store whose gets are counted, delayed, refused or held back."""

    def __init__(self, store: ChunkStore) -> None:
        super().__init__(store)
        self.gets: list[str] = []
        self.delay = 0.0  # seconds for each get
        self.fail: Callable[[str], Exception | None] = lambda key: None
        self.open = threading.Event()  # cleared: gets wait
        self.open.set()
        self.waiting = threading.Semaphore(0)  # released once by each get that waits
        self.under_way = self.most = 0
        self._lock = threading.Lock()

    def _do(self, what: str, operation: Callable[[], T]) -> T:
        if not what.startswith("get objects/"):
            return operation()
        key = what.removeprefix("get ")
        with self._lock:
            self.gets.append(key)
            self.under_way += 1
            self.most = max(self.most, self.under_way)
        try:
            if not self.open.is_set():
                self.waiting.release()
                assert self.open.wait(30)
            if self.delay:
                time.sleep(self.delay)
            error = self.fail(key)
            if error is not None:
                raise error
            return operation()
        finally:
            with self._lock:
                self.under_way -= 1

    def chunk_gets(self, ids: dict[int, bytes]) -> list[int]:
        """The numbers of the chunks that were asked for, in this order."""
        numbers = {object_key(oid): number for number, oid in ids.items()}
        return [numbers[key] for key in self.gets if key in numbers]


def open_descriptors() -> set[str]:
    """What this process has open: files, sockets and pipes by what they are."""
    gc.collect()  # what earlier tests let go of in circles
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{name}: {os.readlink(f'/proc/self/fd/{name}')}")
        except FileNotFoundError:
            continue  # the folder's own
    return found

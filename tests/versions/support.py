"""What the tests of versions share: a volume with a model of what it must hold, and crashes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from horcrux_nbd import host, paths, versions
from horcrux_nbd.chunkstore import open_store
from horcrux_nbd.names import Version
from horcrux_nbd.repository.objects import Kind, key_id, kind_of
from horcrux_nbd.repository.repository import Repository
from horcrux_nbd.units import KiB
from horcrux_nbd.volume import state as states
from horcrux_nbd.volume.state import VolumeState
from horcrux_nbd.volume.volume import Volume
from tests.volume.support import IMAGE, make_image, noise, read

AUTHOR = "Test <test@example.org>"
BLOCK = 4096


class Disk:
    """A volume that nobody serves, and what it must hold."""

    def __init__(self, name: str, url: str, *, ref: str = "main", image: str = IMAGE) -> None:
        self.name, self.url, self.image = name, url, image
        host.create(name, url, Version(image, ref))
        self.model = bytearray(self.content())

    @property
    def folder(self) -> Path:
        return host.folder_of(self.name)

    @property
    def state(self) -> VolumeState:
        return VolumeState.load(self.folder)

    def open(self) -> Volume:
        return Volume.open(self.folder, name=self.name)

    def content(self) -> bytes:
        volume = self.open()
        try:
            return read(volume, 0, volume.size)
        finally:
            volume.close()

    def write(self, *pieces: tuple[int, bytes]) -> None:
        """Write (offset, data) and flush."""
        volume = self.open()
        for offset, data in pieces:
            volume.write(offset, memoryview(bytearray(data)))
            self.model[offset : offset + len(data)] = data
        volume.close()

    def zero(self, offset: int, length: int) -> None:
        volume = self.open()
        volume.zero(offset, length)
        self.model[offset : offset + length] = bytes(length)
        volume.close()

    def commit(self, message: str = "a commit", **options: object) -> versions.Committed:
        made = versions.commit([self.name], message, author=AUTHOR, **options)  # type: ignore[arg-type]
        return made[self.name]

    def push(self, **options: object) -> versions.Pushed:
        return versions.push(self.name, author=AUTHOR, **options)  # type: ignore[arg-type]

    def own(self) -> dict[bytes, Kind]:
        """The volume's own objects."""
        with states.open_objects(self.folder) as store:
            ids = [key_id(entry.key) for entry in store.list("objects/")]
        return {oid: kind for oid in ids if oid is not None and (kind := kind_of(oid))}

    def check(self) -> None:
        """The volume holds what it must, and nothing lies about that does not belong to it."""
        assert self.content() == bytes(self.model)
        state = self.state
        layers = {states.layer_folder(self.folder, layer) for layer in state.all_layers}
        assert set((self.folder / states.OVERLAY).iterdir()) == layers


def version_content(url: str, ref: str = "main", image: str = IMAGE) -> bytes:
    """A version as somebody reads it who has nothing of it."""
    with tempfile.TemporaryDirectory() as cache, open_store(url) as store:
        resolved = Repository.open(store).resolve(Version(image, ref))
        volume = Volume.open_version(url, resolved, cache=Path(cache))
        try:
            return read(volume, 0, volume.size)
        finally:
            volume.close()


def small_repository(folder: Path, chunks: int = 8, chunk_size: int = 64 * KiB) -> str:
    """An image of noise, every chunk another."""
    return make_image(folder, noise(chunks * chunk_size, str(folder)), chunk_size=chunk_size)


def clear_cache() -> None:
    """Let this host forget all that it does not need to keep."""
    from horcrux_nbd.volume.cache import Cache

    for pack in paths.volumes().glob("*/objects/packs/*.sent"):
        pack.unlink()
    if paths.cache().is_dir():
        cache = Cache(paths.cache())
        cache.clear()
        cache.close()


# Runs a command in a process of its own, which kills itself at a step. `at` names a function that
# is looked up from the modules below, the call of it that ends the process (1 is the first), and
# whether before or after it.
_CRASHING = """
import importlib, itertools, os, signal, sys
target, number, when, code = sys.argv[1:5]
module, _, name = target.partition(":")
where = importlib.import_module(module)
*path, last = name.split(".")
for part in path:
    where = getattr(where, part)
original, calls = getattr(where, last), itertools.count(1)
def crash(*args, **kwargs):
    mine = next(calls) == int(number)  # threads call it, too
    if mine and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    result = original(*args, **kwargs)
    if mine and when == "after":
        os.kill(os.getpid(), signal.SIGKILL)
    return result
setattr(where, last, crash)
from horcrux_nbd import versions
exec(code)
"""


def run_until_killed(target: str, number: int, when: str, code: str) -> None:
    """Run `code` (with `versions` at hand) until call `number` of `target`; it must get there."""
    done = subprocess.run(
        [sys.executable, "-c", _CRASHING, target, str(number), when, code],
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr or "it ended by itself"

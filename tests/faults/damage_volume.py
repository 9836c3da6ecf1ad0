"""Damage in what a host keeps: the state, overlay, commits of a volume, and the cache.

Each case works on a copy of the host's folder, as opening a volume changes it. The data files of
an overlay are in it for what shows by itself (cut off): like the blocks of any file system they
have no sum, and are as safe as the disk (docs/reliability.md says so).
"""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path

from horcrux_nbd import host
from horcrux_nbd.errors import HorcruxError
from horcrux_nbd.units import KiB
from horcrux_nbd.versions import reflog
from horcrux_nbd.volume import recent
from horcrux_nbd.volume.volume import Volume

from ..versions.support import BLOCK, Disk
from ..volume.support import CHUNK, abandon, make_image, noise, read, write
from .damage import World, WrongBytes, is_typed

CHUNKS = 6
NAME = "v"
LIMIT = 1.0  # seconds for a store that is away; none is

# The disk remembers the folder that marks were noted in by its inode, which a copy changes.
_place = recent.Recent._place


def _same_place(self: recent.Recent) -> tuple[bytes, int, int]:
    return _place(self)[0], 1, 1


class VolumeWorld(World):
    """A volume with an unpushed commit, flushed writes, and writes that only a dead server's notes
    tell of; a second one beside it; and a warm cache.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        recent.Recent._place = _same_place  # type: ignore[method-assign]
        url = make_image(folder / "store", noise(CHUNKS * CHUNK, "image"))
        for name in ("other", NAME):
            disk = Disk(name, url)
            for commit in range(2):
                disk.write((commit * CHUNK + 3 * BLOCK, noise(BLOCK, (name, commit))))
                disk.commit(f"commit {commit}")
            # A patch that makes a full chunk, and zeros.
            disk.write((2 * CHUNK, noise(CHUNK, (name, "full"))))
            disk.zero(3 * CHUNK + BLOCK, 5 * BLOCK)
            disk.commit("a chunk")
            for n in range(6):
                disk.write((4 * CHUNK + n * BLOCK, noise(BLOCK, (name, "flushed", n))))
        self.flushed = bytes(disk.model)
        volume = disk.open()
        for n in range(4, 10):
            piece = noise(BLOCK, ("acknowledged", n))
            write(volume, 4 * CHUNK + n * BLOCK, piece)
            disk.model[4 * CHUNK + n * BLOCK : 4 * CHUNK + (n + 1) * BLOCK] = piece
        assert read(volume, 0, volume.size) == disk.model  # warms the cache
        abandon(volume)
        self.acknowledged = bytes(disk.model)
        self.template = folder / "template"
        shutil.move(folder / "host", self.template)
        self._copy()

    def _copy(self) -> None:
        shutil.rmtree(self.folder / "host", ignore_errors=True)
        shutil.copytree(self.template, self.folder / "host")

    def files(self) -> dict[str, list[Path]]:
        mine = f"/volumes/{NAME}/"
        return {
            kind: [p for p in paths if mine in str(p)] or paths
            for kind, paths in self._all().items()
        }

    def valid(self, kind: str) -> list[Path]:
        return self._all()[kind]

    def _all(self) -> dict[str, list[Path]]:
        found: dict[str, list[Path]] = {}
        for path in sorted((self.folder / "host" / "root").rglob("*")):
            name = path.relative_to(self.folder / "host" / "root").as_posix()
            if path.is_file() and (kind := _kind(name)):
                found.setdefault(kind, []).append(path)
        return found

    def restore(self, path: Path, data: bytes) -> None:
        self._copy()

    def check(self, rng: random.Random, kind: str, path: Path, data: bytes, way: str) -> str:
        if kind == "data" and way not in ("cut", "longer"):
            return "left out"
        outcome = self._look(kind)
        # Refused or not: with the right file in its place again all must be there.
        if outcome != "healed" and path.parent.is_dir():
            path.unlink(missing_ok=True)
            path.write_bytes(data)
        if outcome != "healed":
            again = self._look("nothing")
            if again != "healed":
                raise WrongBytes(f"the damage is gone, and still: {again}")
        return outcome

    def _look(self, kind: str) -> str:
        folder = self.folder / "host" / "root" / "volumes" / NAME
        errors: list[Exception] = []
        for ask in (
            lambda: host.status(NAME),
            lambda: host.unpushed(NAME),
            lambda: reflog.read(folder),
        ):
            try:
                ask()
            except Exception as error:
                errors.append(error)
        try:
            volume = Volume.open(folder, store_limit=LIMIT)
        except Exception as error:
            errors.append(error)
        else:
            try:
                self._read(volume, kind, errors)
            finally:
                try:
                    volume.close()
                except Exception as error:
                    errors.append(error)
        for error in errors:
            if not is_typed(error):
                raise error
        if errors and kind in ("chunks", "meta", "usage", "reflog", "lock"):
            raise WrongBytes(f"not healed: {errors[0]}")
        return f"error ({type(errors[0]).__name__})" if errors else "healed"

    def _read(self, volume: Volume, kind: str, errors: list[Exception]) -> None:
        step = 16 * KiB
        for at in range(0, CHUNKS * CHUNK, step):
            try:
                got = read(volume, at, step)
            except HorcruxError as error:
                errors.append(error)
                continue
            for block in range(at, at + step, BLOCK):
                piece = got[block - at : block - at + BLOCK]
                allowed = {self.acknowledged[block : block + BLOCK]}
                if kind == "recent":  # it is all that tells of writes without a flush
                    allowed.add(self.flushed[block : block + BLOCK])
                if piece not in allowed:
                    raise WrongBytes(f"block {block // BLOCK} reads as something else")


_KINDS = (
    (re.compile(r"volumes/[^/]*/volume.json"), "volume.json"),
    (re.compile(r"volumes/[^/]*/(?:versions\.)?lock"), "lock"),
    (re.compile(r"volumes/[^/]*/reflog"), "reflog"),
    (re.compile(r"volumes/[^/]*/objects/packs/.*"), "packs"),
    (re.compile(r"volumes/[^/]*/objects/.*"), "objects"),
    (re.compile(r"volumes/[^/]*/overlay/[0-9]*/data-.*"), "data"),
    (re.compile(r"volumes/[^/]*/overlay/[0-9]*/(map|recent|flushed)"), ""),
    (re.compile(r"cache/(chunks|meta|usage).*"), ""),
)


def _kind(name: str) -> str:
    for pattern, kind in _KINDS:
        if match := pattern.fullmatch(name):
            return kind or match.group(1)
    raise AssertionError(f"what is {name}?")

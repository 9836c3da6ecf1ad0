"""A version, or a volume as it is now, to be looked at again and again while it is in use."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from .. import host
from ..errors import Damaged, HorcruxError
from ..repository.commits import Commit
from ..repository.repository import Repository
from ..versions.diff_blocks import Side
from ..versions.session import Session
from ..volume import state as states
from ..volume.base import Base
from ..volume.cache import Cache
from ..volume.layer import Layer
from ..volume.local import LocalObjects
from ..volume.overlay import Overlay
from ..volume.state import VolumeState
from ..volume.volume import STORE_LIMIT

# A commit that ends while a volume is opened takes a layer away: looking again finds the next.
_TRIES = 5
SETTLED = 0.02  # seconds; a file system tells times of changes to 1/100 or 1/250 s


class Content(Side):
    """What one version or volume holds. Use it in a `with` block. Not for several threads.

    `layers` are what was written to a volume, newest first, as its files said at the last
    `refresh`: what its server was not asked to flush by then is missing.
    """

    def __init__(
        self,
        name: str,
        commit: Commit,
        repository: Repository,
        cache: Cache,
        local: LocalObjects | None,
        resources: contextlib.ExitStack,
        volume: str | None = None,
    ) -> None:
        """`volume` is the one whose own writes belong to it; `resources` are closed with it."""
        super().__init__(name, commit, repository, cache, local, (), resources)
        self.repository, self.cache, self.local = repository, cache, local
        self.volume = volume

    def __enter__(self) -> Content:
        return self

    @property
    def base(self) -> Base:
        """The version below what was written."""
        return self._base

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset` on. Raises Damaged, StoreError."""
        data = bytearray(length)
        if length:
            self.read_into(offset, memoryview(data))
        return bytes(data)

    # ---- what was written to a volume

    def refresh(self) -> None:
        """Look again at what was written. Raises HorcruxError where the volume was laid on another
        version meanwhile.
        """
        if self.volume is None:
            return
        folder = host.folder_of(self.volume)
        for attempt in range(1, _TRIES + 1):
            state = VolumeState.load(folder)
            if states.base_commit(folder, state) != self.commit:
                raise HorcruxError(
                    f"volume {self.volume} was laid on another version just now: try again"
                )
            try:
                layers = _open_layers(folder, state)
            except (Damaged, OSError):
                if attempt == _TRIES or VolumeState.load(folder) == state:
                    raise
                continue
            self._close_layers()
            self.layers = layers
            self._view = Overlay(layers, self._base)
            return

    def pulse(self) -> object | None:
        """Changes when the volume's files are written to; None while that cannot be told."""
        found = []
        try:
            for layer in self.layers:
                for path in sorted(layer.folder.iterdir()):
                    stat = path.stat()
                    if abs(time.time() - stat.st_mtime) < SETTLED:
                        return None
                    found.append((path.name, stat.st_mtime_ns, stat.st_size))
        except FileNotFoundError:  # it went into a commit just now
            return None
        return found

    def mounts(self) -> list[Path]:
        """Where the volume is mounted now and can be written, one mount of it."""
        if self.volume is None:
            return []
        mounts = host.mounts(self.volume)[:1]
        return [Path(mount.target) for mount in mounts if "ro" not in mount.super_options]

    def _close_layers(self) -> None:
        for layer in self.layers:
            layer.close()
        self.layers = ()


def _open_layers(folder: Path, state: VolumeState) -> tuple[Layer, ...]:
    layers: list[Layer] = []
    try:
        for name in state.layers:
            layer = Layer(states.layer_folder(folder, name), bytes.fromhex(name.id), state.size)
            layers.append(layer.open(read_only=True))
    except BaseException:
        for layer in layers:
            layer.close()
        raise
    return tuple(layers)


def open_volume(name: str, limit: float = STORE_LIMIT) -> Content:
    """What a volume holds now. Works with the store away as far as the data is on this host."""
    with contextlib.ExitStack() as stack:
        session = stack.enter_context(Session(name, limit, lock=False))
        commit = states.base_commit(session.folder, session.state)
        remote, cache, local = session.remote, session.cache, session.local
        content = Content(name, commit, remote, cache, local, stack.pop_all(), name)
    with contextlib.ExitStack() as stack:
        stack.push(content)
        content.refresh()
        stack.pop_all()
    return content


def open_base(name: str, limit: float = STORE_LIMIT) -> Content:
    """The version that a volume lies on, as `open_volume` opens the volume itself."""
    with contextlib.ExitStack() as stack:
        session = stack.enter_context(Session(name, limit, lock=False))
        commit = states.base_commit(session.folder, session.state)
        remote, cache, local = session.remote, session.cache, session.local
        return Content(f"{name}@HEAD", commit, remote, cache, local, stack.pop_all())

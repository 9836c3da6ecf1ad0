"""A version or a volume as bytes that can be read."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from .. import host
from ..errors import Damaged, HorcruxError
from ..repository.commits import Commit
from ..repository.index import Index
from ..repository.repository import Repository
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


class Content:
    """What one version or volume holds. Use it in a `with` block. Not for several threads.

    `layers` are what was written to a volume, newest first, as its files say: what its server was
    not asked to flush may be missing until `refresh`.
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
        self.name, self.commit, self.size = name, commit, commit.size
        self.repository, self.cache, self.local = repository, cache, local
        self.volume = volume
        self.base = Base(repository, commit, cache, local)
        self.index = Index(commit.index, commit.levels, self.base.load_node)
        self.layers: tuple[Layer, ...] = ()
        self._resources = resources
        resources.callback(self.base.close)
        self._source: Base | Overlay = self.base

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset` on. Raises Damaged, StoreError."""
        data = bytearray(length)
        if length:
            self._source.read_into(offset, memoryview(data))
        return bytes(data)

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill `view` from `offset` on; zeros behind the end. Raises Damaged, StoreError."""
        self._source.read_into(offset, view)

    def chunk(self, number: int) -> bytes:
        """The content of one chunk."""
        return self.read(number * self.commit.chunk_size, self.commit.chunk_size)

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
            if bytes.fromhex(state.base) != self._base_id(folder, state):
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
            self.layers = tuple(layers)
            self._source = Overlay(layers, self.base)
            return

    def _base_id(self, folder: Path, state: VolumeState) -> bytes:
        commit = states.base_commit(folder, state)
        return bytes.fromhex(state.base) if commit == self.commit else b""

    def pulse(self) -> object | None:
        """Changes when the volume's files are written to; None while that cannot be told."""
        found = []
        for layer in self.layers:
            for path in sorted(layer.folder.iterdir()):
                stat = path.stat()
                if abs(time.time() - stat.st_mtime) < SETTLED:
                    return None
                found.append((path.name, stat.st_mtime_ns, stat.st_size))
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

    def close(self) -> None:
        self._close_layers()
        self._resources.close()

    def __enter__(self) -> Content:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _open_layers(folder: Path, state: VolumeState) -> Sequence[Layer]:
    layers: list[Layer] = []
    try:
        for name in state.layers:
            layer = Layer(states.layer_folder(folder, name), bytes.fromhex(name.id), state.size)
            layers.append(layer.open(read_only=True))
    except BaseException:
        for layer in layers:
            layer.close()
        raise
    return layers


def open_volume(name: str, limit: float = STORE_LIMIT) -> Content:
    """What a volume holds now. Works with the store away as far as the data is on this host."""
    with contextlib.ExitStack() as stack:
        session = stack.enter_context(Session(name, limit, lock=False))
        commit = states.base_commit(session.folder, session.state)
        remote, cache, local = session.remote, session.cache, session.local
        content = Content(name, commit, remote, cache, local, stack.pop_all(), name)
    try:
        content.refresh()
    except BaseException:
        content.close()
        raise
    return content

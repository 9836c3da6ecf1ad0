"""An open volume: overlay over base, as one block device."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from .. import files, paths
from ..chunkstore import open_mirrored, open_store
from ..errors import UsageError
from ..native import handles, library
from ..repository.commits import Commit
from ..repository.objects import Form
from ..repository.repository import Repository, Resolved
from . import sealing
from . import state as states
from .base import Base
from .cache import Cache
from .fill import Filler
from .layer import BLOCK_SIZE, Layer
from .local import LocalObjects
from .options import FillOptions
from .overlay import Overlay
from .profile import Recorder, find_profile
from .state import Pending, VolumeState
from .warm import IndexWarmer

log = logging.getLogger(__name__)

# How long a read that only the store can serve waits for it, seconds; then EIO. Below the 90 s
# after which the kernel's NBD client gives up on a request.
STORE_LIMIT = 60.0
REMOVAL_LIMIT = 30.0  # seconds for the removal of layers at the end; what is left goes next time


class Volume:
    """A block device of `size` bytes. Any number of threads may call it at once.

    Offsets and lengths are bytes, and need no alignment; requests must lie within the device.
    """

    def __init__(
        self,
        name: str,
        base: Base,
        overlay: Overlay | None,
        resources: list[Closable],
        folder: Path | None = None,
        commit_id: bytes = b"",
    ) -> None:
        self.name = name
        self.opened = commit_id  # the version that it lay on when it was opened
        self.folder = folder
        self.versions = threading.Lock()  # one freeze or seal at a time
        self.fresh = sealing.Fresh(self)
        self.removers: list[threading.Thread] = []  # of layers that went into commits
        self._warmer: IndexWarmer | None = None
        self.filler: Filler | None = None
        self._recorder: Recorder | None = None
        self.fill = FillOptions()
        self._lock: files.FileLock | None = None
        self.size = base.commit.size
        self.base = base
        self.overlay = overlay
        self._resources = resources
        self.native = _native(overlay, base)

    # ---- open

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        name: str | None = None,
        cache: Path | None = None,
        cache_size: int | None = None,
        read_only: bool = False,
        store_limit: float = STORE_LIMIT,
    ) -> Volume:
        """Open the volume in `folder` and lock it. Works with the store away. Starts no thread and
        connects to nothing, so the process may fork before the volume is used.

        Raises Busy where it is served already, NotFound, Damaged.
        """
        name = name or folder.name
        state = VolumeState.load(folder)
        lock = states.lock_of(folder, name).acquire()
        resources: list[Closable] = [Closable(lock.release)]
        layers: list[Layer] = []
        try:
            state = VolumeState.load(folder)  # again: it may have changed before we had the lock
            read_only = read_only or state.read_only
            commit = states.base_commit(folder, state)
            for layer_name in state.layers:
                layer = Layer(
                    states.layer_folder(folder, layer_name),
                    bytes.fromhex(layer_name.id),
                    state.size,
                )
                frozen = bool(layers) or read_only
                layers.append(layer.open(read_only=frozen))
            # Only now: of a state that fits what is there, it can be said what does not belong.
            states.sweep_layers(folder, state)
            cache_ = _open_cache(cache, cache_size, resources)
            local = LocalObjects(folder, cache_, state.chunk_size, state.form)
            resources.append(Closable(local.close))
            repository = _open_repository(
                state.repository,
                state.repository_id,
                commit,
                local.form,
                store_limit,
                resources,
                state.mirrors,
            )
            base = Base(repository, commit, cache_, local)
            overlay = Overlay(layers, base)
            volume = cls(name, base, overlay, resources, folder, bytes.fromhex(state.base))
            volume._lock, volume.fill = lock, state.fill
            return volume
        except BaseException:
            for layer in layers:
                layer.close()
            _close(resources)
            raise

    @classmethod
    def open_version(
        cls,
        repository: str,
        resolved: Resolved,
        *,
        cache: Path | None = None,
        cache_size: int | None = None,
        store_limit: float = STORE_LIMIT,
    ) -> Volume:
        """A version of the repository at a URL, itself, read-only, without a folder."""
        resources: list[Closable] = []
        try:
            cache_ = _open_cache(cache, cache_size, resources)
            opened = _open_repository(
                repository, "", resolved.commit, resolved.form, store_limit, resources
            )
            base = Base(opened, resolved.commit, cache_)
        except BaseException:
            _close(resources)
            raise
        return cls(str(resolved.version), base, None, resources, commit_id=resolved.id)

    def forked(self) -> None:
        """This process serves it now: let the lock say so, and nbdkit's filter know it."""
        if self._lock is not None:
            self._lock.note_holder()
        if self.native is not None:
            self.native.serve(True)

    @property
    def read_only(self) -> bool:
        return self.overlay is None or self.overlay.layers[0].read_only

    # ---- the block device

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill `view` from `offset`. Raises Damaged, StoreError; then `view` means nothing."""
        (self.overlay or self.base).read_into(offset, view)

    def write(self, offset: int, view: memoryview) -> None:
        """Write `view` at `offset`; durable after the next `flush`. Raises NoSpace."""
        self._writable().write(offset, view)

    def zero(self, offset: int, length: int) -> None:
        """Let a range read as zeros, in time that does not grow with it."""
        self._writable().zero(offset, self._whole(offset, length))

    def zero_is_fast(self, offset: int, length: int) -> bool:
        """Whether `zero` there would not have to fetch anything."""
        return self._writable().zero_is_fast(offset, self._whole(offset, length))

    def _whole(self, offset: int, length: int) -> int:
        """`length`, but for an odd-sized image's last block, of which nobody sees the rest."""
        if offset + length == self.size:
            return -(-self.size // BLOCK_SIZE) * BLOCK_SIZE - offset
        return length

    def flush(self) -> None:
        """Make all that was acknowledged before durable. Raises SyncFailed."""
        if self.overlay is not None and not self.read_only:
            with self.base.figures.flushes.timed():
                self.overlay.flush()

    def dirty_bytes(self) -> int:
        """Bytes that are written or zeroed and in no commit: whole blocks."""
        if self.overlay is None:
            return 0
        return BLOCK_SIZE * sum(sum(layer.blocks.count()) for layer in self.overlay.layers)

    def prefetch(self, offset: int, length: int) -> None:
        """Fetch a range of the base in the background."""
        self.base.prefetch(offset, length)

    def extents(self, offset: int, length: int) -> Iterator[tuple[int, int, bool, bool]]:
        """(start, stop, allocated, zero) of pieces that cover the range, ascending, merged."""
        if self.overlay is None:
            pieces = (
                (low, high, data, not data)
                for low, high, data in self.base.extents(offset, offset + length)
            )
        else:
            pieces = (piece for piece in self.overlay.extents(offset, offset + length))
        last: tuple[int, int, bool, bool] | None = None
        for piece in pieces:
            if last is not None and last[2:] == piece[2:] and last[1] == piece[0]:
                last = (last[0], piece[1], *piece[2:])
                continue
            if last is not None:
                yield last
            last = piece
        if last is not None:
            yield last

    # ---- versions

    def freeze(self, pending: Pending) -> VolumeState:
        """Begin a commit (sealing.py)."""
        return sealing.freeze(self, pending)

    def seal(self, commit_id: bytes) -> VolumeState:
        """End a commit: the volume lies on it now (sealing.py)."""
        return sealing.seal(self, commit_id)

    def abandon(self) -> VolumeState:
        """Forget that a commit was begun (sealing.py)."""
        return sealing.abandon(self)

    def warm_index(self) -> None:
        """Bring the index to this host in the background: a commit needs it, store away or not."""
        if self._warmer is None and not self.read_only:
            self._warmer = IndexWarmer(self.base)

    def start_filling(self, options: FillOptions) -> None:
        """Fetch in the background what `options` say, and record what is read."""
        if self.filler is None:
            self.fill = options
            self.filler = Filler(
                lambda: self.base, self.base.demand, options, lambda: find_profile(self)
            )
            if options.record:
                self._recorder = Recorder(self, options.record)

    def _writable(self) -> Overlay:
        if self.overlay is None or self.read_only:
            raise UsageError(f"{self.name} is read-only")
        return self.overlay

    def close(self) -> None:
        """Flush, stop fetching, release the lock. Raises what `flush` raises, after all is done."""
        with contextlib.ExitStack() as stack:  # from the last to the first, whatever one raises
            stack.callback(_close, self._resources)
            for layer in self.overlay.layers if self.overlay is not None else ():
                stack.callback(layer.close)
            for remover in self.removers:
                stack.callback(remover.join, REMOVAL_LIMIT)
            stack.callback(self.fresh.drop)
            stack.callback(self.base.close)
            for background in (self.filler, self._warmer):
                if background is not None:
                    stack.callback(background.stop)
            # Ends what waits for a store that is away.
            stack.callback(self.base.repository.store.close)
            stack.callback(self.base.close, wait=False)
            if self._recorder is not None:
                stack.callback(self._recorder.stop)
            if self.native is not None:
                self.native.serve(False)
                self.native.set([], None, read_only=True)
            if self.overlay is not None and not self.read_only:
                self.overlay.settle()


def _native(overlay: Overlay | None, base: Base) -> handles.Volume | None:
    """What nbdkit's filter serves from, where this process has it."""
    if overlay is not None:
        return overlay.native
    found = library.active()
    if found is None:
        return None
    native = handles.Volume(found)
    native.set([], base.table, read_only=True)
    return native


class Closable:
    """Something to be closed when the volume is."""

    def __init__(self, close: Callable[[], None]) -> None:
        self.close = close


def _close(resources: list[Closable]) -> None:
    with contextlib.ExitStack() as stack:
        for resource in resources:
            stack.callback(resource.close)
        resources.clear()


def _open_repository(
    url: str,
    repository_id: str,
    commit: Commit,
    form: Form,
    limit: float,
    resources: list[Closable],
    mirrors: Sequence[str] = (),
) -> Repository:
    # Nothing is asked of the store here: a volume whose data is all local opens without it.
    store = open_mirrored(url, mirrors, limit=limit, check=False)
    resources.append(Closable(store.close))
    return Repository(store, repository_id, commit.chunk_size, form)


def _open_cache(folder: Path | None, size: int | None, resources: list[Closable]) -> Cache:
    folder = folder or paths.cache()
    files.make_folder(folder, 0o700)
    cache = Cache(folder, size)
    resources.append(Closable(cache.close))
    return cache


def prepare(
    folder: Path | None,
    repository_url: str | None,
    image: str | None,
    ref: str | None,
    *,
    read_only: bool = False,
) -> Resolved | None:
    """Check what a server was asked for before it goes into the background, and make the volume.

    With a `folder`: it is a volume afterwards (returns None). Without: the version to serve
    read-only. Everything that can be wrong with the request is found here. Raises HorcruxError.
    """
    version = states.default_version(image, ref)
    if folder is not None and (folder / states.STATE).exists():
        state = VolumeState.load(folder)
        states.check_fits(state, folder, repository_url, version)
        return None
    if repository_url is None or version is None:
        raise UsageError(
            "repo= and name= say what to serve: a repository's URL and an image in it"
            if folder is None
            else f"{folder} is no volume yet: repo= and name= say what to make it from"
        )
    with open_store(repository_url) as store:
        repository = Repository.open(store)
        resolved = repository.resolve(version)
        if folder is None:
            if not read_only:
                raise UsageError(
                    "overlay= names the folder for what is written; or say readonly=true"
                )
            return resolved
        files.make_folder(folder.absolute(), 0o700)
        with states.lock_of(folder, str(folder)):
            if not (folder / states.STATE).exists():
                states.create_volume(folder, repository, resolved)
    return None

"""The three moments of a commit at the volume: frozen, then sealed into its commit, or abandoned.

```
layers [A]            --freeze-->   [B, A], pending      what is written goes to B, A stays as it is
layers [B, A] pending --seal---->   [B] over the commit that A went into
layers [B, A] pending --abandon->   [B, A]               as if nothing had been; the next takes both
```

**Invariant:** volume.json is replaced once in each, after everything that it names is durable and
before anything that it no longer names is removed. So a crash leaves the state before or after.
**Invariant:** the content of the volume is the same before and after each.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import Busy, HorcruxError, UsageError
from . import state as states
from .blockmap import BASE, DATA
from .layer import BLOCK_SIZE, Layer
from .overlay import Overlay
from .state import LayerName, Pending, VolumeState

if TYPE_CHECKING:
    from .volume import Volume


class Fresh:
    """A layer that is made before it is needed, so that a freeze need not wait for it."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self._made: tuple[LayerName, Layer] | None = None

    def make(self) -> None:
        """Make it, unless there is one. Raises NoSpace, OSError."""
        if self._made is not None:
            return
        folder = self._volume.folder
        assert folder is not None
        name = VolumeState.load(folder).fresh_layer()
        path = states.layer_folder(folder, name)
        shutil.rmtree(path, ignore_errors=True)  # of one that was killed before it was used
        self._made = name, Layer.create(path, bytes.fromhex(name.id), self._volume.size)

    def take(self, state: VolumeState) -> tuple[LayerName, Layer]:
        """It, and it is the caller's."""
        if self._made is not None and self._made[0].number <= state.layers[0].number:
            self.drop()
        self.make()
        assert self._made is not None
        made, self._made = self._made, None
        return made

    def drop(self) -> None:
        """Remove it, if there is one."""
        if self._made is not None:
            folder = self._made[1].folder
            self._made[1].close()
            self._made = None
            shutil.rmtree(folder, ignore_errors=True)


def freeze(volume: Volume, pending: Pending) -> VolumeState:
    """Begin a commit: what was written so far stays as it is now, durably; writes go on in a fresh
    layer. Holds writers up for two syncs of the disk. Raises Busy if one is begun, NoSpace.
    """
    with _changing(volume) as (overlay, state):
        if state.pending is not None:
            raise Busy(f"a commit of {volume.name} is begun and not finished: finish it first")
        assert volume.folder is not None
        name, fresh = volume.fresh.take(state)
        try:
            overlay.flush()  # most of it, before anybody has to wait
            with overlay.paused():
                overlay.settle()
                new = replace(state, layers=(name, *state.layers), pending=pending)
                _save(volume, state, new)
                overlay.push(fresh)
        except BaseException:
            fresh.close()
            if name not in VolumeState.load(volume.folder).layers:
                shutil.rmtree(fresh.folder, ignore_errors=True)
            raise
        return new


def _save(volume: Volume, old: VolumeState, new: VolumeState) -> None:
    assert volume.folder is not None
    try:
        new.save(volume.folder)
    except BaseException:
        # A sync that failed after the rename: the new state must not be found later, when this
        # server has gone on writing to the layer that it calls frozen.
        with contextlib.suppress(OSError, HorcruxError):
            if VolumeState.load(volume.folder) != old:
                old.save(volume.folder)
        raise


def seal(volume: Volume, commit_id: bytes) -> VolumeState:
    """End a commit: the frozen layers are in the commit `commit_id` now, whose objects are the
    volume's own; the volume lies on it from here on.
    """
    with _changing(volume) as (overlay, state):
        _check_pending(volume, state)
        assert volume.folder is not None
        if commit_id.hex() == state.base:
            _keep_superblock(overlay)
        state = replace(state, base=commit_id.hex(), layers=state.layers[:1], pending=None)
        base = volume.base.successor(states.base_commit(volume.folder, state))
        try:
            state.save(volume.folder)
        except BaseException:
            base.close(wait=False)
            raise
        old, frozen = volume.base, overlay.layers[1:]
        overlay.replace(overlay.layers[:1], base)
        volume.base = base
        # Reads that are under way still use these; their files close with the last of them.
        old.close(wait=False)
        # A second and more for a file in many pieces, and nobody has to wait for it. What a crash
        # leaves is removed when the volume is opened next.
        remover = threading.Thread(target=_remove, args=(list(frozen),), name="remove", daemon=True)
        remover.start()
        volume.removers = [thread for thread in volume.removers if thread.is_alive()] + [remover]
        return state


def _remove(layers: list[Layer]) -> None:
    while layers:
        layer = layers.pop()
        layer.retire()
        shutil.rmtree(layer.folder, ignore_errors=True)
        del layer  # its descriptors close with the last reader's reference


def _keep_superblock(overlay: Overlay) -> None:
    """Take block 0 along where nothing became a commit: what counts as nothing may differ in the
    superblock's bookkeeping (pack.only_bookkeeping).
    """
    content = bytearray(BLOCK_SIZE)
    with overlay.paused():
        states_of_it = [layer.blocks.state(0) for layer in overlay.layers]
        if states_of_it[0] == BASE and any(state != BASE for state in states_of_it[1:]):
            overlay.read_into(0, memoryview(content))
            top = overlay.layers[0]
            top.write(0, bytes(content))
            top.mark(0, 1, DATA)
    overlay.flush()


def abandon(volume: Volume) -> VolumeState:
    """Forget that a commit was begun; nothing that was written is."""
    with _changing(volume) as (_, state):
        _check_pending(volume, state)
        assert volume.folder is not None
        state = replace(state, pending=None)
        state.save(volume.folder)
        return state


def _check_pending(volume: Volume, state: VolumeState) -> None:
    if state.pending is None or len(state.layers) < 2:
        raise UsageError(f"no commit of {volume.name} is begun")


@contextlib.contextmanager
def _changing(volume: Volume) -> Iterator[tuple[Overlay, VolumeState]]:
    if volume.overlay is None or volume.read_only:
        raise UsageError(f"{volume.name} is open read-only: umount it, and serve it writable")
    assert volume.folder is not None
    with volume.versions:
        yield volume.overlay, VolumeState.load(volume.folder)

"""volume.json: what a volume is. Replaced atomically, so it is always the state before or after.

A volume is a folder. The CLI keeps its own under `<root>/volumes/<name>`; the `overlay=` folder of
a bare nbdkit command line is one as well.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .. import files
from ..chunkstore import open_store
from ..errors import Damaged, EnvironmentProblem, NotFound, UsageError
from ..names import DEFAULT_BRANCH, Version, check_name
from ..repository.commits import Commit, check_chunk_size, now
from ..repository.objects import ID_SIZE, Kind, encode, object_key
from ..repository.repository import Repository, Resolved
from .layer import Layer
from .local import OBJECTS, open_objects

STATE = "volume.json"
LOCK = "lock"
OVERLAY = "overlay"


@dataclass(frozen=True)
class LayerName:
    """A layer of the overlay: its folder's number, and the id (hex) that its map must have."""

    number: int
    id: str


@dataclass(frozen=True)
class Pending:
    """A commit that was begun: the layer below the newest is frozen for it, and not packed yet."""

    message: str
    author: str
    time: str
    tags: dict[str, str] = field(default_factory=dict)
    allow_empty: bool = False
    group: str = ""  # the volumes that were committed together have this in common


@dataclass(frozen=True)
class VolumeState:
    """The content of volume.json. `layers` are newest first. Sizes in bytes."""

    repository: str
    repository_id: str
    image: str
    ref: str
    base: str  # commit id, hex
    size: int
    chunk_size: int
    layers: tuple[LayerName, ...]
    read_only: bool = False
    created: str = field(default_factory=now)
    # Commit (hex) that the branch had when it was last looked at: what a push expects to find.
    upstream: str | None = None
    pending: Pending | None = None
    version: int = 1

    @property
    def asked(self) -> Version:
        """What the volume was made from, as it was written."""
        return Version(self.image, self.ref)

    def save(self, folder: Path) -> None:
        """Replace volume.json, durably."""
        files.publish_json(folder / STATE, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> VolumeState:
        """Raises NotFound where `folder` is no volume; Damaged."""
        try:
            value = files.read_json(folder / STATE)
        except (FileNotFoundError, NotADirectoryError):
            raise NotFound(f"{folder} is no volume (no {STATE})") from None
        return cls.decode(value, folder)

    @classmethod
    def decode(cls, value: Mapping[str, Any], folder: Path) -> VolumeState:
        """The state in `value`. Raises Damaged, EnvironmentProblem for a newer one."""
        try:
            if value["version"] > 1:
                raise EnvironmentProblem(f"{folder} was made by a newer release: upgrade this one")
            layers = tuple(LayerName(**layer) for layer in value["layers"])
            pending = Pending(**value["pending"]) if value.get("pending") else None
            state = cls(**{**value, "layers": layers, "pending": pending})
            check_name("image", state.image)
            check_chunk_size(state.chunk_size)
            if len(bytes.fromhex(state.base)) != ID_SIZE or not layers or state.size < 0:
                raise ValueError("base, size or layers")
            for layer in layers:
                if len(bytes.fromhex(layer.id)) != 16 or layer.number < 1:
                    raise ValueError("layers")
        except (KeyError, TypeError, ValueError, AttributeError, UsageError) as error:
            raise Damaged(
                f"{folder / STATE} is damaged ({error!r}): restore it from a backup"
            ) from None
        return state


def layer_folder(folder: Path, layer: LayerName) -> Path:
    return folder / OVERLAY / f"{layer.number:06d}"


def sweep_layers(folder: Path, state: VolumeState) -> None:
    """Remove layers that a crash left beside those in use. Under the volume's lock."""
    used = {layer_folder(folder, name) for name in state.layers}
    for path in (folder / OVERLAY).iterdir():
        if path not in used:
            shutil.rmtree(path)


def lock_of(folder: Path, name: str) -> files.FileLock:
    """The lock that keeps a second server (or anybody who changes the volume) out."""
    return files.FileLock(folder / LOCK, f"volume {name}")


def create_volume(
    folder: Path, repository: Repository, resolved: Resolved, *, read_only: bool = False
) -> VolumeState:
    """Make `folder` a volume of a version. Fetches nothing; keeps the commit, for when the store
    is away. Call it under the volume's lock. Raises UsageError where something else is in there.
    """
    if (folder / STATE).exists():
        raise UsageError(f"{folder} is a volume already")
    if folder.exists():
        # An interrupted `create_volume` leaves these; anything else is somebody's.
        strange = set(os.listdir(folder)) - {LOCK, OBJECTS, OVERLAY}
        strange = {name for name in strange if not name.startswith(files.TEMPORARY_PREFIX)}
        if strange:
            raise UsageError(
                f"{folder} is not empty and no volume ({sorted(strange)[0]!r} is in it): name a "
                "folder that is new, empty, or a volume"
            )
    commit = resolved.commit
    layer = LayerName(1, secrets.token_hex(16))
    state = VolumeState(
        repository=repository.url,
        repository_id=repository.id,
        image=commit.image,
        ref=resolved.version.ref,
        base=resolved.id.hex(),
        size=commit.size,
        chunk_size=commit.chunk_size,
        layers=(layer,),
        read_only=read_only,
        upstream=resolved.id.hex(),
    )
    files.make_folder(folder, 0o700)
    with open_objects(folder, create=True) as objects:
        objects.put(object_key(resolved.id), encode(Kind.COMMIT, commit.encode()))
        objects.sync()
    Layer.create(layer_folder(folder, layer), bytes.fromhex(layer.id), commit.size).close()
    state.save(folder)
    return state


def base_commit(folder: Path, state: VolumeState) -> Commit:
    """The base's commit, from the volume's own objects. Raises Damaged."""
    with open_objects(folder) as objects:
        local = Repository(objects, state.repository_id, state.chunk_size)
        commit = local.read_commit(bytes.fromhex(state.base))
    if (commit.size, commit.chunk_size, commit.image) != (
        state.size,
        state.chunk_size,
        state.image,
    ):
        raise Damaged(f"{folder / STATE} does not fit its base commit {state.base[:12]}")
    return commit


def check_fits(
    state: VolumeState, folder: Path, repository: str | None, version: Version | None
) -> None:
    """Refuse to lay an overlay over anything but what it was made from. Raises UsageError.

    A branch that has moved on since is fine: the volume stays on the commit that it was made from.
    """
    if version is not None and (
        version.image != state.image or version.ref not in (state.ref, state.base)
    ):
        raise UsageError(
            f"overlay {folder} belongs to {state.asked}, not to {version}: use ref={state.ref}, "
            "or another overlay folder"
        )
    if repository is not None and repository != state.repository:
        with open_store(repository) as store:
            if Repository.open(store).id != state.repository_id:
                raise UsageError(
                    f"overlay {folder} belongs to another repository ({state.repository}), not to "
                    f"{store.url}: use that, or another overlay folder"
                )


def default_version(image: str | None, ref: str | None) -> Version | None:
    """What `name=` and `ref=` say together; None where neither is given."""
    if image is None:
        return None
    return Version(check_name("image", image), ref or DEFAULT_BRANCH)

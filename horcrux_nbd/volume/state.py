"""volume.json: what a volume is. Replaced atomically, so it is always the state before or after.

A volume is a folder. The CLI keeps its own under `<root>/volumes/<name>`; the `overlay=` folder of
a bare nbdkit command line is one as well.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from blake3 import blake3

from .. import files
from ..chunkstore import open_store, parse_store_url
from ..errors import Damaged, EnvironmentProblem, KeyRequired, NotFound, UsageError
from ..names import DEFAULT_BRANCH, Version, check_name
from ..repository.commits import Commit, check_chunk_size, now
from ..repository.keyring import form_of_host, is_at_hand, locked
from ..repository.objects import ID_SIZE, Form, Kind, object_key
from ..repository.repository import Repository, Resolved
from .layer import Layer
from .local import OBJECTS, open_objects
from .options import FillOptions

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
    members: tuple[str, ...] = ()  # and these are their names


@dataclass(frozen=True)
class Seen:
    """The branch in the repository as it was when it was looked at last. `at` is when that was."""

    commit: str  # hex
    author: str
    time: str
    why: str
    at: str


@dataclass(frozen=True)
class Line:
    """Commits from `tip` down to `upstream` (hex, left out), which were never pushed."""

    tip: str
    upstream: str | None


@dataclass(frozen=True)
class Stash:
    """Changes that were put aside: layers, and all that they only fit together with."""

    layers: tuple[LayerName, ...]
    base: str  # commit id, hex
    ref: str
    upstream: str | None
    size: int
    time: str
    message: str


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
    mirrors: tuple[str, ...] = ()  # other places of the repository, to read from
    created: str = field(default_factory=now)
    # Commit (hex) that the branch had when it was last looked at: what a push expects to find.
    upstream: str | None = None
    pending: Pending | None = None
    seen: Seen | None = None
    # Branches that were left with commits that were never pushed.
    heads: dict[str, Line] = field(default_factory=dict)
    # Such commits that no branch has any more; `reflog --expire` lets them go.
    kept: tuple[Line, ...] = ()
    stash: tuple[Stash, ...] = ()  # newest first
    encrypted: bool = False  # the repository is, and so are the volume's own objects
    fill: FillOptions = field(default_factory=FillOptions)
    # The image is in no repository yet: the first push makes it there.
    unborn: bool = False
    version: int = 1

    @property
    def form(self) -> Form:
        """How the repository and the volume's own objects are stored. Raises KeyRequired where
        they are encrypted and this host does not have the key.
        """
        return form_of_host(self.repository_id, self.repository, encrypted=self.encrypted)

    @property
    def lacks_key(self) -> str:
        """What is to be done where this host has no key; nothing where it has. Asks nobody."""
        lacks = self.encrypted and not is_at_hand(self.repository_id)
        return locked(self.repository) if lacks else ""

    def require_key(self) -> None:
        """Raises KeyRequired where a server of the volume would find no key."""
        if self.lacks_key:
            raise KeyRequired(self.lacks_key)

    @property
    def asked(self) -> Version:
        """What the volume was made from, as it was written."""
        return Version(self.image, self.ref)

    @property
    def all_layers(self) -> tuple[LayerName, ...]:
        """The layers in use, then those of the stash."""
        return (*self.layers, *(layer for one in self.stash for layer in one.layers))

    @property
    def lines(self) -> tuple[Line, ...]:
        """The lines of commits that the volume may come back to; the one that it is on is first."""
        stashed = (Line(one.base, one.upstream) for one in self.stash)
        return (Line(self.base, self.upstream), *self.heads.values(), *self.kept, *stashed)

    @property
    def tips(self) -> set[bytes]:
        """The newest commit of each of the `lines`: all that they need stays here."""
        return {bytes.fromhex(line.tip) for line in self.lines}

    def fresh_layer(self) -> LayerName:
        """The name of a layer that is not there yet."""
        number = max(layer.number for layer in self.all_layers) + 1
        return LayerName(number, secrets.token_hex(16))

    def save(self, folder: Path) -> None:
        """Replace volume.json, durably."""
        value = asdict(self)
        files.publish_json(folder / STATE, {**value, "check": _check(value)})

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
            value = dict(value)
            check = value.pop("check", None)  # early releases wrote none
            if value["version"] > 1:
                raise EnvironmentProblem(f"{folder} was made by a newer release: upgrade this one")
            if check is not None and check != _check(value):
                raise ValueError("its check does not match")
            layers = _layers(value["layers"])
            pending = value.get("pending")
            seen = value.get("seen")
            stashes = tuple(
                Stash(**{**stash, "layers": _layers(stash["layers"])})
                for stash in value.get("stash", ())
            )
            parts = {
                "layers": layers,
                "mirrors": tuple(value.get("mirrors", ())),
                "pending": pending
                and Pending(**{**pending, "members": tuple(pending.get("members", ()))}),
                "seen": seen and Seen(**seen),
                "heads": {n: Line(**line) for n, line in value.get("heads", {}).items()},
                "kept": tuple(Line(**line) for line in value.get("kept", ())),
                "stash": stashes,
                "fill": FillOptions(**value.get("fill", {})).checked(),
            }
            state = cls(**{**value, **parts})
            check_name("image", state.image)
            check_chunk_size(state.chunk_size)
            if len(bytes.fromhex(state.base)) != ID_SIZE or not layers or state.size < 0:
                raise ValueError("base, size or layers")
            if any(len(tip) != ID_SIZE for tip in state.tips):
                raise ValueError("heads, kept or stash")
            for layer in state.all_layers:
                if len(bytes.fromhex(layer.id)) != 16 or layer.number < 1:
                    raise ValueError("layers")
        except (KeyError, TypeError, ValueError, AttributeError, UsageError) as error:
            raise Damaged(
                f"{folder / STATE} is damaged ({error!r}): restore it from a backup"
            ) from None
        return state


def _check(value: Mapping[str, Any]) -> str:
    """Found out by it: one digit that is another names other layers, and those in use would be
    swept away.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return blake3(text.encode()).hexdigest()[:32]


def _layers(values: Iterable[Mapping[str, Any]]) -> tuple[LayerName, ...]:
    return tuple(LayerName(**layer) for layer in values)


def layer_folder(folder: Path, layer: LayerName) -> Path:
    return folder / OVERLAY / f"{layer.number:06d}"


def sweep_layers(folder: Path, state: VolumeState) -> None:
    """Remove layers that a crash left beside those in use. Under the volume's lock."""
    used = {layer_folder(folder, name) for name in state.all_layers}
    for path in (folder / OVERLAY).iterdir():
        if path not in used:
            shutil.rmtree(path, ignore_errors=True)  # the next time, if not now


def lock_of(folder: Path, name: str) -> files.FileLock:
    """The lock that keeps a second server (or anybody who changes the volume) out."""
    return files.FileLock(folder / LOCK, f"volume {name}")


def create_volume(
    folder: Path,
    repository: Repository,
    resolved: Resolved,
    *,
    read_only: bool = False,
    mirrors: Sequence[str] = (),
    fill: FillOptions | None = None,
) -> VolumeState:
    """Make `folder` a volume of a version. Fetches nothing; keeps the commit, for when the store
    is away. Call it under the volume's lock. Raises UsageError where something else is in there.
    """
    check_folder(folder)
    commit = resolved.commit
    state = VolumeState(
        repository=repository.url,
        repository_id=repository.id,
        image=commit.image,
        ref=resolved.version.ref,
        base=resolved.id.hex(),
        size=commit.size,
        chunk_size=commit.chunk_size,
        layers=(),
        read_only=read_only,
        mirrors=tuple(mirrors),
        upstream=resolved.id.hex(),
        encrypted=repository.form.encrypted,
        fill=fill or FillOptions(),
    )
    files.make_folder(folder, 0o700)
    # As it is stored, not as this release would write it: a later one may have said more in it.
    plain = repository.read_object(resolved.id, (Kind.COMMIT,))[1]
    with open_objects(folder, create=True) as objects:
        objects.put(
            object_key(resolved.id), repository.form.encode(Kind.COMMIT, plain, resolved.id)
        )
        objects.sync()
    return lay_volume(folder, commit, state)


def check_folder(folder: Path) -> None:
    """Raises UsageError where `folder` cannot become a volume."""
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


def lay_volume(folder: Path, commit: Commit, state: VolumeState) -> VolumeState:
    """The last step of making a volume, whose commit is among its objects: a layer to write to."""
    layer = LayerName(1, secrets.token_hex(16))
    Layer.create(layer_folder(folder, layer), bytes.fromhex(layer.id), commit.size).close()
    state = replace(state, layers=(layer,))
    state.save(folder)
    return state


def base_commit(folder: Path, state: VolumeState) -> Commit:
    """The base's commit, from the volume's own objects. Raises Damaged."""
    with open_objects(folder) as objects:
        local = Repository(objects, state.repository_id, state.chunk_size, state.form)
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
    if repository is not None and str(parse_store_url(repository)) != state.repository:
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

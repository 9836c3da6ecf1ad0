"""What Docker was promised: one file for each volume that it knows, replaced atomically.

Desired state only. What is really there is asked of the kernel, of nbdkit's processes and of
Docker each time (driver.py, reconcile.py).
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from horcrux_nbd import files, paths
from horcrux_nbd.attach.processes import boot_id
from horcrux_nbd.errors import Damaged, UsageError

from .options import Options, check_docker_name

SUFFIX = ".json"
_OPTIONS = {one.name for one in fields(Options)}


@dataclass(frozen=True)
class MountId:
    """How often Docker has mounted with one ID, and when it did last (Unix time, seconds)."""

    count: int
    since: float

    @property
    def age(self) -> float:
        """Seconds since the last mount; a clock that was set back makes it 0."""
        return max(0.0, time.time() - self.since)


@dataclass(frozen=True)
class Record:
    """A volume as Docker knows it. `volume` is its name on this host."""

    name: str
    volume: str
    created: str  # RFC 3339
    options: Options
    mounts: Mapping[str, MountId] = field(default_factory=dict)
    boot: str = field(default_factory=boot_id)  # that `mounts` are of

    @property
    def wanted(self) -> bool:
        """Whether Docker wants it to be mounted."""
        return bool(self.mounts)

    def mounted(self, mount_id: str) -> Record:
        count = self.mounts[mount_id].count if mount_id in self.mounts else 0
        return replace(self, mounts={**self.mounts, mount_id: MountId(count + 1, time.time())})

    def unmounted(self, mount_id: str) -> Record:
        """With one mount less of that ID; an unknown one changes nothing."""
        mounts = dict(self.mounts)
        if mount_id in mounts:
            left = mounts[mount_id].count - 1
            if left > 0:
                mounts[mount_id] = replace(mounts[mount_id], count=left)
            else:
                del mounts[mount_id]
        return replace(self, mounts=mounts)

    def without_mounts(self) -> Record:
        return replace(self, mounts={})

    def save(self) -> None:
        """Durable once it returns."""
        files.make_folder(folder(), 0o700)
        files.publish_json(_file(self.name), asdict(self))


def folder() -> Path:
    return paths.root() / "docker"


def load(name: str) -> Record | None:
    """The record of `name`; None where Docker has no such volume. Raises Damaged."""
    try:
        value = files.read_json(_file(check_docker_name(name)))
    except (FileNotFoundError, UsageError):  # what is no name has no volume
        return None
    return _decode(value, _file(name))


def remove(name: str) -> None:
    """Forget `name`; no error where there is none."""
    try:
        os.unlink(_file(name))
    except FileNotFoundError:
        return
    files.sync_folder(folder())


def names() -> list[str]:
    """The volumes that Docker knows."""
    try:
        found = os.listdir(folder())
    except FileNotFoundError:
        return []
    return sorted(
        unquote(file.removesuffix(SUFFIX))
        for file in found
        if file.endswith(SUFFIX) and not file.startswith(files.TEMPORARY_PREFIX)
    )


def _file(name: str) -> Path:
    return folder() / (quote(name, safe="@~^") + SUFFIX)


def _decode(value: Any, file: Path) -> Record:
    try:
        mounts = {key: MountId(**one) for key, one in value["mounts"].items()}
        # A later release may have had more options.
        options = {key: one for key, one in value["options"].items() if key in _OPTIONS}
        record = Record(**{**value, "options": Options(**options), "mounts": mounts})
    except (KeyError, TypeError, AttributeError) as error:
        raise Damaged(
            f"{file} is damaged ({error!r}): remove it, and create the volume again; "
            "what was written is kept"
        ) from None
    if record.boot != boot_id():  # nothing is mounted after a reboot
        record = replace(record, mounts={}, boot=boot_id())
    return record

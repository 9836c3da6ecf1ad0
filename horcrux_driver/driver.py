"""The volumes of Docker: made, mounted, counted, removed. Knows nothing of HTTP.

**Invariant:** the record of a volume (records.py) changes only under the volume's lock, and what a
caller is told is on disk before it is told.

**Invariant:** `get`, `list` and `path` take no lock, ask no repository, and never fail for a volume
that is there. Docker forgets a volume whose Get fails.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from horcrux_nbd import blank, config, files, host, identity, paths, supervise
from horcrux_nbd.contents import holds_changes
from horcrux_nbd.errors import Busy, Damaged, HorcruxError, NotFound, UsageError
from horcrux_nbd.names import Version
from horcrux_nbd.repository.commits import now

from . import options, records, report
from .engine import Engine
from .records import Record
from .remotes import Remotes

log = logging.getLogger(__name__)

COMPARE_LIMIT = 10.0  # seconds to wait for the repository, to see whether files differ from it
LOCK_WAIT = 90.0  # seconds; another Mount of the same volume may be waiting for its repository


class NoSuchVolume(NotFound):
    """Docker knows these words, in other drivers' answers too."""

    def __init__(self, name: str) -> None:
        super().__init__(f"no such volume: {name}")


class Driver:
    """All that the protocol asks for. Any number of threads may call it at once."""

    def __init__(self, engine: Engine | None = None, remotes: Remotes | None = None) -> None:
        self.engine = engine or Engine()
        self.remotes = remotes or Remotes()
        self._locks: dict[str, threading.Lock] = {}
        self._guard = threading.Lock()

    # ---- make and remove

    def create(self, name: str, given: Mapping[str, Any] | None) -> bool:
        """Make the volume `name`; whether it was not there. Fetches nothing.

        Raises UsageError for bad options, or where it exists and is something else; NotFound,
        StoreError.
        """
        options.check_docker_name(name)
        settings = config.load()
        wanted = options.parse(name, given, settings)
        with self.locked(name):
            record = records.load(name)
            if record is not None and _exists(record.volume):
                if given and record.options != wanted:
                    raise UsageError(
                        f"volume {name} exists already with other options "
                        f"({report.described(record.options)}): remove it first, or choose "
                        "another name"
                    )
                return False
            volume = options.host_name(name)
            if _exists(volume):
                if given and not wanted.adopt:
                    _check_same(volume, wanted)
                else:  # not even what the defaults say
                    wanted = replace(wanted, adopt=True)
                log.info("volume %s: taking over the one of this host", name)
            else:
                self._make(name, volume, wanted)
            Record(name, volume, now(), wanted).save()
            return True

    def _make(self, name: str, volume: str, wanted: options.Options) -> None:
        if wanted.adopt:
            raise UsageError(
                f"volume {name}: say what it is: -o access=REPOSITORY -o name=IMAGE for a version, "
                "-o size=10G for a new, empty volume"
            )
        if wanted.size is not None:
            blank.create(
                volume,
                wanted.size,
                wanted.fs,
                image=wanted.image,
                url=wanted.access or None,
                author=identity.author(),
            )
            return
        host.create(
            volume,
            wanted.access,
            Version(wanted.image, wanted.ref),
            read_only=wanted.read_only,
            fill=wanted.fill,
        )

    def remove(self, name: str) -> None:
        """Remove a volume; no error where there is none.

        Raises Busy while it is in use, and, unless `on-remove` says otherwise, where it has what
        exists nowhere else.
        """
        with self.locked(name):
            record = records.load(name)
            if record is None:
                return
            if _exists(record.volume):
                record = self._forget_stale(record, grace=0)
                if record.wanted:
                    users = self.engine.users(name) or []
                    by = f" by {', '.join(users)}" if users else ""
                    raise Busy(f"volume {name} is in use{by}: stop what uses it first")
                self._take_down(record)
                self._remove_volume(record)
            records.remove(name)
            with contextlib.suppress(OSError):
                mountpoint(record).rmdir()

    def _remove_volume(self, record: Record) -> None:
        policy = record.options.on_remove
        try:
            host.remove(
                record.volume,
                force=policy == "delete",
                changed=lambda name: holds_changes(name, COMPARE_LIMIT),
            )
        except NotFound:
            return  # by somebody else, just now
        except host.WouldLose as error:
            if policy == "keep":
                log.warning("volume %s is kept on this host: %s", record.name, error)
                return
            raise Busy(
                f"{error}; `horcrux-cli commit` and `horcrux-cli push` keep them (one made with "
                "-o on-remove=keep or -o on-remove=delete is removed without asking)"
            ) from error

    # ---- mount and unmount

    def mount(self, name: str, mount_id: str) -> str:
        """Mount a volume for one more user; where. It is verified, or an error, and undone."""
        with self.locked(name):
            record = self._known(name)
            self._bring_up(record)
            record.mounted(mount_id).save()
            return str(mountpoint(record))

    def unmount(self, name: str, mount_id: str) -> None:
        """One user less; with the last one everything written is durable and the device is gone."""
        with self.locked(name):
            record = records.load(name)
            if record is None:
                return
            if mount_id not in record.mounts:
                log.warning("volume %s: unmount of an unknown mount ID %s", name, mount_id)
            record = record.unmounted(mount_id)
            record.save()
            if not record.wanted:
                self._take_down(record)

    def _bring_up(self, record: Record) -> None:
        target = mountpoint(record)
        there = host.mounts(record.volume)
        if any(mount.target == str(target) for mount in there):
            problem = host.problem(record.volume)
            if not problem:
                return
            if users := self.engine.users(record.name):
                raise Busy(
                    f"volume {record.name} is broken ({problem}): stop {', '.join(users)}, then "
                    "start again; nothing that was written is lost"
                )
            log.warning("volume %s: mounting anew: %s", record.name, problem)
            host.umount(record.volume, force=True)
        elif there:
            raise Busy(
                f"volume {record.name} is mounted on {there[0].target} already: "
                f"`horcrux-cli umount {record.volume}` first"
            )
        files.make_folder(target.parent, 0o700)  # files of any mode are in there
        files.make_folder(target, 0o700)
        settings = config.load()
        host.mount(
            record.volume,
            target,
            via=settings.attach_via,
            read_only=record.options.read_only,
            options={
                **settings.plugin_options(),
                **record.options.for_server,
            },
        )

    def _take_down(self, record: Record) -> None:
        """Unmount and detach what nobody wants; no error where there is nothing."""
        there = host.mounts(record.volume)
        if any(mount.target != str(mountpoint(record)) for mount in there):
            return  # mounted by somebody else, with horcrux-cli
        broken = bool(there) and bool(host.problem(record.volume))
        try:
            host.umount(record.volume, force=broken)
        except NotFound:
            pass  # not mounted
        except Busy as error:
            if host.mounts(record.volume):
                raise
            # Some process has a copy of our mount in a mount namespace of its own (`unshare -m`).
            log.warning("volume %s is unmounted, and released later: %s", record.name, error)

    # ---- what is there

    def get(self, name: str) -> dict[str, Any]:
        """The volume `name` as Docker shows it. Raises NoSuchVolume."""
        try:
            record = self._known(name)
        except Damaged as error:  # Docker would forget it
            return {"Name": name, "Status": {"problem": str(error)}}
        return {
            **_entry(record),
            "Status": report.status(record, self.engine, self.remotes),
        }

    def list(self) -> list[dict[str, Any]]:
        """All volumes of Docker, without their status."""
        found = []
        for name in records.names():
            try:
                found.append(_entry(self._known(name)))
            except NoSuchVolume:
                pass
            except Damaged:
                found.append({"Name": name})
        return found

    def path(self, name: str) -> str:
        """Where a volume is mounted; empty if it is not. Raises NoSuchVolume."""
        record = self._known(name)
        return _mounted_on(record)

    def capabilities(self) -> dict[str, str]:
        return {"Scope": "global"}

    # ---- counts and truth

    def reconcile(self, grace: float) -> None:
        """Let what is there be what Docker wants: forget counts that nobody has any more, and take
        down what nobody wants. Mounts of the last `grace` seconds are left alone.
        """
        for name in records.names():
            try:
                with self.locked(name, wait=0):
                    record = records.load(name)
                    if record is None or not _exists(record.volume):
                        continue
                    # Mostly done by its watcher already; that may have been killed as well.
                    if supervise.revive(record.volume) is not None:
                        log.warning("volume %s: its server was gone and is back", name)
                    record = self._forget_stale(record, grace)
                    if not record.wanted:
                        self._take_down(record)
            except HorcruxError as error:
                log.warning("volume %s: %s", name, error)

    def _forget_stale(self, record: Record, grace: float) -> Record:
        """Without the mount IDs of users that are gone: a crash of Docker tells nobody."""
        if not record.wanted or any(one.age < grace for one in record.mounts.values()):
            return record
        if host.users(record.volume) or self.engine.users(record.name):
            return record
        log.warning(
            "volume %s: forgetting %d mounts that no container has", record.name, len(record.mounts)
        )
        record = record.without_mounts()
        record.save()
        return record

    # ---- helpers

    def _known(self, name: str) -> Record:
        record = records.load(name)
        if record is None or not _exists(record.volume):
            raise NoSuchVolume(name)
        return record

    @contextlib.contextmanager
    def locked(self, name: str, wait: float = LOCK_WAIT) -> Iterator[None]:
        """Nobody else changes this volume. Raises Busy after `wait` seconds."""
        with self._guard:
            lock = self._locks.setdefault(name, threading.Lock())
        if not lock.acquire(timeout=wait):
            raise Busy(f"volume {name} is being mounted, unmounted or removed just now: try again")
        try:
            yield
        finally:
            lock.release()


def mountpoint(record: Record) -> Path:
    """Where a volume is mounted when it is."""
    return paths.root() / "mounts" / record.volume


def _exists(volume: str) -> bool:
    return host.exists(volume)


def _mounted_on(record: Record) -> str:
    with contextlib.suppress(HorcruxError, OSError):
        target = str(mountpoint(record))
        if any(mount.target == target for mount in host.mounts(record.volume)):
            return target
    return ""


def _entry(record: Record) -> dict[str, Any]:
    return {
        "Name": record.name,
        "Mountpoint": _mounted_on(record),
        "CreatedAt": record.created,
    }


def _check_same(volume: str, wanted: options.Options) -> None:
    """Raises UsageError where the volume of this host is not what is wanted."""
    state = host.load(volume)
    if wanted.size is not None:
        same = state.size == wanted.size and state.image == wanted.image
    else:
        same = (state.repository, state.image, state.ref) == (
            wanted.access,
            wanted.image,
            wanted.ref,
        ) and state.read_only == wanted.read_only
    if not same:
        raise UsageError(
            f"there is a volume {volume} on this host already, of {state.asked} in "
            f"{state.repository}: leave out the options to use it, `horcrux-cli rm {volume}`, or "
            "choose another name"
        )

"""The volumes of this host: made, served, attached, mounted, and all that undone.

What the command line and the Docker driver have in common. State is on disk and in the kernel,
never in the caller: each function looks at what is there, so it works after a crash of anything.
"""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import config, control, files, paths, server
from .attach import busy
from .attach import device as devices
from .attach.base import FOLDER, REQUEST_TIMEOUT, Attachment
from .attach.mount import mount as mount_device
from .attach.mount import unmount_device
from .attach.mountinfo import Mount, mounts_of
from .chunkstore import open_mirrored
from .errors import Busy, Damaged, HorcruxError, NotFound, UsageError
from .mirrors import check_mirrors
from .names import Version, check_name, is_name
from .repository.refs import suggest
from .repository.repository import Repository
from .units import format_size
from .volume import state as states
from .volume.base import WAIT_FACTOR
from .volume.local import open_objects, own_commits
from .volume.options import FillOptions
from .volume.state import VolumeState, create_volume
from .volume.survey import Survey, survey
from .volume.volume import STORE_LIMIT

VERSIONS_LOCK = "versions.lock"  # in a volume's folder; see versions/session.py
LOCK_WAIT = 10.0  # seconds; somebody else's mount or umount of the same volume takes less


class WouldLose(Busy):
    """To remove a volume would lose what exists nowhere else."""


@dataclass(frozen=True)
class VolumeStatus:
    """All there is to say of one volume, without asking its store. Sizes in bytes."""

    name: str
    state: VolumeState
    survey: Survey
    server: server.Server | None
    attachment: Attachment | None
    mounts: tuple[Mount, ...]
    problem: str  # one line, empty if all is well
    figures: dict[str, Any] | None  # of the running server, see `Server.figures`


# ---- which there are


def folder_of(name: str) -> Path:
    """The folder of the volume `name`, whether it exists or not. Raises UsageError."""
    return paths.volumes() / check_name("volume", name)


def names() -> list[str]:
    """The volumes of this host."""
    try:
        found = os.listdir(paths.volumes())
    except FileNotFoundError:
        return []
    return sorted(n for n in found if is_name(n) and exists(n))


def exists(name: str) -> bool:
    """Whether this host has a volume `name`."""
    return (folder_of(name) / states.STATE).exists()


def load(name: str) -> VolumeState:
    """What a volume is. Raises NotFound, which names those that there are."""
    try:
        return VolumeState.load(folder_of(name))
    except NotFound:
        raise NotFound(
            f"there is no volume {name!r} on this host{suggest(name, names())}"
        ) from None


def find(name_or_folder: str) -> str:
    """The volume called so, or mounted there. Raises NotFound."""
    if "/" not in name_or_folder:
        load(name_or_folder)
        return name_or_folder
    target = os.path.realpath(name_or_folder)
    for name in names():
        attachment = Attachment.load(_attach_state(name))
        if attachment and any(m.target == target for m in mounts_of(attachment.device)):
            return name
    raise NotFound(f"no volume of Horcrux is mounted on {name_or_folder}")


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Nobody else changes this volume or what it is attached to. Raises Busy after LOCK_WAIT."""
    check_name("volume", name)
    files.make_folder(paths.run(), 0o700)
    lock = files.FileLock(paths.run() / f"{name}.lock", f"volume {name}")
    lock.acquire(LOCK_WAIT)
    try:
        yield
    finally:
        lock.release()


def mounts(name: str) -> list[Mount]:
    """Where a volume's file system is mounted on this host."""
    attachment = Attachment.load(_attach_state(name))
    return [] if attachment is None else mounts_of(attachment.device)


def problem(name: str) -> str:
    """What keeps an attached volume from working, in one line; empty if nothing does."""
    attachment = Attachment.load(_attach_state(name))
    if attachment is None:
        return ""
    found = devices.status(attachment)
    return "" if found.alive else found.problem


def users(name: str) -> list[busy.User]:
    """Processes that use a volume's device or see it mounted in a mount namespace of their own,
    such as those of containers. Raises TimedOut.
    """
    attachment = Attachment.load(_attach_state(name))
    return [] if attachment is None else busy.processes_with(attachment.device)


def _attach_state(name: str) -> Path:
    return server.folder_of(name) / FOLDER


# ---- make and remove


def create(
    name: str,
    url: str,
    version: Version,
    *,
    read_only: bool = False,
    fill: FillOptions | None = None,
) -> VolumeState:
    """Make a volume of a version. Looks the version up; fetches nothing.

    Raises UsageError if it exists already, NotFound, StoreError.
    """
    folder = folder_of(name)
    if exists(name):
        raise UsageError(f"volume {name!r} exists already: choose another name, or remove it first")
    mirrors = config.load().mirrors_of(url)
    with open_mirrored(url, mirrors) as store:
        repository = Repository.open(store)
        check_mirrors(repository, url, mirrors)
        resolved = repository.resolve(version)
        with locked(name):
            return create_volume(
                folder, repository, resolved, read_only=read_only, mirrors=mirrors, fill=fill
            )


def remove(
    name: str, *, force: bool = False, changed: Callable[[str], bool] = lambda _: True
) -> None:
    """Remove a volume. Raises Busy while it is in use; refuses to lose changes, or versions that
    were never pushed, unless `force`.

    `changed` is asked whether a volume that was written to holds changes that are worth something.
    """
    load(name)
    versions = files.FileLock(folder_of(name) / VERSIONS_LOCK, f"volume {name}")
    with versions, locked(name):
        found = status(name)
        if found.mounts:
            where = found.mounts[0].target
            raise Busy(f"volume {name} is mounted on {where}: `horcrux-cli umount {name}` first")
        if found.attachment is not None:
            raise Busy(
                f"volume {name} is attached as {found.attachment.device}: "
                f"`horcrux-cli detach {name}` first"
            )
        if found.server is not None:
            raise Busy(f"volume {name} is served by process {found.server.pid}: stop that first")
        if found.state.stash and not force:
            raise WouldLose(
                f"volume {name} has changes in its stash that exist nowhere else: "
                f"`horcrux-cli rm --force {name}` drops them"
            )
        lost = found.survey.written + found.survey.zeroed
        if lost and not force and changed(name):
            raise WouldLose(
                f"volume {name} holds {format_size(lost)} of changes that exist nowhere else: "
                f"`horcrux-cli rm --force {name}` drops them"
            )
        only_here = 0 if force else len(unpushed(name))
        if only_here:
            raise WouldLose(
                f"volume {name} has {only_here} version{'s' if only_here > 1 else ''} that never "
                f"went to its repository: `horcrux-cli push {name}` first, or `horcrux-cli rm "
                f"--force {name}` drops them"
            )
        folder = folder_of(name)
        with states.lock_of(folder, name):
            # Renamed first: a removal that breaks off leaves no half volume under the name.
            doomed = folder.with_name(f"{files.TEMPORARY_PREFIX}{name}-{secrets.token_hex(4)}")
            os.rename(folder, doomed)
        shutil.rmtree(doomed)
        files.sync_folder(folder.parent)
        shutil.rmtree(server.folder_of(name), ignore_errors=True)


def unpushed(name: str) -> set[bytes]:
    """The ids of a volume's commits that exist on this host only. Raises Damaged.

    The empty file system that a new image begins with does not count: nobody made it.
    """
    state = load(name)
    form = state.form
    with open_objects(folder_of(name)) as objects:
        return {
            oid
            for line in state.lines
            for oid, commit in own_commits(objects, form, bytes.fromhex(line.tip), line.upstream)
            if commit.parents or not state.unborn
        }


# ---- serve, attach, mount


def serve(
    name: str,
    *,
    socket: Path | None = None,
    read_only: bool = False,
    options: dict[str, str] | None = None,
) -> server.Server:
    """Start the volume's NBD server. `options` go to the plugin. Raises Busy if it runs.

    A device of it whose server had died is connected to the new one, where it can be (kernel NBD).
    """
    load(name).require_key()
    with locked(name):
        serving = server.start(
            name, folder_of(name), socket=socket, read_only=read_only, options=options
        )
        attachment = Attachment.load(_attach_state(name))
        if attachment is not None and devices.status(attachment).reconnect:
            devices.reconnect(attachment)
        return serving


def stop(name: str, *, force: bool = False) -> bool:
    """Stop the volume's server; False if none ran. Raises Busy while it is attached."""
    load(name)
    with locked(name):
        attachment = Attachment.load(_attach_state(name))
        if attachment is not None and not force:
            raise Busy(
                f"volume {name} is attached as {attachment.device}: `horcrux-cli detach {name}`"
            )
        return server.stop(name, force=force)


def attach(
    name: str,
    *,
    via: str | None = None,
    read_only: bool = False,
    options: dict[str, str] | None = None,
) -> Attachment:
    """Serve the volume unless it is, and make it a block device. Undoes itself on failure."""
    load(name)
    with locked(name):
        return _attach(name, via, read_only, options)


def _attach(
    name: str, via: str | None, read_only: bool, options: dict[str, str] | None
) -> Attachment:
    state = load(name)
    attachment = Attachment.load(_attach_state(name))
    if attachment is not None:
        found = devices.status(attachment)
        if found.alive:
            raise Busy(f"volume {name} is attached already, as {attachment.device}")
        if mounts_of(attachment.device):
            raise Busy(
                f"volume {name} is mounted but broken ({found.problem}): "
                f"`horcrux-cli umount --force {name}`, then mount it again"
            )
        devices.clean_up(_attach_state(name))
    serving = server.running(name)
    started = serving is None
    if started:
        state.require_key()
    if serving is None:
        serving = server.start(name, folder_of(name), read_only=read_only, options=options)
    try:
        server.keep(name)
        attachment = devices.attach(
            serving.socket,
            name=name,
            state=_attach_state(name),
            read_only=read_only or state.read_only,
            via=via,
            request_timeout=_request_timeout(serving.options),
        )
    except BaseException:
        server.release(name)
        if started:
            server.stop(name, force=True)
        raise
    if not devices.reconnects(attachment):
        server.release(name)
    return attachment


def _request_timeout(options: Mapping[str, str]) -> int:
    """Seconds the kernel gives one request: enough for the server to say that its store is away.
    After a crash of the server, requests that were under way wait as long.
    """
    store = float(options.get("timeout", STORE_LIMIT))
    return REQUEST_TIMEOUT + math.ceil((store - STORE_LIMIT) * WAIT_FACTOR)


def detach(name: str, *, force: bool = False, keep_server: bool = False) -> bool:
    """Release the device and stop the server; False if it was not attached.

    Raises Busy while it is mounted or open, and says by whom.
    """
    load(name)
    with locked(name):
        return _detach(name, force, keep_server)


def _detach(name: str, force: bool, keep_server: bool = False) -> bool:
    attachment = Attachment.load(_attach_state(name))
    if attachment is not None:
        devices.detach(attachment, force=force)
    else:
        devices.clean_up(_attach_state(name))
    if not keep_server:
        server.stop(name, force=force)
    return attachment is not None


def mount(
    name: str,
    target: Path,
    *,
    via: str | None = None,
    read_only: bool = False,
    mount_options: Sequence[str] = (),
    options: dict[str, str] | None = None,
) -> Mount:
    """Serve, attach and mount in one go, as far as that is not done already.

    Raises Busy if it is mounted already; undoes on failure what this call began.
    """
    state = load(name)
    with locked(name):
        attachment = Attachment.load(_attach_state(name))
        if attachment is not None and (there := mounts_of(attachment.device)):
            raise Busy(f"volume {name} is mounted already, on {there[0].target}")
        served = server.running(name) is not None
        attached = attachment is not None and devices.status(attachment).alive
        if attachment is None or not attached:
            attachment = _attach(name, via, read_only, options)
        try:
            return mount_device(
                attachment.device,
                target,
                read_only=read_only or state.read_only,
                options=mount_options,
            )
        except BaseException:
            if not attached:
                _detach(name, force=True, keep_server=served)
            raise


def remounter(name: str) -> Callable[[], Mount]:
    """Mounts a volume again as it is mounted now, later. Raises Busy where that is in several
    places.
    """
    attachment, there = Attachment.load(_attach_state(name)), mounts(name)
    if attachment is None or len(there) != 1:
        raise Busy(
            f"volume {name} is mounted in {len(there)} places: umount it, and mount it afterwards"
        )
    via, read_only, one = attachment.via, attachment.read_only, there[0]
    told = {"suid": "nosuid", "dev": "nodev", "exec": "noexec"}
    words = [plain if no not in one.options else no for plain, no in told.items()]
    words += [word for word in ("noatime", "relatime", "nodiratime") if word in one.options]
    words += ["discard"] if "discard" in one.super_options else []
    options = config.load().plugin_options()

    def again() -> Mount:
        return mount(
            name,
            Path(one.target),
            via=via,
            read_only=read_only or one.read_only,
            mount_options=words,
            options=options,
        )

    return again


def umount(name_or_folder: str, *, force: bool = False) -> str:
    """Unmount, detach and stop the server; the volume's name. Everything written is durable then.

    Raises Busy while somebody uses it, and says who. `force` takes it away from them.
    """
    name = find(name_or_folder)
    with locked(name):
        attachment = Attachment.load(_attach_state(name))
        mounted = bool(attachment and mounts_of(attachment.device))
        if attachment is not None and not force:  # else `detach` does it, in the order it takes
            unmount_device(attachment.device)
        was_attached = _detach(name, force)
        if not mounted and not was_attached:
            raise NotFound(f"volume {name} is not mounted")
    return name


def touched(name: str) -> tuple[bytes, bytes]:
    """The version that a served volume was opened on, and the profile (plaintext) of what was read
    since. Raises NotFound where it is not served, UsageError where nothing was read.
    """
    load(name)
    if server.running(name) is None:
        raise NotFound(f"volume {name} is not served: mount it and use it first")
    answer = control.ask(server.folder_of(name) / server.CONTROL, "touched")
    return bytes.fromhex(answer["version"]), bytes.fromhex(answer["profile"])


# ---- what is going on


def status(name: str) -> VolumeStatus:
    """How one volume is. Raises NotFound."""
    state = load(name)
    folder = folder_of(name)
    problem = ""
    running = server.running(name)
    attachment = Attachment.load(_attach_state(name))
    mounts: tuple[Mount, ...] = ()
    if attachment is not None:
        mounts = tuple(mounts_of(attachment.device))
        attached = devices.status(attachment)
        if not attached.alive:
            problem = attached.problem
    figures = None
    if running is not None:
        try:
            figures = control.ask(server.folder_of(name) / server.CONTROL, "figures")
        except (OSError, HorcruxError, ValueError) as error:
            problem = problem or f"its server does not answer ({error})"
    try:
        found = survey(folder, state, paths.cache())
    except Damaged as error:
        found, problem = Survey(), problem or str(error)
    if not problem:
        problem = state.lacks_key
    return VolumeStatus(name, state, found, running, attachment, mounts, problem, figures)


def statuses() -> list[VolumeStatus]:
    """How all volumes of this host are."""
    found = []
    for name in names():
        with contextlib.suppress(NotFound):  # removed meanwhile
            found.append(status(name))
    return found

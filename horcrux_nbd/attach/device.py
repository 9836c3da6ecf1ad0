"""A served volume as a block device of this host: attach, detach, and what to do after a crash."""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from pathlib import Path

from .. import files
from ..errors import Busy, EnvironmentProblem, HorcruxError, NotFound
from . import busy, choose, mount, mountinfo
from .base import DEAD_TIMEOUT, RECORD, REQUEST_TIMEOUT, Attachment, Request, Status
from .processes import ProgramFailed, TimedOut, run
from .sockets import listener

TIMEOUT = 30.0  # seconds for one step of a detach


def attach(
    socket: Path,
    *,
    name: str,
    state: Path,
    read_only: bool = False,
    via: str | None = None,
    connections: int | None = None,
    request_timeout: int = REQUEST_TIMEOUT,
    dead_timeout: int = DEAD_TIMEOUT,
) -> Attachment:
    """Make the NBD server that listens on `socket` a block device, and record it in `state`.

    `state` is a folder for this attachment alone, made with mode 0700 and removed by `detach`.
    `via` is "nbd", "ublk" or "fuse", or None for the best; `connections` None is what suits it.
    Time-outs are in seconds: one request may take `request_timeout`, and requests wait
    `dead_timeout` for a server that went away (kernel NBD). Raises Busy if `state` holds an
    attachment, NotFound if there is no socket,
    EnvironmentProblem, TimedOut; then nothing is left behind.
    """
    if os.geteuid() != 0:
        raise EnvironmentProblem(
            f"attaching {name} to this host needs root: use sudo, or `horcrux-cli serve` and give "
            "its socket to qemu, guestfish or nbdcopy, which need no root"
        )
    driver = choose.choose(via)
    if not _is_socket(socket):
        raise NotFound(f"no NBD server listens on {socket}: serve the volume first")
    state = state.absolute()
    if state.exists():
        if attached := Attachment.load(state):
            raise Busy(f"{name} is attached already, as {attached.device}: detach it first")
        clean_up(state)
    files.make_folder(state.parent, mode=0o700)
    state.mkdir(mode=0o700)
    try:
        server = listener(socket.absolute())
        attachment = driver.attach(
            Request(
                socket=socket.absolute(),
                name=name,
                state=state,
                read_only=read_only,
                connections=connections or driver.CONNECTIONS,
                request_timeout=request_timeout,
                dead_timeout=dead_timeout,
            )
        )
        attachment = replace(attachment, server=server)
        attachment.save()
    except BaseException:
        clean_up(state)
        raise
    return attachment


def detach(attachment: Attachment, *, timeout: float = TIMEOUT, force: bool = False) -> list[str]:
    """Flush and release the device, stop our helpers, remove `state`. Safe to call again.

    Its file systems have to be unmounted before. Raises Busy, which names who uses the device,
    TimedOut if a step takes longer than `timeout` seconds (the server does not answer), and
    HorcruxError if the last writes were refused; it stays attached then. `force` goes through
    nevertheless, as `clean_up` does, after an attempt to write out what is dirty. One line about
    each thing that was taken away.
    """
    state = Path(attachment.state)
    current = Attachment.load(state)
    if current is not None and current != attachment:
        raise Busy(f"{attachment.name} was attached anew as {current.device}: detach that one")
    if current is None or force:
        if current is not None and status(attachment).alive:
            _save(attachment, timeout)
        return clean_up(state, timeout=timeout)
    device = attachment.device
    try:
        if users := busy.users_of_device(device, timeout):
            raise Busy(f"{device} ({attachment.name}) is in use by {busy.describe(users)}")
        run(["sync", device], timeout)  # what was written to the device itself and never flushed
        removed = choose.DRIVERS[attachment.via].release(state, timeout=timeout, force=False)
    except ProgramFailed as error:
        raise HorcruxError(
            f"{device} ({attachment.name}) did not take its last writes ({error.said}), so its "
            "server is gone or has failed: only `detach --force` goes on, and loses them"
        ) from error
    except TimedOut as error:
        raise TimedOut(
            f"the server of {device} ({attachment.name}) does not answer ({error}): wait for it, "
            "or `detach --force`, which loses what it did not take"
        ) from error
    _remove(state)
    return removed


def _save(attachment: Attachment, timeout: float) -> None:
    """Give a server that seems well what was written, as far as it takes it."""
    folders = [found.target for found in mountinfo.mounts_of(attachment.device)]
    for words in (*(["--file-system", folder] for folder in folders[:1]), [attachment.device]):
        try:
            run(["sync", *words], timeout)
        except (ProgramFailed, TimedOut):
            return  # it is taken away from its users, not saved: that was asked for


def status(attachment: Attachment) -> Status:
    """Whether the device still works, told without touching it."""
    if Attachment.load(Path(attachment.state)) != attachment:
        return Status(False, f"{attachment.device} is of an earlier boot, or was detached")
    return choose.DRIVERS[attachment.via].status(attachment)


def reconnects(attachment: Attachment) -> bool:
    """Whether `reconnect` can bring it back once it has a server again."""
    driver = choose.DRIVERS[attachment.via]
    return driver.RECONNECTS and attachment.device in driver.devices(Path(attachment.state))


def in_use(state: Path) -> bool:
    """Whether anybody uses the device that `state` led to: a mount, a process, another device."""
    devices = [one for driver in choose.DRIVERS.values() for one in driver.devices(state)]
    return any(busy.users_of_device(device) for device in devices)


def reconnect(attachment: Attachment) -> Attachment:
    """For a supervisor that started the server again; the attachment as it is from then on.

    Requests that wait go on. Safe to call when nothing was lost. Raises CannotReconnect for ways
    other than kernel NBD, NotFound if no server listens, HorcruxError if it serves another image.
    """
    server = listener(Path(attachment.socket))
    if server and server == attachment.server:
        return attachment
    choose.DRIVERS[attachment.via].reconnect(attachment)
    # Noted before connecting: a restart in between is one more difference to find, not one less.
    attachment = replace(attachment, server=server)
    attachment.save()
    return attachment


def clean_up(state: Path, *, timeout: float = TIMEOUT) -> list[str]:
    """Remove everything that `state` ever led to, whatever died when; one line about each thing.

    For what a crash left, and for a server that does not come back: nothing here waits for it.
    File systems are unmounted; one that is in use is taken out of the folder tree and ends with its
    last user. What had not reached the server is lost.
    """
    state = state.absolute()
    removed = []
    for driver in choose.DRIVERS.values():
        removed += driver.abort(state)
        for device in driver.devices(state):
            removed += mount.give_up(device, timeout=timeout)
        removed += driver.release(state, timeout=timeout, force=True)
    _remove(state)
    return removed


def _remove(state: Path) -> None:
    if state.exists():
        (state / RECORD).unlink(missing_ok=True)
        files.sweep_temporaries(state)
        state.rmdir()  # not rmtree: never into something that is still mounted below


def _is_socket(path: Path) -> bool:
    try:
        return stat.S_ISSOCK(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False

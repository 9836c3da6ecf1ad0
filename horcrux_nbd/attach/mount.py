"""Mounting the file system of an attached volume, and unmounting it."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from ..errors import Busy, EnvironmentProblem, NotFound, UsageError
from . import busy, superblock
from .mountinfo import Mount, below, device_number, mounted_at, mounts_of
from .processes import ProgramFailed, TimedOut, run

# Atime updates are writes; an image comes from elsewhere, so its set-user-id programs and device
# nodes are not trusted unless somebody asks for that.
DEFAULT_OPTIONS = ("noatime", "nosuid", "nodev")
TIMEOUT = 60.0  # seconds to mount: journal replay over a slow store; Docker gives 2 minutes
RETRY_BUSY = 3.0  # seconds to wait for programs that are just ending


def mount(
    device: str,
    target: Path,
    *,
    read_only: bool = False,
    options: Sequence[str] = (),
    timeout: float = TIMEOUT,
) -> Mount:
    """Mount the file system on `device` at the folder `target`; what mountinfo says about it then.

    `options` are added to DEFAULT_OPTIONS and win over them ("suid", "dev", "atime"). Raises
    NotFound, UsageError (no known file system, bad option, target in use), EnvironmentProblem,
    TimedOut; then nothing is mounted.
    """
    if os.geteuid() != 0:
        raise EnvironmentProblem(
            "mounting needs root: use sudo, or `horcrux-cli serve` with qemu or guestmount"
        )
    target = Path(os.path.abspath(target))
    if mounted := mounted_at(target):
        raise Busy(f"{target} has {mounted.source} mounted on it already: unmount it first")
    if not target.is_dir():
        raise NotFound(f"{target} is not a folder: make it first")
    target = target.resolve()
    head = superblock.read(device, timeout)
    fstype = superblock.filesystem(head, device)
    words = [*DEFAULT_OPTIONS, *_checked(options), "ro" if read_only else "rw"]
    if _takes_no_writes(device):
        words += _without_recovery(head, fstype)
    try:
        # --internal-only: no mount.TYPE helper from the PATH gets to run on a foreign image.
        run(
            ["mount", "--internal-only", "-t", fstype, "-o", ",".join(words), device, str(target)],
            timeout,
        )
    except TimedOut:
        unmount(target, timeout=timeout, lazy=True)
        raise
    except ProgramFailed as error:
        raise EnvironmentProblem(_explained(error, device, fstype)) from error
    mounted = mounted_at(target)
    if mounted is None or mounted not in mounts_of(device):
        raise EnvironmentProblem(f"mount said yes, but {device} is not mounted on {target}")
    return mounted


def unmount(target: Path, *, timeout: float = TIMEOUT, lazy: bool = False) -> bool:
    """Unmount what is on `target`. False if nothing was mounted there.

    Waits up to RETRY_BUSY seconds for users that are just ending; then Busy names them. TimedOut if
    the server does not take the last writes within `timeout` seconds. `lazy` never gives up: it
    takes the mount out of the tree now, and the kernel ends it with its last user (umount2(2),
    MNT_DETACH); mounts below it go with it.
    """
    mounted = mounted_at(target)
    if mounted is None:
        return False
    if lazy:
        run(["umount", "--internal-only", "--no-canonicalize", "--lazy", mounted.target], timeout)
        return True
    deadline = time.monotonic() + RETRY_BUSY
    while True:
        try:
            run(["umount", "--internal-only", "--no-canonicalize", mounted.target], timeout)
        except ProgramFailed as error:
            if mounted_at(target) != mounted:
                return True  # somebody else was faster
            if time.monotonic() > deadline:
                users = busy.describe(busy.users_of_mount(mounted.target))
                raise Busy(
                    f"{mounted.target} is in use by {users}"
                    if users
                    else f"{mounted.target} cannot be unmounted: {error.said}"
                ) from error
            time.sleep(0.1)
        else:
            return True


def unmount_device(device: str, *, timeout: float = TIMEOUT) -> list[str]:
    """Unmount `device` wherever our mount namespace has it; the folders. Raises as `unmount`."""
    gone = []
    while found := mounts_of(device):
        target = Path(found[-1].target)
        if mounted_at(target) != found[-1]:
            raise Busy(f"{target} is hidden below another mount: unmount that first")
        unmount(target, timeout=timeout)
        gone.append(str(target))
    return gone


def give_up(device: str, *, timeout: float = TIMEOUT) -> list[str]:
    """Unmount `device` everywhere whatever uses it; one line about each mount.

    Its server is dead, so that nothing here may wait for it or be refused.
    """
    done = []
    while found := mounts_of(device):
        target = Path(found[-1].target)
        # What is mounted on top of it or below it would keep it.
        for inner in [*below(target), mounted_at(target)]:
            if inner is None:
                continue
            users = busy.describe(busy.users_of_mount(inner.target))
            unmount(Path(inner.target), timeout=timeout, lazy=True)
            done.append(
                f"unmounted {inner.target}"
                + (f"; it ends with its last user: {users}" if users else "")
            )
    return done


def _checked(options: Sequence[str]) -> list[str]:
    """`options` with lists split. Refuses what would mount something else or elsewhere."""
    words = [word for option in options for word in option.split(",") if word]
    for word in words:
        key = word.partition("=")[0]
        if key in ("loop", "bind", "rbind", "move", "remount", "offset", "sizelimit", "user"):
            raise UsageError(f"mount option {word!r} cannot be used for a volume: leave it out")
        if key.startswith(("x-", "X-", "_netdev", "helper")) or not word.isprintable():
            raise UsageError(f"mount option {word!r} is for /etc/fstab: leave it out")
    return words


def _takes_no_writes(device: str) -> bool:
    return Path(f"/sys/dev/block/{device_number(device)}/ro").read_text().strip() == "1"


def _without_recovery(head: bytes, fstype: str) -> list[str]:
    """Options for a file system that was never unmounted, on a device that takes no writes.

    Without them the kernel refuses (ext4: "write access unavailable, cannot proceed"). What is only
    in the journal is not seen then; a writable volume of the same version replays it.
    """
    if superblock.needs_recovery(head):
        return ["noload"]
    if fstype == "xfs":  # nothing in its superblock says so; harmless on a clean one
        return ["norecovery"]
    return []


def _explained(error: ProgramFailed, device: str, fstype: str) -> str:
    if "unknown filesystem type" in error.said:
        return (
            f"this kernel has no {fstype} ({device}): `modprobe {fstype}`, or give the volume to "
            "a VM with `horcrux-cli serve`"
        )
    return f"{device} ({fstype}) could not be mounted: {error.said}; `dmesg | tail` says more"

"""Who uses a file system or a block device, so that a refusal can say whom to stop.

Looks at what the kernel shows under /proc and never touches the file system itself, so it does not
hang on a dead one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from .mountinfo import Mount, device_number, mounts
from .processes import Process, ProgramFailed, run

SHOWN = 5  # users named in a message
OPEN_TIMEOUT = 10.0  # seconds to open a device that nobody uses


@dataclass(frozen=True)
class User:
    """A process (pid 0: the kernel) and in what way it uses the thing."""

    pid: int
    name: str
    how: str

    def __str__(self) -> str:
        return f"{self.name} (pid {self.pid}, {self.how})" if self.pid else f"{self.how}"


def describe(users: Iterable[User]) -> str:
    """`users` in a few words for an error message."""
    users = list(users)
    text = ", ".join(map(str, users[:SHOWN]))
    return text + (f" and {len(users) - SHOWN} more" if len(users) > SHOWN else "")


def users_of_mount(target: str) -> list[User]:
    """Processes that keep the mount at `target` busy, and mounts below it.

    Only /proc is read: links there are compared as text, and mapped files by device number.
    """
    inside = [mount for mount in mounts() if mount.target == target]
    number = inside[-1].device if inside else ""
    prefix = target.rstrip("/") + "/"
    users = [
        User(0, "kernel", f"{mount.fstype} mounted on {mount.target}")
        for mount in mounts()
        if mount.target.startswith(prefix)
    ]
    for pid in _pids():
        how = _uses_path(pid, target, prefix) or (_maps_device(pid, number) if number else "")
        if how:
            users.append(_user(pid, how))
    return users


def users_of_device(device: str, timeout: float = OPEN_TIMEOUT) -> list[User]:
    """Who holds `device`: mounts in any mount namespace, open descriptors, devices built on it.

    Raises TimedOut if the device cannot even be opened within `timeout` seconds.
    """
    try:
        number = device_number(device)
    except FileNotFoundError:
        return []
    users = _mounting(number) + _opening(device)
    with contextlib.suppress(FileNotFoundError):
        for holder in os.listdir(f"/sys/dev/block/{number}/holders"):
            users.append(User(0, "kernel", f"/dev/{holder} is built on it"))
    if not users and _claimed(device, timeout):
        users.append(User(0, "kernel", "somebody who cannot be told holds it exclusively"))
    return users


def processes_with(device: str) -> list[User]:
    """Processes that hold `device` open, or have it mounted in a mount namespace of their own.

    Not who has it where we have it: a namespace that was copied from ours (systemd makes such
    ones) follows when we unmount.
    """
    try:
        number = device_number(device)
    except FileNotFoundError:
        return []
    ours = {mount.target for mount in mounts() if mount.device == number}
    users = _mounting(number, but=ours) + _opening(device)
    return [user for user in users if user.pid]


def _mounting(number: str, but: Collection[str] = ()) -> list[User]:
    users: list[User] = []
    seen: set[str] = set()
    for pid in _pids():
        with contextlib.suppress(OSError):
            namespace = os.readlink(f"/proc/{pid}/ns/mnt")
            if namespace not in seen:
                seen.add(namespace)
                users += _mounts_in(pid, namespace, number, but)
    return users


def _opening(device: str) -> list[User]:
    return [
        _user(pid, "has the device open")
        for pid in _pids()
        if any(path == device for _, path in _links(pid, "fd"))
    ]


def _mounts_in(pid: int, namespace: str, number: str, but: Collection[str]) -> list[User]:
    ours = namespace == os.readlink("/proc/self/ns/mnt")
    found: list[Mount] = [
        mount for mount in mounts(pid) if mount.device == number and mount.target not in but
    ]
    if ours:
        return [User(0, "kernel", f"mounted on {mount.target}") for mount in found]
    return [
        _user(pid, f"its mount namespace has it mounted on {mount.target}") for mount in found[:1]
    ]


def _claimed(device: str, timeout: float) -> bool:
    """Whether a mount, also one that was detached lazily, or a kernel driver claims `device`.

    Asked by a child: to open a device waits for others that are just opening or closing it, and
    those wait for its server (seen: for ever, with a server that was stopped).
    """
    code = "import os, sys; os.open(sys.argv[1], os.O_RDONLY | os.O_EXCL)"
    try:
        run([sys.executable, "-I", "-S", "-c", code, device], timeout)
    except ProgramFailed as error:
        return os.strerror(errno.EBUSY) in error.said
    return False


def _pids() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]


def _user(pid: int, how: str) -> User:
    process = Process(pid, 0)
    return User(pid, process.name(), how)


def _links(pid: int, folder: str) -> list[tuple[str, str]]:
    """Name and target of the links in /proc/PID/`folder`; nothing if the process is gone."""
    found = []
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/{folder}"):
            with contextlib.suppress(OSError):
                found.append((name, os.readlink(f"/proc/{pid}/{folder}/{name}")))
    return found


def _uses_path(pid: int, target: str, prefix: str) -> str:
    for link, how in (
        ("cwd", "its working directory"),
        ("root", "its root"),
        ("exe", "its program"),
    ):
        with contextlib.suppress(OSError):
            path = os.readlink(f"/proc/{pid}/{link}")
            if path == target or path.startswith(prefix):
                return f"{how} is {path}"
    for _, path in _links(pid, "fd"):
        if path == target or path.startswith(prefix):
            return f"has {path} open"
    return ""


def _maps_device(pid: int, number: str) -> str:
    """Which file of the file system `number` the process maps (a library, a database's pages)."""
    if Process.state(pid) == "D":
        return ""  # its memory map may be locked for as long as it waits, and would hold us too
    major, minor = (int(part) for part in number.split(":"))
    wanted = f"{major:02x}:{minor:02x}"
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines():
            fields = line.split(None, 5)
            if fields[3] == wanted:
                return f"maps {fields[5] if len(fields) > 5 else 'a file'}"
    return ""

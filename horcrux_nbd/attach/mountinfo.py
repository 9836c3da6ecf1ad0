"""What is mounted, from /proc/PID/mountinfo (proc(5)): the only source that cannot be stale."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

_ESCAPE = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True)
class Mount:
    """One line of mountinfo, unescaped."""

    id: int
    parent: int
    device: str  # "major:minor"
    root: str  # the part of the file system that is seen here; "/" unless it is a bind mount
    target: str
    options: frozenset[str]  # of this mount
    propagation: str  # "shared:5", "master:2", … separated by spaces; empty if private
    fstype: str
    source: str
    super_options: frozenset[str]  # of the file system

    @property
    def read_only(self) -> bool:
        return "ro" in self.options or "ro" in self.super_options


def unescape(text: str) -> str:
    r"""`text` without the kernel's escapes: `\040` space, `\011` tab, `\012` newline, `\134`."""
    return _ESCAPE.sub(lambda match: chr(int(match.group(1), 8)), text)


def parse(line: str) -> Mount:
    """The mount that a line of mountinfo tells of. Raises ValueError if it is no such line."""
    first, separator, second = line.partition(" - ")
    fields, tail = first.split(" "), second.split(" ")
    if not separator or len(fields) < 6 or len(tail) < 3:
        raise ValueError(f"no line of mountinfo: {line!r}")
    return Mount(
        id=int(fields[0]),
        parent=int(fields[1]),
        device=fields[2],
        root=unescape(fields[3]),
        target=unescape(fields[4]),
        options=frozenset(fields[5].split(",")),
        propagation=" ".join(fields[6:]),
        fstype=unescape(tail[0]),
        source=unescape(tail[1]),
        super_options=frozenset(tail[2].split(",")),
    )


def mounts(pid: int | str = "self") -> list[Mount]:
    """Every mount that process `pid` sees, in mount order; OSError if the process is gone."""
    # surrogateescape: a mount point is bytes, and str paths round-trip through os.fsencode.
    text = Path(f"/proc/{pid}/mountinfo").read_text(errors="surrogateescape")
    return [parse(line) for line in text.split("\n") if line]


def device_number(device: str | Path) -> str:
    """ "major:minor" of a device node, as mountinfo writes it."""
    number = os.stat(device).st_rdev
    return f"{os.major(number)}:{os.minor(number)}"


def mounts_of(device: str | Path) -> list[Mount]:
    """Where the file system on `device` is mounted in our mount namespace."""
    number = device_number(device)
    return [mount for mount in mounts() if mount.device == number]


def mounted_at(target: str | Path) -> Mount | None:
    """What is mounted on `target` (the topmost), without touching what is mounted there."""
    # realpath of the parent only: a stat of the mount point itself hangs on a dead server.
    path = Path(os.path.abspath(target))
    wanted = os.path.join(os.path.realpath(path.parent), path.name) if path.name else "/"
    found = None
    for mount in mounts():
        if mount.target == wanted:
            found = mount
    return found


def below(target: str | Path) -> list[Mount]:
    """Mounts on folders below `target`, deepest first: the order to unmount them in."""
    prefix = os.path.abspath(target).rstrip("/") + "/"
    inside = [mount for mount in mounts() if mount.target.startswith(prefix)]
    return sorted(inside, key=lambda mount: (mount.target.count("/"), mount.id), reverse=True)

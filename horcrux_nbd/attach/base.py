"""What an attached volume is, however it was attached, and how that outlives the program.

Each way to attach (`kernel_nbd`, `ublk`, `fuse_loop`) has the functions of `Driver`. The way in for
others is `device.py`.

**Invariant:** everything that an attachment leaves in the system can be found again from its
`state` folder alone, without `attachment.json`, which is written last. So a crash between any two
steps leaves nothing that `clean_up` does not find.

**Invariant:** the caller holds the volume's lock around attach, detach, reconnect and clean_up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from .. import files
from ..errors import Damaged, EnvironmentProblem
from .processes import Process, boot_id
from .sockets import listener

RECORD = "attachment.json"
FOLDER = "attach"  # an attachment's own, beside the sockets of its volume
REQUEST_TIMEOUT = 90  # seconds; above our fetch budget of 60 s, so the server's answer comes first
DEAD_TIMEOUT = 300  # seconds that requests queue for a server that is being started again


class CannotReconnect(EnvironmentProblem):
    """The server was started again, and this way to attach cannot take up with it."""

    def __init__(self, attachment: Attachment) -> None:
        super().__init__(
            f"{attachment.device} ({attachment.name}) lost its server and --via {attachment.via} "
            "cannot connect again: `detach --force`, then attach and mount again; what was flushed "
            "is there"
        )


@dataclass(frozen=True)
class Attachment:
    """A volume that is a block device of this host now."""

    via: str  # "nbd", "ublk" or "fuse"
    device: str  # /dev/nbd3, /dev/ublkb0, /dev/loop5
    socket: str  # where the server listens
    state: str  # our private folder
    name: str  # the volume
    size: int  # bytes
    read_only: bool = False
    connections: int = 1
    processes: tuple[Process, ...] = ()  # helpers of ours that must live (nbdfuse, nbdublk)
    boot: str = field(default_factory=boot_id)
    # Inode of the server's socket: tells a restarted server. Changes with a reconnect, and is no
    # part of what makes two records the same attachment.
    server: int = field(default=0, compare=False)

    def save(self) -> None:
        files.publish_json(Path(self.state) / RECORD, self.to_json())

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Attachment:
        """Raises Damaged if `value` is not what `to_json` gave."""
        try:
            processes = tuple(Process(**process) for process in value["processes"])
            return cls(**{**value, "processes": processes})
        except (TypeError, KeyError) as error:
            raise Damaged(f"{RECORD} is not the record of an attachment ({error})") from error

    @classmethod
    def load(cls, state: Path) -> Attachment | None:
        """The attachment recorded in `state`; None if there is none, or one of an earlier boot."""
        try:
            attachment = cls.from_json(files.read_json(state / RECORD))
        except FileNotFoundError:
            return None
        return attachment if attachment.boot == boot_id() else None


@dataclass(frozen=True)
class Request:
    """What `attach` was asked for; see `device.attach`."""

    socket: Path
    name: str
    state: Path
    read_only: bool
    connections: int
    request_timeout: int
    dead_timeout: int


@dataclass(frozen=True)
class Status:
    """How an attachment is. `alive` means that reads and writes can be answered."""

    alive: bool
    problem: str = ""  # one line, where not alive
    reconnect: bool = False  # whether `device.reconnect` is what it needs


class Driver(Protocol):
    """The functions of a module that attaches in one way."""

    NAME: str
    CONNECTIONS: int  # to the server, unless asked for otherwise
    RECONNECTS: bool  # whether it has `reconnect`

    def missing(self) -> tuple[str, str] | None:
        """What this machine lacks for it and how to get it; None if nothing."""

    def warning(self) -> str:
        """What works less well than it could on this machine, in one line; mostly empty."""

    def attach(self, request: Request) -> Attachment:
        """A device that is ready for I/O. What a failure leaves is for abort and release."""

    def status(self, attachment: Attachment) -> Status:
        """Without I/O on the device."""

    def reconnect(self, attachment: Attachment) -> None:
        """Connect to a server that was started again. CannotReconnect if this way has no means."""

    def devices(self, state: Path) -> list[str]:
        """The devices that `state` led to and that are there now."""

    def abort(self, state: Path) -> list[str]:
        """End everything that waits for the server with an error; one line about each thing.

        What the server had not taken is lost. Nothing of `state` starts anything new after it.
        """

    def release(self, state: Path, *, timeout: float, force: bool) -> list[str]:
        """Take the device and all helpers away; one line about each. It is flushed and unmounted.

        Raises TimedOut after `timeout` seconds for a step. With `force` a device that somebody
        still uses goes away by itself once they are done, and the line says so.
        """


def server_status(attachment: Attachment) -> Status:
    """Whether the server that it was attached to still listens."""
    current = listener(Path(attachment.socket))
    if current == 0:
        return Status(False, f"the server on {attachment.socket} is gone: serve the volume again")
    if current != attachment.server:
        return Status(False, f"the server on {attachment.socket} was started again", True)
    return Status(True)

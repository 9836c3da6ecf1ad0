"""Attach by the kernel's own NBD client. The best way where there is one: no process of ours.

When the server dies, the kernel keeps the device and queues its requests for `dead_timeout`
seconds; `reconnect` gives it connections to the restarted server. Requests that were under way when
it died are sent again once their `request_timeout` has passed (the kernel looks at them no sooner),
so a crash of the server is a pause, not an I/O error. That takes two connections or more
(PEERS.md), so a server without multi-conn gets EIO in such a case.

nbd-client is not used: on Debian 12 it cannot reconnect, and leaves a process behind.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from functools import partial
from pathlib import Path

from ..errors import Busy, EnvironmentProblem, HorcruxError
from . import busy, handshake, nbd_netlink
from .base import Attachment, Request, Status, server_status
from .processes import ProgramFailed, run, wait_until, with_argument

NAME = "nbd"
ABORT_TIMEOUT = 10.0  # seconds to disconnect, with a Python to start
CONNECT_TIMEOUT = 30.0  # seconds; the server may fetch an index root first
SECTOR = 512  # see fuse_loop.py
MAX_SECTORS_KB = 1024  # the kernel's default of 128 KiB cuts sequential reads into small requests
SYSFS = Path("/sys/block")


class KernelNbd:
    NAME = NAME
    RECONNECTS = True
    CONNECTIONS = 4  # 4 KiB cold reads: 3,130/s over one connection, 10,097/s over four (PEERS.md)

    def missing(self) -> tuple[str, str] | None:
        module = Path("/sys/module/nbd")
        if not module.exists() and os.geteuid() == 0:
            with contextlib.suppress(HorcruxError):
                run(["modprobe", "nbd"], 10)
        if not module.exists():
            return "the kernel has no nbd module loaded", "modprobe nbd, if the kernel has it"
        return None

    def warning(self) -> str:
        return ""

    def attach(self, request: Request) -> Attachment:
        streams, export = handshake.connect_all(
            request.socket, request.connections, CONNECT_TIMEOUT
        )
        backend = identifier(request.state)
        flags = export.flags | (handshake.READ_ONLY if request.read_only else 0)
        try:
            number = nbd_netlink.connect(
                streams,
                size=export.size,
                block_size=max(SECTOR, export.minimum_block),
                flags=flags,
                timeout=request.request_timeout,
                dead_timeout=request.dead_timeout,
                backend=backend,
            )
        finally:
            handshake.close_all(streams)
        if numbers(backend) != [number]:
            disconnect(number, backend, CONNECT_TIMEOUT)
            raise EnvironmentProblem(
                "this kernel's NBD driver keeps no name for a device, so a crash could lose it: "
                "use Linux 5.15 or later, or --via fuse"
            )
        with contextlib.suppress(OSError):  # a wish
            (SYSFS / f"nbd{number}/queue/max_sectors_kb").write_text(str(MAX_SECTORS_KB))
        return Attachment(
            via=NAME,
            device=f"/dev/nbd{number}",
            socket=str(request.socket),
            state=str(request.state),
            name=request.name,
            size=export.size // SECTOR * SECTOR,
            read_only=bool(flags & handshake.READ_ONLY),
            connections=len(streams),
        )

    def status(self, attachment: Attachment) -> Status:
        if _number(attachment) not in numbers(identifier(Path(attachment.state))):
            return Status(False, f"{attachment.device} was released by somebody else")
        return server_status(attachment)

    def reconnect(self, attachment: Attachment) -> None:
        socket = Path(attachment.socket)
        streams, export = handshake.connect_all(socket, attachment.connections, CONNECT_TIMEOUT)
        try:
            if export.size // SECTOR * SECTOR != attachment.size:
                raise HorcruxError(
                    f"{socket} serves {export.size} bytes now, and {attachment.device} has "
                    f"{attachment.size}: it is another image"
                )
            nbd_netlink.reconnect(
                _number(attachment), streams, backend=identifier(Path(attachment.state))
            )
        finally:
            handshake.close_all(streams)  # the kernel holds those that it took

    def devices(self, state: Path) -> list[str]:
        return [f"/dev/nbd{number}" for number in numbers(identifier(state))]

    def abort(self, state: Path) -> list[str]:
        # A killed program's disconnect may still be at work, and would hit the next attachment.
        for process in with_argument(Path(sys.executable).name, identifier(state)):
            process.signal(signal.SIGKILL)
            process.wait_gone(ABORT_TIMEOUT)
        found = numbers(identifier(state))
        for number in found:
            disconnect(number, identifier(state), ABORT_TIMEOUT)
        return [f"disconnected /dev/nbd{number}" for number in found]

    def release(self, state: Path, *, timeout: float, force: bool) -> list[str]:
        removed = []
        for number in numbers(identifier(state)):
            disconnect(number, identifier(state), timeout)
            # While somebody has it open the kernel keeps it, and its name, without connections.
            limit = ABORT_TIMEOUT if force else timeout
            if wait_until(partial(_is_free, number, identifier(state)), limit):
                removed.append(f"released /dev/nbd{number}")
            elif force:
                removed.append(f"/dev/nbd{number} goes away once nobody uses it any more")
            else:
                users = busy.describe(busy.users_of_device(f"/dev/nbd{number}")) or "somebody"
                raise Busy(f"/dev/nbd{number} is disconnected but still in use by {users}")
        return removed


def disconnect(number: int, backend: str, timeout: float) -> None:
    """In a process of its own: the kernel sends a farewell, and waits if nobody reads it.

    `backend` is on its command line so that it can be found.
    """
    program = [sys.executable, "-m", nbd_netlink.__name__]
    try:
        run([*program, "disconnect", str(number), backend], timeout)
    except ProgramFailed as error:
        raise HorcruxError(error.said) from error


def identifier(state: Path) -> str:
    """What the kernel calls the device of `state`, so that it can be found after any crash."""
    return f"horcrux:{state}"


def numbers(backend: str) -> list[int]:
    """The devices connected under `backend`, told by sysfs."""
    found = []
    for name in sorted(os.listdir(SYSFS)):
        if name.startswith("nbd") and name[3:].isdigit():
            with contextlib.suppress(OSError):
                if (SYSFS / name / "backend").read_text().rstrip("\n") == backend:
                    found.append(int(name[3:]))
    return found


def _is_free(number: int, backend: str) -> bool:
    return number not in numbers(backend)


def _number(attachment: Attachment) -> int:
    return int(attachment.device.removeprefix("/dev/nbd"))


DRIVER = KernelNbd()

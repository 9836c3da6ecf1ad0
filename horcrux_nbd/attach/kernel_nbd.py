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
import sys
from pathlib import Path

from ..errors import EnvironmentProblem, HorcruxError
from . import handshake, nbd_netlink
from .base import Attachment, Request, Status, server_status
from .processes import ProgramFailed, TimedOut, run, wait_until

NAME = "nbd"
CONNECT_TIMEOUT = 30.0  # seconds; the server may fetch an index root first
SECTOR = 512  # see fuse_loop.py
MAX_SECTORS_KB = 1024  # the kernel's default of 128 KiB cuts sequential reads into small requests
SYSFS = Path("/sys/block")


class KernelNbd:
    NAME = NAME

    def missing(self) -> tuple[str, str] | None:
        module = Path("/sys/module/nbd")
        if not module.exists() and os.geteuid() == 0:
            with contextlib.suppress(HorcruxError):
                run(["modprobe", "nbd"], 10)
        if not module.exists():
            return "the kernel has no nbd module loaded", "modprobe nbd, if the kernel has it"
        return None

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
            self._disconnect(number, CONNECT_TIMEOUT)
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

    def detach(self, attachment: Attachment, *, timeout: float, force: bool) -> None:
        if not force:
            run(["sync", attachment.device], timeout)
        self.clean_up(Path(attachment.state), timeout)

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

    def clean_up(self, state: Path, timeout: float) -> list[str]:
        removed = []
        for number in numbers(identifier(state)):
            self._disconnect(number, timeout)
            if not wait_until(lambda: not numbers(identifier(state)), timeout):
                raise TimedOut(f"/dev/nbd{number} is still there {timeout:.0f} s after disconnect")
            removed.append(f"released /dev/nbd{number}")
        return removed

    def _disconnect(self, number: int, timeout: float) -> None:
        try:
            run(
                [sys.executable, "-m", nbd_netlink.__name__, "disconnect", str(number)],
                timeout,
            )
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


def _number(attachment: Attachment) -> int:
    return int(attachment.device.removeprefix("/dev/nbd"))


DRIVER = KernelNbd()

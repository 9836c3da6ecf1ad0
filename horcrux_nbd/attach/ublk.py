"""Attach by ublk: nbdublk (libnbd ≥ 1.15.2, so Debian 13) and a kernel with ublk_drv.

Written from nbdublk(1) and ublk(8), and **never run against a real ublk device**: neither Debian 12
nor the machines that this was made on have one. Tests cover the detection and the command lines.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import stat
import subprocess
from pathlib import Path

from ..errors import EnvironmentProblem, HorcruxError
from .base import Attachment, CannotReconnect, Request, Status, server_status
from .processes import (
    ENVIRONMENT,
    Process,
    TimedOut,
    io_flusher,
    run,
    wait_until,
    with_argument,
)

NAME = "ublk"
CONTROL = Path("/dev/ublk-control")
START_TIMEOUT = 30.0  # seconds
LOG = "nbdublk.log"
CHOSEN = "ublk-number"  # written before the device is made, so that a crash cannot lose it


class Ublk:
    NAME = NAME
    RECONNECTS = False
    CONNECTIONS = 4  # nbdublk's own default

    def missing(self) -> tuple[str, str] | None:
        for program, package in (("nbdublk", "libnbd-bin"), ("ublk", "ublksrv or ubdsrv")):
            if not shutil.which(program, path=ENVIRONMENT["PATH"]):
                return (
                    f"{program} is not installed",
                    f"install {package} (libnbd 1.15.2 or later: Debian 13 has it)",
                )
        if not CONTROL.exists() and os.geteuid() == 0:
            with contextlib.suppress(HorcruxError):
                run(["modprobe", "ublk_drv"], 10)
        if not CONTROL.exists():
            return f"{CONTROL} is not there", "modprobe ublk_drv (Linux 6.0 or later)"
        return None

    def warning(self) -> str:
        return "this way was never run by its authors: please report how it goes"

    def attach(self, request: Request) -> Attachment:
        number = free_number()
        (request.state / CHOSEN).write_text(f"{number}\n")
        device = Path(f"/dev/ublkb{number}")
        with open(request.state / LOG, "ab") as log, io_flusher():
            child = subprocess.Popen(
                command(request, number),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=ENVIRONMENT,
                start_new_session=True,
            )
        process = Process.of(child.pid)
        if not wait_until(lambda: child.poll() is not None or _is_device(device), START_TIMEOUT):
            raise TimedOut(f"{device} was not there within {START_TIMEOUT:.0f} s")
        if child.returncode is not None or process is None:
            said = " ".join((request.state / LOG).read_text(errors="replace").split())
            raise EnvironmentProblem(f"nbdublk did not start: {said[-500:] or 'it said nothing'}")
        sysfs = Path("/sys/block") / device.name
        return Attachment(
            via=NAME,
            device=str(device),
            socket=str(request.socket),
            state=str(request.state),
            name=request.name,
            size=int((sysfs / "size").read_text()) * 512,
            read_only=request.read_only or (sysfs / "ro").read_text().strip() == "1",
            connections=request.connections,
            processes=(process,),
        )

    def status(self, attachment: Attachment) -> Status:
        for process in attachment.processes:
            if not process.alive():
                return Status(False, f"nbdublk (pid {process.pid}) died")
        return server_status(attachment)

    def reconnect(self, attachment: Attachment) -> None:
        raise CannotReconnect(attachment)

    def devices(self, state: Path) -> list[str]:
        device = Path(f"/dev/ublkb{chosen(state)}")
        return [str(device)] if _is_device(device) else []

    def abort(self, state: Path) -> list[str]:
        helpers = _helpers(state)
        for process in helpers:
            process.signal(signal.SIGKILL)
            process.wait_gone(START_TIMEOUT)
        return [f"killed nbdublk (pid {process.pid})" for process in helpers]

    def release(self, state: Path, *, timeout: float, force: bool) -> list[str]:
        removed = []
        for device in self.devices(state):
            run(["ublk", "del", "-n", str(chosen(state))], timeout)
            removed.append(f"released {device}")
        for process in _helpers(state):  # deleting its device ends it
            if not process.wait_gone(timeout) and not process.stop(timeout):
                raise TimedOut(f"nbdublk (pid {process.pid}) cannot be ended")
            removed.append(f"ended nbdublk (pid {process.pid})")
        for name in (CHOSEN, LOG):
            (state / name).unlink(missing_ok=True)
        return removed


def chosen(state: Path) -> int | None:
    """The device number that `state` was given; None if none was."""
    try:
        return int((state / CHOSEN).read_text())
    except (FileNotFoundError, ValueError):
        return None


def _helpers(state: Path) -> list[Process]:
    return with_argument("nbdublk", f"/dev/ublkb{chosen(state)}")


def command(request: Request, number: int) -> list[str]:
    """nbdublk's command line; it stays in the foreground."""
    return [
        "nbdublk",
        f"--connections={request.connections}",
        *(["--readonly"] if request.read_only else []),
        f"/dev/ublkb{number}",
        "--unix",
        str(request.socket),
    ]


def free_number(devices: Path = Path("/dev")) -> int:
    """The lowest number without a ublk device. nbdublk fails if somebody is faster: try again."""
    number = 0
    while (devices / f"ublkb{number}").exists() or (devices / f"ublkc{number}").exists():
        number += 1
    return number


def _is_device(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return stat.S_ISBLK(path.stat().st_mode)
    return False


DRIVER = Ublk()

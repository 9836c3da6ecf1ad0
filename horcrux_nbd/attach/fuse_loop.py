"""Attach with no kernel module of NBD: a FUSE file (nbdfuse) with a loop device on it.

    file system → /dev/loopN (direct I/O) → STATE/fuse/nbd → nbdfuse → NBD socket

Flush and discard go all the way: the loop device turns them into fsync and fallocate, nbdfuse into
NBD flush and trim (tests/attach/test_fuse_loop.py watches them arrive).

- Direct I/O, because a second page cache below the file system's own makes it four times slower,
  and holds dirty pages that writeback can only clean with the help of nbdfuse.
- Sectors of 512 bytes: file systems with smaller blocks than 4 KiB, xfs's log and images whose size
  is no multiple of 4 KiB need them, and file systems send 4 KiB blocks either way.
- nbdfuse serves its file with mode 0666, so it is mounted in a folder that only root enters.
- nbdfuse does not connect again to a server that was restarted: then detach and attach anew.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from functools import partial
from pathlib import Path

from ..errors import Busy, EnvironmentProblem
from . import busy
from .base import Attachment, CannotReconnect, Request, Status, server_status
from .mountinfo import mounted_at
from .processes import (
    ENVIRONMENT,
    Process,
    TimedOut,
    io_flusher,
    run,
    wait_until,
    with_argument,
)

NAME = "fuse"
START_TIMEOUT = 30.0  # seconds for nbdfuse to connect; the server may fetch an index root first
PROGRAMS = {"nbdfuse": "libnbd-bin", "losetup": "mount", "umount": "mount"}
ABORT_TIMEOUT = 3.0  # seconds for what a killed process held to come free
FOLDER, FILE, PIDFILE, LOG = "fuse", "nbd", "nbdfuse.pid", "nbdfuse.log"


class FuseLoop:
    NAME = NAME
    RECONNECTS = False
    # libnbd locks a connection while it waits, so each has one request under way, and libfuse has
    # 10 threads. 4 KiB reads with 20 ms behind each: 270/s with 4 connections, 430/s with 12.
    CONNECTIONS = 10

    def missing(self) -> tuple[str, str] | None:
        for program, package in PROGRAMS.items():
            if not shutil.which(program, path=ENVIRONMENT["PATH"]):
                return f"{program} is not installed", f"apt-get install {package}"
        for node, module in (("/dev/fuse", "fuse"), ("/dev/loop-control", "loop")):
            if not os.path.exists(node):
                return f"{node} is not there", f"modprobe {module}, or give it to the container"
        return None

    def warning(self) -> str:
        with io_flusher() as allowed:
            if allowed:
                return ""
        return (
            "CAP_SYS_RESOURCE is missing, so nbdfuse cannot be marked PR_SET_IO_FLUSHER: when "
            "memory runs out, the device may hang"
        )

    def attach(self, request: Request) -> Attachment:
        nbdfuse = self._start_nbdfuse(request)
        file = request.state / FOLDER / FILE
        device = run(
            [
                "losetup",
                "--find",
                "--show",
                "--direct-io=on",
                *(["--read-only"] if request.read_only else []),
                str(file),
            ],
            START_TIMEOUT,
        ).strip()
        sysfs = Path("/sys/block") / Path(device).name
        if (sysfs / "loop/dio").read_text().strip() != "1":
            raise EnvironmentProblem(f"{device} does no direct I/O on a FUSE file: kernel too old")
        return Attachment(
            via=NAME,
            device=device,
            socket=str(request.socket),
            state=str(request.state),
            name=request.name,
            size=int((sysfs / "size").read_text()) * 512,
            read_only=request.read_only or (sysfs / "ro").read_text().strip() == "1",
            connections=request.connections,
            processes=(nbdfuse,),
        )

    def _start_nbdfuse(self, request: Request) -> Process:
        folder, pidfile = request.state / FOLDER, request.state / PIDFILE
        folder.mkdir(mode=0o700)
        argv = [
            "nbdfuse",
            # nbdfuse 1.14 never uses the last of its connections, so ask for one more.
            f"--connections={request.connections + 1}",
            *(["--readonly"] if request.read_only else []),
            "--pidfile",
            str(pidfile),
            str(folder),
            "--unix",
            str(request.socket),
        ]
        with open(request.state / LOG, "ab") as log, io_flusher():
            child = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=ENVIRONMENT,
                start_new_session=True,  # it outlives us and our terminal
            )
        process = Process.of(child.pid)

        def ready() -> bool:
            return child.poll() is not None or (pidfile.exists() and pidfile.stat().st_size > 0)

        if not wait_until(ready, START_TIMEOUT):
            raise TimedOut(
                f"nbdfuse was not ready within {START_TIMEOUT:.0f} s: {self._said(request.state)}"
            )
        if child.returncode is not None or process is None:
            raise EnvironmentProblem(f"nbdfuse did not start: {self._said(request.state)}")
        return process

    def _said(self, state: Path) -> str:
        with contextlib.suppress(OSError):
            lines = (state / LOG).read_text(errors="replace").strip().splitlines()
            return lines[-1] if lines else "it said nothing"
        return "it said nothing"

    def status(self, attachment: Attachment) -> Status:
        state = Path(attachment.state)
        for process in attachment.processes:
            if not process.alive():
                return Status(False, f"nbdfuse (pid {process.pid}) died: {self._said(state)}")
        if attachment.device not in loop_devices(state / FOLDER / FILE):
            return Status(False, f"{attachment.device} was released by somebody else")
        return server_status(attachment)

    def reconnect(self, attachment: Attachment) -> None:
        raise CannotReconnect(attachment)

    def devices(self, state: Path) -> list[str]:
        return loop_devices(state / FOLDER / FILE)

    def abort(self, state: Path) -> list[str]:
        # A killed program's losetup or umount may still be at work, and would get in our way.
        helpers = _helpers(state)
        for process in helpers:
            process.signal(signal.SIGKILL)
        for process in helpers:
            process.wait_gone(ABORT_TIMEOUT)
        return [f"killed process {process.pid}, which worked for it" for process in helpers]

    def release(self, state: Path, *, timeout: float, force: bool) -> list[str]:
        removed = []
        folder = state / FOLDER
        for device in self.devices(state):
            # With a user left, the kernel only marks it to go with the last one.
            run(["losetup", "--detach", device], timeout)
            limit = ABORT_TIMEOUT if force else timeout
            if wait_until(partial(_is_free, device, folder / FILE), limit):
                removed.append(f"released {device}")
            elif force:
                removed.append(f"{device} goes away once nobody uses it any more")
            else:
                users = busy.describe(busy.users_of_device(device)) or "somebody"
                raise Busy(f"{device} is still in use by {users}")
        while mounted_at(folder):
            lazy = ["--lazy"] if force else []
            run(["umount", "--internal-only", "--no-canonicalize", *lazy, str(folder)], timeout)
            removed.append(f"unmounted {folder}")
        for process in _helpers(state):  # unmounting ends it
            if not process.wait_gone(timeout) and not process.stop(ABORT_TIMEOUT):
                raise TimedOut(f"nbdfuse (pid {process.pid}) cannot be ended: see its kernel stack")
            removed.append(f"ended nbdfuse (pid {process.pid})")
        for name in (PIDFILE, LOG):
            (state / name).unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            folder.rmdir()
        return removed


def loop_devices(file: Path) -> list[str]:
    """The loop devices whose backing file is `file`, told by sysfs without touching it."""
    found = []
    for name in sorted(os.listdir("/sys/block")):
        if name.startswith("loop"):
            with contextlib.suppress(OSError):  # not bound, or just being released
                backing = Path(f"/sys/block/{name}/loop/backing_file").read_text().rstrip("\n")
                if backing.removesuffix(" (deleted)") == str(file):
                    found.append(f"/dev/{name}")
    return found


def _is_free(device: str, file: Path) -> bool:
    return device not in loop_devices(file)


def _helpers(state: Path) -> list[Process]:
    folder = state / FOLDER
    return [
        *with_argument("nbdfuse", str(folder)),
        *with_argument("losetup", str(folder / FILE)),
        *with_argument("umount", str(folder)),
    ]


DRIVER = FuseLoop()

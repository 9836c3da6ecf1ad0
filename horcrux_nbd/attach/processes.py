"""Processes that outlive us, and programs that must not hang us.

A read from a dead NBD server or FUSE mount can block a process where no signal reaches it. So
everything that may touch one runs in a child with a time limit, and a child that cannot even be
killed is left behind and named rather than waited for.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import EnvironmentProblem, HorcruxError

PR_SET_IO_FLUSHER = 57  # linux/prctl.h, kernel 5.6
KILL_GRACE = 2.0  # seconds that a killed child has to go before it counts as stuck in the kernel
# losetup and mount translate their messages; ours are read by people and by tests.
ENVIRONMENT = {"LC_ALL": "C", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}


class TimedOut(HorcruxError):
    """A step did not end within its limit. What it says names the step and the limit."""

    errno = errno.ETIMEDOUT


class ProgramFailed(HorcruxError):
    """A program ended with an error. Carries its exit `status` and what it `said`."""

    def __init__(self, argv: Sequence[str], status: int, said: str) -> None:
        how = f"exit status {status}" if status >= 0 else f"signal {-status}"
        super().__init__(f"{Path(argv[0]).name} failed ({how}): {said or 'it said nothing'}")
        self.status, self.said = status, said


def boot_id() -> str:
    """The kernel's id of this boot: state of an earlier one names devices that are gone."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@dataclass(frozen=True)
class Process:
    """A process told apart from a later one with the same pid by its start time.

    `start` is in clock ticks since boot (field 22 of /proc/PID/stat, proc(5)).
    """

    pid: int
    start: int

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """The process that has `pid` now; None if none has, or only a zombie."""
        fields = _stat(pid)
        if not fields or fields[0] in ("Z", "X"):
            return None
        return cls(pid, int(fields[19]))

    @staticmethod
    def state(pid: int) -> str:
        """The letter that ps shows (R, S, D, Z, …); empty if there is no such process."""
        fields = _stat(pid)
        return fields[0] if fields else ""

    def alive(self) -> bool:
        return Process.of(self.pid) == self

    def name(self) -> str:
        with contextlib.suppress(OSError):
            return Path(f"/proc/{self.pid}/comm").read_text().strip()
        return "?"

    def signal(self, number: int) -> None:
        """Send `number` to it and to no other; nothing happens if it is gone."""
        try:
            descriptor = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return
        try:
            # The pidfd holds on to whoever has the pid now, so this check cannot be outrun.
            if self.alive():
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(descriptor, number)
        finally:
            os.close(descriptor)

    def wait_gone(self, timeout: float) -> bool:
        """Whether it has ended within `timeout` seconds (reaped if it was our child)."""
        try:
            descriptor = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return True
        try:
            if not self.alive():
                return True
            ready = readable(descriptor, timeout)
            if ready:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(self.pid, os.WNOHANG)
            return ready
        finally:
            os.close(descriptor)

    def stop(self, grace: float) -> bool:
        """TERM, then KILL after `grace` seconds. Whether it is gone in the end."""
        self.signal(signal.SIGTERM)
        if self.wait_gone(grace):
            return True
        self.signal(signal.SIGKILL)
        return self.wait_gone(KILL_GRACE)


def _stat(pid: int) -> list[str]:
    """/proc/PID/stat from its third field on; empty if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return []
    # The command name may hold spaces and brackets: fields count from its last bracket.
    return text[text.rindex(")") + 2 :].split()


def readable(descriptor: int, timeout: float) -> bool:
    """Whether `descriptor` has something within `timeout` seconds.

    poll(2), since select(2) takes no descriptor above 1,023 and the cache opens more files.
    """
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(max(0.0, timeout) * 1000))


def with_argument(program: str, argument: str) -> list[Process]:
    """The processes of `program` (its file name) that have `argument` on their command line.

    Finds what a killed starter could not write down any more.
    """
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        process = Process.of(int(entry))
        # The name first: to read the command line of a process that hangs in the kernel can hang.
        if process is None or process.name() != program[:15]:
            continue
        with contextlib.suppress(OSError):  # it ended meanwhile
            words = Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0")
            if os.fsencode(argument) in words[1:]:
                found.append(process)
    return found


def run(argv: Sequence[str], timeout: float) -> str:
    """`run_bytes`, as text."""
    return run_bytes(argv, timeout).decode(errors="replace")


def run_bytes(argv: Sequence[str], timeout: float) -> bytes:
    """Standard output of `argv`, which has `timeout` seconds; returns even if it cannot be killed.

    Raises ProgramFailed with what it wrote to standard error, TimedOut, EnvironmentProblem if the
    program is not there.
    """
    # Files, not pipes: a child stuck in the kernel would hold a pipe open and us with it.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            child = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd="/",
                env=ENVIRONMENT,
                start_new_session=True,
            )
        except FileNotFoundError:
            raise EnvironmentProblem(f"{argv[0]} is not installed") from None
        try:
            status = child.wait(timeout)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # with the children that it started
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(KILL_GRACE)
            stuck = "" if child.returncode is not None else f"; process {child.pid} cannot be ended"
            raise TimedOut(
                f"{Path(argv[0]).name} took longer than {timeout:.0f} s on {argv[-1]}{stuck}"
            ) from None
        out.seek(0)
        err.seek(0)
        if status:
            said = " ".join(err.read(4096).decode(errors="replace").split())
            raise ProgramFailed(argv, status, said)
        return out.read()


def wait_until(done: Callable[[], bool], timeout: float, step: float = 0.01) -> bool:
    """Whether `done()` came true within `timeout` seconds. For states that announce no event."""
    deadline = time.monotonic() + timeout
    while not done():
        if time.monotonic() >= deadline:
            return False
        time.sleep(step)
        step = min(step * 1.5, 0.2)
    return True


@contextlib.contextmanager
def io_flusher() -> Iterator[bool]:
    """Processes started inside inherit PR_SET_IO_FLUSHER; yields whether the kernel allows it.

    For whatever serves a block device of this host: memory that such a process asks for is not
    reclaimed by writing to that device, which would wait for the process (prctl(2): inherited by
    fork, kept by exec). Needs CAP_SYS_RESOURCE, which some containers' root lacks.
    """
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    allowed = prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) == 0
    try:
        yield allowed
    finally:
        if allowed:
            prctl(PR_SET_IO_FLUSHER, 0, 0, 0, 0)

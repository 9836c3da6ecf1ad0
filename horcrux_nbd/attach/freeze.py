"""Holding mounted file systems still for a moment: fsfreeze (FIFREEZE, linux/fs.h).

A frozen file system whose freezer was killed stays frozen, and every writer hangs. So a child does
it, which thaws when its pipe to us closes (we ended, however), or after a time limit of its own. It
runs before the freeze begins, so that what writers wait for is two system calls, not a program's
start.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from ..errors import HorcruxError
from .processes import TimedOut, readable

TIMEOUT = 60.0  # seconds to write out what is dirty; reads that it needs may go to the store
LONGEST = 30  # seconds that a freeze lasts at most, whatever we do

_THAW = 0xC0045878  # FITHAW

# Lines that it says: "ready", then after "freeze" from us "frozen" or "failed …", then after "thaw"
# (or when nobody listens any more) "thawed", or "late" where the time was over before.
_CHILD = """
import errno, fcntl, os, signal, sys
FREEZE, THAW = 0xC0045877, 0xC0045878
signal.signal(signal.SIGINT, signal.SIG_IGN)
fds = [(os.open(path, os.O_RDONLY | os.O_DIRECTORY), path) for path in sys.argv[2:]]
frozen = []
def thaw():
    while frozen:
        try:
            fcntl.ioctl(frozen.pop(), THAW, 0)
        except OSError:
            pass
def say(line):
    try:
        os.write(1, (line + "\\n").encode())
    except OSError:
        pass
def late(number, frame):
    thaw()
    say("late")
    os._exit(1)
signal.signal(signal.SIGALRM, late)
say("ready")
if os.read(0, 1):
    signal.alarm(int(sys.argv[1]))
    try:
        for fd, path in fds:
            try:
                fcntl.ioctl(fd, FREEZE, 0)
                frozen.append(fd)
            except OSError as error:
                # EBUSY: somebody else holds it frozen. EOPNOTSUPP: it cannot be.
                if error.errno not in (errno.EBUSY, errno.EOPNOTSUPP):
                    say(f"failed {path}: {error.strerror}")
                    break
        else:
            say("frozen")
            os.read(0, 1)
    finally:
        thaw()
        signal.alarm(0)
        say("thawed")
"""


class Freezer:
    """Freezes the file systems mounted at some folders, one mount of each. Use in a `with` block.

    Whatever ends the block, or this process, thaws them.
    """

    def __init__(self, targets: Sequence[Path], timeout: float = TIMEOUT) -> None:
        self._targets, self._timeout = targets, timeout
        self._child: subprocess.Popen[bytes] | None = None
        self._is_ready = self._asked = False

    def __enter__(self) -> Freezer:
        if self._targets:
            argv = [sys.executable, "-I", "-S", "-c", _CHILD, str(LONGEST)]
            self._child = subprocess.Popen(
                [*argv, *map(str, self._targets)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd="/",
                start_new_session=True,  # Ctrl-C is for us, and we thaw
                bufsize=0,
            )
        return self

    def ready(self) -> None:
        """Wait until a freeze need not wait for anything but the kernel. Raises HorcruxError."""
        if not self._is_ready:
            self._expect("ready")
            self._is_ready = True

    def freeze(self) -> None:
        """Consistent on their devices, and no writes until `thaw`. Raises TimedOut, HorcruxError.

        Keep it to milliseconds: writers hang meanwhile.
        """
        self.ready()
        self._asked = True
        self._tell()
        self._expect("frozen")

    def thaw(self) -> None:
        """Let writers go on. Raises HorcruxError where that happened before, without us."""
        self._tell()
        self._expect("thawed")

    def _tell(self) -> None:
        if self._child is not None:
            assert self._child.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # what it said last tells why
                self._child.stdin.write(b"x")

    def _expect(self, wanted: str) -> None:
        if self._child is None:
            return
        assert self._child.stdout is not None
        line, deadline = b"", time.monotonic() + self._timeout
        while not line.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not readable(self._child.stdout.fileno(), left):
                raise TimedOut(
                    f"{', '.join(map(str, self._targets))} could not be frozen within "
                    f"{self._timeout:.0f} s: it is thawed as soon as that is possible"
                )
            part = self._child.stdout.read(1)
            if not part:
                break
            line += part
        said = line.decode(errors="replace").strip()
        if said == "late":
            raise HorcruxError(
                f"the freeze took over {LONGEST} s, so writers were let go on: try again when the "
                "disk under the overlay is less busy"
            )
        if said != wanted:
            raise HorcruxError(f"cannot freeze: {said.removeprefix('failed ') or 'no answer'}")

    def _close(self) -> None:
        if self._child is not None:
            assert self._child.stdin is not None
            assert self._child.stdout is not None
            self._child.stdin.close()  # it thaws now, if it has not yet
            self._child.stdout.close()
            # One that is stuck in the kernel thaws when it gets out; nothing can hurry it.
            with contextlib.suppress(subprocess.TimeoutExpired):
                if self._child.wait(self._timeout) < 0 and self._asked:
                    self._thaw_for_it()

    def _thaw_for_it(self) -> None:
        """The child was killed, and cannot: every writer would hang until the next boot."""
        for target in self._targets:
            with contextlib.suppress(OSError):  # EINVAL: it was not frozen
                fd = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    fcntl.ioctl(fd, _THAW, 0)
                finally:
                    os.close(fd)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close()


def write_out(target: Path) -> None:
    """Write what is dirty in the file system at `target` to its device: syncfs(2). OSError."""
    fd = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if _libc.syncfs(fd) != 0:
            number = ctypes.get_errno() or errno.EIO
            raise OSError(number, f"{target}: {os.strerror(number)}")
    finally:
        os.close(fd)


_libc = ctypes.CDLL(None, use_errno=True)

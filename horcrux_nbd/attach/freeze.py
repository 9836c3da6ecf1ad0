"""Holding a mounted file system still for a moment: fsfreeze (ioctl_fs FIFREEZE)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from .processes import ProgramFailed, TimedOut, run

TIMEOUT = 60.0  # seconds to write out what is dirty; reads that it needs may go to the store


@contextlib.contextmanager
def frozen(target: Path, timeout: float = TIMEOUT) -> Iterator[None]:
    """The file system at `target` is consistent on its device and takes no writes inside `with`.

    Keep it to milliseconds: writers hang meanwhile. It is thawed whatever happens inside, and if we
    are killed inside, `thaw` does it. Raises ProgramFailed, TimedOut.
    """
    try:
        run(["fsfreeze", "--freeze", str(target)], timeout)
    except TimedOut:
        # The freeze may still come through after we gave up on it.
        with contextlib.suppress(ProgramFailed, TimedOut):
            thaw(target, timeout)
        raise
    try:
        yield
    finally:
        thaw(target, timeout)


def thaw(target: Path, timeout: float = TIMEOUT) -> bool:
    """End a freeze; False if it was not frozen. For what a killed program left frozen too."""
    try:
        run(["fsfreeze", "--unfreeze", str(target)], timeout)
    except ProgramFailed as error:
        if "Invalid argument" in error.said:
            return False
        raise
    return True

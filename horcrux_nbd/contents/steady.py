"""Files of contents that may be changing: a volume that is mounted, with a workload on it.

A look at a file system that is written meanwhile is a mixture of moments. So what is dirty is
written out, the look is taken, and it counts if nothing was written to the volume in between. If
something was, it is taken again with the file system frozen: by then all that it needs from the
store is on this host, so writers wait for milliseconds and never for a network.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from ..attach.freeze import Freezer, write_out
from ..errors import Busy, Damaged, NotFound
from ..filesystem import Change, Reader, compare, open_filesystem
from .content import SETTLED, Content
from .differences import Differences

log = logging.getLogger(__name__)

_TRIES = 3  # of a volume that is written by a VM, which nobody here can freeze

Result = TypeVar("Result")


def files_of(content: Content) -> Reader:
    """The file system in a content as it is now. See `steadily` for one that may change."""
    return open_filesystem(content.read, content.size, content.name)


def changed_files(old: Content, new: Content) -> list[Change]:
    """What differs between the files of two contents, by path.

    Reads the metadata that differs and what leads to it. Raises UsageError where one holds no
    ext2, ext3 or ext4, EnvironmentProblem, Damaged, StoreError; Busy for a volume that a VM writes
    to without a pause.
    """

    def look() -> list[Change]:
        return compare(files_of(old), files_of(new), Differences(old, new))

    return steadily([old, new], look)


def steadily(contents: list[Content], look: Callable[[], Result]) -> Result:
    """What `look` finds in `contents` at one moment; it may be called more than once."""
    moving = [content for content in contents if content.volume is not None]
    if not moving:
        return look()
    result: Result | None = None
    problem: Damaged | NotFound | None = None
    for _ in range(_TRIES):
        _write_out(moving)
        before = _pulses(moving)
        if None in before:
            time.sleep(SETTLED)
            before = _pulses(moving)
        try:
            result, problem = look(), None
        except (Damaged, NotFound) as error:
            problem = error
        after = _pulses(moving)
        if None not in before and before == after:
            break
        if any(content.mounts() for content in moving):
            with _frozen(moving):
                return look()
    else:
        if problem is not None:
            names = ", ".join(content.name for content in moving)
            raise Busy(
                f"{names} is written to all the time, and not by a mount of this host that could "
                f"be held still ({problem}): pause the VM, or look at a version of it"
            )
        log.info("the volume was written to while it was read")
    if problem is not None:
        raise problem
    return result  # type: ignore[return-value]


def _pulses(contents: list[Content]) -> list[object | None]:
    return [content.pulse() for content in contents]


def _write_out(contents: list[Content]) -> None:
    for content in contents:
        for target in content.mounts():
            with contextlib.suppress(OSError):  # unmounted just now: then it was written out
                write_out(target)
        content.refresh()


@contextlib.contextmanager
def _frozen(contents: list[Content]) -> Iterator[None]:
    targets = [target for content in contents for target in content.mounts()]
    with Freezer(targets) as freezer:
        freezer.freeze()
        for content in contents:
            content.refresh()
        yield
        freezer.thaw()

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
from ..errors import Busy, Damaged, HorcruxError, NotFound
from ..filesystem import Change, Reader, compare, open_filesystem
from .content import SETTLED, Content, open_base, open_volume
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

    def look(is_frozen: bool) -> list[Change]:
        differences = Differences(old, new, exact=not is_frozen)
        return compare(files_of(old), files_of(new), differences)

    return steadily([old, new], look)


def holds_changes(name: str, limit: float) -> bool:
    """Whether the files of a volume are others than those of the version that it lies on.

    A volume that was only mounted has been written to, but holds no changes. Where that cannot be
    told (another file system than ext2 to ext4, or a store that is away for `limit` seconds) the
    answer is yes.
    """
    try:
        with open_base(name, limit) as old, open_volume(name, limit) as new:
            return bool(changed_files(old, new))
    except HorcruxError as error:
        log.info("volume %s may hold changes: %s", name, error)
        return True


@contextlib.contextmanager
def reading(content: Content) -> Iterator[Reader]:
    """The files of a content, to be read as long as that takes. Raises Busy where a volume was
    written to meanwhile and what was read does not fit together.
    """
    reader = steadily([content], lambda _: files_of(content))
    before = content.pulse()
    try:
        yield reader
    except Damaged as error:
        if content.volume is None or (before is not None and before == content.pulse()):
            raise
        raise Busy(
            f"{content.name} was written to while it was read ({error}): read it where it is "
            "mounted, or commit and read that version"
        ) from error


def steadily(contents: list[Content], look: Callable[[bool], Result]) -> Result:
    """What `look` finds in `contents` at one moment. It may be called more than once, and is told
    whether writers wait for it meanwhile.
    """
    moving = [content for content in contents if content.volume is not None]
    if not moving:
        return look(False)
    targets = [target for content in moving for target in content.mounts()]
    with Freezer(targets) as freezer:
        problem: HorcruxError | None = None
        for _ in range(_TRIES):
            for target in targets:
                write_out(target)
            before = _refreshed(moving)
            try:
                result, problem = look(False), None
            except (Damaged, NotFound) as error:
                problem = error
            if None not in before and before == _pulses(moving):
                break
            if targets:
                freezer.freeze()
                _refreshed(moving)
                result, problem = look(True), None
                freezer.thaw()
                break
        else:
            if problem is not None:
                names = ", ".join(content.name for content in moving)
                problem = Busy(
                    f"{names} is written to all the time, and by nobody whom this host could hold "
                    f"still ({problem}): pause the VM, or look at a version of it"
                )
        if problem is not None:
            raise problem
    return result


def _refreshed(contents: list[Content]) -> list[object | None]:
    for content in contents:
        content.refresh()
    before = _pulses(contents)
    if None in before:
        time.sleep(SETTLED)
        before = _pulses(contents)
    return before


def _pulses(contents: list[Content]) -> list[object | None]:
    return [content.pulse() for content in contents]

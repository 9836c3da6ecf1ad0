"""Decides what a path given to `generate` is and opens it as a source."""

from __future__ import annotations

import gc
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UsageError
from ..progress import Progress
from .base import Source
from .directory import Ext4Source
from .ext4_make import TIMESTAMP
from .layout import Layout
from .qemu import QemuSource, image_format
from .raw import RawSource, device_in_use
from .tree import EmptyTree, Tree
from .xfs import XfsImage, XfsSource

FILESYSTEMS = ("ext4", "xfs")


def open_source(
    path: str | os.PathLike[str],
    *,
    filesystem: str = "ext4",
    size: int | None = None,
    free: int | None = None,
    temporary: str | Path | None = None,
    progress: Progress | None = None,
    label: str = "",
    previous: Layout | None = None,
) -> Source:
    """What is at `path`, as a disk image.

    A directory becomes a file system of type `filesystem` named `label`, of `size` bytes in all
    or with `free` bytes beside its files (by default as much as they take, at least 1 GiB: that
    is a hole and costs nothing). A regular file or a block device is an image already; formats
    other than raw are read through qemu. Temporary files lie in `temporary`, else $TMPDIR, else
    /var/tmp; what they take is noted in `progress` beforehand and checked.

    `previous` is the `layout` of an earlier version's Ext4Source: files stay where they were.

    Raises UsageError (not there, not readable, does not fit), NoSpace, EnvironmentProblem.
    """
    _check_filesystem(filesystem)
    progress = progress or Progress()
    name = os.fspath(path)
    try:
        mode = os.stat(name).st_mode
    except OSError as error:
        raise UsageError(f"cannot read {name}: {error.strerror}") from error
    if stat.S_ISDIR(mode):
        progress.start(f"Looking at {name}")
        with _no_collector():
            tree = Tree(name)
            if filesystem == "xfs":
                return XfsSource(
                    tree, size=size, free=free, temporary=temporary, progress=progress, label=label
                )
            return Ext4Source(
                tree,
                size=size,
                free=free,
                temporary=temporary,
                progress=progress,
                label=label,
                previous=previous,
            )
    if size is not None or free is not None:
        raise UsageError(f"{name} is a disk image: its size is given, only a directory has room")
    if stat.S_ISBLK(mode):
        if device_in_use(name):
            progress.note(f"{name} is in use: unmount it or the image may be inconsistent")
        return RawSource(name)
    if not stat.S_ISREG(mode):
        raise UsageError(f"{name} is neither a directory nor a file nor a block device")
    kind = image_format(name)
    if kind == "raw":
        return RawSource(name)
    return QemuSource(name, kind, progress=progress)


def empty_filesystem(
    size: int,
    filesystem: str = "ext4",
    *,
    temporary: str | Path | None = None,
    label: str = "",
) -> Source:
    """A new, empty file system of `size` bytes that belongs to root. Raises as `open_source`."""
    _check_filesystem(filesystem)
    if filesystem == "xfs":
        return XfsImage(size, temporary, label)
    tree = EmptyTree(TIMESTAMP * 10**9)
    return Ext4Source(tree, size=size, temporary=temporary, label=label)


def _check_filesystem(filesystem: str) -> None:
    if filesystem not in FILESYSTEMS:
        raise UsageError(
            f"cannot make a file system {filesystem!r}: choose one of {', '.join(FILESYSTEMS)}"
        )


@contextmanager
def _no_collector() -> Iterator[None]:
    """A million small objects are made that all stay: looking for cycles takes a quarter of it."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()

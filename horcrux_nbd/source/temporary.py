"""Temporary disk space of image sources.

Files have no name from the start, so nothing is left behind however the process ends; programs
reach them as `/proc/self/fd/N`, which also works for a file that has lost its name.
"""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from ..errors import NoSpace, UsageError
from ..units import format_size

# /tmp is a RAM disk on many machines; these files may be as large as the disk image.
DEFAULT_FOLDER = "/var/tmp"


def choose_folder(folder: str | Path | None) -> Path:
    """`folder`, else `$TMPDIR`, else /var/tmp. Raises UsageError if it is none."""
    chosen = Path(folder or os.environ.get("TMPDIR") or DEFAULT_FOLDER)
    if not chosen.is_dir():
        raise UsageError(f"the folder for temporary files {chosen} does not exist: make it")
    return chosen


def check_room(folder: Path, needed: int, what: str) -> None:
    """Raises NoSpace unless `needed` bytes are free in `folder`; `what` says what for."""
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    if free < needed:
        raise NoSpace(
            f"{what} needs {format_size(needed)} of temporary space, but {folder} has "
            f"{format_size(free)}: free some, or set TMPDIR to a folder with more room"
        )


class UnnamedFile:
    """An empty file in `folder` without a name; its space is given back when it is closed."""

    def __init__(self, folder: Path) -> None:
        try:
            self.fd = os.open(folder, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
        except OSError as error:
            # EISDIR: a kernel without it; EOPNOTSUPP: a file system without it (NFS, overlayfs).
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
                raise
            self.fd, name = tempfile.mkstemp(prefix=".tmp-horcrux-", dir=folder)
            os.unlink(name)
        self.folder = folder

    @property
    def path(self) -> str:
        """Opens this very file again, in this process and in one that got `fd` passed."""
        return f"/proc/self/fd/{self.fd}"

    def resize(self, size: int) -> None:
        """Make it `size` bytes long without taking space. Raises NoSpace where it is too long."""
        try:
            os.ftruncate(self.fd, size)
        except OSError as error:
            if error.errno == errno.EFBIG:
                raise NoSpace(
                    f"{self.folder} cannot hold a sparse file of {format_size(size)}: set TMPDIR "
                    "to a folder on XFS or another file system that can"
                ) from error
            raise

    def used(self) -> int:
        """Bytes of disk that it takes now."""
        return os.fstat(self.fd).st_blocks * 512

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

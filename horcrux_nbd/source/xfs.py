"""A directory as an XFS image: a full copy in a sparse temporary file, made by mounting it.

There is no way to fill an XFS without its kernel driver, so this needs root, loop devices and as
much temporary space as the files take. ext4 needs none of these; XFS is for those whose database
wants it. The copy runs in a mount namespace of its own: mount and loop device vanish with it,
however it ends. Other than with ext4 the same files do not give the same bytes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from ..errors import EnvironmentProblem, HorcruxError, NoSpace, UsageError
from ..files import read_exactly
from ..progress import Progress
from ..units import GiB, MiB, format_size, round_up
from .base import Source, check_range
from .raw import data_ranges
from .temporary import UnnamedFile, check_room, choose_folder
from .tools import find_tool, last_line, run_tool
from .tree import Tree

MIN_SIZE = 300 * MiB  # mkfs.xfs since 5.19 makes none smaller
_NAMESPACE = uuid.UUID("0d3f2c53-6a5b-5f44-9d52-8a8a4f0f5f0d")
_LABEL_BYTES = 12
_COPY = (
    'mount -t xfs -o loop,nouuid -- "$1" "$2" && '
    'cp --archive --sparse=auto -- "$3/." "$2/" && umount -- "$2"'
)


class XfsImage(Source):
    """An empty XFS of `size` bytes."""

    filesystem = "xfs"

    def __init__(self, size: int, temporary: str | Path | None = None, label: str = "") -> None:
        if size < MIN_SIZE:
            raise UsageError(
                f"{format_size(size)} is too small for an XFS image: it takes at least "
                f"{format_size(MIN_SIZE)}"
            )
        self._file = UnnamedFile(choose_folder(temporary))
        try:
            self.size = size - size % 4096
            self._file.resize(self.size)
            self._make(label)
            self._fill()
        except BaseException:
            self._file.close()
            raise
        self.temporary_bytes = self._file.used()

    def _make(self, label: str) -> None:
        short = label.encode()[:_LABEL_BYTES].decode(errors="ignore")
        result = run_tool(
            [
                find_tool("mkfs.xfs", "xfsprogs"),
                *("-q", "-f", "-K", "-L", short, "-m", f"uuid={uuid.uuid5(_NAMESPACE, label)}"),
                self._file.path,
            ],
            pass_fds=[self._file.fd],
        )
        if result.returncode:
            raise UsageError(
                f"mkfs.xfs cannot make an XFS of {format_size(self.size)} ({last_line(result)})"
            )

    def _fill(self) -> None:
        """Nothing: it stays empty."""

    def extents(self) -> Iterator[tuple[int, int]]:
        yield from data_ranges(self._file.fd, 0, self.size)

    def read(self, offset: int, length: int) -> bytes:
        check_range(offset, length)
        return read_exactly(self._file.fd, length, offset)

    def problems(self) -> list[str]:
        return []

    def close(self) -> None:
        self._file.close()


class XfsSource(XfsImage):
    """A copy of `tree` in an XFS."""

    def __init__(
        self,
        tree: Tree,
        *,
        size: int | None = None,
        free: int | None = None,
        temporary: str | Path | None = None,
        progress: Progress | None = None,
        label: str = "",
    ) -> None:
        _check_machine()
        self._tree, self._progress = tree, progress or Progress()
        # Inodes of 512 bytes, a block for a small file or directory, and what XFS keeps for itself.
        needed = tree.allocated_bytes + tree.files * (4096 + 512) + 64 * MiB
        if size is None:
            room = max(needed, GiB) if free is None else free
            size = max(round_up((needed + room) * 51 // 50, MiB), MIN_SIZE)
        elif size < needed:
            raise UsageError(
                f"{format_size(size)} is too small for {tree.files:,} files: it takes about "
                f"{format_size(needed)}"
            )
        folder = choose_folder(temporary)
        check_room(folder, needed, "a copy of the files")
        self._progress.note(
            f"{tree.files:,} files, {format_size(tree.file_bytes)}; temporary space for a "
            f"copy: about {format_size(needed)} in {folder}; image of {format_size(size)}, xfs"
        )
        for line in tree.notes():
            self._progress.note(line)
        super().__init__(size, folder, label)

    def _fill(self) -> None:
        if self._tree.left_out:
            raise UsageError(
                f"an XFS image is copied whole, but {self._tree.left_out[0]}: use ext4"
            )
        point = tempfile.mkdtemp(prefix="horcrux-xfs-")
        self._progress.start("Copying to a temporary XFS", self._tree.file_bytes)
        copy = subprocess.Popen(
            [
                find_tool("unshare", "util-linux"),
                *("--mount", "--propagation=private", "sh", "-c", _COPY, "sh"),
                *(self._file.path, point, self._tree.root_path),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=[self._file.fd],
            env={**os.environ, "LC_ALL": "C"},
            process_group=0,
        )
        try:
            self._watch(copy)
        except BaseException:
            if copy.poll() is None:
                os.killpg(copy.pid, signal.SIGTERM)
                copy.wait()
            raise
        finally:
            if copy.stderr:
                copy.stderr.close()
            os.rmdir(point)

    def _watch(self, copy: subprocess.Popen[bytes]) -> None:
        done, said = self._file.used(), b""
        while copy.returncode is None:
            try:
                _, said = copy.communicate(timeout=0.5)
            except subprocess.TimeoutExpired:
                now = self._file.used()
                self._progress.advance(max(now - done, 0))
                done = max(now, done)
        if copy.returncode:
            lines = said.decode(errors="replace").strip().splitlines() or ["no reason given"]
            if "No space left" in lines[-1]:
                raise NoSpace(f"the copy does not fit into the image: {lines[-1]}")
            raise HorcruxError(f"cannot fill an XFS image: {lines[0]}")

    def problems(self) -> list[str]:
        return list(self._tree.changes())


def _check_machine() -> None:
    """Raises EnvironmentProblem unless this machine can mount an XFS image."""
    if os.geteuid() != 0:
        raise EnvironmentProblem("an XFS image can be filled by root only: use sudo, or ext4")
    if not os.path.exists("/dev/loop-control"):
        raise EnvironmentProblem("filling an XFS image needs loop devices: modprobe loop, or ext4")
    find_tool("mkfs.xfs", "xfsprogs")

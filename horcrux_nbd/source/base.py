"""What `generate` reads: a disk image that exists, or one that is made up while it is read.

A directory becomes a file system whose metadata lies in a small unnamed temporary file and whose
file contents stay where they are: they are read from the source files when the image is read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

from ..closing import Closing


class Source(Closing, ABC):
    """A disk image to be read once, in any order, by several threads."""

    size: int  # bytes of the image; need not be a multiple of anything for a raw file
    filesystem: str | None  # "ext4", "xfs", or None where it is neither or not known
    temporary_bytes: int = 0  # of local disk that it holds until `close`

    @abstractmethod
    def extents(self) -> Iterator[tuple[int, int]]:
        """(offset, length) of what may hold data, ascending and apart; the rest reads as zeros."""

    @abstractmethod
    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes at `offset`, any alignment; what lies behind `size` reads as zeros.

        Safe to call from several threads. A file that vanished, changed or cannot be read is
        noted for `problems`, and what could not be had of it reads as zeros. Raises OSError where
        the image itself cannot be read; ValueError for a negative offset or length.
        """

    @abstractmethod
    def problems(self) -> list[str]:
        """Once all was read: one line per file that changed, vanished or was not readable.

        Empty if the image is what the source was when it was opened.
        """

    @abstractmethod
    def close(self) -> None:
        """Remove every temporary file and stop every helper process. May be called twice."""


def check_range(offset: int, length: int) -> None:
    """ValueError for what `Source.read` refuses."""
    if offset < 0 or length < 0:
        raise ValueError(f"negative range {offset}, {length}")

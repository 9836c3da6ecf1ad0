"""Where the files of an image lie, so that the next version can leave them there."""

from __future__ import annotations

from dataclasses import dataclass, field

from .ext4_inode import Extent
from .ext4_make import Geometry


@dataclass(frozen=True, slots=True)
class Place:
    """Of one file, directory or long symbolic link."""

    inode: int
    extents: tuple[Extent, ...]  # in blocks of 4 KiB; what is no hole
    tree: tuple[int, ...] = ()  # blocks of its extent tree, beside the inode
    xattr_block: int = 0  # block of its extended attributes, 0 for none; several may share it


@dataclass
class Layout:
    """Of a whole file system. Paths are relative to its root, which is `.`."""

    geometry: Geometry
    places: dict[bytes, Place] = field(default_factory=dict)

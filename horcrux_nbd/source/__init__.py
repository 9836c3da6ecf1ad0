"""Image sources: what a new version of an image is made from."""

from .base import Source
from .ext4_read import read_layout
from .layout import Layout
from .opening import FILESYSTEMS, empty_filesystem, open_source

__all__ = [
    "FILESYSTEMS",
    "Layout",
    "Source",
    "empty_filesystem",
    "open_source",
    "read_layout",
]

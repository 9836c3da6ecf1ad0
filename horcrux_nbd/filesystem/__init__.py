"""Reads ext2, ext3 and ext4 through any function that reads a disk. Mounts nothing, trusts nothing.

    reader = open_filesystem(read, size)      # read(offset, length) -> bytes
    for path, inode in reader.walk(): …
    for change in compare(old, new, changed): …

Written for this project because none of the libraries at hand fits: libext2fs and The Sleuth Kit
(pytsk3) do not replay a journal, and a diff of a volume in use has to; they are C that meets
images of strangers inside this process; and a diff wants to read the metadata that differs and
nothing else. Here a damaged or hostile image costs a Damaged error, in bounded time and memory.
The kernel's own reading is the oracle of the tests.
"""

from __future__ import annotations

from .blocks import Read
from .changes import Change, Changed
from .compare import compare
from .reader import Reader, open_filesystem

__all__ = ["Change", "Changed", "Read", "Reader", "compare", "open_filesystem"]

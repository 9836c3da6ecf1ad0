"""Whether a server listens, told without connecting to it (which it would log as a lost client)."""

from __future__ import annotations

import re
from pathlib import Path

_ACCEPTS = 0x10000  # __SO_ACCEPTCON of linux/net.h
# Num RefCount Protocol Flags Type St Inode Path; numbers are padded with spaces, the path is not.
_LINE = re.compile(r"\S+ +\S+ +\S+ +(\S+) +\S+ +\S+ +(\d+) (.*)")


def listener(path: Path) -> int:
    """The inode of the socket that listens at `path`: another one after a restart; 0 if none.

    `path` as the server was given it, which has to be absolute.
    """
    for line in Path("/proc/net/unix").read_text(errors="surrogateescape").split("\n"):
        match = _LINE.fullmatch(line)
        if match and match[3] == str(path) and int(match[1], 16) & _ACCEPTS:
            return int(match[2])
    return 0

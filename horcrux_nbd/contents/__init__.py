"""What versions and volumes hold, to be looked at: bytes, files, and what differs between two.

Takes no lock and changes nothing: a volume may be served, mounted and written meanwhile.
"""

from __future__ import annotations

from .content import Content, open_base, open_volume
from .differences import Differences
from .steady import changed_files, files_of, holds_changes, reading, steadily

__all__ = [
    "Content",
    "Differences",
    "changed_files",
    "files_of",
    "holds_changes",
    "open_base",
    "open_volume",
    "reading",
    "steadily",
]

"""The reflog of a volume: one line of JSON for each time that it came to lie on another version.

A help for people, so a line that a crash tore is passed over. It keeps nothing alive by itself:
what may be come back to is in volume.json.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from ..repository.commits import now

FILE = "reflog"
KEPT = 1000  # lines; beyond twice as many the older ones go
MOST = 8 << 20  # bytes that are read


@dataclass(frozen=True)
class Move:
    """One step. Ids are hex; `before` and `after` are the same where only a branch changed."""

    time: str
    action: str  # commit, checkout, reset, revert, pull, push, stash
    before: str
    after: str
    message: str


def append(folder: Path, action: str, before: str, after: str, message: str) -> None:
    """Note a move. Never fails: the move has happened."""
    line = json.dumps(asdict(Move(now(), action, before, after, message[:500]))) + "\n"
    with contextlib.suppress(OSError):
        path = folder / FILE
        with open(path, "a", encoding="utf-8") as file:
            file.write(line)
        if path.stat().st_size > 2 * KEPT * 400:
            lines = _lines(path)
            if len(lines) > 2 * KEPT or path.stat().st_size > MOST:
                temporary = path.with_name(f".tmp-{FILE}")
                temporary.write_text("".join(f"{one}\n" for one in lines[-KEPT:]), "utf-8")
                os.rename(temporary, path)


def _lines(path: Path) -> list[str]:
    """The newest lines, as many as are ever kept."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - MOST))
        return file.read(MOST).decode("utf-8", "replace").splitlines()


def read(folder: Path) -> list[Move]:
    """All moves, newest first."""
    try:
        lines = _lines(folder / FILE)
    except FileNotFoundError:
        return []
    moves = []
    for line in lines:
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            moves.append(Move(**json.loads(line)))
    return moves[::-1]

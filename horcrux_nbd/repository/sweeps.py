"""How writers and the removal of unreachable objects keep out of each other's way.

Whoever removes objects says so a day before, by a key `gc/<when it begins>-<token>`, and when it
begins, looks again at what is reachable (docs/format.md, "Removal", which has the proof). So a
writer that took less than a day, and met no removal that was due, may rely on every object that it
found; any other one looks again before it moves a ref. No lock, no clock better than an hour.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from datetime import UTC, datetime

from ..chunkstore.base import ChunkStore
from ..errors import Busy

PREFIX = "gc/"
NOTICE = 24 * 3600.0  # seconds between the announcement of a removal and its beginning, at least
MARGIN = 3600.0  # seconds: how far clocks may differ, and how long moving a ref may take

_NAME = re.compile(r"(\d{8}T\d{6}Z)-[0-9a-f]{1,64}", re.ASCII)
_FORM = "%Y%m%dT%H%M%SZ"


def announcement(begins: float, token: str) -> str:
    """The key that announces a removal which begins at `begins` (seconds since 1970)."""
    return f"{PREFIX}{datetime.fromtimestamp(begins, UTC).strftime(_FORM)}-{token}"


def begins(name: str) -> float | None:
    """When the removal that is announced under `gc/<name>` begins; None for another name."""
    match = _NAME.fullmatch(name)
    if not match:
        return None
    try:
        return datetime.strptime(match.group(1), _FORM).replace(tzinfo=UTC).timestamp()
    except ValueError:
        return None


def _due_times(store: ChunkStore) -> list[float]:
    found = (begins(name) for name in store.children(PREFIX))
    return [when for when in found if when is not None]


def refuse_during_removal(store: ChunkStore, now: float | None = None) -> None:
    """Raises Busy while a removal is under way or about to begin. Before any ref is made.

    Enough by itself for a ref to what another ref reaches.
    """
    soon = (time.time() if now is None else now) + MARGIN
    if any(when <= soon for when in _due_times(store)):
        raise Busy(
            f"{store.url}: unreachable objects are being removed: try again when that is done, or "
            "finish it with `horcrux-cli gc` if it was broken off"
        )


class Sweeps:
    """The removals that one writer has to mind. Make it before the first look at an object."""

    def __init__(self, store: ChunkStore, clock: Callable[[], float] = time.time) -> None:
        self._store, self._clock = store, clock
        self._began = clock()
        self._seen = _due_times(store)

    def must_look_again(self) -> bool:
        """Whether objects that were there may be gone. Ask right before a ref is made.

        Raises Busy while a removal is under way, or about to begin.
        """
        now = self._clock()
        refuse_during_removal(self._store, now)
        soon = now + MARGIN
        return soon - self._began > NOTICE or any(when <= soon for when in self._seen)

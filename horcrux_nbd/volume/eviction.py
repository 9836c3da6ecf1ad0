"""Which files of a cache go, with memory for some of them: a terabyte of chunks is two million."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .pins import Pin

SPAN = 300.0  # seconds of last use that are counted together


@dataclass(frozen=True)
class Entry:
    """One cached file: hex id, bytes on disk, when it was last used (seconds since 1970)."""

    area: str
    id: str
    size: int
    used: float
    path: Path


class Eviction:
    """What there is in a cache, counted by spans of time of the last use."""

    def __init__(self, entries: Callable[[], Iterator[Entry]], pinned: Sequence[Pin]) -> None:
        """`entries` lists all that is there; it is asked again for `oldest`."""
        self._entries, self._pinned = entries, pinned
        self._spans: Counter[tuple[bool, int]] = Counter()
        self.total = 0  # bytes
        for entry in entries():
            self.total += entry.size
            if not self._is_pinned(entry):
                self._spans[_span(entry)] += entry.size

    def _is_pinned(self, entry: Entry) -> bool:
        return bool(self._pinned) and any(bytes.fromhex(entry.id) in pin for pin in self._pinned)

    def oldest(self, surplus: int) -> Iterator[Entry]:
        """Entries of `surplus` bytes or more, where so much is not pinned: whole spans in no order,
        from those used longest ago, and then the oldest of the next one. Chunks go before nodes and
        commits, which are small and needed first.
        """
        whole: set[tuple[bool, int]] = set()
        following: tuple[bool, int] | None = None
        for following in sorted(self._spans):
            if self._spans[following] > surplus:
                break
            whole.add(following)
            surplus -= self._spans[following]
        last = []
        for entry in self._entries():
            span = _span(entry)
            if self._is_pinned(entry):
                continue
            if span in whole:
                yield entry
            elif span == following:
                last.append(entry)
        yield from sorted(last, key=lambda entry: entry.used)


def _span(entry: Entry) -> tuple[bool, int]:
    return entry.area == "meta", int(entry.used // SPAN)

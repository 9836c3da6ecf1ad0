"""What a volume does beside serving: `volume.json` keeps it, a server may be told otherwise."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UsageError

# What is fetched before anybody asks for it: what the version's profile lists; then all the rest
# as well; nothing.
PREFETCH = ("profile", "all", "none")
RECORD_AFTER = 60.0  # seconds
LONGEST = 86_400.0  # seconds


@dataclass(frozen=True)
class FillOptions:
    """`rate`: bytes per second from the store, 0 for no limit. `record`: after how many seconds
    what was read becomes the version's profile, if it has none; 0: never.
    """

    mode: str = "profile"
    rate: int = 0
    record: float = 0.0

    def checked(self) -> FillOptions:
        """Itself. Raises UsageError."""
        if self.mode not in PREFETCH:
            raise UsageError(f"prefetch={self.mode}: say {', '.join(PREFETCH)}")
        if self.rate < 0:
            raise UsageError(f"fill_rate={self.rate}: give bytes per second, e.g. 20M; 0: no limit")
        if not 0 <= self.record <= LONGEST:
            raise UsageError(f"record={self.record:g}: give seconds, 0 to {LONGEST:.0f}")
        return self


def parse_record(text: str) -> float:
    """Seconds of `record=`: a number, or `true` for the usual time. Raises UsageError."""
    word = text.lower()
    if word in ("true", "on", "yes"):
        return RECORD_AFTER
    if word in ("false", "off", "no"):
        return 0.0
    try:
        return FillOptions(record=float(word)).checked().record
    except ValueError:
        raise UsageError(f"record={text}: give seconds, or true or false") from None

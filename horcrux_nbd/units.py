"""Sizes as people write them. The one place that parses and prints them."""

from __future__ import annotations

import re

from .errors import UsageError

KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30
TiB = 1 << 40
PiB = 1 << 50

_FACTORS = {"": 1, "K": KiB, "M": MiB, "G": GiB, "T": TiB, "P": PiB}
_SIZE = re.compile(r"(\d{1,18})(?:\.(\d{1,6}))?\s*([KMGTP]?)(?:I?B)?", re.IGNORECASE | re.ASCII)


def parse_size(text: str | int, what: str = "size") -> int:
    """Bytes in `text`: `4096`, `512K`, `64M`, `1.5G`, `10GiB`. Factors are powers of 1024.

    Raises UsageError, which names `what`, for anything else, and for parts of a byte.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        return text
    match = _SIZE.fullmatch(str(text).strip())
    if not match:
        raise UsageError(
            f"{what} {text!r} is no size: write bytes or a number with K, M, G, T or P"
        )
    whole, fraction, unit = match.groups()
    factor = _FACTORS[unit.upper()]
    size = int(whole) * factor
    if fraction:
        part = int(fraction) * factor
        scale: int = 10 ** len(fraction)
        if unit == "":
            raise UsageError(f"{what} {text!r} is not a whole number of bytes")
        size += part // scale
    return size


def format_size(size: float) -> str:
    """`size` bytes for people, with a binary unit: `0 B`, `4.0 KiB`, `2.5 GiB`."""
    if abs(size) < KiB:
        return f"{size:.0f} B"
    for unit, factor in (("KiB", KiB), ("MiB", MiB), ("GiB", GiB), ("TiB", TiB)):
        if abs(size) < factor * 1024:
            return f"{size / factor:.1f} {unit}"
    return f"{size / PiB:.1f} PiB"


def round_up(value: int, step: int) -> int:
    """The least multiple of `step` that is not below `value`."""
    return -(-value // step) * step

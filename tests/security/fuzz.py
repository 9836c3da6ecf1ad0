"""What every parser is fed: bytes that nobody wrote on purpose. Each case comes from its seed.

Each target has samples that it takes, and a function that parses. Cases are the samples with bytes
changed, cut, doubled, or with the numbers that break programs in place of others; samples spliced;
and noise. A parser may take them, or refuse them with one of its own errors: anything else, and any
case that takes long, is a finding.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from horcrux_nbd.errors import HorcruxError

LIMIT = 5.0  # seconds for one case, on a machine that does other things too
_NUMBERS = (0, 1, 127, 128, 255, 256, 0x7FFF, 0xFFFF, 1 << 31, (1 << 31) - 1, (1 << 32) - 1)
_WORDS = (
    b"../", b"/", b"\0", b"\r\n", b"%2e%2e%2f", b"\xff\xfe", b"\\ud800", b"-1", b"1e309", b"NaN",
    b"null", b"{}", b"[" * 3000, b'{"a":' * 2000, b"9" * 5000, "２".encode(), "\u202e".encode(),
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A parser. `errors` are those that it may raise."""

    name: str
    samples: Sequence[bytes]
    parse: Callable[[bytes], object]
    errors: tuple[type[BaseException], ...] = (HorcruxError,)


def case(target: Target, rng: random.Random) -> bytes:
    """One input."""
    if rng.random() < 0.05:
        return rng.randbytes(rng.choice((0, 1, 15, 16, 17, 200, 5000)))
    data = bytearray(rng.choice(target.samples))
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(9):
            case 0 if data:
                data[at % len(data)] ^= 1 << rng.randrange(8)
            case 1 if data:
                data[at % len(data)] = rng.randrange(256)
            case 2:
                del data[at:]
            case 3:
                del data[at : at + rng.randrange(1, 64)]
            case 4:
                data[at:at] = rng.randbytes(rng.randrange(1, 32))
            case 5:
                size = rng.choice((1, 2, 4, 8))
                number = rng.choice(_NUMBERS) & (1 << 8 * size) - 1
                data[at : at + size] = number.to_bytes(size, rng.choice(("little", "big")))
            case 6:
                data[at:at] = rng.choice(_WORDS)
            case 7:
                other = rng.choice(target.samples)
                data[at:] = other[rng.randrange(len(other) + 1) :]
            case 8:
                data[at:at] = data[at : at + rng.randrange(1, 256)]
    return bytes(data)


def run(target: Target, count: int, seed: str) -> int:
    """Feed `count` cases; how many were taken. Raises AssertionError with what reproduces it."""
    taken = 0
    for sample in target.samples:
        target.parse(sample)  # else the cases would test nothing
    for number in range(count):
        rng = random.Random(f"{seed} {target.name} {number}")
        data = case(target, rng)
        began = time.monotonic()
        try:
            target.parse(data)
            taken += 1
        except target.errors:
            pass
        except BaseException as error:
            raise AssertionError(
                f"{target.name}, case {number} of seed {seed!r}: {error!r} for {data[:2000]!r}"
            ) from error
        seconds = time.monotonic() - began
        assert seconds < LIMIT, f"{target.name}, case {number} of seed {seed!r}: {seconds:.1f} s"
    return taken

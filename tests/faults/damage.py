"""Cases of damage, many of them: one file at a time, at random, and what comes of it.

    python -m tests.faults.damage repository|volume --cases N --seed S

Runs by itself in a process whose memory is bounded and measured, as a bomb must cost nothing.
Writes one JSON object: how many cases of each kind and outcome there were, what went wrong (nothing
may), and the most memory that was taken.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import shutil
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from horcrux_nbd.errors import HorcruxError
from horcrux_nbd.repository.objects import HEADER, MAGIC
from horcrux_nbd.units import GiB, KiB

ADDRESS_SPACE = 3 * GiB  # beyond it an allocation fails: a bomb shows, and the machine lives on
BOMB = 10 * GiB

# What damaged a file: its content becomes other bytes, or none of its own (then it did the work).
Damage = Callable[[random.Random, Path, bytes, list[Path]], bytes | None]


class WrongBytes(AssertionError):
    """What may never happen."""


# ---- ways to damage a file


def flip(rng: random.Random, path: Path, data: bytes, others: list[Path]) -> bytes:
    """A few bits turned over."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(rng: random.Random, path: Path, data: bytes, others: list[Path]) -> bytes:
    """Truncated."""
    return data[: rng.choice((0, len(data) - 1, rng.randrange(len(data))))]


def longer(rng: random.Random, path: Path, data: bytes, others: list[Path]) -> bytes:
    """Bytes too many."""
    return data + rng.randbytes(rng.choice((1, 40, 4096)))


def zeroed(rng: random.Random, path: Path, data: bytes, others: list[Path]) -> bytes:
    """Zeros in a range, in a sector, or all over."""
    begin = rng.choice((0, rng.randrange(len(data)), rng.randrange(len(data)) // 512 * 512))
    stop = rng.choice((len(data), min(len(data), begin + 512), rng.randint(begin, len(data))))
    return data[:begin] + bytes(stop - begin) + data[stop:]


def garbage(rng: random.Random, path: Path, data: bytes, others: list[Path]) -> bytes:
    """Random bytes of the same length."""
    return rng.randbytes(len(data))


def swapped(rng: random.Random, path: Path, data: bytes, others: list[Path]) -> bytes:
    """Another valid file of the same kind in its place."""
    return rng.choice(others).read_bytes() if others else garbage(rng, path, data, others)


def bomb(rng: random.Random, path: Path, data: bytes, others: list[Path]) -> bytes | None:
    """1 KiB that claims to be, or becomes, gigabytes."""
    kind = data[5] if data[:4] == MAGIC and len(data) > 5 else rng.randint(1, 4)
    match rng.randrange(6):
        case 0:  # a header that claims as much as it can
            return HEADER.pack(MAGIC, 1, kind, 1, 0, (1 << 32) - 1, KiB) + bytes(KiB)
        case 1:  # a frame that claims 10 GiB, in a header that does not
            frame = struct.pack("<IBQ", 0xFD2FB528, 0xE0, BOMB) + bytes(KiB)
            return HEADER.pack(MAGIC, 1, kind, 1, 0, 64 * KiB, len(frame)) + frame
        case 2:  # a frame that says nothing of its length, and becomes what it likes
            return _rle_bomb(kind, 64 * KiB)
        case 3:
            return _rle_bomb(kind, (1 << 32) - 1)
        case 4:  # a kibibyte on disk, 10 GiB long
            os.truncate(path, 0)
            with path.open("wb") as file:
                file.write(data[:KiB])
            os.truncate(path, BOMB)
            return None
        case _:
            return b"[" * KiB if rng.random() < 0.5 else b'{"version": ' + b"9" * KiB + b"}"


def _rle_bomb(kind: int, claimed: int) -> bytes:
    """Blocks of one repeated byte, 128 KiB each from 4 bytes: what zstd can do at most."""
    block = struct.pack("<I", (128 * KiB) << 3 | 1 << 1)[:3] + b"A"
    frame = struct.pack("<IBB", 0xFD2FB528, 0x00, 0x58) + block * 250
    return HEADER.pack(MAGIC, 1, kind, 1, 0, claimed, len(frame)) + frame


WAYS: dict[str, Damage] = {
    way.__name__: way for way in (flip, cut, longer, zeroed, garbage, swapped, bomb)
}


# ---- what there is to damage


class World:
    """Files, and what must hold whatever happens to one of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def files(self) -> dict[str, list[Path]]:
        """All files that can be damaged, by their kind."""
        raise NotImplementedError

    def valid(self, kind: str) -> list[Path]:
        """Files of a kind that one of it may be swapped with."""
        return self.files()[kind]

    def check(self, rng: random.Random, kind: str, path: Path, data: bytes, way: str) -> str:
        """Look at all there is while `path` is damaged; the outcome. Raises WrongBytes."""
        raise NotImplementedError

    def restore(self, path: Path, data: bytes) -> None:
        """Undo what was done to it."""
        path.unlink(missing_ok=True)
        path.write_bytes(data)


def run(world: World, cases: int, seed: int) -> tuple[Counter[str], list[str]]:
    """`cases` of damage; outcomes by kind, and what went wrong."""
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []
    for number in range(cases):
        rng = random.Random(f"{seed}-{number}")
        files = world.files()
        kind = rng.choice(sorted(files))
        path = rng.choice(files[kind])
        way = rng.choice(sorted(WAYS))
        before = path.read_bytes()
        if not before:
            continue
        others = [p for p in world.valid(kind) if p != path and p.read_bytes() != before]
        after = WAYS[way](rng, path, before, others)
        if after is not None:
            if after == before:
                continue
            path.unlink()
            path.write_bytes(after)
        try:
            outcomes[f"{kind}: {world.check(rng, kind, path, before, way)}"] += 1
        except Exception as error:
            outcomes[f"{kind}: WRONG"] += 1
            where = path.relative_to(world.folder)
            wrong.append(f"case {seed}-{number}: {way} of {where}: {type(error).__name__}: {error}")
        world.restore(path, before)
    return outcomes, wrong


def _most_resident() -> int:
    """KiB that this program had resident at most. Not `ru_maxrss`: what a process inherits of that
    is its parent's, of before the exec.
    """
    found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert found is not None
    return int(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("world", choices=("repository", "volume"))
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    import logging

    logging.disable(logging.CRITICAL)  # each damage is a line in the log
    # In memory, where there is such a place: a sync costs nothing, and says nothing here.
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    folder = Path(tempfile.mkdtemp(prefix="damage-", dir=memory))
    try:
        os.environ["HORCRUX_ROOT"] = str(folder / "host" / "root")
        os.environ["HORCRUX_RUN"] = str(folder / "host" / "run")
        os.environ["HORCRUX_CONFIG"] = str(folder / "host" / "config.toml")
        if arguments.world == "repository":
            from .damage_repository import RepositoryWorld as Made
        else:
            from .damage_volume import VolumeWorld as Made  # type: ignore[assignment]
        world = Made(folder)
        before = _most_resident()
        outcomes, wrong = run(world, arguments.cases, arguments.seed)
        most = _most_resident()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    json.dump(
        {
            "cases": sum(outcomes.values()),
            "outcomes": dict(sorted(outcomes.items())),
            "wrong": wrong,
            "kib_before": before,
            "kib_most": most,
        },
        sys.stdout,
        indent=1,
    )


def is_typed(error: Exception) -> bool:
    """Whether a user gets one line and an exit code for it."""
    return isinstance(error, (HorcruxError, OSError))


if __name__ == "__main__":
    main()

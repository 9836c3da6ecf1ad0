"""Kill after kill, one seed for all of it: `scripts/torture`, and the test that runs it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from .world import Tally, World

COMPARE_EVERY = 12  # rounds between two looks at the versions that were made


def environment(root: Path, run: Path) -> None:
    """Let this process's Horcrux keep its state in `root` and its sockets in `run`."""
    os.environ["HORCRUX_ROOT"], os.environ["HORCRUX_RUN"] = str(root), str(run)


def torture(
    folder: Path,
    *,
    kills: int,
    seed: str,
    minutes: float | None = None,
    tell: Callable[[str], None] = print,
) -> Tally:
    """At least `kills` kills of a volume in the empty `folder`, or as many as `minutes` allow.

    Ends at the first violation: what comes after it would only be its consequence. The requests,
    their order and the moments of the kills follow from `seed`; how threads interleave does not.
    """
    world = World(folder / "store")
    deadline = time.monotonic() + minutes * 60 if minutes else None
    tally, number, told = world.tally, 0, time.monotonic()
    try:
        world.serve()
        while tally.kills < kills and not tally.violations:
            if deadline is not None and time.monotonic() > deadline:
                break
            world.round(f"{seed}/{number}")
            number += 1
            if number % COMPARE_EVERY == 0 and not tally.violations:
                world.compare_versions(f"{seed}/{number}")
            if time.monotonic() - told > 30:
                told = time.monotonic()
                tell(str(tally))
        if not tally.violations:
            world.compare_versions(f"{seed}/{number}")
    finally:
        world.close()
    return tally

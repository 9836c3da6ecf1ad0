"""Which ways to attach a volume this machine has, and which one is taken."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import EnvironmentProblem, UsageError
from . import fuse_loop, kernel_nbd, ublk
from .base import Driver

# Best first. Kernel NBD before ublk: it queues requests while the server restarts, and ublk depends
# on one more process of ours.
DRIVERS: dict[str, Driver] = {
    driver.NAME: driver for driver in (kernel_nbd.DRIVER, ublk.DRIVER, fuse_loop.DRIVER)
}


@dataclass(frozen=True)
class Way:
    """One way to attach, for `doctor`. The texts are one line each, or empty."""

    name: str
    available: bool
    missing: str = ""
    mend: str = ""
    warning: str = ""


def ways() -> list[Way]:
    """All ways, best first, each with what this machine lacks for it."""
    found = []
    for name, driver in DRIVERS.items():
        lack = driver.missing()
        found.append(
            Way(name, True, warning=driver.warning()) if lack is None else Way(name, False, *lack)
        )
    return found


def choose(via: str | None = None) -> Driver:
    """The way called `via`, or the best that this machine has.

    Raises UsageError for an unknown name, EnvironmentProblem where it is (or all are) missing.
    """
    if via is not None and via not in DRIVERS:
        raise UsageError(f"--via {via}: there is no such way to attach; use {', '.join(DRIVERS)}")
    asked = [way for way in ways() if via in (None, way.name)]
    for way in asked:
        if way.available:
            return DRIVERS[way.name]
    lacks = "; ".join(f"{way.name}: {way.missing} ({way.mend})" for way in asked)
    raise EnvironmentProblem(
        f"no way to attach a volume here: {lacks}. "
        "`horcrux-cli serve` needs none of them: qemu, guestfish and nbdcopy read its socket"
    )

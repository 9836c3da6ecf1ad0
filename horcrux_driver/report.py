"""What `docker volume inspect` shows of a volume."""

from __future__ import annotations

import time
from typing import Any

from horcrux_nbd import host
from horcrux_nbd.errors import HorcruxError
from horcrux_nbd.units import format_size

from .engine import Engine
from .options import Options
from .records import Record
from .remotes import Remotes


def described(options: Options) -> str:
    """Options in a few words, for messages."""
    if options.adopt:
        return "those of the volume that was there"
    if options.size is not None:
        return f"size={options.size} fs={options.fs}"
    mode = " readonly" if options.read_only else ""
    return f"access={options.access} name={options.image} ref={options.ref}{mode}"


def status(record: Record, engine: Engine, remotes: Remotes) -> dict[str, Any]:
    """The Status of a volume. Asks nobody who is away, and never fails."""
    found: dict[str, Any] = {
        "volume": record.volume,
        "on-remove": record.options.on_remove,
        "mounts": sum(one.count for one in record.mounts.values()),
    }
    try:
        one = host.status(record.volume)
    except (HorcruxError, OSError) as error:
        return {**found, "problem": str(error)}
    state, survey = one.state, one.survey
    found |= {
        "image": state.image,
        "version": f"{state.asked} {state.base[:12]}",
        "repository": state.repository,
        "size": format_size(state.size),
        "read-only": state.read_only or record.options.read_only,
        "cached": "?" if survey.cached is None else format_size(survey.cached),
        "changed": format_size(survey.written + survey.zeroed),
    }
    if one.figures is not None:
        found["fetched"] = format_size(one.figures["fetched_bytes"])
    if one.attachment is not None:
        found["attached by"] = f"{one.attachment.via} ({one.attachment.device})"
    if record.wanted and (users := engine.users(record.name)):
        found["containers"] = users
    if one.problem:
        found["problem"] = one.problem
    if state.repository:
        found["remote reachable"] = _reachable(state.repository, remotes)
    return found


def _reachable(url: str, remotes: Remotes) -> str:
    answer = remotes.ask(url)
    if answer is None:
        return "being asked"
    ago = f"{time.monotonic() - answer.at:.0f} s ago"
    return f"no ({answer.problem}), {ago}" if answer.problem else f"yes, {ago}"

"""The options of volumes about what is fetched before anybody asks, and how far that is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from .. import config
from ..units import format_size
from ..volume.options import PREFETCH, FillOptions, parse_record
from . import output
from .words import SIZE

if TYPE_CHECKING:
    from ..host import VolumeStatus


def fill_options(command: Any) -> Any:
    """The options that say what is fetched before anybody asks."""
    for option in (
        click.option(
            "--record",
            metavar="SECONDS",
            help="Store what was read by then as a profile (true: 60).",
        ),
        click.option(
            "--fill-rate", type=SIZE, help="Prefetch at most SIZE per second. 0: no limit."
        ),
        click.option(
            "--prefetch",
            type=click.Choice(PREFETCH),
            help="Fetch what the version's profile lists (the default), all, or none.",
        ),
    ):
        command = option(command)
    return command


def server_options(
    prefetch: str | None = None, fill_rate: int | None = None, record: str | None = None
) -> dict[str, str]:
    """What the configuration and the command line say to the server."""
    if record is not None:
        record = str(parse_record(record))
    told = {"prefetch": prefetch, "fill_rate": fill_rate, "record": record}
    asked = {key: str(value) for key, value in told.items() if value is not None}
    return config.load().plugin_options() | asked


def kept(prefetch: str | None, fill_rate: int | None, record: str | None) -> FillOptions:
    """What a volume is made with. Raises UsageError."""
    seconds = parse_record(record) if record else 0.0
    return FillOptions(prefetch or PREFETCH[0], fill_rate or 0, seconds).checked()


def line(one: VolumeStatus) -> str:
    """What the background fetches, and how far it is."""
    fill = one.state.fill
    at_most = f", at most {format_size(fill.rate)}/s" if fill.rate else ""
    found = (one.figures or {}).get("prefetch")
    if not found:
        return fill.mode + at_most
    if found["stage"] == "all":
        done, of = one.survey.cached, one.survey.data
        how = "" if done is None or not of else f", {100 * done // of} % is here"
    else:
        how = f", {output.plural(found['profile_chunks'], 'chunk')} in the profile"
    return f"{found['mode']}{at_most}: {found['stage']}{how}"

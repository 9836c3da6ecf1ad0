"""`cache`: what this host keeps of what its volumes read."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from .. import config, paths
from ..units import format_size
from . import output
from .words import SIZE

if TYPE_CHECKING:
    from ..volume.cache import Cache

LISTED = 50


def _open() -> Cache | None:
    """This host's cache, None where nothing was cached yet (then nothing is made either)."""
    from ..volume.cache import Cache

    folder = paths.cache()
    return Cache(folder, config.load().cache_size) if folder.is_dir() else None


@click.group()
def cache() -> None:
    """Look at the cache, or shrink it.

    It holds verified chunks, shared by all volumes of this host. It bounds itself, never holds the
    only copy of anything, and may be trimmed or cleared while volumes are mounted: what is missing
    is fetched again.

    \b
    horcrux-cli cache size
    horcrux-cli cache trim 10G
    """


@cache.command("ls")
@click.option("-n", "--limit", default=LISTED, show_default=True, help="At most so many; 0: all.")
@output.json_option
def list_entries(limit: int, as_json: bool) -> None:
    """List what is cached, last used first."""
    opened = _open()
    found = sorted(opened.entries() if opened else (), key=lambda entry: -entry.used)
    shown = found[:limit] if limit else found
    if as_json:
        output.emit_json(
            [{"id": e.id, "kind": e.area, "size": e.size, "used": _iso(e.used)} for e in shown]
        )
        return
    output.table(
        ("ID", "KIND", "SIZE", "USED"),
        [(e.id, e.area, format_size(e.size), output.when(_iso(e.used))) for e in shown],
        right=("SIZE",),
    )
    if len(found) > len(shown):
        click.echo(f"… and {len(found) - len(shown):,} more: -n 0 lists all")


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


@cache.command()
@output.json_option
def size(as_json: bool) -> None:
    """Say how large the cache is, and how large it may become."""
    opened = _open()
    value: dict[str, Any] = {"folder": str(paths.cache()), "bytes": 0, "limit": None, "free": None}
    counts: dict[str, list[int]] = {"chunks": [0, 0], "meta": [0, 0]}
    if opened is not None:
        for entry in opened.entries():
            counts[entry.area][0] += 1
            counts[entry.area][1] += entry.size
        stat = os.statvfs(opened.folder)
        value["limit"], value["free"] = opened.limit, stat.f_bavail * stat.f_frsize
    value["bytes"] = sum(used for _, used in counts.values())
    for area, (count, used) in counts.items():
        value[area] = {"count": count, "bytes": used}
    if as_json:
        output.emit_json(value)
        return
    limit = "none yet" if value["limit"] is None else format_size(value["limit"])
    pairs = [("folder", value["folder"]), ("used", format_size(value["bytes"])), ("limit", limit)]
    for area, what in (("chunks", "chunk"), ("meta", "index node")):
        count, used = counts[area]
        pairs.append((area, f"{format_size(used)} in {output.plural(count, what)}"))
    if value["free"] is not None:
        pairs.append(("free on disk", format_size(value["free"])))
    output.facts(pairs)


@cache.command()
@click.argument("size", type=SIZE, required=False)
@output.json_option
def trim(size: int | None, as_json: bool) -> None:
    """Evict what was not used longest until SIZE is left. Default: the configured limit.

    \b
    horcrux-cli cache trim 10G
    """
    opened = _open()
    _removed(opened.trim(opened.limit if size is None else size) if opened else 0, as_json)


@cache.command()
@output.json_option
def clear(as_json: bool) -> None:
    """Evict everything. Nothing is lost: it is fetched again when it is read."""
    opened = _open()
    _removed(opened.clear() if opened else 0, as_json)


def _removed(count: int, as_json: bool) -> None:
    if as_json:
        output.emit_json({"removed_bytes": count})
    else:
        click.echo(f"{format_size(count)} removed")

"""Volumes are made, of a version or empty, and removed."""

from __future__ import annotations

import click

from .. import config
from ..errors import UsageError
from ..names import check_name, parse_version
from ..units import format_size
from . import output, prefetching
from .volumes import described, read_only_option
from .words import REPO, SIZE, VOLUME


@click.command()
@click.argument("volume", type=VOLUME)
@click.argument("repo", type=REPO, required=False)
@click.argument("version", required=False)
@read_only_option
@click.option("--size", type=SIZE, help="A new, empty volume of this size, of no VERSION yet.")
@click.option("--filesystem", metavar="TYPE", help="Of a new volume: ext4 (default) or xfs.")
@prefetching.fill_options
@output.json_option
def create(
    volume: str,
    repo: str | None,
    version: str | None,
    read_only: bool,
    size: int | None,
    filesystem: str | None,
    prefetch: str | None,
    fill_rate: int | None,
    record: str | None,
    as_json: bool,
) -> None:
    """Make a volume: a writable copy of VERSION in REPO.

    Fetches nothing yet. It stays on the version that VERSION means now, also when its branch moves
    on. What is fetched in the background while it is served (--prefetch) is kept with it.

    With --size it is new and empty. `push` makes it an image called VERSION (or VOLUME) in REPO (or
    this host's own repository); nothing is asked of REPO before.

    \b
    horcrux-cli create amcc cp:///opt/horcrux-amcc AMCC
    horcrux-cli create amcc-old team AMCC@main~2
    horcrux-cli create scratch --size 10G
    """
    from .. import blank, host, identity

    check_name("volume", volume)
    url = None if repo is None else config.load().url(repo)
    if size is not None:
        if read_only:
            raise UsageError("--read-only and --size contradict each other: it would stay empty")
        state = blank.create(
            volume, size, filesystem or "ext4", image=version, url=url, author=identity.author()
        )
    elif filesystem is not None:
        raise UsageError("--filesystem is for a new volume: say its size with --size")
    elif url is None or version is None:
        raise UsageError("create takes VOLUME REPO VERSION, or VOLUME --size SIZE")
    else:
        state = host.create(
            volume,
            url,
            parse_version(version),
            read_only=read_only,
            fill=prefetching.kept(prefetch, fill_rate, record),
        )
    if as_json:
        output.emit_json(described(host.status(volume)))
    else:
        click.echo(
            f"{volume}: {state.asked} {output.short(state.base)}, {format_size(state.size)}"
            f"{', read-only' if state.read_only else ''}; next: horcrux-cli mount {volume} DIR"
        )


@click.command()
@click.argument("volume", type=VOLUME)
@click.option("-f", "--force", is_flag=True, help="Also when there are changes: they are lost.")
def rm(volume: str, force: bool) -> None:
    """Remove a volume and what was written to it.

    The repository is not touched. Refuses when there are changes, which exist nowhere else, unless
    forced; and while it is in use.

    \b
    horcrux-cli rm amcc
    """
    from .. import host

    host.remove(volume, force=force)
    click.echo(f"{volume} is removed")

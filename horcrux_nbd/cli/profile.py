"""`profile`: what a workload reads first of a version, so that the next start need not wait."""

from __future__ import annotations

from typing import Any

import click

from ..errors import NotFound
from ..units import format_size
from . import output
from .words import REPO_OR_VOLUME, VOLUME, find_version, where

SHOWN = 20  # runs of chunks


@click.group()
def profile() -> None:
    """Record what a start reads, and have it fetched ahead next time.

    A profile is a list of chunks in the order of their first read. It lies in the repository beside
    its version, and later versions use it too. Any volume of the version that is served fetches it
    in the background, unless it is told otherwise (--prefetch none).

    \b
    horcrux-cli mount amcc /mnt/amcc     # then start the database, run the first queries
    horcrux-cli profile record amcc
    """


@profile.command()
@click.argument("volume", type=VOLUME)
@output.json_option
def record(volume: str, as_json: bool) -> None:
    """Store what was read of VOLUME since it is served, as the profile of its version.

    It takes the place of the one that is there.

    \b
    horcrux-cli profile record amcc
    """
    from .. import host
    from ..chunkstore import open_store
    from ..repository import profiles
    from ..repository.profiles import Profile
    from ..repository.repository import Repository

    state = host.load(volume)
    version, plain = host.touched(volume)
    found = Profile.decode(plain)
    with open_store(state.repository) as store:
        repository = Repository.open(store)
        if not repository.has_commit(version):
            raise NotFound(
                f"the version {output.short(version.hex())} that {volume} lies on is not in "
                f"{state.repository}: `horcrux-cli push {volume}` first"
            )
        key = profiles.save(repository, state.image, version, found)
    if as_json:
        output.emit_json({"key": key, **_described(found, version)})
    else:
        click.echo(f"{state.image}@{output.short(version.hex())}: {_line(found)}")


@profile.command()
@click.argument("repo", type=REPO_OR_VOLUME, metavar="REPO|VOLUME")
@click.argument("version", required=False)
@output.json_option
def show(repo: str, version: str | None, as_json: bool) -> None:
    """Show the profile that a volume of VERSION would use.

    \b
    horcrux-cli profile show amcc
    horcrux-cli profile show /opt/horcrux-amcc AMCC@main
    """
    from ..chunkstore import open_store
    from ..repository import profiles
    from ..repository.repository import Repository

    place = where(repo)
    with open_store(place.url) as store:
        repository = Repository.open(store)
        resolved = find_version(repository, place, version)
        found = profiles.find(
            repository, resolved.commit.image, resolved.id, repository.read_commit
        )
    if found is None:
        raise NotFound(
            f"{resolved.commit.image}@{output.short(resolved.id.hex())} has no profile: "
            "`horcrux-cli profile record VOLUME` makes one"
        )
    of, profile = found
    if as_json:
        output.emit_json({**_described(profile, of), "chunks": list(profile.chunks)})
        return
    whose = f"{resolved.commit.image}@{output.short(of.hex())}"
    click.echo(f"{whose}: {_line(profile)}")
    runs = list(profiles.runs(profile.chunks))
    for first, count in runs[:SHOWN]:
        begin, stop = first * profile.chunk_size, (first + count) * profile.chunk_size
        click.echo(f"  {format_size(begin):>10} to {format_size(stop):>10}")
    if len(runs) > SHOWN:
        click.echo(f"  … and {len(runs) - SHOWN:,} more: --json lists all")


@profile.command()
@click.argument("repo", type=REPO_OR_VOLUME, metavar="REPO|VOLUME")
@click.argument("version", required=False)
def rm(repo: str, version: str | None) -> None:
    """Remove the profile of VERSION.

    \b
    horcrux-cli profile rm /opt/horcrux-amcc AMCC@main
    """
    from ..chunkstore import open_store
    from ..repository import profiles
    from ..repository.repository import Repository

    place = where(repo)
    with open_store(place.url) as store:
        repository = Repository.open(store)
        resolved = find_version(repository, place, version)
        image, short = resolved.commit.image, output.short(resolved.id.hex())
        if not profiles.remove(repository, image, resolved.id):
            raise NotFound(f"{image}@{short} has no profile of its own")
    click.echo(f"the profile of {image}@{short} is removed")


def _line(profile: Any) -> str:
    size = len(profile.chunks) * profile.chunk_size
    return f"{output.plural(len(profile.chunks), 'chunk')}, {format_size(size)}"


def _described(profile: Any, version: bytes) -> dict[str, Any]:
    return {
        "version": version.hex(),
        "chunk_size": profile.chunk_size,
        "count": len(profile.chunks),
    }

"""`pin`: versions that are whole on this host, for use without their repository."""

from __future__ import annotations

import click

from .. import config, files, paths
from ..errors import NotFound, UsageError
from ..units import format_size
from . import output
from .versions_place import TARGET_HELP, opened


@click.command(epilog=TARGET_HELP)
@click.argument("target", required=False)
@click.argument("ref", required=False)
@click.option("-d", "--delete", is_flag=True, help="Let go of it: the cache may evict it again.")
@output.quiet_option
@output.json_option
def pin(target: str | None, ref: str | None, delete: bool, quiet: bool, as_json: bool) -> None:
    """Bring all of a version to this host and keep it, for use offline; or list what is pinned.

    It lies in the cache, which evicts other things only. Broken off, run it again. With -d TARGET
    may also be the beginning of an id that the list shows.

    \b
    horcrux-cli pin amcc                 # the version that the volume lies on
    horcrux-cli pin AMCC@v3
    horcrux-cli pin
    """
    from .. import versions
    from ..progress import make_progress

    if target is None:
        if delete:
            raise UsageError("pin -d takes what is to be let go of: see `horcrux-cli pin`")
        _list(as_json)
        return
    if delete:
        _unpin(target, ref, as_json)
        return
    with opened(target, ref) as (place, asked):
        oid, commit = place.find(asked)
        local = place.session.local if place.session is not None else None
        with make_progress(quiet or as_json) as progress:
            done = versions.pin(place.repository, place.cache, oid, commit, local, progress)
    if as_json:
        output.emit_json({"id": oid.hex(), "bytes": done.bytes, "fetched_bytes": done.fetched})
    else:
        click.echo(
            f"{commit.image}@{output.short(oid)} is pinned: {format_size(done.bytes)}, of which "
            f"{format_size(done.fetched)} were fetched"
        )


def _unpin(target: str, ref: str | None, as_json: bool) -> None:
    from ..volume import pins

    folder = paths.cache()
    near = [one.commit for one in pins.load(folder) if one.commit.hex().startswith(target)]
    if ref is None and len(target) >= 4 and len(near) == 1:
        oid = near[0]
    else:
        with opened(target, ref) as (place, asked):
            oid = place.find(asked)[0]
    if not pins.remove(folder, oid):
        raise NotFound(f"{output.short(oid)} is not pinned: `horcrux-cli pin` lists what is")
    if as_json:
        output.emit_json({"id": oid.hex()})
    else:
        click.echo(f"{output.short(oid)} is let go of; `horcrux-cli cache trim` gives room back")


def _list(as_json: bool) -> None:
    from .. import versions
    from ..repository.commits import Commit
    from ..volume import pins
    from ..volume.cache import Cache

    rows = []
    if paths.cache().is_dir():
        files.make_folder(paths.cache(), 0o700)
        cache = Cache(paths.cache(), config.load().cache_size)
        try:
            for one in pins.load(cache.folder):
                plain = cache.read(one.commit)
                made = Commit.decode(plain) if plain is not None else None
                whole = all(cache.has(chunk) for chunk in one.chunks())
                rows.append(
                    {
                        "id": one.commit.hex(),
                        "image": made.image if made else None,
                        "message": made.message if made else None,
                        "bytes": versions.pinned_bytes(cache, one),
                        "whole": whole and made is not None,
                    }
                )
        finally:
            cache.close()
    if as_json:
        output.emit_json(rows)
        return
    output.table(
        ("ID", "IMAGE", "HERE", "WHOLE", "MESSAGE"),
        [
            (
                output.short(str(row["id"])),
                str(row["image"] or "?"),
                format_size(int(row["bytes"] or 0)),
                "yes" if row["whole"] else "no: pin it again",
                str(row["message"] or ""),
            )
            for row in rows
        ],
    )

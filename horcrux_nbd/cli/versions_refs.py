"""Branches and tags of an image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from .. import identity
from ..errors import NotFound, UsageError
from ..names import check_name
from ..repository.refs import suggest
from ..units import format_size
from . import output
from .versions_place import TARGET_HELP, Opened, opened

if TYPE_CHECKING:
    from ..repository.commits import Commit

EPILOG = TARGET_HELP


def _stored(place: Opened, ref: str | None, what: str) -> tuple[bytes, Commit]:
    """A version that the repository has. Raises UsageError for one that was never pushed."""
    oid, commit = place.find(ref)
    if oid in place.own():
        raise UsageError(
            f"{output.short(oid)} was never pushed, and a {what} is in the repository: "
            f"`horcrux-cli push {place.place.volume}` first"
        )
    return oid, commit


def _without_image(place: Opened, name: str) -> str:
    return name.removeprefix(f"{place.image}@")


@click.command(epilog=EPILOG)
@click.argument("target")
@click.argument("name", required=False)
@click.argument("ref", required=False)
@click.option("-d", "--delete", is_flag=True, help="Delete branch NAME.")
@click.option("-D", "force", is_flag=True, help="Delete it though versions are on no other.")
@output.json_option
def branch(
    target: str, name: str | None, ref: str | None, delete: bool, force: bool, as_json: bool
) -> None:
    """List the branches of TARGET's image, make one at REF, or delete one.

    \b
    horcrux-cli branch AMCC
    horcrux-cli branch AMCC prices main~2
    horcrux-cli branch AMCC -d prices
    """
    from .. import versions

    with opened(target, ref) as (place, asked):
        if name is None:
            _list_branches(place, as_json)
            return
        name = _without_image(place, check_name("branch", _without_image(place, name)))
        author = identity.author()
        if delete or force:
            if asked is not None:
                raise UsageError("branch -d takes a branch's name and no REF")
            record = versions.delete_branch(
                place.repository, place.cache, place.image, name, author=author, force=force
            )
            said = f"branch {name} of {place.image} is deleted"
        else:
            oid, _ = _stored(place, asked, "branch")
            record = versions.make_branch(place.repository, place.image, name, oid, author=author)
            said = f"branch {name} of {place.image} is at {output.short(oid)}"
    if as_json:
        output.emit_json({"branch": name, "id": record.commit.hex() if record.commit else None})
    else:
        click.echo(said)


def _list_branches(place: Opened, as_json: bool) -> None:
    place.repository.refs.require_image(place.image)
    here = place.session.state if place.session is not None else None
    rows: list[dict[str, Any]] = []
    for name, record in sorted(place.repository.refs.heads(place.image).items()):
        assert record.commit is not None
        rows.append(
            {
                "branch": name,
                "id": record.commit.hex(),
                "author": record.author,
                "time": record.time,
                "why": record.why,
                "followed": here is not None and here.ref == name,
            }
        )
    if as_json:
        output.emit_json(rows)
        return
    output.table(
        ("", "BRANCH", "ID", "MOVED", "BY", "WHY"),
        [
            (
                "*" if row["followed"] else "",
                row["branch"],
                output.short(row["id"]),
                output.when(row["time"]),
                row["author"],
                row["why"],
            )
            for row in rows
        ],
    )
    if here is not None:
        for name, line in sorted(here.heads.items()):
            click.echo(f"{name}: this volume has {output.short(line.tip)} on it, never pushed")


@click.command(epilog=EPILOG)
@click.argument("target")
@click.argument("name", required=False)
@click.argument("ref", required=False)
@click.option("-m", "--message", default="", help="What it is, for people.")
@click.option("-d", "--delete", is_flag=True, help="Delete tag NAME.")
@output.json_option
def tag(
    target: str, name: str | None, ref: str | None, message: str, delete: bool, as_json: bool
) -> None:
    """List the tags of TARGET's image, name a version with one for good, or delete one.

    \b
    horcrux-cli tag AMCC
    horcrux-cli tag AMCC v3 main~2 -m "before the migration"
    horcrux-cli tag AMCC -d v3
    """
    with opened(target, ref) as (place, asked):
        refs, image = place.repository.refs, place.image
        if name is None:
            _list_tags(place, as_json)
            return
        name = check_name("tag", _without_image(place, name))
        if delete:
            if asked is not None:
                raise UsageError("tag -d takes a tag's name and no REF")
            refs.delete_tag(image, name)
            oid, said = None, f"tag {name} of {image} is deleted"
        else:
            head = refs.head(image, name)
            if head is not None and head.commit is not None:
                raise UsageError(f"{image} has a branch {name!r}: choose another name for the tag")
            oid, _ = _stored(place, asked, "tag")
            refs.make_tag(image, name, oid, author=identity.author(), message=message)
            said = f"tag {name} of {image} is {output.short(oid)}"
    if as_json:
        output.emit_json({"tag": name, "id": oid.hex() if oid else None})
    else:
        click.echo(said)


def _list_tags(place: Opened, as_json: bool) -> None:
    place.repository.refs.require_image(place.image)
    rows = []
    for name in sorted(place.repository.refs.tags(place.image)):
        record = place.repository.refs.tag(place.image, name)
        if record is not None:
            rows.append((name, record))
    if as_json:
        output.emit_json(
            [
                {
                    "tag": name,
                    "id": record.commit.hex(),
                    "author": record.author,
                    "time": record.time,
                    "message": record.message,
                }
                for name, record in rows
            ]
        )
        return
    output.table(
        ("TAG", "ID", "MADE", "BY", "MESSAGE"),
        [
            (name, output.short(one.commit), output.when(one.time), one.author, one.message)
            for name, one in rows
        ],
    )


@click.command(epilog=EPILOG)
@click.argument("target")
@click.argument("branch", required=False)
@click.option("-n", "--limit", default=50, show_default=True, help="At most so many lines.")
@click.option("--expire", is_flag=True, help="Let go of versions kept aside on this host.")
@output.json_option
def reflog(target: str, branch: str | None, limit: int, expire: bool, as_json: bool) -> None:
    """Show where a VOLUME was, or how BRANCH of an image moved, newest first.

    \b
    horcrux-cli reflog amcc
    horcrux-cli reflog AMCC main
    horcrux-cli reflog amcc --expire
    """
    from .. import versions
    from ..versions import reflog as logs

    if expire:
        count, size = versions.expire(target)
        click.echo(f"{target}: {output.plural(count, 'version')} let go, {format_size(size)} freed")
        return
    with opened(target, branch) as (place, asked):
        if place.session is not None and asked is None:
            moves = logs.read(place.session.folder)[:limit]
            rows = [(m.after, m.time, "", f"{m.action}: {m.message}".strip(": ")) for m in moves]
        else:
            name = asked or place.place.ref or "main"
            keys = place.repository.refs.record_keys(place.image, name)
            if not keys:
                known = place.repository.refs.branches(place.image)
                raise NotFound(f"{place.image} has no branch {name!r}{suggest(name, known)}")
            records = [place.repository.refs.read_record(key) for key in keys[:limit]]
            rows = [(r.commit.hex() if r.commit else "", r.time, r.author, r.why) for r in records]
    if as_json:
        output.emit_json(
            [{"id": i or None, "time": t, "author": a or None, "why": w} for i, t, a, w in rows]
        )
        return
    output.table(
        ("ID", "TIME", "BY", "WHAT"),
        [(output.short(i) or "(deleted)", output.when(t), a, w) for i, t, a, w in rows],
    )

"""What versions there are: log and show."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from ..errors import HorcruxError
from ..names import is_name
from ..units import format_size
from . import output
from .repositories import describe
from .versions_place import TARGET_HELP, Opened, opened

if TYPE_CHECKING:
    from ..repository.commits import Commit

MOST = 10_000  # versions that a graph looks at


@click.command(epilog=TARGET_HELP)
@click.argument("target")
@click.argument("ref", required=False)
@click.option("-n", "--limit", default=50, show_default=True, help="At most so many versions.")
@click.option("--graph", is_flag=True, help="All branches, with lines between versions.")
@output.json_option
def log(target: str, ref: str | None, limit: int, graph: bool, as_json: bool) -> None:
    """List a version and those before it, newest first: who, when, what, and how much was new.

    Of a VOLUME: what it lies on, its own versions that were never pushed first.

    \b
    horcrux-cli log AMCC
    horcrux-cli log AMCC --graph
    horcrux-cli log amcc v3
    """
    with opened(target, ref) as (place, asked):
        names, problem = _names(place)
        own = place.own()
        if graph:
            rows, pictures = _graph(place, asked, names, limit)
        else:
            oid, _ = place.find(asked)
            branch = asked or place.place.ref or (None if place.session else "main")
            line = place.commits.line(oid, branch if branch and is_name(branch) else None)
            rows = list(itertools.islice(line, limit + 1))
            pictures = {}
        more, rows = len(rows) > limit, rows[:limit]
    if as_json:
        output.emit_json(
            [
                {
                    "id": oid.hex(),
                    "refs": names.get(oid, []),
                    "pushed": oid not in own,
                    **describe(commit),
                    "new": commit.new or None,
                }
                for oid, commit in rows
            ]
        )
        return
    if problem:
        click.echo(f"branches and tags are not shown: {problem}", err=True)
    if graph:
        _draw(rows, pictures, names, own)
    else:
        output.table(
            ("ID", "REFS", "NEW", "TIME", "BY", "MESSAGE"),
            [
                (
                    output.short(oid),
                    ", ".join([*names.get(oid, []), *(["not pushed"] if oid in own else [])]),
                    new_bytes(commit),
                    output.when(commit.time),
                    commit.author,
                    with_tags(commit),
                )
                for oid, commit in rows
            ],
            right=("NEW",),
        )
    if more:
        click.echo(f"… and older ones: see more with -n {limit * 10}")


def new_bytes(commit: Commit) -> str:
    """What its writer stored for it, for people; empty where that is not known."""
    return format_size(commit.new["bytes"]) if "bytes" in commit.new else ""


def with_tags(commit: Commit) -> str:
    """The message, and the notes beside it."""
    notes = " ".join(f"{key}={value}" for key, value in sorted(commit.tags.items()))
    return f"{commit.message}  [{notes}]" if notes else commit.message


def _names(place: Opened) -> tuple[dict[bytes, list[str]], str]:
    """The branches and tags of each version, HEAD of a volume first; and why there are none."""
    names: dict[bytes, list[str]] = {}
    if place.session is not None:
        names.setdefault(place.session.base, []).append("HEAD")
        for name, line in sorted(place.session.state.heads.items()):
            names.setdefault(bytes.fromhex(line.tip), []).append(name)
    prefix = "origin/" if place.session is not None else ""
    refs = place.repository.refs
    try:
        for name, record in sorted(refs.heads(place.image).items()):
            if record.commit:
                names.setdefault(record.commit, []).append(prefix + name)
        for name in sorted(refs.tags(place.image)):
            tag = refs.tag(place.image, name)
            if tag is not None:
                names.setdefault(tag.commit, []).append(name)
    except HorcruxError as error:
        if place.session is None:
            raise
        return names, str(error)
    return names, ""


def _graph(
    place: Opened, ref: str | None, names: dict[bytes, list[str]], limit: int
) -> tuple[list[tuple[bytes, Commit]], dict[bytes, list[str]]]:
    """The versions in order, and the lines of the picture: those above each, and its own."""
    from ..versions.graph import draw
    from ..versions.history import in_order

    tips = [place.find(ref)[0]] if ref is not None else list(names) or [place.find(None)[0]]
    rows = in_order(place.commits, tips, MOST)
    known = {oid for oid, _ in rows}
    lines: dict[bytes, list[str]] = {}
    pending: list[str] = []
    versions = ((oid, [p for p in commit.parents if p in known]) for oid, commit in rows)
    drawn = 0
    for oid, picture in draw(versions):
        pending.append(picture)
        if oid is not None:
            lines[oid], pending = pending, []
            drawn += 1
            if drawn > limit:
                break
    return rows[: limit + 1], lines


def _draw(
    rows: Iterable[tuple[bytes, Commit]],
    pictures: dict[bytes, list[str]],
    names: dict[bytes, list[str]],
    own: dict[bytes, Commit],
) -> None:
    for oid, commit in rows:
        *above, mine = pictures[oid]
        for line in above:
            click.echo(line)
        refs = [*names.get(oid, []), *(["not pushed"] if oid in own else [])]
        words = [output.short(oid), f"({', '.join(refs)})" if refs else "", with_tags(commit)]
        words += [f"- {commit.author},", output.when(commit.time), new_bytes(commit)]
        click.echo(f"{mine}  {output.printable(' '.join(word for word in words if word))}")


@click.command(epilog=TARGET_HELP)
@click.argument("target")
@click.argument("ref", required=False)
@click.option("--data", is_flag=True, help="Also how much of it is data: reads the whole index.")
@click.option(
    "--only", is_flag=True, help="Also what no other version needs: reads the index of all."
)
@output.json_option
def show(target: str, ref: str | None, data: bool, only: bool, as_json: bool) -> None:
    """Show one version: who made it, when, of what, how large it is, what it changed.

    \b
    horcrux-cli show AMCC main~1
    horcrux-cli show amcc --only
    """
    from ..versions.history import only_in

    with opened(target, ref) as (place, asked):
        oid, commit = place.find(asked)
        names, _ = _names(place)
        own = place.own()
        value: dict[str, Any] = {
            "id": oid.hex(),
            "image": commit.image,
            "refs": names.get(oid, []),
            "pushed": oid not in own,
            **describe(commit),
            "new": commit.new or None,
        }
        if data:
            chunks = sum(1 for _ in _index(place, commit).entries())
            value |= {"data_chunks": chunks, "data_bytes": chunks * commit.chunk_size}
        if only:
            others = _all_versions(place)
            count, size = only_in(place.repository, oid, others)
            value |= {"only_objects": count, "only_bytes": size}
    if as_json:
        output.emit_json({"url": place.repository.url, **value})
        return
    pairs = [
        ("version", f"{commit.image}@{oid.hex()}"),
        ("refs", ", ".join(value["refs"]) or "none"),
        ("in", place.repository.url if value["pushed"] else "this host only: never pushed"),
        ("by", commit.author),
        ("time", output.when(commit.time)),
        ("message", commit.message),
        ("parents", " ".join(output.short(parent) for parent in commit.parents) or "none"),
        ("size", f"{format_size(commit.size)} ({commit.size:,} bytes)"),
        ("file system", commit.filesystem or "none known"),
        ("chunk size", format_size(commit.chunk_size)),
    ]
    pairs += [(f"note {key}", text) for key, text in sorted(commit.tags.items())]
    if commit.new:
        changed = commit.new.get("changed", 0)
        pairs.append(("new", f"{new_bytes(commit)} stored for {format_size(changed)} changed"))
    if data:
        shown = format_size(value["data_bytes"])
        in_chunks = output.plural(value["data_chunks"], "chunk")
        pairs.append(("data", f"{shown} in {in_chunks}; the rest is zeros"))
    if only:
        in_objects = output.plural(value["only_objects"], "object")
        pairs.append(("only here", f"{format_size(value['only_bytes'])} in {in_objects}"))
    output.facts(pairs)


def _index(place: Opened, commit: Commit) -> Any:
    if place.session is not None:
        from ..volume.local import remote_node

        return place.session.local.index(commit, remote_node(place.repository))
    return place.repository.index(commit)


def _all_versions(place: Opened) -> dict[bytes, Commit]:
    """Every version of every image in the repository: images share what is the same."""
    from ..versions.history import in_order

    refs = place.repository.refs
    tips: list[bytes] = []
    for image in refs.images():
        tips += [record.commit for record in refs.heads(image).values() if record.commit]
        tips += [tag.commit for name in refs.tags(image) if (tag := refs.tag(image, name))]
    return dict(in_order(place.commits, tips, 1_000_000))

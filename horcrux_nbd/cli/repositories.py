"""What repositories hold: `ls`, and `verify`, which proves it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import click

from .. import config
from ..errors import Damaged, HorcruxError, UsageError
from ..names import Version, parse_version
from ..units import format_size
from . import output
from .words import REPO, REPO_OR_VOLUME, volume_state, where

if TYPE_CHECKING:
    from ..repository.commits import Commit
    from ..repository.repository import Repository
    from ..repository.verify import Report

LOOKING = 8  # refs read at once: a store 20 ms away answers for 100 images in half a second


@dataclass(frozen=True)
class Row:
    """One branch or tag. `commit` is None where `problem` says why it cannot be read."""

    image: str
    ref: str
    kind: str  # "branch" or "tag"
    id: bytes
    commit: Commit | None
    problem: str = ""

    def to_json(self) -> dict[str, Any]:
        value = {"image": self.image, "ref": self.ref, "kind": self.kind, "id": self.id.hex()}
        described = describe(self.commit) if self.commit else {}
        return {**value, **described, "problem": self.problem or None}


def describe(commit: Commit) -> dict[str, Any]:
    """A commit as JSON."""
    return {
        "size": commit.size,
        "chunk_size": commit.chunk_size,
        "filesystem": commit.filesystem,
        "author": commit.author,
        "time": commit.time,
        "message": commit.message,
        "notes": dict(commit.tags),
        "parents": [parent.hex() for parent in commit.parents],
    }


# ---- ls -----------------------------------------------------------------------------------------


@click.command()
@click.argument("repo", required=False, type=REPO_OR_VOLUME)
@click.option("--stored", is_flag=True, help="Also what the repository takes: lists all objects.")
@output.json_option
def ls(repo: str | None, stored: bool, as_json: bool) -> None:
    """List the images in REPO, their branches, tags and sizes.

    Without REPO: in every remote, and in every repository that a volume of this host is of. A
    VOLUME's name stands for its repository.

    \b
    horcrux-cli ls cp:///opt/horcrux-amcc
    horcrux-cli ls team --stored
    """
    found: list[dict[str, Any]] = []
    failed: HorcruxError | None = None
    urls = [(where(repo).url, repo)] if repo else _known_repositories()
    if not urls and not as_json:
        raise UsageError(
            "say which repository, as in `horcrux-cli ls cp:///opt/horcrux-amcc`: there is no "
            "remote and no volume here yet"
        )
    for at, (url, name) in enumerate(urls):
        if len(urls) > 1 and not as_json:
            click.echo(f"{'' if at == 0 else chr(10)}{url}{f'  ({name})' if name else ''}")
        try:
            found.append(_list_one(url, stored, as_json))
        except HorcruxError as error:
            if repo:
                raise
            failed = error
            found.append({"url": url, "problem": str(error)})
            if not as_json:
                click.echo(f"  {error}")
        else:
            problems = [row["problem"] for row in found[-1]["versions"] if row["problem"]]
            failed = Damaged(problems[0]) if problems else failed
    if as_json:
        output.emit_json(found)
    if failed is not None:
        raise failed


def _known_repositories() -> list[tuple[str, str]]:
    """(URL, remote's name or nothing) of what this host knows, each once."""
    from .. import host

    found = {url: name for name, url in sorted(config.load().remotes.items())}
    for volume in host.names():
        state = volume_state(volume)
        if state is not None:
            found.setdefault(state.repository, "")
    return list(found.items())


def _list_one(url: str, stored: bool, as_json: bool) -> dict[str, Any]:
    from ..chunkstore import open_store
    from ..repository.repository import Repository

    with open_store(url) as store:
        repository = Repository.open(store)
        rows = list(rows_of(repository))
        value: dict[str, Any] = {
            "url": store.url,
            "id": repository.id,
            "chunk_size": repository.chunk_size,
            "versions": [row.to_json() for row in rows],
            "problem": None,
        }
        if stored:
            sizes = [entry.size for entry in store.list("objects/")]
            value |= {"stored_bytes": sum(sizes), "stored_objects": len(sizes)}
    if as_json:
        return value
    if rows:
        output.table(
            ("VERSION", "ID", "SIZE", "CHANGED", "BY", "MESSAGE"),
            [_cells(row) for row in rows],
            right=("SIZE",),
        )
    else:
        click.echo(f"{url} has no image yet")
    if stored:
        click.echo(
            f"stored: {format_size(value['stored_bytes'])} in "
            f"{output.plural(value['stored_objects'], 'object')}"
        )
    return value


def _cells(row: Row) -> tuple[str, ...]:
    name = str(Version(row.image, row.ref))
    if row.commit is None:
        return name, output.short(row.id), "", "", "", row.problem
    size, time = format_size(row.commit.size), output.when(row.commit.time)
    return name, output.short(row.id), size, time, output.who(row.commit.author), row.commit.message


def rows_of(repository: Repository) -> Iterator[Row]:
    """Every branch and tag of every image, in order. Damage is told in its row."""
    refs = repository.refs

    def read(image: str) -> list[Row]:
        found = [(n, "branch", r.commit) for n, r in sorted(refs.heads(image).items()) if r.commit]
        for name in sorted(refs.tags(image)):
            tag = refs.tag(image, name)
            if tag is not None:
                found.append((name, "tag", tag.commit))
        return [_row(repository, image, *one) for one in found]

    with ThreadPoolExecutor(LOOKING) as pool:
        for rows in pool.map(read, sorted(refs.images())):
            yield from rows


def _row(repository: Repository, image: str, ref: str, kind: str, oid: bytes) -> Row:
    try:
        return Row(image, ref, kind, oid, repository.read_commit(oid))
    except Damaged as error:
        return Row(image, ref, kind, oid, None, str(error))


# ---- verify -------------------------------------------------------------------------------------


@click.command()
@click.argument("repo", type=REPO)
@click.argument("version", required=False)
@click.option("--data", is_flag=True, help="Read and prove every object, not the structure only.")
@output.quiet_option
@output.json_option
def verify(repo: str, version: str | None, data: bool, quiet: bool, as_json: bool) -> None:
    """Prove that a repository holds what its versions need. Changes nothing.

    Refs, commits, index and patches are read, and every chunk must be there with a size that can
    be; with --data each is read and its content compared with its id. VERSION is IMAGE for one
    image, or IMAGE@REF for one version. Exit code 4: something is missing or damaged; each is named
    with the versions that need it.

    \b
    horcrux-cli verify /opt/horcrux-amcc
    horcrux-cli verify --data scp://me@nas:/srv/images AMCC@main
    """
    from ..chunkstore import open_store
    from ..progress import make_progress
    from ..repository.verify import verify as run

    asked = parse_version(version) if version else None
    image = asked.image if asked and version and "@" not in version else None
    url = config.load().url(repo)
    with open_store(url) as store, make_progress(quiet) as progress:
        report = run(
            store,
            image=image,
            version=None if image else asked,
            data=data,
            progress=progress,
        )
    if as_json:
        output.emit_json({"url": url, "data": data, "ok": report.ok, **asdict(report)})
    else:
        show_problems(report)
        click.echo(
            f"{output.plural(report.versions, 'version')} of "
            f"{output.plural(report.images, 'image')}: {output.plural(report.chunks, 'chunk')}, "
            f"{report.patches:,} patches, {output.plural(report.nodes, 'index node')}, "
            f"{format_size(report.bytes)} stored; "
            + (
                f"{output.plural(report.read_objects, 'object')} read"
                if data
                else "structure only (--data reads all)"
            )
        )
        if report.unreferenced:
            click.echo(
                f"{output.plural(report.unreferenced, 'object')} "
                f"({format_size(report.unreferenced_bytes)}) belong to no version, as an "
                "interrupted run leaves them: harmless"
            )
        for key in report.strays:
            click.echo(f"{output.printable(key)}: no object of Horcrux's, left alone")
    if not report.ok:
        count = len(report.problems) + report.more_problems
        raise Damaged(
            f"{url} has {output.plural(count, 'problem')}: `horcrux-cli repair` mends them from a "
            "copy of the repository; or make the versions again"
        )
    if not as_json:
        click.echo("no problem found")


def show_problems(report: Report) -> None:
    """What is missing or damaged, and the versions that need it."""
    for problem in report.problems:
        click.echo(f"{problem.key}: {output.printable(problem.what)}")
        if problem.affects:
            more = f" and {problem.more} more" if problem.more else ""
            click.echo(f"  needed by {', '.join(problem.affects)}{more}")
    if report.more_problems:
        click.echo(f"… and {output.plural(report.more_problems, 'more problem')}")

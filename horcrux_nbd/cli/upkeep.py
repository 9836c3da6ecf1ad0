"""What keeps repositories in order: gc, copies and repair."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from .. import config
from ..errors import Busy, Damaged, KeyRequired, UsageError
from ..identity import author
from ..progress import make_progress
from ..units import format_size
from . import output
from .words import REPO

if TYPE_CHECKING:
    from ..repository.removal import Collected, Plan
    from ..repository.repair import Source
    from ..repository.repository import Repository
    from ..repository.verify import Report
    from ..volume.cache import Cache

_COUNT = click.IntRange(min=1)


def _local_versions(repository: Repository) -> dict[bytes, str]:
    """Versions that volumes of this host lie on, were made from, or may come back to."""
    from .. import host

    found: dict[bytes, str] = {}
    for name in host.names():
        state = host.load(name)
        if state.repository_id != repository.id:
            continue
        for line in state.lines:
            for oid in (line.tip, line.upstream):
                if oid is not None:
                    found.setdefault(bytes.fromhex(oid), f"volume {name}")
    return found


@click.command()
@click.argument("repo", type=REPO)
@click.option("-n", "--dry-run", is_flag=True, help="Say what would go and stay; change nothing.")
@click.option("--keep-last", type=_COUNT, help="Keep the newest N versions of each branch.")
@click.option("--keep-daily", type=_COUNT, help="Keep the newest of each of the last N days.")
@click.option("--keep-weekly", type=_COUNT, help="Keep the newest of each of the last N weeks.")
@click.option(
    "--keep-tags/--drop-tags",
    default=True,
    show_default=True,
    help="Keep tagged versions, or drop tags whose version no other rule keeps.",
)
@click.option("--image", help="Apply the rules to this image only.")
@click.option(
    "--no-grace",
    is_flag=True,
    help="Remove at once. Only while nobody pushes or generates: what they rely on may go.",
)
@click.option("--withdraw", is_flag=True, help="Take back a removal that was announced.")
@output.quiet_option
@output.json_option
def gc(
    repo: str,
    dry_run: bool,
    keep_last: int | None,
    keep_daily: int | None,
    keep_weekly: int | None,
    keep_tags: bool,
    image: str | None,
    no_grace: bool,
    withdraw: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Drop old versions by rules, and remove what no version needs.

    Objects go a day after a run has announced it: a later run removes them, so that nobody who
    pushes meanwhile loses anything. Run it every night. From an hour before the removal begins to
    its end, pushes are refused. Without a --keep option no version is dropped. Heads of branches,
    and versions that volumes of this host lie on, always stay.

    \b
    horcrux-cli gc --dry-run --keep-last 10 --keep-daily 7 /opt/horcrux-amcc
    horcrux-cli gc --keep-last 10 --keep-daily 7 team
    """
    from ..chunkstore import open_store
    from ..repository.removal import Collector
    from ..repository.repository import Repository
    from ..repository.retention import Rules

    rules = Rules(keep_last, keep_daily, keep_weekly, keep_tags)
    if not rules.any and (not keep_tags or image is not None):
        raise UsageError("--drop-tags and --image need a rule: give --keep-last N, for example")
    if dry_run and (no_grace or withdraw):
        raise UsageError("--dry-run goes with neither --no-grace nor --withdraw")
    url = config.load().url(repo)
    with open_store(url) as store, make_progress(quiet) as progress:
        repository = Repository.open(store)
        collector = Collector(
            repository,
            pinned=_local_versions(repository),
            author=author(),
            progress=progress,
        )
        if withdraw:
            count = collector.withdraw()
            done = None
        elif dry_run:
            plan = collector.plan(rules, image, versions=True)
            done = None
        else:
            done = collector.run(rules, image, grace=not no_grace)
            plan = done.plan
    if withdraw:
        if as_json:
            output.emit_json({"url": url, "withdrawn": count})
        else:
            click.echo(f"{output.plural(count, 'removal')} taken back")
    elif as_json:
        output.emit_json({"url": url, **_to_json(plan, done)})
    else:
        _show(plan, done)


def _to_json(plan: Plan, done: Collected | None) -> dict[str, Any]:
    choice = plan.choice
    value: dict[str, Any] = {
        "dry_run": done is None,
        "objects": plan.objects,
        "bytes": plan.size,
        "unreachable_objects": len(plan.unreachable),
        "unreachable_bytes": plan.unreachable_size,
        "dropped": [oid.hex() for oid in choice.dropped],
        "versions": [
            {
                "id": oid.hex(),
                "image": version.commit.image,
                "time": version.commit.time,
                "message": version.commit.message,
                "stays": oid not in choice.dropped,
                "because": version.kept,
                "only_objects": version.only_objects,
                "only_bytes": version.only_bytes,
            }
            for oid, version in plan.versions.items()
        ],
    }
    if done is not None:
        begins = done.announced.begins if done.announced else None
        value |= {
            "removed_objects": done.removed_objects,
            "removed_bytes": done.removed_bytes,
            "removal_begins": begins and datetime.fromtimestamp(begins, UTC).isoformat(),
        }
    return value


def _show(plan: Plan, done: Collected | None) -> None:
    if done is None:
        output.table(
            ("VERSION", "TIME", "ONLY ITS OWN", "STAYS", "MESSAGE"),
            [
                (
                    f"{version.commit.image}@{output.short(oid)}",
                    output.when(version.commit.time),
                    format_size(version.only_bytes),
                    "no"
                    if oid in plan.choice.dropped
                    else ", ".join(dict.fromkeys(version.kept)) or "yes",
                    version.commit.message,
                )
                for oid, version in plan.versions.items()
            ],
            right=("ONLY ITS OWN",),
        )
    dropped = output.plural(len(plan.choice.dropped), "version")
    garbage = (
        f"{output.plural(len(plan.unreachable), 'object')} ({format_size(plan.unreachable_size)})"
    )
    of = f"of {output.plural(plan.objects, 'object')} ({format_size(plan.size)})"
    if done is None:
        click.echo(f"would drop {dropped}, and then remove {garbage} {of}")
        return
    if plan.choice.dropped:
        click.echo(f"dropped {dropped}")
    if done.removed_objects:
        click.echo(
            f"removed {output.plural(done.removed_objects, 'object')} "
            f"({format_size(done.removed_bytes)})"
        )
    if done.announced is not None:
        begins = datetime.fromtimestamp(done.announced.begins).astimezone()
        click.echo(
            f"{garbage} {of} belong to no version: a removal begins at "
            f"{begins:%Y-%m-%d %H:%M}; run this again then"
        )
    elif not done.removed_objects:
        click.echo(f"nothing to remove {of}")


# ---- copies -------------------------------------------------------------------------------------


def _copy(
    source: str, destination: str, versions: tuple[str, ...], quiet: bool, as_json: bool
) -> None:
    from ..chunkstore import open_store
    from ..names import check_name, parse_version
    from ..repository.copy import copy
    from ..repository.repository import Repository

    settings = config.load()
    wanted = [parse_version(v) if "@" in v else check_name("image", v) for v in versions]
    urls = settings.url(source), settings.url(destination)
    if urls[0] == urls[1]:
        raise UsageError(f"{urls[0]} is both: name two places")
    with open_store(urls[0]) as first, make_progress(quiet) as progress:
        repository = Repository.open(first)  # before anything is made at the other end
        with open_store(urls[1], create=True) as second:
            done = copy(repository, second, wanted, author=author(), progress=progress)
    if as_json:
        output.emit_json({"source": urls[0], "destination": urls[1], **asdict(done)})
    else:
        click.echo(
            f"{output.plural(done.versions, 'new version')}: "
            f"{output.plural(done.objects, 'object')} ({format_size(done.bytes)}) and "
            f"{output.plural(done.refs, 'ref')} copied to {urls[1]}"
        )
    if done.conflicts:
        more = f", and {len(done.conflicts) - 1} more" if len(done.conflicts) > 1 else ""
        raise Busy(
            f"{done.conflicts[0]}{more}: left alone there, all else was copied; push those "
            "versions to the source on a branch of their own, or choose an empty place"
        )


_SRC = click.argument("source", metavar="SRC", type=REPO)
_DST = click.argument("destination", metavar="DST", type=REPO)
_SOME = click.argument("versions", metavar="[VERSION]...", nargs=-1)


@click.command()
@_SRC
@_DST
@_SOME
@output.quiet_option
@output.json_option
def clone(
    source: str, destination: str, versions: tuple[str, ...], quiet: bool, as_json: bool
) -> None:
    """Copy a repository, or some images or versions of it, to another place.

    IMAGE stands for all versions of an image, IMAGE@REF for one version without those before it.
    The copy is the same repository: it can serve as a mirror. Broken off, it goes on where it was.

    \b
    horcrux-cli clone cp:///opt/horcrux-amcc 's3://bucket/amcc?region=eu-west-1'
    horcrux-cli clone team ./here AMCC@v3
    """
    _copy(source, destination, versions, quiet, as_json)


@click.command()
@_SRC
@_DST
@_SOME
@output.quiet_option
@output.json_option
def sync(
    source: str, destination: str, versions: tuple[str, ...], quiet: bool, as_json: bool
) -> None:
    """Bring to a copy of a repository what it lacks.

    Nothing is taken away in DST. A branch that was pushed to in both is left alone, and told (exit
    code 5). It is the same as clone, which may be said again as well.

    \b
    horcrux-cli sync team cp:///mnt/backup/amcc
    """
    _copy(source, destination, versions, quiet, as_json)


# ---- repair -------------------------------------------------------------------------------------


@click.command()
@click.argument("repo", type=REPO)
@click.option(
    "--from", "mirrors", multiple=True, type=REPO, help="A copy of it. May be given several times."
)
@output.quiet_option
@output.json_option
def repair(repo: str, mirrors: tuple[str, ...], quiet: bool, as_json: bool) -> None:
    """Write anew what is missing or damaged in a repository, from where it is sound.

    Looked for in the copies given with --from, in the mirrors of the remote, and on this host: in
    its cache and in what its volumes have of their own. Every object is read, before and after.
    Nothing is deleted. Exit code 4: something could not be mended; it is listed with the versions
    that need it.

    \b
    horcrux-cli repair /opt/horcrux-amcc --from s3://bucket/amcc
    """
    from ..chunkstore import open_store
    from ..repository.repair import quiet as tolerant
    from ..repository.repair import repair as run
    from .repositories import show_problems

    settings = config.load()
    url = settings.url(repo)
    others = dict.fromkeys([*map(settings.url, mirrors), *settings.mirrors_of(url)])
    others.pop(url, None)
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(make_progress(quiet))
        store = stack.enter_context(open_store(url))
        copies = [stack.enter_context(open_store(other)) for other in others]
        sources = [tolerant(source) for source in _local_objects(stack)]
        done = run(store, copies, sources, progress=progress)
    left = done.left
    if as_json:
        output.emit_json({"url": url, "ok": left.ok, "mended": done.mended, **_left(left)})
    else:
        show_problems(left)
        click.echo(f"{output.plural(len(done.mended), 'object or ref')} mended in {url}")
    if not left.ok:
        count = len(left.problems) + left.more_problems
        raise Damaged(
            f"{url}: {output.plural(count, 'problem')} could not be mended: name another copy with "
            "--from, or make the versions again"
        )


def _left(report: Report) -> dict[str, Any]:
    return {
        "problems": [asdict(problem) for problem in report.problems],
        "more_problems": report.more_problems,
    }


def _local_objects(stack: contextlib.ExitStack) -> Iterator[Source]:
    """What this host has of any repository: ids prove that it fits."""
    from .. import files, host, paths
    from ..repository.commits import MAX_CHUNK
    from ..repository.objects import kind_of
    from ..repository.repository import Repository
    from ..volume.cache import Cache
    from ..volume.local import open_objects

    if paths.cache().is_dir():
        files.make_folder(paths.cache(), 0o700)
        cache = Cache(paths.cache(), config.load().cache_size)
        stack.callback(cache.close)
        yield cache.read
        yield partial(_chunk_of, cache)
    for name in host.names():
        objects = stack.enter_context(open_objects(host.folder_of(name)))
        try:
            form = host.load(name).form
        except KeyRequired:
            continue
        own = Repository(objects, "", MAX_CHUNK, form)

        def read(oid: bytes, own: Repository = own) -> bytes | None:
            kind = kind_of(oid)
            return own.read_object(oid, (kind,), MAX_CHUNK)[1] if kind else None

        yield read


def _chunk_of(cache: Cache, oid: bytes) -> bytes | None:
    found = cache.open(oid)
    return None if found is None else cache.content(oid, found.length)

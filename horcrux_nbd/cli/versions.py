"""Versions of volumes: commit, push, fetch, pull."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from .. import config, identity
from ..errors import HorcruxError, UsageError
from ..units import format_size
from . import output
from .words import REPO, VOLUME

if TYPE_CHECKING:
    from ..versions import Committed, Fetched, Moved, Pushed

remount_option = click.option(
    "--remount", is_flag=True, help="Unmount it, and mount it again afterwards."
)


def change_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--discard` and `--stash`, for what drops changes."""
    for name, text in (
        ("--stash", "Put changes that are in no version aside (horcrux-cli stash)."),
        ("--discard", "Drop changes that are in no version."),
    ):
        command = click.option(name, is_flag=True, help=text)(command)
    return command


def changes(discard: bool, stash: bool) -> Any:
    """What the two options say."""
    from ..versions import Changes

    if discard and stash:
        raise UsageError("--discard and --stash exclude each other")
    return Changes.DISCARD if discard else Changes.STASH if stash else Changes.REFUSE


def tags_of(values: tuple[str, ...]) -> dict[str, str]:
    """`KEY=VALUE` words."""
    tags = {}
    for value in values:
        key, equals, text = value.partition("=")
        if not equals or not key:
            raise UsageError(f"{value!r} is no tag: write KEY=VALUE, as in -t ticket=4711")
        tags[key] = text
    return tags


def _hook(command: str | None, when: str) -> Callable[[], None] | None:
    if command is None:
        return None

    def run() -> None:
        # Its output is for people, and ours may be JSON.
        status = subprocess.run(command, shell=True, stdout=2, check=False).returncode
        if status:
            raise HorcruxError(f"the command {when} the freeze failed (exit status {status})")

    return run


def _steps(*steps: Callable[[], None] | None) -> Callable[[], None]:
    """One after the other, as far as they are there."""

    def run() -> None:
        for step in steps:
            if step is not None:
                step()

    return run


def _pausing(
    volumes: tuple[str, ...], stack: contextlib.ExitStack
) -> tuple[Callable[[], None], Callable[[], None]]:
    """What pauses the containers that use the volumes, and what lets them go on, as does the end of
    `stack`.
    """
    from .. import host
    from ..containers import Containers, Entry

    docker = Containers()

    def wanted(mount: Entry) -> bool:
        source = str(mount.get("Source", ""))
        return mount.get("Name") in volumes or any(
            source == target or source.startswith(f"{target}/") for target in targets
        )

    targets = [one.target for name in volumes for one in host.mounts(name)]
    containers = docker.using(wanted)  # also tells before the commit begins that Docker is away

    def pause() -> None:
        stack.enter_context(docker.paused(containers))

    return pause, stack.close


@click.command()
@click.argument("volumes", type=VOLUME, nargs=-1, required=True, metavar="VOLUME...")
@click.option("-m", "--message", required=True, help="What changed, for people.")
@click.option("-t", "--tag", "tags", multiple=True, metavar="KEY=VALUE", help="A note beside it.")
@click.option("--allow-empty", is_flag=True, help="Also when nothing changed.")
@click.option("--before", metavar="CMD", help="Run this right before the freeze (CHECKPOINT, …).")
@click.option("--after", metavar="CMD", help="Run this when writes go on.")
@click.option("--push", "push_too", is_flag=True, help="Push it, too.")
@click.option("--pause", is_flag=True, help="Pause the containers that use it meanwhile.")
@click.option("--author", help="Default: what git would say.")
@output.quiet_option
@output.json_option
def commit(
    volumes: tuple[str, ...],
    message: str,
    tags: tuple[str, ...],
    allow_empty: bool,
    before: str | None,
    after: str | None,
    push_too: bool,
    pause: bool,
    author: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Make what VOLUME holds now a version, on this host. Works while it is used, and offline.

    The file system is frozen for some milliseconds; storing goes on beside the workload. Several
    volumes are frozen at one moment, and get a version each or none. --pause holds the containers
    that use them still meanwhile (docker pause), for programs with files on several volumes.

    \b
    horcrux-cli commit amcc -m "fix prices" -t ticket=4711 --push
    horcrux-cli commit db files -m "release 7" --before "psql -c CHECKPOINT"
    """
    from .. import versions
    from ..progress import make_progress

    author = author or identity.author()
    with make_progress(quiet or as_json) as progress, contextlib.ExitStack() as standing:
        hooks = _pausing(volumes, standing) if pause else (None, None)
        made = versions.commit(
            volumes,
            message,
            author=author,
            tags=tags_of(tags),
            allow_empty=allow_empty,
            before=_steps(_hook(before, "before"), hooks[0]),
            after=_steps(hooks[1], _hook(after, "after")),
            progress=progress,
        )
    for name, one in [] if as_json else sorted(made.items()):
        click.echo(
            f"{name}: {output.short(one.id)} {output.printable(one.commit.message)}: "
            f"{format_size(one.packed.changed_bytes)} changed, {format_size(one.bytes)} to push"
        )
    for name in [] if as_json else sorted(set(volumes) - set(made)):
        click.echo(f"{name}: no changes")
    pushed = {}
    for name in sorted(made) if push_too else ():
        with make_progress(quiet or as_json) as progress:
            pushed[name] = versions.push(name, author=author, progress=progress)
        if not as_json:
            click.echo(_push_line(name, pushed[name]))
    if as_json:
        told = {name: _commit_json(one) for name, one in made.items()}
        for name, sent in pushed.items():
            told[name]["push"] = _push_json(sent)
        output.emit_json(told)


def _commit_json(one: Committed) -> dict[str, Any]:
    return {
        "id": one.id.hex(),
        "message": one.commit.message,
        "changed_bytes": one.packed.changed_bytes,
        "new_bytes": one.bytes,
        "new_objects": one.objects,
        "frozen_seconds": round(one.frozen_seconds, 4),
    }


@click.command()
@click.argument("volumes", type=VOLUME, nargs=-1, required=True, metavar="VOLUME...")
@click.option("-b", "--branch", metavar="NAME", help="Push to a new branch, and follow that.")
@click.option("--tag", metavar="NAME", help="Name what all of them lie on then.")
@click.option("--to", type=REPO, help="For a new image: the repository that it goes to.")
@click.option("--force", is_flag=True, help="Also move the branch back, after a reset.")
@output.quiet_option
@output.json_option
def push(
    volumes: tuple[str, ...],
    branch: str | None,
    tag: str | None,
    to: str | None,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Send the commits of VOLUME to its repository and move the branch to them.

    Only what the repository lacks travels; broken off, run it again. Refuses when somebody else
    moved the branch, and says who. --force still refuses what this volume has not seen.

    \b
    horcrux-cli push amcc
    horcrux-cli push amcc --branch prices
    horcrux-cli push db files --tag release-7
    horcrux-cli push scratch --to scp://me@nas:/srv/images
    """
    from .. import versions
    from ..progress import make_progress

    author = identity.author()
    url = None if to is None else config.load().url(to)
    done = {}
    volumes = tuple(dict.fromkeys(volumes))
    if tag is not None:
        versions.check_free(volumes, tag)
    for name in volumes:
        with make_progress(quiet or as_json) as progress:
            done[name] = versions.push(
                name, branch=branch, force=force, to=url, author=author, progress=progress
            )
        if not as_json:
            click.echo(_push_line(name, done[name]))
    if tag is not None:  # when all are there: the tag names the set
        for name, oid in versions.tag_volumes(volumes, tag, author=author).items():
            if not as_json:
                click.echo(f"{name}: tag {tag} is {output.short(oid)}")
    if as_json:
        output.emit_json({name: _push_json(one) for name, one in done.items()})


def _push_line(name: str, one: Pushed) -> str:
    if one.record is None:
        return f"{name}: nothing to push: branch {one.branch} has all of it"
    return (
        f"{name}: {output.plural(one.commits, 'version')}, {format_size(one.bytes)} in "
        f"{output.plural(one.objects, 'object')}; branch {one.branch} is at {output.short(one.tip)}"
    )


def _push_json(one: Pushed) -> dict[str, Any]:
    return {
        "branch": one.branch,
        "id": one.tip.hex(),
        "commits": one.commits,
        "objects": one.objects,
        "bytes": one.bytes,
        "known_objects": one.known_objects,
        "moved": one.record is not None,
    }


@click.command()
@click.argument("volume", type=VOLUME)
@output.json_option
def fetch(volume: str, as_json: bool) -> None:
    """Look what the branch of VOLUME has that the volume has not. Changes nothing.

    \b
    horcrux-cli fetch amcc
    """
    from .. import versions

    fetched = versions.fetch(volume)
    if as_json:
        output.emit_json(_fetch_json(fetched))
        return
    click.echo(_fetch_line(volume, fetched))
    for oid, commit in fetched.new[:20]:
        click.echo(
            f"  {output.short(oid)}  {output.when(commit.time)}  {output.printable(commit.author)}"
            f"  {output.printable(commit.message)}"
        )
    if len(fetched.new) > 20:
        click.echo(
            f"  … and {len(fetched.new) - 20} more: horcrux-cli log {volume} origin/"
            f"{fetched.branch}"
        )


def _fetch_line(volume: str, fetched: Fetched) -> str:
    new, own = len(fetched.new), len(fetched.own)
    if not new and not own:
        return f"{volume} has what branch {fetched.branch} has"
    parts = []
    if new:
        parts.append(f"branch {fetched.branch} has {output.plural(new, 'new version')}")
    if own:
        parts.append(f"{volume} has {output.plural(own, 'version')} to push")
    return "; ".join(parts)


def _fetch_json(fetched: Fetched) -> dict[str, Any]:
    return {
        "branch": fetched.branch,
        "head": fetched.record.commit.hex() if fetched.record.commit else None,
        "behind": [oid.hex() for oid, _ in fetched.new],
        "ahead": [oid.hex() for oid, _ in fetched.own],
        "fork": fetched.fork.hex() if fetched.fork else None,
        "diverged": fetched.diverged,
    }


@click.command()
@click.argument("volume", type=VOLUME)
@change_options
@remount_option
@output.json_option
def pull(volume: str, discard: bool, stash: bool, remount: bool, as_json: bool) -> None:
    """Lay VOLUME on the newest version of its branch, if it has no version of its own.

    Where both have new versions it changes nothing and says which: disks cannot be merged.

    \b
    horcrux-cli pull amcc
    """
    from .. import versions

    fetched, moved = versions.pull(volume, changes=changes(discard, stash), remount=remount)
    if as_json:
        output.emit_json({**_fetch_json(fetched), "moved": moved is not None})
    elif moved is None:
        click.echo(_fetch_line(volume, fetched))
    else:
        click.echo(moved_line(volume, moved))


def moved_line(volume: str, moved: Moved) -> str:
    """Where a volume is now, and what became of its changes."""
    ref = "" if len(moved.ref) == 64 else f" ({moved.ref})"
    line = (
        f"{volume} is on {output.short(moved.after)}{ref} {output.printable(moved.commit.message)}"
    )
    if moved.stashed:
        line += f"; {format_size(moved.stashed)} of changes are in the stash"
    if moved.dropped:
        line += f"; {format_size(moved.dropped)} of changes are dropped"
    for oid in moved.kept:
        line += (
            f"; {output.short(oid)} was never pushed and is kept: `horcrux-cli checkout {volume} "
            f"{output.short(oid)}`"
        )
    return line

"""Going to another version: checkout, reset, revert, stash."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from .. import identity
from ..errors import UsageError
from . import output
from .versions import change_options, changes, moved_line, remount_option
from .words import VOLUME

if TYPE_CHECKING:
    from ..versions import Moved


def _report(volume: str, moved: Moved, as_json: bool) -> None:
    if not as_json:
        click.echo(moved_line(volume, moved))
        return
    output.emit_json(
        {
            "volume": volume,
            "before": moved.before.hex(),
            "after": moved.after.hex(),
            "ref": moved.ref,
            "stashed_bytes": moved.stashed,
            "dropped_bytes": moved.dropped,
            "kept": [oid.hex() for oid in moved.kept],
        }
    )


@click.command()
@click.argument("volume", type=VOLUME)
@click.argument("ref")
@change_options
@remount_option
@output.json_option
def checkout(
    volume: str, ref: str, discard: bool, stash: bool, remount: bool, as_json: bool
) -> None:
    """Lay VOLUME on another version: back, forward, or on another branch. Fetches nothing.

    REF is a branch, tag or id, HEAD, or origin/BRANCH, with ~N to go back N. The volume's own
    commits come first. On a branch it follows that; on anything else a push needs --branch.

    \b
    horcrux-cli checkout amcc main~2
    horcrux-cli checkout amcc v3 --stash --remount
    """
    from .. import versions

    moved = versions.checkout(volume, ref, changes=changes(discard, stash), remount=remount)
    _report(volume, moved, as_json)


@click.command()
@click.argument("volume", type=VOLUME)
@click.argument("ref")
@change_options
@remount_option
@output.json_option
def reset(volume: str, ref: str, discard: bool, stash: bool, remount: bool, as_json: bool) -> None:
    """Let the branch of VOLUME point to REF, and lay the volume on it.

    For commits that should not have been: those that were never pushed are kept aside
    (horcrux-cli reflog). To move the branch in the repository back too: push --force.

    \b
    horcrux-cli reset amcc HEAD~1
    horcrux-cli reset amcc origin/main --discard
    """
    from .. import versions

    moved = versions.reset(volume, ref, changes=changes(discard, stash), remount=remount)
    _report(volume, moved, as_json)


@click.command()
@click.argument("volume", type=VOLUME)
@click.argument("ref", required=False)
@click.option("--to", metavar="REF", help="Make a version that is like REF.")
@click.option("-m", "--message", help="Default: says what was reverted.")
@change_options
@remount_option
@output.json_option
def revert(
    volume: str,
    ref: str | None,
    to: str | None,
    message: str | None,
    discard: bool,
    stash: bool,
    remount: bool,
    as_json: bool,
) -> None:
    """Undo the newest version of VOLUME by a new one on top, or go back --to REF by one.

    Unlike git's it undoes the newest only: what came after an older one lies on it, on a disk.

    \b
    horcrux-cli revert amcc
    horcrux-cli revert amcc --to v3 -m "back to last week"
    """
    from .. import versions

    moved = versions.revert(
        volume,
        ref,
        to=to,
        author=identity.author(),
        message=message,
        changes=changes(discard, stash),
        remount=remount,
    )
    _report(volume, moved, as_json)


@click.command()
@click.argument("volume", type=VOLUME)
@click.argument("action", type=click.Choice(["push", "list", "pop", "drop"]), default="push")
@click.argument("number", type=int, default=0)
@click.option("-m", "--message", default="", help="What it is, for people.")
@remount_option
@output.json_option
def stash(
    volume: str, action: str, number: int, message: str, remount: bool, as_json: bool
) -> None:
    """Put the changes of VOLUME aside, list what is there, take them back (pop) or drop them.

    Nothing is copied. They fit onto the version that they were made on, and go back to that only.

    \b
    horcrux-cli stash amcc -m "half of the import"
    horcrux-cli stash amcc list
    horcrux-cli stash amcc pop
    """
    from .. import versions

    if message and action != "push":
        raise UsageError(f"stash {action} takes no message")
    if action == "push":
        one = versions.stash(volume, message, remount=remount)
        line = f"{volume}: changes on {output.short(one.base)} are put aside"
    elif action == "pop":
        one = versions.stash_pop(volume, number, remount=remount)
        line = f"{volume}: the changes of {output.when(one.time)} are back"
    elif action == "drop":
        one = versions.stash_drop(volume, number)
        line = f"{volume}: the changes of {output.when(one.time)} are dropped"
    else:
        _list(volume, as_json)
        return
    if as_json:
        output.emit_json(_stash_json(one))
    else:
        click.echo(line)


def _stash_json(one: Any) -> dict[str, Any]:
    return {"base": one.base, "ref": one.ref, "time": one.time, "message": one.message}


def _list(volume: str, as_json: bool) -> None:
    from .. import versions

    found = versions.stashes(volume)
    if as_json:
        output.emit_json([_stash_json(one) for one in found])
        return
    if not found:
        click.echo(f"{volume} has nothing in its stash", err=True)
        return
    output.table(
        ("NUMBER", "ON", "TIME", "MESSAGE"),
        [
            (str(number), output.short(one.base), output.when(one.time), one.message)
            for number, one in enumerate(found)
        ],
        right=("NUMBER",),
    )

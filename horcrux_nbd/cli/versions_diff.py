"""What differs between two versions, two volumes, or a volume and its version."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from ..errors import HorcruxError, UsageError
from ..units import format_size
from . import output
from .versions_place import Place, opened, place
from .words import volume_state

if TYPE_CHECKING:
    from ..contents import Content
    from ..versions.diff_blocks import Extent

EXT = ("ext2", "ext3", "ext4")
_LETTERS = {"added": "A", "deleted": "D", "modified": "M", "renamed": "R"}


@click.command()
@click.argument("words", nargs=-1, required=True, metavar="TARGET [REF [REF]] | VOLUME VOLUME")
@click.option("--stat", is_flag=True, help="How much, in all; fetches no data.")
@click.option("--blocks", is_flag=True, help="Which blocks, exactly; reads what may differ.")
@output.json_option
def diff(words: tuple[str, ...], stat: bool, blocks: bool, as_json: bool) -> None:
    """Show what differs: files where both are ext2, ext3 or ext4, else how much.

    Of a VOLUME alone: what was written since its version. With one REF: from that to what the
    volume (or the image's main branch) holds now. A volume in use is compared as it was flushed
    last.

    \b
    horcrux-cli diff amcc
    horcrux-cli diff amcc main~3 --stat
    horcrux-cli diff AMCC main~3 main
    horcrux-cli diff amcc amcc-old --blocks
    """
    from ..versions import diff_blocks

    if stat and blocks:
        raise UsageError("--stat and --blocks exclude each other")
    with contextlib.ExitStack() as stack:
        old, new = _sides(words, stack)
        if blocks:
            _show_blocks(diff_blocks.differing(old, new, exact=True), as_json)
        elif stat or not {old.commit.filesystem, new.commit.filesystem} <= set(EXT):
            _show_stat(old, new, as_json)
        else:
            _show_files(old, new, as_json)


# ---- what is compared


def _sides(words: tuple[str, ...], stack: contextlib.ExitStack) -> tuple[Content, Content]:
    from ..contents import open_volume

    first, *refs = words
    if len(refs) > 2:
        raise UsageError("diff takes a TARGET and at most two REFs")
    found = place(first)
    if len(refs) == 1 and _is_place(refs[0]):
        other = place(refs[0])
        return _whole(first, found, stack), _whole(refs[0], other, stack)
    if found.volume is not None and len(refs) < 2:
        old = _version(first, refs[0] if refs else "HEAD", stack)
        return old, stack.enter_context(open_volume(found.volume))
    if not refs:
        raise UsageError(f"say what to compare {first} with, as in `diff {first} main~1`")
    return (
        _version(first, refs[0], stack),
        _version(first, refs[1] if len(refs) == 2 else None, stack),
    )


def _is_place(word: str) -> bool:
    """Whether a second word is a TARGET of its own and no REF."""
    if "@" in word[1:] and not word.startswith("origin/"):
        return True
    with contextlib.suppress(HorcruxError):
        return volume_state(word) is not None
    return False


def _whole(word: str, found: Place, stack: contextlib.ExitStack) -> Content:
    from ..contents import open_volume

    if found.volume is not None:
        return stack.enter_context(open_volume(found.volume))
    return _version(word, None, stack)


def _version(word: str, ref: str | None, stack: contextlib.ExitStack) -> Content:
    from ..contents import Content

    with contextlib.ExitStack() as resources:
        opened_place, asked = resources.enter_context(opened(word, ref))
        oid, commit = opened_place.find(asked)
        name = f"{commit.image}@{output.short(oid)}"
        local = None if opened_place.session is None else opened_place.session.local
        content = Content(
            name, commit, opened_place.repository, opened_place.cache, local, resources.pop_all()
        )
    return stack.enter_context(content)


# ---- how it is shown


def _show_stat(old: Content, new: Content, as_json: bool) -> None:
    from ..versions.diff_blocks import stat

    found = stat(old, new)
    if as_json:
        output.emit_json(
            {
                "old": old.name,
                "new": new.name,
                "chunks": found.chunks,
                "bytes_at_most": found.bytes,
                "old_size": found.sizes[0],
                "new_size": found.sizes[1],
            }
        )
        return
    click.echo(
        f"{old.name} to {new.name}: {output.plural(found.chunks, 'chunk')}, at most "
        f"{format_size(found.bytes)} of {format_size(new.size)}"
    )
    if found.sizes[0] != found.sizes[1]:
        click.echo(f"size: {format_size(found.sizes[0])} to {format_size(found.sizes[1])}")


def _show_blocks(extents: Iterator[Extent], as_json: bool) -> None:
    if as_json:
        output.emit_json([{"start": one.start, "length": one.length} for one in extents])
        return
    total = count = 0
    for one in extents:
        click.echo(f"{one.start:>16} +{one.length}")
        total, count = total + one.length, count + 1
    click.echo(f"{format_size(total)} in {output.plural(count, 'piece')}")


def _show_files(old: Content, new: Content, as_json: bool) -> None:
    from ..contents import changed_files
    from ..filesystem.changes import shown

    changes = changed_files(old, new)
    if as_json:
        output.emit_json([one.to_json() for one in changes])
        return
    for one in changes:
        path = shown(one.path)
        if one.old_path is not None:
            path = f"{shown(one.old_path)} -> {path}"
        click.echo(f"{_LETTERS.get(one.kind, '?')}  {path}{_sizes(one)}")
    if not changes:
        click.echo("no file differs", err=True)


def _sizes(one: Any) -> str:
    if one.type != "file":
        return ""
    if one.kind == "added":
        return f"  {format_size(one.new_size or 0)}"
    if one.kind == "deleted":
        return f"  {format_size(one.old_size or 0)}"
    what = [word for word in one.what if word != "content"]
    sizes = f"{format_size(one.changed_bytes)} changed of {format_size(one.new_size or 0)}"
    return f"  {sizes}" + (f" ({', '.join(what)})" if what else "")

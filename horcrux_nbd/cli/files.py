"""Files in versions and volumes, without mounting them: `ls` of a path, `cat`, `restore`."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from ..errors import UsageError
from ..units import format_size
from . import output, repositories
from .versions_place import TARGET_HELP, opened, place
from .words import REPO_OR_VOLUME, existing_folder

if TYPE_CHECKING:
    from ..contents import Content
    from ..filesystem import Reader
    from ..filesystem.inode import Inode

# IMAGE@REF:PATH, VOLUME:PATH, REF:PATH, :PATH; what follows the colon of a URL are two slashes.
_SPOT = re.compile(r"([A-Za-z0-9_.@~^/-]*):(?!//)(.*)", re.DOTALL)


@dataclass(frozen=True)
class Spot:
    """A path in a version, or in a volume as it is now (`ref` is None and `target` a VOLUME)."""

    target: str
    ref: str | None
    path: str


def spot(words: Sequence[str]) -> Spot:
    """What TARGET [REF] PATH, TARGET REF:PATH or TARGET:PATH names. Raises UsageError."""
    match = _SPOT.fullmatch(words[-1]) if words else None
    if len(words) == 1 and match and match[1]:
        return Spot(match[1], None, match[2])
    if len(words) == 2:
        if match and not words[1].startswith("/"):
            return Spot(words[0], _ref(match[1]), match[2])
        return Spot(words[0], None, words[1])
    if len(words) == 3:
        return Spot(words[0], _ref(words[1]), words[2])
    raise UsageError(
        "say which file: TARGET REF PATH, or VOLUME PATH for a volume as it is now (REF:PATH in "
        "one word works too)"
    )


def _ref(text: str) -> str | None:
    """`@v3` is `v3`; `@` alone stays, and nothing at all is none."""
    return text.removeprefix("@") or text or None


def open_place(target: str, ref: str | None) -> Content:
    """A version, or, of a VOLUME without a REF, what it holds now. Raises NotFound, StoreError."""
    from ..contents import Content, open_volume

    named = place(target)
    if named.volume is not None and ref is None:
        return open_volume(named.volume)
    with contextlib.ExitStack() as stack:
        found, asked = stack.enter_context(opened(target, ref))
        oid, commit = found.find(asked)
        name = f"{commit.image}@{asked or found.place.ref or output.short(oid)}"
        local = None if found.session is None else found.session.local
        return Content(name, commit, found.repository, found.cache, local, stack.pop_all())


# ---- ls


@click.command(epilog=TARGET_HELP)
@click.argument("words", nargs=-1, metavar="[REPO] | TARGET [REF]:PATH", type=REPO_OR_VOLUME)
@click.option("--stored", is_flag=True, help="Also what a repository takes: lists all objects.")
@click.option("-R", "--recursive", is_flag=True, help="Also what is below PATH.")
@output.json_option
@click.pass_context
def ls(
    context: click.Context, words: tuple[str, ...], stored: bool, recursive: bool, as_json: bool
) -> None:
    """List the images in REPO, or the files in a version or a volume.

    Without REPO: the images in every remote, and in every repository that a volume of this host is
    of. With a path, files: of a version, or of a VOLUME as it is now. Nothing is mounted, and of
    the image only what leads to the path is fetched (ext2, ext3, ext4).

    \b
    horcrux-cli ls cp:///opt/horcrux-amcc
    horcrux-cli ls team --stored
    horcrux-cli ls AMCC@v3:/base
    horcrux-cli ls amcc:/base
    horcrux-cli ls amcc main~2:/base -R
    """
    if len(words) == 0 or (len(words) == 1 and not _names_path(words[0])):
        if recursive:
            raise UsageError("--recursive is for files: say a path too, as in VOLUME:/")
        repo = words[0] if words else None
        context.invoke(repositories.ls, repo=repo, stored=stored, as_json=as_json)
        return
    if stored:
        raise UsageError("--stored is for a repository, not for files in a version")
    from ..contents import files_of, steadily
    from ..filesystem.changes import text

    asked = spot(words)
    with open_place(asked.target, asked.ref) as content:
        rows = steadily([content], lambda _: _rows(files_of(content), asked.path, recursive))
    if as_json:
        output.emit_json(
            {
                "in": content.name,
                "path": text(os.fsencode(asked.path)),
                "files": [row.to_json() for row in rows],
            }
        )
        return
    table = [row.cells() for row in rows]
    if table:
        headers = ("MODE", "UID", "GID", "SIZE", "MODIFIED", "NAME")
        output.table(headers, table, right=("UID", "GID", "SIZE"))


def _names_path(word: str) -> bool:
    match = _SPOT.fullmatch(word)
    return bool(match and match[1])


@dataclass(frozen=True)
class _Row:
    path: bytes
    inode: Inode
    target: bytes | None

    def cells(self) -> tuple[str, ...]:
        from ..filesystem.changes import shown

        inode = self.inode
        size = ",".join(map(str, inode.device)) if any(inode.device) else format_size(inode.size)
        name = shown(self.path)
        if self.target is not None:
            name += f" -> {shown(self.target)}"
        when = output.when(_iso(inode.mtime))
        return stat.filemode(inode.mode), str(inode.uid), str(inode.gid), size, when, name

    def to_json(self) -> dict[str, Any]:
        from ..filesystem.changes import KINDS, hex_of, text

        inode = self.inode
        value = {
            "path": text(self.path),
            "type": KINDS[stat.S_IFMT(inode.mode)],
            "mode": f"{stat.S_IMODE(inode.mode):04o}",
            "uid": inode.uid,
            "gid": inode.gid,
            "size": inode.size,
            "links": inode.links,
            "modified": _iso(inode.mtime),
            "target": None if self.target is None else text(self.target),
        }
        return value | hex_of("path_hex", self.path)


def _iso(nanoseconds: int) -> str:
    seconds, rest = divmod(nanoseconds, 10**9)
    try:
        when = datetime.fromtimestamp(seconds, UTC).replace(tzinfo=None)
    except (ValueError, OverflowError, OSError):  # a year that Python has not
        return f"@{seconds}"
    return f"{when.isoformat()}.{rest:09d}Z"


def _rows(reader: Reader, path: str, recursive: bool) -> list[_Row]:
    """What `path` is, or what is in it if it is a directory; by name."""
    raw = os.fsencode(path)
    inode = reader.lookup(raw)
    if not inode.is_dir:
        found = [(raw.strip(b"/"), inode)]
    elif recursive:
        found = list(reader.walk(inode))
    else:
        found = list(reader.children(inode))
    return [
        _Row(name, one, reader.readlink(one) if one.is_link else None)
        for name, one in sorted(found, key=lambda pair: pair[0])
    ]


# ---- cat and restore


@contextlib.contextmanager
def _reading(asked: Spot) -> Iterator[Reader]:
    from ..contents import reading

    with open_place(asked.target, asked.ref) as content, reading(content) as reader:
        yield reader


@click.command(epilog=TARGET_HELP)
@click.argument("words", nargs=-1, required=True, metavar="TARGET [REF] PATH")
def cat(words: tuple[str, ...]) -> None:
    """Write a file of a version, or of a VOLUME as it is now, to standard output.

    Nothing is mounted; what the file needs is fetched (ext2, ext3, ext4). Symbolic links are
    followed inside the image.

    \b
    horcrux-cli cat AMCC@v3 /etc/app.conf
    horcrux-cli cat amcc /etc/app.conf
    horcrux-cli cat amcc main~2:/etc/app.conf
    """
    asked = spot(words)
    with _reading(asked) as reader:
        inode = reader.lookup(os.fsencode(asked.path))
        if inode.is_dir:
            raise UsageError(f"{asked.path} is a directory: `horcrux-cli ls` lists it")
        if not inode.is_file:
            raise UsageError(f"{asked.path} is no regular file")
        out = sys.stdout.buffer
        for data in reader.read_file(inode):
            out.write(data)
        out.flush()


@click.command(epilog=TARGET_HELP)
@click.argument("words", nargs=-1, required=True, metavar="TARGET [REF] PATH DIR")
@click.option("-f", "--force", is_flag=True, help="Replace what is in DIR under the same name.")
@click.option(
    "--trusted",
    is_flag=True,
    help="Also set-user-id bits, devices, and attributes that only root may set.",
)
@output.quiet_option
@output.json_option
def restore(words: tuple[str, ...], force: bool, trusted: bool, quiet: bool, as_json: bool) -> None:
    """Bring a file or a directory of a version, or of a VOLUME, into the folder DIR.

    It comes with modes, times, links, holes and attributes as they were (owners too for root),
    whole or not at all. PATH / brings all that there is. What would give power on this host is left
    out unless --trusted: an image may come from anywhere.

    \b
    horcrux-cli restore AMCC@v3 /base/16384 /tmp/old
    horcrux-cli restore amcc main~1:/etc/app.conf .
    """
    from ..filesystem.restore import restore as run
    from ..progress import make_progress

    if len(words) < 2:
        raise UsageError("say what to restore and the folder where it goes: TARGET PATH DIR")
    asked = spot(words[:-1])
    path = os.fsencode(asked.path)
    with _reading(asked) as reader, make_progress(quiet or as_json) as progress:
        reader.lookup(path, follow=False)  # before a folder is made for it
        target = existing_folder(words[-1])
        done = run(
            reader,
            path,
            target,
            force=force,
            trusted=trusted,
            progress=progress,
        )
    if as_json:
        output.emit_json(
            {
                "target": str(target),
                "files": done.files,
                "directories": done.directories,
                "others": done.others,
                "bytes": done.bytes,
                "left_out": done.left_out,
                "left_out_count": done.left_out_count,
            }
        )
        return
    for line in done.left_out:
        click.echo(f"left out: {line}", err=True)
    if done.left_out_count > len(done.left_out):
        click.echo(f"… and {done.left_out_count - len(done.left_out):,} more", err=True)
    click.echo(
        f"{output.plural(done.files, 'file')} and {output.plural(done.directories, 'folder')} "
        f"({format_size(done.bytes)}) restored into {target}"
    )

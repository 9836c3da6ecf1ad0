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
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import UsageError
from ..names import is_name, parse_version
from ..units import format_size
from . import output, repositories
from .words import REPO_OR_VOLUME, existing_folder, volume_state, where

if TYPE_CHECKING:
    from ..contents import Content
    from ..filesystem import Reader
    from ..filesystem.inode import Inode

# IMAGE@REF:PATH, @REF:PATH, :PATH; of a URL the part before the colon is followed by slashes.
_SPOT = re.compile(r"([A-Za-z0-9_.@~^-]*):(?!//)(.*)", re.DOTALL)


@dataclass(frozen=True)
class Spot:
    """A path in a version (`version` as it was written), or in a volume as it is now."""

    place: str
    version: str | None
    path: str


def spot(words: Sequence[str]) -> Spot:
    """What PLACE [VERSION] PATH, PLACE VERSION:PATH or VOLUME:PATH names. Raises UsageError."""
    match = _SPOT.fullmatch(words[-1])
    if len(words) == 1 and match and is_name(match[1]):
        return Spot(match[1], None, match[2])
    if len(words) == 2:
        if match:
            return Spot(words[0], match[1] or None, match[2])
        return Spot(words[0], None, words[1])
    if len(words) == 3:
        return Spot(*words)
    raise UsageError(
        "say which file: REPO VERSION PATH, or VOLUME PATH for a volume as it is now (VERSION:PATH "
        "in one word works too)"
    )


def open_place(place: str, version: str | None) -> Content:
    """A version, or, of a VOLUME without a version, what it holds now. Raises NotFound."""
    from ..contents import open_commit, open_version, open_volume

    found = where(place)
    if found.volume is not None:
        if version is None:
            return open_volume(found.volume)
        state = volume_state(found.volume)
        image = version.partition("@")[0]
        if state is None or image in ("", state.image):
            return open_commit(found.volume, version.partition("@")[2] or "HEAD")
        if "@" not in version:
            return open_commit(found.volume, version)
        return open_version(found.url, parse_version(version))
    if version is None:
        return open_version(found.url, _only_image(found.url))
    return open_version(found.url, parse_version(version))


def _only_image(url: str) -> Any:
    from ..chunkstore import open_store
    from ..repository.repository import Repository
    from .words import Where, find_version

    with open_store(url) as store:
        return find_version(Repository.open(store), Where(url), None).version


# ---- ls


@click.command()
@click.argument("words", nargs=-1, metavar="[REPO|VOLUME] [VERSION:PATH]", type=REPO_OR_VOLUME)
@click.option("--stored", is_flag=True, help="Also what a repository takes: lists all objects.")
@click.option("-R", "--recursive", is_flag=True, help="Also what is below PATH.")
@output.json_option
@click.pass_context
def ls(
    context: click.Context, words: tuple[str, ...], stored: bool, recursive: bool, as_json: bool
) -> None:
    """List the images in REPO, or the files in a version or volume.

    Without REPO: the images in every remote, and in every repository that a volume of this host is
    of. With a path, files: of VERSION, or of a VOLUME as it is now. Nothing is mounted, and of the
    image only what leads to the path is fetched (ext2, ext3, ext4).

    \b
    horcrux-cli ls cp:///opt/horcrux-amcc
    horcrux-cli ls team --stored
    horcrux-cli ls team AMCC@v3:/base
    horcrux-cli ls amcc:/base
    horcrux-cli ls amcc @main~2:/base -R
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

    asked = spot(words)
    with open_place(asked.place, asked.version) as content:
        rows = steadily([content], lambda: _rows(files_of(content), asked.path, recursive))
    if as_json:
        output.emit_json(
            {"in": content.name, "path": asked.path, "files": [row.to_json() for row in rows]}
        )
        return
    table = [row.cells() for row in rows]
    if table:
        headers = ("MODE", "UID", "GID", "SIZE", "MODIFIED", "NAME")
        output.table(headers, table, right=("UID", "GID", "SIZE"))


def _names_path(word: str) -> bool:
    match = _SPOT.fullmatch(word)
    return bool(match and is_name(match[1]))


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
        found = [(entry.name, reader.inode(entry.inode)) for entry in reader.listdir(inode)]
    return [
        _Row(name, one, reader.readlink(one) if one.is_link else None)
        for name, one in sorted(found, key=lambda pair: pair[0])
    ]


# ---- cat and restore


@contextlib.contextmanager
def _reading(asked: Spot) -> Iterator[Reader]:
    from ..contents import files_of, steadily

    with open_place(asked.place, asked.version) as content:
        yield steadily([content], lambda: files_of(content))


@click.command()
@click.argument("words", nargs=-1, required=True, metavar="PLACE [VERSION] PATH")
def cat(words: tuple[str, ...]) -> None:
    """Write a file of a version, or of a volume as it is now, to standard output.

    PLACE is a REPO or a VOLUME. Nothing is mounted; what the file needs is fetched (ext2, ext3,
    ext4). Symbolic links are followed inside the image.

    \b
    horcrux-cli cat team AMCC@v3 /etc/app.conf
    horcrux-cli cat amcc /etc/app.conf
    horcrux-cli cat amcc @main~2:/etc/app.conf
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


@click.command()
@click.argument("words", nargs=-1, required=True, metavar="PLACE [VERSION] PATH DIR")
@click.option("-f", "--force", is_flag=True, help="Replace what is in DIR under the same name.")
@click.option(
    "--trusted",
    is_flag=True,
    help="Also set-user-id bits, devices, and attributes that only root may set.",
)
@output.quiet_option
@output.json_option
def restore(words: tuple[str, ...], force: bool, trusted: bool, quiet: bool, as_json: bool) -> None:
    """Bring a file or a directory of a version, or of a volume, into the folder DIR.

    It comes with modes, times, links, holes and attributes as they were (owners too for root),
    whole or not at all. PATH / brings all that there is. What would give power on this host is left
    out unless --trusted: an image may come from anywhere.

    \b
    horcrux-cli restore team AMCC@v3 /base/16384 /tmp/old
    horcrux-cli restore amcc @main~1:/etc/app.conf .
    """
    from ..filesystem.restore import restore as run
    from ..progress import make_progress

    if len(words) < 2:
        raise UsageError("say what to restore and the folder where it goes: PLACE PATH DIR")
    asked, target = spot(words[:-1]), existing_folder(words[-1])
    with _reading(asked) as reader, make_progress(quiet or as_json) as progress:
        done = run(
            reader,
            os.fsencode(asked.path),
            Path(target),
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

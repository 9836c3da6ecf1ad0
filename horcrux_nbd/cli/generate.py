"""`generate`: a directory or disk image becomes a version in a repository."""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING

import click

from .. import config
from ..errors import Incomplete, NotFound, StoreMissing, UsageError
from ..names import DEFAULT_BRANCH, Version, check_name
from ..units import format_size
from . import output
from .key import secret_of, secret_options, unlock_with
from .words import SIZE

if TYPE_CHECKING:
    from ..repository.keys import Secret

LISTED = 20  # problems printed; --json has all


@click.command()
@click.argument("words", nargs=-1, metavar="NAME SOURCE REPO")
@click.option(
    "-s",
    "--chunksize",
    type=SIZE,
    help="Power of two from 64K to 64M. Default: that of the image or repository, else 512K.",
)
@click.option("--free", type=SIZE, help="Room to grow beside the files; a hole, costs nothing.")
@click.option("--size", type=SIZE, help="Size of the file system in all, instead of --free.")
@click.option(
    "--fs",
    "filesystem",
    default="ext4",
    show_default=True,
    metavar="ext4|xfs",
    help="File system that a directory becomes; xfs takes root and a copy of it.",
)
@click.option("--branch", default=DEFAULT_BRANCH, show_default=True, help="Branch to add to.")
@click.option(
    "--onto",
    metavar="IMAGE",
    help="In place of NAME: refresh IMAGE, with only the blocks new that changed.",
)
@click.option("-m", "--message", help="What this version is. Default: where it came from.")
@click.option(
    "--temporary",
    type=click.Path(file_okay=False),
    help="Folder for temporary files. Default: $TMPDIR, else /var/tmp.",
)
@click.option("--encrypt", is_flag=True, help="A repository that is made is encrypted.")
@secret_options
@output.quiet_option
@output.json_option
def generate(
    words: tuple[str, ...],
    onto: str | None,
    chunksize: int | None,
    free: int | None,
    size: int | None,
    filesystem: str,
    branch: str,
    message: str | None,
    temporary: str | None,
    encrypt: bool,
    key_file: str | None,
    passphrase_file: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Make a version of image NAME from SOURCE in REPO.

    SOURCE is a directory (it becomes an ext4 file system with all owners, modes, times, xattrs,
    ACLs, links and holes), a raw disk image, a block device, or what qemu-img reads (qcow2, vmdk,
    vdi, …). REPO is made if it is missing. Run it again to add a version: only new chunks are
    stored. Interrupted, it leaves the image as it was, and the next run sends what is missing.

    \b
    horcrux-cli generate -s 512K AMCC /var/lib/postgresql/15/main /opt/horcrux-amcc
    horcrux-cli generate --free 20G -m "before the upgrade" AMCC /srv/amcc scp://me@nas:/srv/images

    --onto makes tonight's version of a directory that changed: files stay where they lay, and of
    each changed chunk the changed blocks are stored. It reads those chunks of the last version.

    \b
    horcrux-cli generate --onto AMCC /srv/amcc scp://me@nas:/srv/images

    --encrypt makes a repository that nobody can read without its key: a passphrase, which is asked
    for, or a file. This host keeps the key until a reboot (`horcrux-cli key`, docs/security.md).

    \b
    horcrux-cli generate --encrypt AMCC /srv/amcc s3://bucket/amcc

    Exit code 10: the version was made, but files changed or could not be read meanwhile; they are
    listed. Stop the database, or take a snapshot, and run it again.
    """
    from ..chunkstore import open_store
    from ..generate import generate as run
    from ..identity import author
    from ..progress import make_progress
    from ..refresh import LastVersion
    from ..repository.commits import check_chunk_size
    from ..source import open_source

    began = time.monotonic()
    name, source, repo = _words(words, onto)
    check_name("image", name)
    check_name("branch", branch)
    if chunksize is not None:
        check_chunk_size(chunksize)
    if free is not None and size is not None:
        raise UsageError("--size is the whole, --free what is left over: give one of them")
    url = config.load().url(repo)
    _check_apart(source, url)
    secret = _look_at(url, encrypt, key_file, passphrase_file)
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(make_progress(quiet))
        last = stack.enter_context(LastVersion(url, Version(name, branch))) if onto else None
        image = stack.enter_context(
            open_source(
                source,
                filesystem=filesystem,
                size=size,
                free=free,
                temporary=temporary,
                progress=progress,
                label=name[: 16 if filesystem == "ext4" else 12],
                previous=last.layout() if last is not None else None,
            )
        )
        done = run(
            image,
            stack.enter_context(open_store(url, create=True)),
            name,
            chunk_size=chunksize,
            branch=branch,
            author=author(),
            message=message or f"generated from {os.path.abspath(source)}",
            old_chunk=last.chunk if last is not None else None,
            secret=secret,
            progress=progress,
        )
    if secret is not None:
        _keep_key(url)
    seconds = time.monotonic() - began
    if as_json:
        output.emit_json(
            {
                "id": done.id.hex(),
                "version": f"{name}@{branch}",
                "repository": url,
                "size": done.commit.size,
                "chunk_size": done.commit.chunk_size,
                "filesystem": done.commit.filesystem,
                "read_bytes": done.read_bytes,
                "stored_bytes": done.written.bytes,
                "stored_objects": done.written.objects,
                "known_objects": done.written.known_objects,
                "seconds": round(seconds, 3),
                "problems": done.problems,
            }
        )
    else:
        click.echo(
            f"{name}@{branch} {output.short(done.id)}: {format_size(done.commit.size)} image, "
            f"{format_size(done.read_bytes)} read, {format_size(done.written.bytes)} stored in "
            f"{output.plural(done.written.objects, 'new object')}, {seconds:.1f} s, "
            f"{format_size(done.read_bytes / max(seconds, 1e-3))}/s"
        )
    if done.problems:
        if not as_json:
            _list(done.problems)
        raise Incomplete(
            f"{name}@{branch} was made, but {output.plural(len(done.problems), 'file')} changed or "
            "could not be read meanwhile: stop what writes there and run it again"
        )


def _words(words: tuple[str, ...], onto: str | None) -> tuple[str, str, str]:
    """(image, source, repository) of the command line. Raises click's usage error."""
    given = words if onto is None else (onto, *words)
    if len(given) != 3:
        wanted = "NAME SOURCE REPO" if onto is None else "SOURCE REPO with --onto"
        raise click.UsageError(f"this takes {wanted}, not {len(words)} words")
    return given[0], given[1], given[2]


def _check_apart(source: str, url: str) -> None:
    """Refuse a repository that would hold itself. Raises UsageError."""
    from ..chunkstore import parse_store_url

    target = parse_store_url(url)
    if target.scheme != "cp":
        return
    here, there = os.path.realpath(source), os.path.realpath(target.path)
    if here == there:
        raise UsageError(f"SOURCE and REPO are the same folder ({here}): choose another REPO")
    if there.startswith(here.rstrip("/") + "/"):
        raise UsageError(f"REPO {there} lies inside of SOURCE {here}: choose one outside of it")
    if here.startswith(there.rstrip("/") + "/"):
        raise UsageError(f"SOURCE {here} lies inside of REPO {there}: choose a REPO elsewhere")


def _look_at(
    url: str, encrypt: bool, key_file: str | None, passphrase_file: str | None
) -> Secret | None:
    """Find out now what is wrong with the repository: reading the source may take minutes.

    Changes nothing. What opens the encrypted repository that is to be made, if one is. Raises what
    opening it does, unless it is only missing.
    """
    from ..chunkstore import open_store
    from ..repository.repository import Repository

    given = key_file is not None or passphrase_file is not None
    try:
        with open_store(url) as store:
            if given:
                unlock_with(store, secret_of(key_file, passphrase_file, url))
            there = Repository.open(store)
    except (StoreMissing, NotFound):
        if given and not encrypt:
            raise UsageError(
                f"{url} holds no repository yet: say --encrypt to make an encrypted one"
            ) from None
        return secret_of(key_file, passphrase_file, url, new=True) if encrypt else None
    if not there.form.encrypted and (encrypt or given):
        raise UsageError(
            f"{url} is there already and is not encrypted: choose an empty place for an encrypted "
            "repository"
        )
    return None


def _keep_key(url: str) -> None:
    """Who made an encrypted repository here goes on to use it here."""
    from ..chunkstore import open_store
    from ..repository import keyring
    from ..repository.configuration import read_config

    with open_store(url) as store:
        repository_id = read_config(store).id
    master = keyring.find(repository_id)
    if master is not None:
        path = keyring.keep(repository_id, master)
        click.echo(
            f"this host keeps the key until a reboot or `horcrux-cli key lock {url}` ({path}); "
            "without a key nobody can read it: keep a copy elsewhere "
            f"(`horcrux-cli key export {url} FILE`)",
            err=True,
        )


def _list(problems: list[str]) -> None:
    for line in problems[:LISTED]:
        click.echo(f"  {output.printable(line)}", err=True)
    if len(problems) > LISTED:
        click.echo(f"  … and {len(problems) - LISTED} more (--json lists all)", err=True)

"""`key`: the keys of encrypted repositories, and which of them this host has."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from .. import config
from ..errors import KeyRequired, UsageError
from . import output
from .words import REPO

if TYPE_CHECKING:
    from ..chunkstore.base import ChunkStore
    from ..repository.keys import Secret, Slot

_FILE = click.Path(dir_okay=False)


def secret_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--key-file` and `--passphrase-file`."""
    for option in (
        click.option("--passphrase-file", type=_FILE, help="File with the passphrase in it."),
        click.option(
            "--key-file", type=_FILE, help="Key file, as `horcrux-cli key make` makes it."
        ),
    ):
        command = option(command)
    return command


def _new_secret_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--label", default="", help="Whose it is; anybody can read that."),
        click.option("--new-passphrase-file", type=_FILE, help="File with the new passphrase."),
        click.option("--new-key-file", type=_FILE, help="The new key file."),
    ):
        command = option(command)
    return command


def secret_of(
    key_file: str | None, passphrase_file: str | None, what: str, *, new: bool = False
) -> Secret:
    """What opens a key: from a file, else from the terminal (twice where it is `new`).

    Never from an argument or the environment, which others can read.
    """
    from ..repository.keys import passphrase, read_key_file, read_passphrase_file

    if key_file is not None and passphrase_file is not None:
        raise UsageError(f"{what}: give a key file or a passphrase file, not both")
    if key_file is not None:
        return read_key_file(key_file)
    if passphrase_file is not None:
        return read_passphrase_file(passphrase_file)
    if not sys.stdin.isatty():
        raise UsageError(
            f"{what}: there is no terminal to ask for a {'new ' if new else ''}passphrase: name a "
            "key file or a passphrase file"
        )
    return passphrase(
        click.prompt(
            f"{'new ' if new else ''}passphrase of {what}",
            hide_input=True,
            confirmation_prompt=new,
            err=True,
        )
    )


def unlock_with(store: ChunkStore, secret: Secret) -> None:
    """Let this process read the encrypted repository in `store`. Raises KeyRequired, NotFound."""
    from ..repository import keyring
    from ..repository.configuration import form_of, read_config
    from ..repository.keys import unlock as open_keys

    found = read_config(store)
    if found.encrypted:
        keyring.remember(found.id, open_keys(store, found.id, secret)[0])
        form_of(store, found)  # checks it


@contextlib.contextmanager
def _encrypted(repo: str) -> Iterator[tuple[ChunkStore, str]]:
    """The store of an encrypted repository, and the repository's id. Raises UsageError."""
    from ..chunkstore import open_store
    from ..repository.configuration import read_config

    with open_store(config.load().url(repo)) as store:
        found = read_config(store)
        if not found.encrypted:
            raise UsageError(
                f"{store.url} is not encrypted: `horcrux-cli generate --encrypt` makes one that is"
            )
        yield store, found.id


def _master(
    store: ChunkStore, repository_id: str, key_file: str | None, passphrase_file: str | None
) -> tuple[bytes, Slot | None]:
    """The master key: by what is given, else the one that this host has, else by asking."""
    from ..repository import keyring
    from ..repository.configuration import form_of, read_config
    from ..repository.keys import unlock as open_keys

    if key_file is None and passphrase_file is None:
        with contextlib.suppress(KeyRequired):
            form_of(store, read_config(store))
            master = keyring.find(repository_id)
            if master is not None:
                return master, None
    found = open_keys(store, repository_id, secret_of(key_file, passphrase_file, store.url))
    keyring.remember(repository_id, found[0])
    form_of(store, read_config(store))  # checks it
    return found


@click.group()
def key() -> None:
    """Keys of encrypted repositories.

    `horcrux-cli generate --encrypt` makes an encrypted repository. Any of its keys, a passphrase or
    a key file, opens it. Commands and servers use the key that this host was given with `unlock`,
    or the key file that HORCRUX_KEY_FILE names. docs/security.md says what is protected.

    \b
    horcrux-cli key unlock scp://me@nas:/srv/images
    horcrux-cli key add --new-key-file ~/backup.key --label backup team
    horcrux-cli key ls team
    """


@key.command()
@click.argument("file", type=_FILE)
def make(file: str) -> None:
    """Write a new random key to FILE, which only its owner can read.

    It opens nothing until it is given to `generate --encrypt` or `key add`. Keep a copy.

    \b
    horcrux-cli key make /root/amcc.key
    """
    from ..repository.keys import make_key_file

    make_key_file(file)
    click.echo(f"{os.path.abspath(file)} is a key: keep a copy of it elsewhere")


@key.command()
@click.argument("repo", type=REPO)
@click.option("--keep", is_flag=True, help="Beyond a reboot: on this host's disk.")
@secret_options
def unlock(repo: str, keep: bool, key_file: str | None, passphrase_file: str | None) -> None:
    """Let this host read REPO, until a reboot or `key lock`.

    The key then lies in this host's folder of sockets, in a file that only its owner can read.
    With --keep it lies on disk, for servers that start unattended.

    \b
    horcrux-cli key unlock team
    horcrux-cli key unlock --keep --key-file /root/team.key team
    """
    from ..repository import keyring

    with _encrypted(repo) as (store, repository_id):
        master, _ = _master(store, repository_id, key_file, passphrase_file)
        path = keyring.keep(repository_id, master, for_good=keep)
        click.echo(f"{store.url} is unlocked on this host ({path})")


@key.command()
@click.argument("repo", type=REPO)
def lock(repo: str) -> None:
    """Take the key of REPO away from this host.

    A server that runs keeps its own until it stops, and the cache stays readable to root:
    `horcrux-cli cache clear` empties it.
    """
    from ..repository import keyring

    with _encrypted(repo) as (store, repository_id):
        there = keyring.forget(repository_id)
        click.echo(f"{store.url} is locked on this host{'' if there else ' (it was)'}")


@key.command("ls")
@click.argument("repo", type=REPO)
@output.json_option
def list_keys(repo: str, as_json: bool) -> None:
    """List the keys of REPO. Takes no key.

    \b
    horcrux-cli key ls /opt/horcrux-amcc
    """
    from ..repository.keys import read_slots

    with _encrypted(repo) as (store, _):
        slots = read_slots(store)
    if as_json:
        output.emit_json(
            [
                {"key": one.name, "kind": one.kind, "label": one.label, "created": one.created}
                for one in slots
            ]
        )
        return
    output.table(
        ("KEY", "KIND", "MADE", "LABEL"),
        [
            (one.name, one.kind, output.when(one.created), output.printable(one.label))
            for one in slots
        ],
    )


@key.command()
@click.argument("repo", type=REPO)
@_new_secret_options
@secret_options
def add(
    repo: str,
    label: str,
    new_key_file: str | None,
    new_passphrase_file: str | None,
    key_file: str | None,
    passphrase_file: str | None,
) -> None:
    """Add a key to REPO: a passphrase, or a key file.

    \b
    horcrux-cli key add --label "alice" team
    """
    from ..repository.keys import add_slot, make_slot

    with _encrypted(repo) as (store, repository_id):
        master, _ = _master(store, repository_id, key_file, passphrase_file)
        secret = secret_of(new_key_file, new_passphrase_file, store.url, new=True)
        slot = make_slot(secret, master, repository_id, label)
        add_slot(store, slot)
        click.echo(f"{slot.name} is a key of {store.url} now")


@key.command()
@click.argument("repo", type=REPO)
@_new_secret_options
@secret_options
def change(
    repo: str,
    label: str,
    new_key_file: str | None,
    new_passphrase_file: str | None,
    key_file: str | None,
    passphrase_file: str | None,
) -> None:
    """Replace a key of REPO: the one that opens with the passphrase or file given.

    No object is written anew. Who had the old key may have kept what it opened (docs/security.md).

    \b
    horcrux-cli key change /opt/horcrux-amcc
    """
    from ..repository.keys import add_slot, make_slot, remove_slot
    from ..repository.keys import unlock as open_keys

    with _encrypted(repo) as (store, repository_id):
        old = secret_of(key_file, passphrase_file, store.url)
        master, slot = open_keys(store, repository_id, old)
        if slot is None:
            raise UsageError("a master key is no key of the repository: `key add` and `key rm`")
        secret = secret_of(new_key_file, new_passphrase_file, store.url, new=True)
        made = make_slot(secret, master, repository_id, label or slot.label)
        add_slot(store, made)
        remove_slot(store, slot.name)
        click.echo(f"{made.name} replaces {slot.name} in {store.url}")


@key.command("rm")
@click.argument("repo", type=REPO)
@click.argument("name", metavar="KEY")
def remove(repo: str, name: str) -> None:
    """Remove KEY (as `key ls` shows it) from REPO; the last one stays.

    Copies of the repository keep theirs: remove it there too. Who used the key may have kept the
    master key: to keep them out of new versions, make a new repository.

    \b
    horcrux-cli key rm /opt/horcrux-amcc KEY
    """
    from ..repository.keys import remove_slot

    with _encrypted(repo) as (store, _):
        removed = remove_slot(store, name)
        click.echo(f"{removed} is no key of {store.url} any more")


@key.command()
@click.argument("repo", type=REPO)
@click.argument("file", type=_FILE)
@secret_options
def export(repo: str, file: str, key_file: str | None, passphrase_file: str | None) -> None:
    """Write the master key of REPO to FILE, for a safe place.

    It opens the repository whatever becomes of its keys, and cannot be taken back. FILE is a
    --key-file to all commands.

    \b
    horcrux-cli key export /opt/horcrux-amcc /media/safe/amcc.master
    """
    from ..repository.keys import export_master

    with _encrypted(repo) as (store, repository_id):
        master, _ = _master(store, repository_id, key_file, passphrase_file)
        export_master(file, repository_id, master)
        click.echo(f"{os.path.abspath(file)} opens {store.url}: keep it where nobody else reads it")

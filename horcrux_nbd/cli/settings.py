"""`config` and `remote`: what is set on this host, and names for repositories."""

from __future__ import annotations

import click

from .. import config as configuration
from .. import paths
from ..units import format_size
from . import output


@click.command()
@output.json_option
def config(as_json: bool) -> None:
    """Show the configuration that is in effect.

    The file is TOML ($HORCRUX_CONFIG, else /etc/horcrux/config.toml for root, else
    ~/.config/horcrux/config.toml). All it can hold:

    \b
    [remotes.team]
    url = "scp://images@nas:/srv/horcrux"
    mirrors = ["s3://bucket/horcrux"]
    [cache]
    size = "20G"        # default: a fifth of the disk, at most 50G
    [store]
    timeout = 60        # seconds that a read waits for a store that is away, then it fails
    [attach]
    via = "fuse"        # nbd, ublk or fuse; default: the best there is
    """
    settings = configuration.load()
    value = {
        "file": str(settings.file),
        "exists": settings.exists,
        "root": str(paths.root()),
        "run": str(paths.run()),
        "cache": {"folder": str(paths.cache()), "size": settings.cache_size},
        "store": {"timeout": settings.store_timeout},
        "attach": {"via": settings.attach_via},
        "remotes": dict(settings.remotes),
        "mirrors": {name: list(urls) for name, urls in settings.mirrors.items()},
    }
    if as_json:
        output.emit_json(value)
        return
    size = "default" if settings.cache_size is None else format_size(settings.cache_size)
    output.facts(
        [
            ("file", f"{settings.file}{'' if settings.exists else ' (not there: defaults)'}"),
            ("state", str(paths.root())),
            ("sockets", str(paths.run())),
            ("cache.size", f"{size} ({paths.cache()})"),
            ("store.timeout", f"{settings.store_timeout or 'default (60)'} s"),
            ("attach.via", settings.attach_via or "default (the best there is)"),
            *(
                (f"remotes.{name}", " ".join((url, *settings.mirrors.get(name, ()))))
                for name, url in sorted(settings.remotes.items())
            ),
        ]
    )


@click.group()
def remote() -> None:
    """Names for repositories, to write instead of their URLs.

    \b
    horcrux-cli remote add team scp://images@nas:/srv/horcrux
    horcrux-cli ls team
    """


@remote.command()
@click.argument("name")
@click.argument("url")
@click.argument("mirrors", nargs=-1)
def add(name: str, url: str, mirrors: tuple[str, ...]) -> None:
    """Let NAME stand for the repository at URL. Nothing is asked of it now.

    MIRRORS are copies of it (`clone`, `sync`). Volumes that are made from then on read from the
    next one where one is away or has an object damaged. Pushes go to URL only.

    \b
    horcrux-cli remote add team 's3://bucket/prefix?region=eu-west-1' cp:///mnt/copy
    """
    kept = configuration.add_remote(name, url, mirrors=mirrors)
    also = f", with mirrors {', '.join(configuration.load().mirrors_of(kept))}" if mirrors else ""
    click.echo(f"{name} is {kept}{also}")


@remote.command("ls")
@output.json_option
def list_remotes(as_json: bool) -> None:
    """List the remotes."""
    remotes = dict(sorted(configuration.load().remotes.items()))
    if as_json:
        output.emit_json(remotes)
    elif remotes:
        output.table(("NAME", "URL"), list(remotes.items()))
    else:
        click.echo("there is no remote yet: horcrux-cli remote add NAME URL", err=True)


@remote.command("rm")
@click.argument("name")
def remove(name: str) -> None:
    """Forget a remote. What is stored there stays."""
    configuration.remove_remote(name)
    click.echo(f"{name} is forgotten; its repository was not touched")

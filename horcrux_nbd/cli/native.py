"""`native`: the filter in C that makes nbdkit serve what is local without Python."""

from __future__ import annotations

import click

from . import output


@click.group()
def native() -> None:
    """The native filter: volumes served several times as fast.

    nbdkit takes it only from its own version: build it again when nbdkit was upgraded. Without it
    everything works, more slowly. HORCRUX_NATIVE=0 in the environment leaves it out.

    \b
    horcrux-cli native build
    nbdkit --filter="$(horcrux-cli native path)" python "$(horcrux-cli plugin-path)" …
    """


@native.command()
@click.option("--if-needed", is_flag=True, help="Only where there is none that fits.")
def build(if_needed: bool) -> None:
    """Compile it for the nbdkit of this machine. Needs gcc and nbdkit-plugin-dev.

    Servers that run go on as they are; those that start from now on use it.
    """
    from ..native import build as building

    path = building.found() if if_needed else None
    if path is None:
        path = building.build()
    click.echo(output.printable(str(path)))


@native.command()
def path() -> None:
    """Print where it is. Exit code 9 if there is none that fits."""
    from ..native import build as building

    found = building.found()
    if found is None:
        raise building.not_there()
    click.echo(output.printable(str(found)))

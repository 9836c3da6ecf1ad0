"""`completion` and `plugin-path`: what other programs need to know about this one."""

from __future__ import annotations

import click

SHELLS = {
    "bash": "~/.bashrc",
    "zsh": "~/.zshrc",
    "fish": "~/.config/fish/completions/horcrux-cli.fish",
}


@click.command()
@click.argument("shell", type=click.Choice(list(SHELLS)))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print a script that completes words in your shell.

    \b
    bash   echo 'eval "$(horcrux-cli completion bash)"' >> ~/.bashrc
    zsh    echo 'eval "$(horcrux-cli completion zsh)"' >> ~/.zshrc
    fish   horcrux-cli completion fish > ~/.config/fish/completions/horcrux-cli.fish
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    root = ctx.find_root()
    assert root.info_name is not None
    variable = f"_{root.info_name.replace('-', '_').upper()}_COMPLETE"
    click.echo(kind(root.command, {}, root.info_name, variable).source())


@click.command("plugin-path")
def plugin_path() -> None:
    """Print the path of the nbdkit plugin of this installation.

    \b
    nbdkit python "$(horcrux-cli plugin-path)" \\
        repo=scp://user@host:/opt/horcrux-amcc name=AMCC overlay=/var/tmp/o

    `nbdkit python "$(horcrux-cli plugin-path)" --help` lists its keys.
    """
    from .. import server

    click.echo(server.plugin_path())

"""Completion in real shells, and the plugin's path."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from .support import PROGRAM, run


def complete(words: str, incomplete: str) -> list[str]:
    """What bash is told to offer behind `words`."""
    line = f"horcrux-cli {words} {incomplete}".replace("  ", " ")
    done = subprocess.run(
        [PROGRAM],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={
            **os.environ,
            "_HORCRUX_CLI_COMPLETE": "bash_complete",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(words.split()) + 1),
        },
    )
    return [text.partition(",")[2] for text in done.stdout.splitlines()]


def test_commands_and_options() -> None:
    assert complete("", "gen") == ["generate"]
    assert set(complete("cache", "")) == {"ls", "size", "trim", "clear"}
    assert "--chunksize" in complete("generate", "--ch")


def test_volumes_and_remotes(made_repository: Path) -> None:
    run("create", "amcc", made_repository, "AMCC")
    run("remote", "add", "team", made_repository)
    assert complete("umount", "a") == ["amcc"]
    assert complete("create x", "te") == ["team"]


def test_a_broken_configuration_breaks_no_shell(horcrux_host: Path) -> None:
    horcrux_host.mkdir()
    (horcrux_host / "config.toml").write_text("[cash]")
    assert complete("create x", "te") == ["te"]  # as a folder, for the shell to complete


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts(shell: str) -> None:
    script = run("completion", shell).out
    assert "_HORCRUX_CLI_COMPLETE" in script
    assert "horcrux-cli" in script
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True, timeout=30)


def test_bash_takes_it() -> None:
    """The line that the help tells to put into ~/.bashrc works."""
    line = f'eval "$({PROGRAM} completion bash)"; complete -p horcrux-cli'
    done = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, timeout=60, check=True
    )
    assert "horcrux-cli" in done.stdout


def test_plugin_path() -> None:
    path = Path(run("plugin-path").out.strip())
    assert path.name == "plugin.py"
    done = subprocess.run(
        ["nbdkit", "python", path, "--dump-plugin"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "horcrux_version=" in done.stdout

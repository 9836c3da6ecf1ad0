"""What every command has in common: help, exit codes, one line for an error, start-up."""

from __future__ import annotations

import inspect
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

from horcrux_nbd import __version__, errors
from horcrux_nbd.cli import main as cli

from .support import LIMIT, PROGRAM, fails, make_directory, run

DOCS = Path(__file__).parents[2] / "docs" / "cli.md"


def one_of(group: click.Group, name: str) -> click.Command:
    found = group.get_command(click.Context(group), name)
    assert found is not None
    return found


def commands() -> list[list[str]]:
    """The words of every command, groups' own included."""
    found: list[list[str]] = []

    def walk(command: click.Command, words: list[str]) -> None:
        if words:
            found.append(words)
        if isinstance(command, click.Group):
            for name in command.list_commands(click.Context(command)):
                walk(one_of(command, name), [*words, name])

    walk(cli.cli, [])
    return found


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_teaches(words: list[str]) -> None:
    """Each has a purpose in one line, an example of itself, and help for each option."""
    command: click.Command = cli.cli
    for word in words:
        assert isinstance(command, click.Group)
        command = one_of(command, word)
    purpose = (command.help or "").split("\n\n")[0]
    assert purpose.strip().endswith("."), f"{words} says not what it is for"
    assert len(purpose.splitlines()) <= 2
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{words} {parameter.opts} has no help"
    takes_words = any(isinstance(p, click.Argument) and p.required for p in command.params)
    if takes_words and words[0] != "remote":
        assert "horcrux-cli" in (command.help or ""), f"{words} has no example"


def test_help_names_every_command() -> None:
    text = run("--help").out
    for words in commands():
        assert re.search(rf"^  {words[0]}  ", text, re.MULTILINE), words[0]
    assert "VERSION" in text
    assert run("-h").out == text


def test_version() -> None:
    assert __version__ in run("--version").out


def test_start_is_quick_and_lazy() -> None:
    """What takes long to import is not needed to say what commands there are."""
    code = (
        "import sys; from horcrux_nbd.cli.main import main; main(['--help'])\n"
        "slow = {'boto3', 'botocore', 'paramiko', 'cryptography', 'rich'}\n"
        "print(sorted(slow & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT, check=True
    )
    assert done.stderr.strip() == "[]"
    best = min(_seconds_of_help() for _ in range(5))
    assert best < 0.5, f"--help takes {best:.2f} s"  # 0.15 s alone; others use this machine too


def _seconds_of_help() -> float:
    began = time.monotonic()
    run("--help")
    return time.monotonic() - began


def test_exit_codes_are_those_of_the_docs() -> None:
    told: dict[str, int] = {}
    for code, names in re.findall(r"^\| (\d+) \| .* \| ([\w, ]*)\|$", DOCS.read_text(), re.M):
        told |= {name.strip(): int(code) for name in names.split(",") if name.strip()}
    real = {
        name: kind.exit_code
        for name, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, errors.HorcruxError)
    }
    assert told == real
    assert (cli.INTERRUPTED, cli.OUTPUT_CLOSED, cli.TERMINATED) == (130, 141, 143)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nonsense"], "nonsense"),
        (["ls", "--nonsense"], "--nonsense"),
        (["create", "amcc"], "REPO"),
        (["cache"], None),
        (["mount", "amcc"], "VOLUME DIR"),
        (["completion", "tcsh"], "tcsh"),
        (["cache", "ls", "-n", "many"], "many"),
    ],
)
def test_a_wrong_request_is_one_line(words: list[str], said: str | None) -> None:
    if said is None:  # a group alone shows its help
        assert "Commands:" in "".join(run(*words, ok=False).__dict__[k] for k in ("out", "err"))
        return
    assert said in fails(2, *words)


def test_os_errors_are_one_line(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.mkdir()
    assert "Is a directory" in fails(1, "config", env={"HORCRUX_CONFIG": str(config)})


def test_debug_shows_where(tmp_path: Path) -> None:
    for words, env in ((["--debug"], {}), ([], {"HORCRUX_DEBUG": "1"})):
        result = run(*words, "ls", tmp_path, env=env, ok=False)
        assert result.code == 3
        assert "Traceback" in result.err
        assert result.err.splitlines()[-1].startswith("horcrux-cli: ")


def test_closed_output_is_quiet(made_repository: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as output:
        done = subprocess.run(
            [PROGRAM, "ls", made_repository],
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
            timeout=LIMIT,
            check=False,
        )
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_a_signal_ends_it_cleanly(tmp_path: Path, number: int, code: int, said: str) -> None:
    """One line, its exit code, and no temporary file: `generate` was in the middle."""
    source = make_directory(tmp_path / "source")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    (source / "big").write_bytes(os.urandom(1 << 20) * 300)
    child = subprocess.Popen(
        [PROGRAM, "generate", "--temporary", temporary, "X", source, tmp_path / "r"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stderr is not None
    for line in child.stderr:
        if line.startswith("image of"):
            break
    child.send_signal(number)
    _, err = child.communicate(timeout=LIMIT)
    assert child.returncode == code
    assert err.splitlines()[-1] == f"horcrux-cli: {said}"
    assert "Traceback" not in err
    assert list(temporary.iterdir()) == []
    assert "X" not in run("ls", "--json", tmp_path / "r", ok=False).out


def test_a_near_command_is_suggested() -> None:
    assert fails(2, "comit", "v").startswith("no such command 'comit': did you mean commit?")
    assert fails(2, "xyzzy").startswith("no such command 'xyzzy' ")

"""The command `horcrux-cli`: its commands, and what happens when one fails."""

from __future__ import annotations

import difflib
import errno
import importlib
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

import click

from .. import __version__, config
from ..errors import HorcruxError, UsageError
from .words import WORDS

PROGRAM = "horcrux-cli"
INTERRUPTED = 130  # 128 + SIGINT, as shells count
TERMINATED = 143  # 128 + SIGTERM
OUTPUT_CLOSED = 141  # 128 + SIGPIPE
KEY_FILE = "HORCRUX_KEY_FILE"  # as keyring.py has it
HICCUP = 5.0  # seconds

# Command: the module that has it, which is imported when it is wanted: all of them together take
# longer than most commands.
SECTIONS: dict[str, dict[str, str]] = {
    "The way in": {
        "generate": "generate",
        "clone": "upkeep",
        "sync": "upkeep",
        "verify": "repositories",
        "repair": "upkeep",
        "gc": "upkeep",
    },
    "What is there": {
        "ls": "files",
        "cat": "files",
        "restore": "files",
        "log": "versions_log",
        "show": "versions_log",
        "diff": "versions_diff",
        "status": "volumes",
    },
    "Volumes": {
        "create": "volumes_make",
        "mount": "volumes",
        "umount": "volumes",
        "attach": "volumes",
        "detach": "volumes",
        "serve": "volumes",
        "profile": "profile",
        "rm": "volumes_make",
    },
    "Versions": {
        "commit": "versions",
        "push": "versions",
        "fetch": "versions",
        "pull": "versions",
        "checkout": "versions_move",
        "branch": "versions_refs",
        "tag": "versions_refs",
        "reflog": "versions_refs",
        "revert": "versions_move",
        "reset": "versions_move",
        "stash": "versions_move",
    },
    "This host": {
        "cache": "cache",
        "pin": "pin",
        "doctor": "doctor",
        "key": "key",
        "native": "native",
        "config": "settings",
        "remote": "settings",
        "plugin-path": "completion",
        "completion": "completion",
    },
}

HELP = f"""Versioned disk images: a private, writable copy of any data set in seconds.

A directory becomes a repository (chunks in a plain folder, on an SSH server or in S3), and a
version in it becomes a disk that fetches what is read and keeps what is written:

\b
  horcrux-cli generate AMCC /srv/postgres /opt/horcrux-amcc
  horcrux-cli ls cp:///opt/horcrux-amcc
  horcrux-cli create amcc cp:///opt/horcrux-amcc AMCC
  horcrux-cli mount amcc /mnt/amcc
  horcrux-cli status
  horcrux-cli umount amcc

{WORDS}
"""


class _OutputClosed(BaseException):
    """`horcrux-cli ls | head`: nobody reads on."""


class Commands(click.Group):
    """A group whose help lists the commands by what they are about."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise _OutputClosed from None  # click would make it a failure like any other

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for commands in SECTIONS.values() for name in commands]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        for commands in SECTIONS.values():
            if cmd_name in commands:
                module = importlib.import_module(f"{__package__}.{commands[cmd_name]}")
                command = getattr(module, cmd_name.replace("-", "_"))
                assert isinstance(command, click.Command)
                return command
        return None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            near = difflib.get_close_matches(args[0], self.list_commands(ctx), 1)
            if near:
                told = f"No such command {args[0]!r}: did you mean {near[0]}?"
                raise click.UsageError(told, ctx) from error
            raise

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, commands in SECTIONS.items():
            with formatter.section(title):
                found = ((name, self.get_command(ctx, name)) for name in commands)
                lines = [(name, one.get_short_help_str(66)) for name, one in found if one]
                formatter.write_dl(lines, col_max=11)


@click.group(
    cls=Commands,
    help=HELP,
    epilog="Exit codes are in docs/cli.md. `horcrux-cli COMMAND --help` has an example of each.",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, "-V", "--version", prog_name=PROGRAM)
@click.option(
    "--debug", is_flag=True, help="Say what is done; a traceback on errors (HORCRUX_DEBUG=1)."
)
def cli(debug: bool) -> None:
    _set_up_log(debug or _debugging())
    try:
        settings = config.load()
    except UsageError:
        return  # told by who needs it: others can still mend it
    os.environ.update(settings.environment())


def _debugging() -> bool:
    return os.environ.get("HORCRUX_DEBUG", "") not in ("", "0") or "--debug" in sys.argv


class _Log(logging.Handler):
    """Lines on whatever is standard error at that moment: a progress bar replaces it."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(f"{PROGRAM}: {record.levelname.lower()}: {record.getMessage()}", err=True)


class _Hiccup(logging.Filter):
    """Drops warnings of the first seconds, about a store that is tried again: either that passes,
    or it ends in an error that says the same.
    """

    def __init__(self) -> None:
        super().__init__()
        self._until = time.monotonic() + HICCUP

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno > logging.WARNING or time.monotonic() > self._until


def _set_up_log(debug: bool) -> None:
    root = logging.getLogger()
    root.handlers = [_Log()]
    root.setLevel(logging.DEBUG if debug else logging.WARNING)
    if not debug:
        logging.getLogger("horcrux_nbd.chunkstore").addFilter(_Hiccup())
    # boto3 and paramiko tell a lot, and some of it (headers, keys' names) is none of a log's
    # business.
    for library in ("boto3", "botocore", "urllib3", "paramiko", "s3transfer"):
        logging.getLogger(library).setLevel(logging.CRITICAL)


class _Terminated(BaseException):
    """SIGTERM or SIGHUP, so that `finally` runs and temporary files go."""


def _terminate(number: int, frame: FrameType | None) -> None:
    raise _Terminated


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code (docs/cli.md). The entry point of `horcrux-cli`."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup's choice stands
            signal.signal(number, _terminate)
    if path := os.environ.get(KEY_FILE):
        os.environ[KEY_FILE] = os.path.abspath(path)  # for servers, which run elsewhere
    try:
        result = cli.main(
            args=None if arguments is None else list(arguments),
            prog_name=PROGRAM,
            standalone_mode=False,
        )
        sys.stdout.flush()
    except (_OutputClosed, BrokenPipeError):
        # Nobody is left to tell, and Python would complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OUTPUT_CLOSED
    except (HorcruxError, click.ClickException, OSError) as error:
        if _debugging() and not isinstance(error, click.ClickException):
            logging.getLogger(__name__).debug("traceback", exc_info=True)
            sys.excepthook(type(error), error, error.__traceback__)
        return _failed(error)
    except (KeyboardInterrupt, click.Abort):
        return _say("interrupted", INTERRUPTED)
    except _Terminated:
        return _say("terminated", TERMINATED)
    return result if isinstance(result, int) else 0


def _failed(error: Exception) -> int:
    if isinstance(error, HorcruxError):
        return _say(str(error), error.exit_code)
    if isinstance(error, click.ClickException):
        return _say(_usage(error), error.exit_code)
    assert isinstance(error, OSError)
    what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    return _say(what, 8 if error.errno in (errno.ENOSPC, errno.EDQUOT) else 1)


def _usage(error: click.ClickException) -> str:
    text = error.format_message().rstrip(".")
    context = getattr(error, "ctx", None)
    if context is None:
        return text
    return f"{text[:1].lower()}{text[1:]} (see `{context.command_path} --help`)"


def _say(text: str, code: int) -> int:
    click.echo(f"{PROGRAM}: {' '.join(text.split())}", err=True)
    return code

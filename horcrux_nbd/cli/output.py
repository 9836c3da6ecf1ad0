"""What commands print: tables and JSON on standard output, nothing else there.

Text of a repository (messages, authors, labels) comes from elsewhere: `printable` keeps a
terminal's control characters out of it.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import click

SHORT_ID = 12  # hex digits: 48 bits, as git's for a large project
JSON_HELP = "Print JSON (keys: docs/cli.md)."


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--json`, as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help=JSON_HELP)(command)


def quiet_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--quiet`: no progress."""
    return click.option("-q", "--quiet", is_flag=True, help="No progress and no notes.")(command)


def emit_json(value: Any) -> None:
    """`value` as JSON on standard output; times in it are ISO 8601 in UTC, sizes bytes."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def printable(text: str) -> str:
    """`text` on one line, without characters that a terminal would obey."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "�" for c in text).strip()


def when(iso: str) -> str:
    """A time of a commit or volume for people: local, to the minute."""
    try:
        return datetime.fromisoformat(iso).astimezone().strftime("%Y-%m-%d %H:%M")
    except ValueError:
        return printable(iso)


def who(author: str) -> str:
    """The name in `Name <mail>`, for a table."""
    return author.partition("<")[0].strip() or author


def short(oid: bytes | str) -> str:
    """The beginning of an id, long enough to name it."""
    return (oid.hex() if isinstance(oid, bytes) else oid)[:SHORT_ID]


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> None:
    """Aligned columns; `right` names those of numbers. On a terminal the last one is cut to fit."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[at]) for row in [headers, *rows]) for at in range(len(headers))]
    limit = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    for row in [headers, *rows]:
        cells = [
            cell.rjust(width) if header in right else cell.ljust(width)
            for cell, width, header in zip(row, widths, headers, strict=True)
        ]
        line = "  ".join(cells).rstrip()
        fixed = sum(widths[:-1]) + 2 * (len(widths) - 1)
        if limit and len(line) > limit > fixed + 10:
            line = line[: limit - 1] + "…"
        click.echo(line)


def facts(pairs: Sequence[tuple[str, str]]) -> None:
    """`what   value` lines, aligned."""
    width = max((len(what) for what, _ in pairs), default=0)
    for what, value in pairs:
        click.echo(f"{what.ljust(width)}  {printable(value)}".rstrip())


def plural(count: int, what: str) -> str:
    """`1 object`, `2 objects`."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"

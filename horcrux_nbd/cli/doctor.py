"""`doctor`: what this machine, or a repository, lacks, and how to mend it."""

from __future__ import annotations

import itertools
from dataclasses import asdict

import click

from .. import config
from ..errors import EnvironmentProblem, UsageError
from . import output
from .words import REPO

COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@click.command()
@click.argument("repo", required=False, type=REPO)
@click.option("--write", is_flag=True, help="Also try to write to REPO (a probe, then removed).")
@output.json_option
def doctor(repo: str | None, write: bool, as_json: bool) -> None:
    """Check what Horcrux needs here, and say how to mend it.

    With REPO: also whether that can be read. Each line is ok, warn (something is not possible or
    not good, the rest works) or fail. Exit code 9 if something failed.

    \b
    horcrux-cli doctor
    horcrux-cli doctor --write scp://me@nas:/srv/images
    """
    from . import checks

    if write and repo is None:
        raise UsageError("--write tries a repository: say which")
    found: list[checks.Finding] = []
    every = checks.this_host()
    if repo is not None:
        every = itertools.chain(every, checks.repository(config.load().url(repo), write))
    for finding in every:
        found.append(finding)
        if not as_json:
            level = click.style(f"{finding.level:4}", fg=COLOURS[finding.level])
            click.echo(f"{level}  {finding.check:13}  {output.printable(finding.what)}")
            if finding.mend:
                click.echo(f"{'':21}→ {output.printable(finding.mend)}")
    failed = [finding.check for finding in found if finding.level == checks.FAIL]
    if as_json:
        output.emit_json({"ok": not failed, "checks": [asdict(finding) for finding in found]})
    if failed:
        raise EnvironmentProblem(
            f"{output.plural(len(failed), 'check')} failed: {', '.join(failed)}"
        )

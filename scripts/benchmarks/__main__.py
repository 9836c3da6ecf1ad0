"""`scripts/bench`: runs benchmarks and prints their tables."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import click

from . import report
from .common import Missing, Table

ALL = {  # in the order they run; what QUICK has by default with --quick
    "open": "open_size",
    "memory": "memory",
    "warm": "warm",
    "generate": "generate_speed",
    "lazy": "lazy",
    "cold": "cold",
    "pages": "page_updates",
    "freeze": "freeze",
    "refresh": "refresh",
    "history": "history_size",
    "docker": "docker_volumes",
    "encryption": "encryption",
}
QUICK = ("open", "warm", "generate", "lazy", "pages")
# What the benchmarks read when they are imported: size of the database, rounds, seconds of a job.
SMALL = {"SCALE": "6", "ROUNDS": "1", "SECONDS": "1", "PEERS": "Horcrux,nbdkit curl,rsync"}


@click.command(
    help="Measures Horcrux against its peers. BENCHMARK: one or more of " + ", ".join(ALL)
)
@click.argument("benchmarks", nargs=-1, type=click.Choice(list(ALL)), metavar="[BENCHMARK]…")
@click.option("--quick", is_flag=True, help="Small data, few rounds: under 3 minutes for all.")
@click.option("--write", is_flag=True, help="Keep the results in docs/benchmarks.")
@click.option(
    "--scratch",
    type=click.Path(file_okay=False, path_type=Path),
    help="A folder for databases and images, kept for the next run (default: a temporary one).",
)
def main(benchmarks: tuple[str, ...], quick: bool, write: bool, scratch: Path | None) -> None:
    kept = scratch is not None
    if scratch is None:
        folder = os.environ.get("TMPDIR", "/var/tmp")
        scratch = Path(tempfile.mkdtemp(prefix="horcrux-bench-", dir=folder))
    scratch.mkdir(exist_ok=True)
    scratch.chmod(0o755)  # PostgreSQL runs as a user of its own
    # As pip leaves an installation: compiled.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["HORCRUX_ROOT"] = str(scratch / "root")
    os.environ["HORCRUX_RUN"] = str(scratch / "run")
    if quick:
        os.environ.update({name: os.environ.get(name, value) for name, value in SMALL.items()})
    tables: dict[str, Table] = {}
    try:
        for name in benchmarks or (QUICK if quick else tuple(ALL)):
            try:
                tables[name] = import_module(f".{ALL[name]}", __package__).main(scratch)
            except Missing as error:
                print(f"### {name}\n\nnot measured: {error}\n")
                continue
            print(tables[name].markdown(), flush=True)
    finally:
        if not kept:
            shutil.rmtree(scratch, ignore_errors=True)
    print(report.bars_table(tables).markdown())
    for line in report.compare(tables):
        print(line)
    if write:
        for path in report.write(tables, " ".join(["scripts/bench", *sys.argv[1:]])):
            print(f"wrote {path}")


if __name__ == "__main__":
    main()

"""The Docker volume driver: `docker volume create` to the first query, and how long calls take."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.driver.support import FOLDER, PLUGINS, DriverProcess, shared_folder
from tests.servers import dockerd as daemons
from tests.servers.postgres import Database

from .common import Missing, Table, cli, database, folder_bytes, postgres_bin

VOLUMES = int(os.environ.get("VOLUMES", "100"))
SCALE = int(os.environ.get("SCALE", "40"))  # of pgbench; 40 is about 0.8 GB
ROUNDS = 3
CALLS = ("Create", "Get", "Mount", "Path", "List", "Unmount", "Remove")
QUERY = "SELECT abalance FROM pgbench_accounts WHERE aid = 4711"


@contextlib.contextmanager
def _host(name: str) -> Iterator[None]:
    """State and sockets of their own, gone at the end."""
    for what in ("ROOT", "RUN"):
        os.environ[f"HORCRUX_{what}"] = str(FOLDER / name / what.lower())
    os.environ["HORCRUX_CONFIG"] = str(FOLDER / name / "config.toml")
    try:
        yield
    finally:
        shutil.rmtree(FOLDER / name, ignore_errors=True)


@contextlib.contextmanager
def _driver(scratch: Path, docker_host: str) -> Iterator[DriverProcess]:
    process = DriverProcess(scratch, docker_host)
    process.words = ["--docker-host", docker_host, "--log-level", "warning"]
    process.start()
    try:
        yield process
    finally:
        process.stop()


def quantile(values: Sequence[float], part: float) -> float:
    """The smallest value that `part` of them do not exceed."""
    return sorted(values)[max(0, math.ceil(part * len(values)) - 1)]


def calls(scratch: Path) -> Table:
    """Each call as Docker makes it, over the driver's socket, one after another."""
    source = scratch / "small"
    source.mkdir(exist_ok=True)
    (source / "file").write_bytes(os.urandom(1 << 20))
    repository = scratch / "repo-calls"
    shutil.rmtree(repository, ignore_errors=True)
    cli("generate", "-q", "--size", "64M", "SMALL", source, repository)
    options = {"name": "SMALL", "access": str(repository), "on-remove": "delete"}
    took: dict[str, list[float]] = {call: [] for call in CALLS}
    with _host("c"), _driver(scratch, "unix:///nonexistent") as driver:
        driver.ask("Plugin.Activate")
        for call in CALLS:
            for number in range(VOLUMES):
                body: dict[str, object] = {"Name": f"volume{number}"}
                if call == "Create":
                    body["Opts"] = options
                if call in ("Mount", "Unmount"):
                    body["ID"] = "1"
                began = time.monotonic()
                driver.ask(call, **({} if call == "List" else body))
                took[call].append(time.monotonic() - began)
    table = Table(
        f"calls of the Docker volume driver, {VOLUMES} volumes", ["call", "p50", "p99", "largest"]
    )
    for call, values in took.items():
        shown = (statistics.median(values), quantile(values, 0.99), max(values))
        table.rows.append((call, *(f"{value * 1000:,.1f} ms" for value in shown)))
    table.notes.append(
        "One after another, through the driver's socket; all volumes are mounted when Path and "
        "List are asked. Mount is nbdkit started, attached, mounted and verified; Unmount is "
        "everything written durable, and all of that gone."
    )
    return table


def first_query(scratch: Path) -> Table:
    """What a user waits for: two docker commands, and the database answers."""
    if not daemons.available():
        raise Missing(daemons.MISSING)
    postgres_bin()
    data = database(scratch, SCALE)
    repository = scratch / "repo-docker"
    shutil.rmtree(repository, ignore_errors=True)
    read = json.loads(cli("generate", "--json", "PG", data, repository))["read_bytes"]
    pg = Database(scratch, "bench")
    found: list[tuple[float, float, float]] = []
    options = ("-o", "on-remove=delete", "-o", "name=PG", "-o", f"access={repository}")
    # Short: containerd's sockets lie deep below it, and have 107 bytes.
    with tempfile.TemporaryDirectory(prefix="hd", dir="/tmp") as folder:
        with (
            daemons.dockerd(Path(folder), PLUGINS) as docker,
            _driver(scratch, docker.host) as driver,
        ):
            for number in range(ROUNDS + 1):
                with _host(f"q{number}"), _restarted(driver):
                    began = time.monotonic()
                    docker("volume", "create", "-d", driver.name, *options, "pg")
                    created = time.monotonic()
                    with pg.container(docker, "pg", "db"):
                        pg.query(QUERY)
                        answered = time.monotonic()
                        fetched = json.loads(cli("status", "pg", "--json"))["fetched_bytes"]
                    docker("volume", "rm", "pg")
                    if number:  # the first one loads programs from the disk
                        found.append((created - began, answered - began, fetched))
    table = Table(
        "`docker volume create` to the first query of a PostgreSQL container",
        ["volume create", "to first query", "fetched"],
    )
    create, query, bytes_ = (statistics.median(column) for column in zip(*found, strict=True))
    table.rows.append((f"{create:.2f} s", f"{query:.2f} s", f"{bytes_ / read:.2%}"))
    table.notes.append(
        f"{read / 1e9:.1f} GB of data ({folder_bytes(repository) / 1e9:.1f} GB stored); empty "
        f"cache; start of the container and of PostgreSQL included; medians of {ROUNDS}."
    )
    return table


@contextlib.contextmanager
def _restarted(driver: DriverProcess) -> Iterator[None]:
    """The driver on the host that is set now."""
    driver.restart()
    yield


def main(scratch: Path) -> Table:
    with shared_folder():
        print(first_query(scratch).markdown(), flush=True)
        return calls(scratch)

"""Mount to first query of a PostgreSQL database that lies in a remote repository."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import time
from pathlib import Path

from tests.servers.moto_s3 import moto
from tests.servers.proxy import proxy
from tests.servers.sshd import sshd

from .common import Table, cli, database, postgres, query

TITLE = "First query"
SCALE = int(os.environ.get("SCALE", "150"))  # of pgbench; 150 is about 2.5 GB
ROUNDS = 3
NETWORKS = (("local", 0.0, 0.0), ("20 ms, 1 Gb/s", 0.010, 125e6))  # name, one-way seconds, bytes/s


def first_query(scratch: Path, url: str, number: int) -> tuple[float, float]:
    """Seconds from `mount` to the answer, and the part of the image's data that was fetched."""
    os.environ["HORCRUX_ROOT"] = str(scratch / f"root-{number}")
    os.environ["HORCRUX_RUN"] = str(scratch / "run")
    target = scratch / "mnt"
    target.mkdir(exist_ok=True)
    cli("create", "pg", url, "PG")
    began = time.monotonic()
    cli("mount", "pg", target)
    try:
        with postgres(target, scratch / "pgsocket"):
            query(scratch / "pgsocket", "SELECT abalance FROM pgbench_accounts WHERE aid = 4711")
            seconds = time.monotonic() - began
            fetched = json.loads(cli("status", "pg", "--json"))["fetched_bytes"]
    finally:
        cli("umount", "pg")
    shutil.rmtree(scratch / f"root-{number}")
    return seconds, fetched


def main(scratch: Path) -> Table:
    data = database(scratch, SCALE)
    table = Table(
        "mount to first query of a PostgreSQL database",
        ["store", "network", "time", "fetched"],
    )
    repository = scratch / "repo-q"
    shutil.rmtree(repository, ignore_errors=True)
    answer = json.loads(cli("generate", "--json", "PG", data, repository))
    total = answer["read_bytes"]
    (scratch / "sshd").mkdir(exist_ok=True)
    (scratch / "moto").mkdir(exist_ok=True)
    with sshd(scratch / "sshd") as ssh, moto(scratch / "moto") as s3:
        os.environ["HORCRUX_SSH_CONFIG"] = str(ssh.write_config())
        os.environ.update(s3.environment())
        s3.client().create_bucket(Bucket="bench")
        client = s3.client()
        for path in repository.rglob("*"):
            if path.is_file():
                client.upload_file(str(path), "bench", str(path.relative_to(repository)))
        number = 0
        for name, delay, rate in NETWORKS:
            with (
                proxy(ssh.port, delay=delay, rate=rate) as a,
                proxy(s3.port, delay=delay, rate=rate) as b,
            ):
                ssh.trust(a.port)
                urls = {
                    "scp://": ssh.url(repository, a.port),
                    "s3://": f"s3://bench?region=us-east-1&endpoint=http://127.0.0.1:{b.port}",
                }
                for scheme, url in urls.items():
                    found = []
                    for _ in range(ROUNDS):
                        number += 1
                        found.append(first_query(scratch, url, number))
                    table.rows.append(
                        (
                            scheme,
                            name,
                            f"{statistics.median(t for t, _ in found):.2f} s",
                            f"{statistics.median(f for _, f in found) / total:.2%}",
                        )
                    )
    table.notes.append(
        f"{total / 1e9:.1f} GB of data; serve, attach, mount, start of PostgreSQL (which replays "
        f"nothing), one query by primary key; empty cache; medians of {ROUNDS}; sshd and moto's S3 "
        "server on this machine behind a proxy that makes the network."
    )
    return table

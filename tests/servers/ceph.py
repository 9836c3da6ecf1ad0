"""radosgw on a one-node Ceph: a real S3 server, by scripts/ceph-s3."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from .moto_s3 import S3Server

FLAG = "HORCRUX_TEST_CEPH"
SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "ceph-s3"


def missing() -> str:
    """Why there is none in this run, and how to get it; empty if there is."""
    if os.environ.get(FLAG) != "1":
        return f"set {FLAG}=1, as root, for tests on a real S3 server (Ceph; installs it by apt)"
    if os.geteuid() != 0:
        return "Ceph's daemons need root here"
    return ""


@contextlib.contextmanager
def ceph(folder: Path) -> Iterator[S3Server]:
    """A Ceph cluster with its files in `folder`."""
    result = subprocess.run(
        [SCRIPT, "start", folder], check=True, stdout=subprocess.PIPE, text=True, timeout=600
    )
    try:
        values = dict(line.split("=", 1) for line in result.stdout.splitlines() if "=" in line)
        yield S3Server(values["endpoint"], Path(values["credentials"]))
    finally:
        subprocess.run([SCRIPT, "stop", folder], check=True, timeout=120)

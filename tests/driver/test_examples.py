"""The examples: a database by `docker-compose`, and the files themselves."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.servers.dockerd import Dockerd
from tests.servers.postgres import Database, import_host
from tests.servers.process import PATIENCE

from .support import DriverProcess
from .test_survival import database, database_repository

__all__ = ["database", "database_repository"]  # fixtures

EXAMPLES = Path(__file__).parents[2] / "examples"
COMPOSE = shutil.which("docker-compose")

needs_compose = pytest.mark.skipif(
    COMPOSE is None, reason="needs docker-compose: apt-get install docker-compose"
)


def compose(docker: Dockerd, *words: str | Path, **environment: str) -> str:
    done = subprocess.run(
        [str(COMPOSE), *map(str, words)],
        capture_output=True,
        text=True,
        timeout=120 * PATIENCE,
        env={**os.environ, "DOCKER_HOST": docker.host, "PYTHONPATH": "", **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_compose
@pytest.mark.timeout(300 * PATIENCE)
def test_compose_up(
    docker: Dockerd,
    dv: DriverProcess,
    database: Database,
    database_repository: Path,
    tmp_path: Path,
) -> None:
    """`up`, a row, `down`, `up`: it is there. The database is this machine's, not an image's."""
    import_host(docker)
    (tmp_path / "override.json").write_text(
        json.dumps(
            {
                "services": {
                    "db": {
                        "volumes": ["/usr:/usr:ro", "/etc:/etc:ro", f"{database.sockets}:/sockets"],
                        "stop_signal": "SIGINT",
                    }
                }
            }
        )
    )
    programs = database.bin / "postgres"
    settings = {
        "DB_IMAGE": "host",
        "DB_COMMAND": f"{programs} -D /var/lib/postgresql/data -k /sockets -c listen_addresses=",
        "DB_USER": str(pwd.getpwnam("postgres").pw_uid),
        "DB_NETWORK": "none",
        "HORCRUX_DRIVER": dv.name,
        "IMAGE": "PG",
        "REPOSITORY": str(database_repository),
    }
    files = ("-p", "shop", "-f", EXAMPLES / "compose.yaml", "-f", tmp_path / "override.json")
    for rows in (0, 1):
        compose(docker, *files, "up", "-d", **settings)
        database.wait()
        assert database.rows() == rows
        database.query("INSERT INTO ledger (who) VALUES (1)")
        compose(docker, *files, "down", **settings)
    assert docker.inspect("shop_amcc")["Driver"] == dv.name
    assert "exist nowhere else" in docker.fails("volume", "rm", "shop_amcc")


@needs_compose
def test_what_must_be_said(docker: Dockerd) -> None:
    """Both files are sound, and ask for the repository."""
    for name in ("compose.yaml", "swarm.yaml"):
        found = compose(docker, "-f", EXAMPLES / name, "config", REPOSITORY="team")
        assert "access: team" in found
        done = subprocess.run(
            [str(COMPOSE), "-f", EXAMPLES / name, "config"],
            capture_output=True, text=True, timeout=120 * PATIENCE, check=False,
        )  # fmt: skip
        assert done.returncode != 0
        assert "the URL of a repository" in done.stderr

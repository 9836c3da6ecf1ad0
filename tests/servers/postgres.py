"""This machine's PostgreSQL: a data directory, and a container that runs on one."""

from __future__ import annotations

import contextlib
import io
import pwd
import shutil
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

from .dockerd import Dockerd
from .process import PATIENCE

MISSING = "needs PostgreSQL: apt-get install postgresql"
IMAGE = "host"  # shows /usr and /etc of this machine
LIMIT = 120.0 * PATIENCE  # seconds for one query, or for the server to answer


def programs() -> Path | None:
    """The folder of its programs."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return found[-1].parent if found else None


def available() -> bool:
    return programs() is not None


def _run(*words: str | Path, limit: float = LIMIT) -> str:
    """As the user postgres, who alone may run it."""
    done = subprocess.run(
        ["runuser", "-u", "postgres", "--", *map(str, words)],
        capture_output=True,
        text=True,
        cwd="/",
        timeout=limit,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


class Database:
    """Listens in `sockets`, below `folder`. `name` is that of the database to ask."""

    def __init__(self, folder: Path, name: str = "postgres") -> None:
        self.name = name
        self.sockets = folder / "pg"
        self.sockets.mkdir(exist_ok=True)
        shutil.chown(self.sockets, "postgres")
        found = programs()
        assert found is not None
        self.bin = found

    def query(self, sql: str) -> str:
        return _run(self.bin / "psql", "-h", self.sockets, "-d", self.name, "-Atc", sql)

    def answers(self) -> bool:
        with contextlib.suppress(AssertionError):
            return self.query("SELECT 1") == "1"
        return False

    def wait(self) -> None:
        deadline = time.monotonic() + LIMIT
        while not self.answers():
            assert time.monotonic() < deadline, "PostgreSQL does not answer"
            time.sleep(0.1)

    def make(self, data: Path, scale: int = 1) -> None:
        """A stopped data directory with the tables of pgbench, and an empty one, `ledger`."""
        data.mkdir()
        shutil.chown(data, "postgres")
        _run(self.bin / "initdb", "-D", data, "--auth=trust", "--no-sync")
        options = f"-k {self.sockets} -c listen_addresses= -c fsync=off"
        ctl = (self.bin / "pg_ctl", "-D", data, "-w", "-s")
        _run(*ctl, "-o", options, "-l", self.sockets / "log", "start")
        try:
            connect = ("-h", self.sockets, self.name)
            _run(self.bin / "pgbench", "-i", "-q", "-n", "-s", str(scale), *connect)
            self.query("CREATE TABLE ledger (n serial PRIMARY KEY, who int, at timestamptz)")
        finally:
            _run(*ctl, "-m", "fast", "stop")

    @contextlib.contextmanager
    def container(self, docker: Dockerd, volume: str, name: str) -> Iterator[None]:
        """PostgreSQL in a container on `volume`, which answers; stopped and removed at the end."""
        import_host(docker)
        docker(
            "run", "-d", "--name", name,
            *("-u", str(pwd.getpwnam("postgres").pw_uid), "--stop-signal", "SIGINT"),
            *("-v", "/usr:/usr:ro", "-v", "/etc:/etc:ro", "-v", f"{self.sockets}:/sockets"),
            *("-v", f"{volume}:/data", IMAGE),
            *(self.bin / "postgres", "-D", "/data", "-k", "/sockets", "-c", "listen_addresses="),
        )  # fmt: skip
        try:
            self.wait()
            yield
            docker("stop", "-t", "60", name, limit=LIMIT)
            assert docker("inspect", "-f", "{{.State.ExitCode}}", name) == "0"
        except BaseException as error:
            said = docker.run("logs", name)
            error.add_note(f"the container: {said.stdout[-2000:]}{said.stderr[-2000:]}")
            raise
        finally:
            docker.run("rm", "-f", name)

    def inserting(self, clients: int, seconds: int) -> subprocess.Popen[str]:
        """pgbench that writes one row for each transaction, as many as it can."""
        script = self.sockets / "insert.sql"
        script.write_text("INSERT INTO ledger (who, at) VALUES (:client_id, now());\n")
        return subprocess.Popen(
            [
                *("runuser", "-u", "postgres", "--", self.bin / "pgbench", "-n"),
                *("-f", script, "-c", str(clients), "-T", str(seconds), "-h", self.sockets),
                self.name,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd="/",
        )

    def rows(self) -> int:
        return int(self.query("SELECT count(*) FROM ledger"))


def acknowledged(inserting: subprocess.Popen[str], limit: float) -> int:
    """Transactions that pgbench got an answer for; none may have failed."""
    out, said = inserting.communicate(timeout=limit)
    assert inserting.returncode == 0, said
    facts = dict(line.split(": ", 1) for line in out.splitlines() if ": " in line)
    assert facts["number of failed transactions"].startswith("0 "), out
    return int(facts["number of transactions actually processed"])


def import_host(docker: Dockerd) -> None:
    """IMAGE: folders to mount on, and the links of a merged /usr."""
    if IMAGE in docker("images", "--format", "{{.Repository}}").split():
        return
    tree = io.BytesIO()
    with tarfile.open(fileobj=tree, mode="w") as tar:
        for folder in ("usr", "etc", "tmp", "data", "sockets", "proc", "dev", "sys", "run", "var"):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if folder == "tmp" else 0o755
            tar.addfile(entry)
        for link in ("bin", "sbin", "lib", "lib64"):
            entry = tarfile.TarInfo(link)
            entry.type, entry.linkname = tarfile.SYMTYPE, f"usr/{link}"
            tar.addfile(entry)
    subprocess.run(
        docker.command("import", "-", IMAGE),
        input=tree.getvalue(), check=True, capture_output=True, timeout=LIMIT,
    )  # fmt: skip

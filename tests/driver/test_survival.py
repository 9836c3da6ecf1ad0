"""Containers do not notice what happens to the driver and to nbdkit, and nothing is left behind.

Runs here over FUSE, and in `scripts/vm-docker` over kernel NBD.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from horcrux_nbd import host, paths, server
from horcrux_nbd.attach.mountinfo import mounts
from horcrux_nbd.attach.processes import Process, with_argument
from tests.attach.conftest import needs_nbd
from tests.cli.support import run
from tests.servers import postgres
from tests.servers.dockerd import Dockerd
from tests.servers.postgres import Database, acknowledged
from tests.servers.process import PATIENCE

from .support import FOLDER, LIMIT, DriverProcess, wait_for

ROUNDS = 5 if PATIENCE > 1 else 25  # a round takes some seconds under emulation
LONG_ROUNDS = 500
LOAD_SECONDS = 100  # of pgbench; a kill under load is a pause of 20 s
LOOK = 25  # rounds between two looks at what is left


def servers() -> list[Process]:
    """nbdkit processes of this test's host."""
    return [
        process
        for name in host.names()
        for process in with_argument("nbdkit", f"volume={host.folder_of(name)}")
    ]


def complaints() -> list[str]:
    """What the kernel says of broken devices and file systems."""
    lines = subprocess.run(["dmesg"], capture_output=True, text=True, check=True).stdout
    bad = ("I/O error", "EXT4-fs error", "Remounting filesystem read-only", "JBD2: ")
    return [line for line in lines.splitlines() if any(word in line for word in bad)]


@pytest.fixture
def writer(docker: Dockerd, dv: DriverProcess) -> Iterator[str]:
    """A container that writes a line twice a second and ends where it cannot."""
    docker("volume", "create", "-d", dv.name, "-o", "on-remove=delete", "vol")
    # Not `v`: Docker's command line takes v:/data for a path on a Windows drive.
    write = "echo x >>/data/lines && sync -d /data/lines"
    script = f"while {write}; do sleep 0.5; done; echo failed; sleep 1000"
    docker("run", "-d", "--name", "writer", "-v", "vol:/data", "bb", "sh", "-c", script)
    yield "writer"
    docker.run("rm", "-f", "writer")


def lines_of(docker: Dockerd, container: str) -> int:
    return docker.run("exec", container, "cat", "/data/lines").stdout.count("x")


def goes_on(docker: Dockerd, container: str) -> None:
    before = lines_of(docker, container)
    wait_for(lambda: lines_of(docker, container) > before, "more lines")
    assert "failed" not in docker("logs", container)


@pytest.mark.parametrize("how", ["killed", "upgraded"])
def test_the_driver_goes_and_comes(
    docker: Dockerd, dv: DriverProcess, writer: str, how: str
) -> None:
    """Its container runs on meanwhile, the next driver takes the same nbdkit over, and tidies."""
    goes_on(docker, writer)
    before = servers()
    assert len(before) == 1
    if how == "killed":
        dv.kill()
    else:
        assert dv.stop() == 0
    goes_on(docker, writer)
    dv.start()
    goes_on(docker, writer)
    assert servers() == before
    docker("rm", "-f", writer)
    wait_for(lambda: not servers(), "the end of nbdkit")
    docker("run", "--rm", "-v", "vol:/data", "bb", "cat", "/data/lines")
    assert servers() == []


# ---- nothing is left


def processes() -> list[str]:
    """Those of this test's host: nbdkit, nbdfuse, watchers; they name its folders."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            if str(paths.root().parent) in words and "horcrux-dv" not in words:
                found.append(f"process {entry.name}: {words}")
    return found


def what_is_there() -> set[str]:
    """Mounts, devices, processes, sockets and folders that could be left of volumes."""
    host_folder = str(paths.root().parent)
    found = {f"mount {m.target}" for m in mounts() if host_folder in f"{m.target} {m.source}"}
    for name in os.listdir("/sys/block"):
        for file in ("loop/backing_file", "backend"):
            with contextlib.suppress(OSError):
                text = Path(f"/sys/block/{name}/{file}").read_text()
                if host_folder in text:
                    found.add(f"device {name}: {text}")
    for folder in (paths.run(), paths.root() / "mounts", paths.root() / "docker", paths.volumes()):
        if folder.is_dir():
            found |= {str(path) for path in folder.rglob("*")}
    return found | set(processes())


def descriptors(driver: DriverProcess) -> list[str]:
    folder = f"/proc/{driver.pid}/fd"
    return sorted(os.readlink(f"{folder}/{name}").split(":")[0] for name in os.listdir(folder))


def rounds(docker: Dockerd, dv: DriverProcess, number: int) -> None:
    def one() -> None:
        docker("volume", "create", "-d", dv.name, "-o", "on-remove=delete", "round")
        touch = "test ! -e /data/new && echo x >/data/new && sync -d /data/new"
        docker("run", "--rm", "-v", "round:/data", "bb", "sh", "-c", touch)
        docker("volume", "rm", "round")

    for _ in range(3):  # whatever is made once and kept
        one()
    before, open_before = what_is_there(), descriptors(dv)
    for n in range(1, number + 1):
        one()
        if n % LOOK == 0 or n == number:
            wait_for(lambda: not processes(), "the end of all processes")
            left = what_is_there() - before
            assert not left, (n, left)
            open_now = descriptors(dv)
            assert len(open_now) <= len(open_before) + 1, (n, open_before, open_now)
            print(f"{n} rounds: nothing left, {len(open_now)} descriptors", flush=True)


@pytest.mark.timeout(600 * PATIENCE)
def test_rounds_leave_nothing(docker: Dockerd, dv: DriverProcess) -> None:
    rounds(docker, dv, ROUNDS)


@pytest.mark.long
@pytest.mark.timeout(7200 * PATIENCE)
def test_many_rounds_leave_nothing(docker: Dockerd, dv: DriverProcess) -> None:
    rounds(docker, dv, LONG_ROUNDS)


# ---- a database


@pytest.fixture(scope="session")
def database_repository(folder: None) -> Path:
    if not postgres.available():
        pytest.skip(postgres.MISSING)
    place = FOLDER / "database"  # where PostgreSQL, a user of its own, can go
    if (place / "repository").exists():  # tests/driver/test_examples.py has this fixture too
        return place / "repository"
    place.mkdir()
    Database(place).make(place / "data")
    run("generate", "-q", "--size", "1G", "PG", place / "data", place / "repository")
    return place / "repository"


@pytest.fixture
def database(database_repository: Path) -> Database:
    return Database(database_repository.parent)


@pytest.mark.timeout(600 * PATIENCE)
@needs_nbd
def test_nbd_a_database_whose_nbdkit_is_killed(
    docker: Dockerd, dv: DriverProcess, database: Database, database_repository: Path
) -> None:
    """pgbench writes while nbdkit and the driver are killed: no error, and every row is there."""
    with paths.config_file().open("a") as file:
        # The kernel sends what was under way again after 17 s then, and not after 90.
        file.write("[store]\ntimeout = 1\n")
    before = complaints()
    docker(
        "volume", "create", "-d", dv.name,
        "-o", "name=PG", "-o", f"access={database_repository}", "pg",
    )  # fmt: skip
    with database.container(docker, "pg", "db"):
        inserting = database.inserting(clients=4, seconds=LOAD_SECONDS)
        for number in range(2):
            count = database.rows()
            wait_for(lambda count=count: database.rows() > count + 20, "rows")
            killed = server.running("pg")
            assert killed is not None
            if number == 1:
                dv.kill()  # nbdkit has a watcher of its own
            os.kill(killed.pid, signal.SIGKILL)
            wait_for(lambda old=killed: server.running("pg") not in (None, old), "nbdkit")
            assert len(servers()) == 1
            if number == 1:
                dv.start()
        assert inserting.poll() is None, "it ended before the last kill"
        count = database.rows()
        wait_for(lambda: database.rows() > count + 20, "rows")
        written = acknowledged(inserting, LOAD_SECONDS + LIMIT)
        assert database.rows() == written > 100
        assert database.query("SELECT count(*) FROM pgbench_accounts") == "100000"
    assert complaints()[len(before) :] == []
    wait_for(lambda: not servers(), "the end of nbdkit")
    with database.container(docker, "pg", "db2"):
        assert database.rows() == written
    docker.run("volume", "rm", "pg")
    host.remove("pg", force=True)


@pytest.mark.timeout(300 * PATIENCE)
def test_a_database(
    docker: Dockerd, dv: DriverProcess, database: Database, database_repository: Path
) -> None:
    """It starts having fetched a part, takes rows, and has them the next time."""
    docker(
        "volume", "create", "-d", dv.name, "-o", "on-remove=delete",
        "-o", "name=PG", "-o", f"access={database_repository}", "pg",
    )  # fmt: skip
    with database.container(docker, "pg", "db"):
        assert database.query("SELECT count(*) FROM pgbench_branches") == "1"
        status = docker.inspect("pg")["Status"]
        assert status["containers"] == ["db"]
        figures = host.status("pg").figures
        assert figures is not None
        data = sum(f.stat().st_size for f in (database_repository.parent / "data").rglob("*"))
        assert 0 < figures["fetched_bytes"] < data / 2
        written = acknowledged(database.inserting(clients=2, seconds=3), 60)
    with database.container(docker, "pg", "db2"):
        assert database.rows() == written
    docker("volume", "rm", "pg")

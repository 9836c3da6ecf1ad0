"""Whatever dies or is away: containers go on where they can, and Docker is told the truth."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from horcrux_driver import records
from horcrux_nbd import host, paths, server
from tests.attach.conftest import needs_fuse
from tests.cli.support import run
from tests.servers.dockerd import IMAGE, Dockerd
from tests.servers.proxy import Network, proxy
from tests.servers.sshd import Sshd

from .conftest import clean_host
from .support import DriverProcess, UnixConnection, driver, wait_for

pytestmark = needs_fuse

DATA = "/data"
# Writes a line each time, and ends with the first thing that goes wrong.
WRITER = (
    f"while echo line >> {DATA}/log && sync && cat {DATA}/hello > /dev/null; do sleep 0.05; done"
)


def start(docker: Dockerd, volume: str, *, name: str = "one", script: str = WRITER) -> None:
    docker("run", "-d", "--name", name, "-v", f"{volume}:{DATA}", IMAGE, "sh", "-c", script)


def lines(docker: Dockerd, name: str = "one") -> int:
    """How often the writer in a container has written."""
    return len(docker("exec", name, "cat", f"{DATA}/log").splitlines())


def goes_on(docker: Dockerd, name: str = "one") -> None:
    before = lines(docker, name)
    wait_for(lambda: lines(docker, name) > before, "another line")


def counts(volume: str) -> int:
    record = records.load(volume)
    return 0 if record is None else sum(one.count for one in record.mounts.values())


def nothing_is_left(volume: str) -> None:
    """Neither mount nor device nor server of a volume."""
    wait_for(lambda: not host.mounts(volume), "the end of the mount")
    # Who has copied our mounts (`unshare -m`) keeps the device; the driver looks every 30 s.
    wait_for(lambda: server.running(volume) is None, "the end of the server", 90.0)
    assert host.status(volume).attachment is None


# ---- the driver


def test_the_driver_is_killed(docker: Dockerd, dv: DriverProcess) -> None:
    docker("volume", "create", "-d", dv.name, "vol")
    start(docker, "vol")
    pid = host.status("vol").server
    dv.kill()
    goes_on(docker)
    docker("exec", "one", "touch", f"{DATA}/while-it-was-dead")
    dv.start()
    goes_on(docker)
    assert host.status("vol").server == pid
    assert counts("vol") == 1
    assert docker.inspect("vol")["Status"]["containers"] == ["one"]
    assert "is in use" in dv.error("Remove", Name="vol")  # Docker itself would not even ask
    docker("rm", "-f", "one")
    nothing_is_left("vol")
    assert docker("run", "--rm", "-v", f"vol:{DATA}", IMAGE, "ls", f"{DATA}/while-it-was-dead")


def test_the_driver_is_killed_while_it_mounts(docker: Dockerd, dv: DriverProcess) -> None:
    """Docker tries again with the next one, but (20.10) with an empty body: then it is told so, and
    the next time works. No count is left over.
    """
    docker("volume", "create", "-d", dv.name, "vol")
    running = docker.start_command(
        "run", "--rm", "-v", f"vol:{DATA}", IMAGE, "cat", f"{DATA}/hello"
    )
    wait_for(lambda: server.running("vol") is not None, "the beginning of the mount")
    dv.kill()
    dv.start()
    out, err = running.communicate(timeout=60)
    assert out == "hello\n" or "the request names no volume" in err, err
    assert docker("run", "--rm", "-v", f"vol:{DATA}", IMAGE, "cat", f"{DATA}/hello") == "hello"
    wait_for(lambda: counts("vol") == 0, "the unmount")
    nothing_is_left("vol")


def test_a_container_stops_while_the_driver_is_dead(docker: Dockerd, dv: DriverProcess) -> None:
    """Nobody tells the next driver. It sees that the container is gone, and lets it be removed."""
    docker("volume", "create", "-d", dv.name, "vol")
    start(docker, "vol")
    dv.kill()
    docker("kill", "one")
    docker("rm", "one", limit=120)
    dv.start()
    assert counts("vol") == 1
    assert docker("run", "--rm", "-v", f"vol:{DATA}", IMAGE, "cat", f"{DATA}/hello") == "hello"
    # Until the device is free: it may be seen in somebody's copy of our mount namespace.
    refusal = "changes that exist nowhere else"
    wait_for(lambda: refusal in docker.fails("volume", "rm", "vol"), "the refusal", 90.0)
    assert counts("vol") == 0  # the attempt looked
    nothing_is_left("vol")


# ---- nbdkit


def test_nbdkit_is_killed(docker: Dockerd, dv: DriverProcess) -> None:
    """Without kernel NBD its container sees I/O errors; started again it finds all it had synced,
    and the driver tells what is the matter meanwhile.
    """
    docker("volume", "create", "-d", dv.name, "vol")
    start(docker, "vol")
    wait_for(lambda: lines(docker) > 2, "some lines")
    written = lines(docker)
    served = server.running("vol")
    assert served is not None
    os.kill(served.pid, signal.SIGKILL)
    wait_for(lambda: docker("ps", "-q") == "", "the end of the container, which got an error")
    assert docker("volume", "ls", "-q", "--filter", f"driver={dv.name}") == "vol"
    docker("start", "one")
    goes_on(docker)
    assert lines(docker) > written
    docker("rm", "-f", "one")
    nothing_is_left("vol")


def test_a_broken_volume_in_use_is_told(docker: Dockerd, dv: DriverProcess) -> None:
    docker("volume", "create", "-d", dv.name, "vol")
    start(docker, "vol", script="sleep 600")
    served = server.running("vol")
    assert served is not None
    os.kill(served.pid, signal.SIGKILL)
    wait_for(lambda: "problem" in docker.inspect("vol")["Status"], "the truth")
    said = docker.fails("run", "--rm", "-v", f"vol:{DATA}", IMAGE, "true")
    assert "is broken" in said
    assert "stop one, then start again" in said
    docker("kill", "one")
    assert docker("run", "--rm", "-v", f"vol:{DATA}", IMAGE, "cat", f"{DATA}/hello") == "hello"


# ---- dockerd


def test_dockerd_is_killed(docker: Dockerd, dv: DriverProcess) -> None:
    """Its containers end with it, or with its next start, and nobody unmounts for them."""
    docker("volume", "create", "-d", dv.name, "vol")
    start(docker, "vol")
    docker.kill()
    docker.start()
    docker("rm", "-f", "one")
    for _ in range(2):
        assert docker("run", "--rm", "-v", f"vol:{DATA}", IMAGE, "cat", f"{DATA}/hello") == "hello"
    # Until the device is free: it may be seen in somebody's copy of our mount namespace.
    refusal = "changes that exist nowhere else"
    wait_for(lambda: refusal in docker.fails("volume", "rm", "vol"), "the refusal", 90.0)
    nothing_is_left("vol")


def test_live_restore(docker: Dockerd, dv: DriverProcess) -> None:
    """Containers outlive dockerd then, and their volumes must too: no Mount comes for them."""
    docker.stop()
    docker.options = ["--live-restore"]
    try:
        docker.start()
        docker("volume", "create", "-d", dv.name, "vol")
        start(docker, "vol")
        docker.kill()
        before = len((Path(dv_mount("vol")) / "log").read_text().splitlines())
        docker.start()
        goes_on(docker)
        assert lines(docker) > before
        assert counts("vol") == 1
        docker("rm", "-f", "one")
        nothing_is_left("vol")
    finally:
        docker.options = []
        docker.restart()


def dv_mount(volume: str) -> str:
    (mount,) = host.mounts(volume)
    return mount.target


# ---- the repository


@pytest.fixture
def away(
    images: Path, ssh: Sshd, docker: Dockerd, tmp_path: Path
) -> Iterator[tuple[Network, DriverProcess]]:
    """The remote `far`, over a line that can be cut, and a driver that gives it 3 seconds."""
    with proxy(ssh.port) as network:
        ssh.trust(network.port)
        file = paths.config_file()
        file.write_text(
            f'[remotes.far]\nurl = "{ssh.url(images, network.port)}"\n[store]\ntimeout = 3\n'
            '[docker]\naccess = "far"\nname = "AMCC"\n'
        )
        with driver(tmp_path, docker.host) as process:
            yield network, process
            network.accept()
            if found := docker("ps", "-aq").split():
                docker("rm", "-f", *found)
            for volume in docker("volume", "ls", "-qf", f"driver={process.name}").split():
                docker.run("volume", "rm", volume)
        clean_host()


def test_away_at_create(docker: Dockerd, away: tuple[Network, DriverProcess]) -> None:
    network, dv = away
    network.refuse()
    began = time.monotonic()
    said = docker.fails("volume", "create", "-d", dv.name, "vol")
    assert time.monotonic() - began < 30
    assert "127.0.0.1" in said
    assert host.names() == []
    assert dv.ask("List") == {"Volumes": []}
    network.accept()
    docker("volume", "create", "-d", dv.name, "vol")


def test_away_at_mount(docker: Dockerd, away: tuple[Network, DriverProcess]) -> None:
    network, dv = away
    docker("volume", "create", "-d", dv.name, "vol")
    network.refuse()
    said = docker.fails("run", "--rm", "-v", f"vol:{DATA}", IMAGE, "true")
    assert "vol" in said
    nothing_is_left("vol")
    assert counts("vol") == 0
    for _ in range(2):  # the first only begins to ask whether it answers
        began = time.monotonic()
        status = docker.inspect("vol")["Status"]
        assert time.monotonic() - began < 3
    wait_for(
        lambda: docker.inspect("vol")["Status"]["remote reachable"].startswith("no ("), "the answer"
    )
    assert status["image"] == "AMCC"
    assert docker("volume", "ls", "-q", "--filter", f"driver={dv.name}") == "vol"
    network.accept()
    assert docker("run", "--rm", "-v", f"vol:{DATA}", IMAGE, "cat", f"{DATA}/hello") == "hello"


def test_away_while_it_runs(docker: Dockerd, away: tuple[Network, DriverProcess]) -> None:
    """What is on this host goes on, writes too; the end waits for nobody."""
    network, dv = away
    docker("volume", "create", "-d", dv.name, "vol")
    start(docker, "vol")
    goes_on(docker)
    network.refuse()
    goes_on(docker)
    began = time.monotonic()
    docker("rm", "-f", "one")
    nothing_is_left("vol")
    assert time.monotonic() - began < 15
    # And again, from the cache.
    assert docker("run", "--rm", "-v", f"vol:{DATA}", IMAGE, "cat", f"{DATA}/hello") == "hello"


def test_a_volume_that_waits_holds_no_other_up(
    docker: Dockerd, away: tuple[Network, DriverProcess], images: Path
) -> None:
    """One repository stalls; volumes of another one are made, mounted and removed meanwhile."""
    network, dv = away
    docker("volume", "create", "-d", dv.name, "slow")
    network.stall()
    waiting = docker.start_command("run", "--rm", "-v", f"slow:{DATA}", IMAGE, "true")
    try:
        wait_for(lambda: server.running("slow") is not None, "the mount that waits")
        words = ["-o", f"access=cp://{images}", "-o", "name=AMCC"]
        docker("volume", "create", "-d", dv.name, *words, "quick")
        assert waiting.poll() is None
        began = time.monotonic()
        dv.ask("Get", Name="slow")
        dv.ask("List")
        assert time.monotonic() - began < 3
    finally:
        network.resume()
        waiting.communicate(timeout=60)
    assert docker("run", "--rm", "-v", f"quick:{DATA}", IMAGE, "cat", f"{DATA}/hello") == "hello"


# ---- two repositories, many rounds, strange names


def test_two_repositories_at_once(docker: Dockerd, dv: DriverProcess, tmp_path: Path) -> None:
    """The original kept one state for all volumes: the second overwrote the first."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "hello").write_text("from the other\n")
    run("generate", "-q", "--size", "32M", "OTHER", tmp_path / "in", tmp_path / "other")
    docker("volume", "create", "-d", dv.name, "aa")
    other = ["-o", "name=OTHER", "-o", f"access=cp://{tmp_path}/other"]
    docker("volume", "create", "-d", dv.name, *other, "bb")
    for name in ("aa", "bb"):
        start(docker, name, name=name)
    for name in ("aa", "bb"):
        goes_on(docker, name)
    assert docker("exec", "aa", "cat", f"{DATA}/hello") == "hello"
    assert docker("exec", "bb", "cat", f"{DATA}/hello") == "from the other"
    docker("rm", "-f", "aa")
    goes_on(docker, "bb")


def rounds(count: int, docker: Dockerd, dv: DriverProcess) -> None:
    """Create, run, remove; and nothing is left behind."""

    def open_files() -> int:
        return len(os.listdir(f"/proc/{dv.pid}/fd"))

    before = 0
    for number in range(count):
        words = ["-v", f"v{number}:{DATA}", "--volume-driver", dv.name, "--rm", IMAGE]
        assert docker("run", *words, "cat", f"{DATA}/hello") == "hello"
        docker("volume", "rm", f"v{number}")
        before = before or open_files()
    assert host.names() == records.names() == []
    wait_for(lambda: open_files() <= before + 2, "the closing of what was open")
    left = [str(path) for path in paths.run().iterdir() if path.suffix != ".lock"]
    assert not left, left
    assert not list((paths.root() / "mounts").iterdir())


@pytest.mark.timeout(300)
def test_a_few_rounds(docker: Dockerd, dv: DriverProcess) -> None:
    """`scripts/vm-docker --long` does 500, with kernel NBD."""
    rounds(5, docker, dv)


def test_strange_names(docker: Dockerd, dv: DriverProcess) -> None:
    """Docker checks no name of a plugin's volume: here they come as they were written."""
    said = {
        "../x": "cannot name a volume",
        "x" * 300: "300 characters",
        "größe": "cannot name a volume",
        "a/../../b": "cannot name a volume",
        "a b": "cannot name a volume",
        "-rf": "cannot name a volume",
        ".": "cannot name a volume",
        "..@main": "cannot name an image",
        "AMCC@../../etc": "is no ref",
        "AMCC@": "is no ref",
        "../x/AMCC@main": "cannot name",
        "line\nbreak": "cannot name a volume",
        "nul\0": "cannot name a volume",
    }
    for name, message in said.items():
        assert message in dv.error("Create", Name=name, Opts={})
        for command in ("Mount", "Get", "Path"):
            assert "no such volume" in dv.error(command, Name=name, ID="1")
        dv.ask("Unmount", Name=name, ID="1")
        dv.ask("Remove", Name=name)
    for name in ("../x", "x" * 300, "größe"):
        assert said[name] in docker.fails("volume", "create", "-d", dv.name, name)
    assert host.names() == records.names() == []
    made = [path.name for path in paths.root().rglob("*")]
    assert set(made) <= {"docker", "volumes"}, made


# ---- counting, as Docker does not do it itself


def test_counts_by_mount_id(alone: DriverProcess) -> None:
    alone.ask("Create", Name="vol", Opts={})
    for mount_id in ("id1", "id1", "id2"):
        where = alone.ask("Mount", Name="vol", ID=mount_id)["Mountpoint"]
    assert (Path(where) / "hello").read_text() == "hello\n"
    assert counts("vol") == 3
    alone.ask("Unmount", Name="vol", ID="id1")
    alone.ask("Unmount", Name="vol", ID="strange")
    alone.kill()
    alone.start()
    assert counts("vol") == 2
    alone.ask("Unmount", Name="vol", ID="id2")
    assert host.mounts("vol")
    alone.ask("Unmount", Name="vol", ID="id1")
    nothing_is_left("vol")
    alone.ask("Unmount", Name="vol", ID="id1")  # once too often


def test_nobody_waits_for_the_mount_any_more(alone: DriverProcess) -> None:
    """Docker hung up: no Unmount will come, so the mount is undone."""
    alone.ask("Create", Name="vol", Opts={})
    connection = UnixConnection(alone.socket)
    connection.request("POST", "/VolumeDriver.Mount", json.dumps({"Name": "vol", "ID": "1"}))
    wait_for(lambda: server.running("vol") is not None, "the beginning of the mount")
    connection.close()
    wait_for(lambda: "nobody waits" in alone.log.read_text(), "the notice")
    nothing_is_left("vol")
    assert counts("vol") == 0
    assert alone.ask("Mount", Name="vol", ID="1")["Mountpoint"]
    alone.ask("Unmount", Name="vol", ID="1")


def test_a_reboot_forgets_the_counts(alone: DriverProcess) -> None:
    """As after a power cut: the record is of another boot."""
    alone.ask("Create", Name="vol", Opts={})
    alone.ask("Mount", Name="vol", ID="1")
    alone.stop()
    host.umount("vol")
    record = records.load("vol")
    assert record is not None
    replace(record, boot="another").save()
    alone.start()
    assert counts("vol") == 0
    assert alone.ask("Get", Name="vol")["Volume"]["Status"]["mounts"] == 0
    assert alone.ask("Mount", Name="vol", ID="2")["Mountpoint"]
    alone.ask("Unmount", Name="vol", ID="2")
    nothing_is_left("vol")


def test_mounted_by_somebody_else(alone: DriverProcess, tmp_path: Path) -> None:
    alone.ask("Create", Name="vol", Opts={})
    run("mount", "vol", tmp_path / "m")
    said = alone.error("Mount", Name="vol", ID="1")
    assert f"is mounted on {tmp_path}/m already: `horcrux-cli umount vol` first" in said
    assert "in use" in alone.error("Remove", Name="vol") or host.mounts("vol")
    run("umount", "vol")
    alone.ask("Mount", Name="vol", ID="1")
    alone.ask("Unmount", Name="vol", ID="1")


def test_a_response_that_is_cut(alone: DriverProcess) -> None:
    """A client that goes away at any moment disturbs nobody else."""
    alone.ask("Create", Name="vol", Opts={})
    for size in (1, 20, 60):
        connection = UnixConnection(alone.socket)
        connection.connect()
        connection.sock.sendall(b"POST /VolumeDriver.Get HTTP/1.1\r\nHost: x\r\n\r\n"[:size])
        connection.close()
    assert alone.ask("Get", Name="vol")["Volume"]["Name"] == "vol"

"""What Docker's own tests ask of a volume driver, on a real dockerd.

The behaviours are those of moby's integration-cli/docker_cli_external_volume_driver_test.go. Where
that counts the calls of its toy driver, a recorder between Docker and ours counts them.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import time
from pathlib import Path

from horcrux_nbd import host
from tests.attach.conftest import needs_fuse
from tests.servers.dockerd import IMAGE, Dockerd

from .support import PLUGINS, DriverProcess, Recorder, driver, wait_for

pytestmark = needs_fuse

CALLS = ("Create", "Remove", "Mount", "Unmount")
DATA = "/data"  # no folder of the image


def volumes(docker: Dockerd, driver_name: str) -> list[str]:
    return docker("volume", "ls", "-q", "--filter", f"driver={driver_name}").split()


def test_create_with_the_name_of_another_driver(docker: Dockerd, dv: DriverProcess) -> None:
    docker("volume", "create", "conflict")
    try:
        assert "must be unique" in docker.fails("volume", "create", "-d", dv.name, "conflict")
        assert docker("volume", "inspect", "--format", "{{.Driver}}", "conflict") == "local"
        docker("volume", "create", "-d", "local", "conflict")
    finally:
        docker("volume", "rm", "conflict")


def test_create_again(docker: Dockerd, dv: DriverProcess) -> None:
    """With the same options, or none, it is the same volume."""
    words = ["volume", "create", "-d", dv.name, "-o", "name=AMCC", "-o", "access=team", "again"]
    for _ in range(2):
        assert docker(*words) == "again"
    assert docker("volume", "create", "-d", dv.name, "again") == "again"
    assert volumes(docker, dv.name) == ["again"]


def test_named(docker: Dockerd, seen: Recorder) -> None:
    words = ["--volume-driver", seen.name, "-v", f"named:{DATA}"]
    assert docker("run", "--rm", *words, IMAGE, "cat", f"{DATA}/hello") == "hello"
    (where,) = [one["Mountpoint"] for one in [_get(seen, "named")]]
    assert where == ""  # nothing is mounted any more
    docker("volume", "rm", "named")
    assert seen.counts(*CALLS) == (1, 1, 1, 1)
    assert host.names() == []


def _get(seen: Recorder, name: str) -> dict[str, str]:
    _, data = seen.answer("/VolumeDriver.Get", json.dumps({"Name": name}).encode())
    return dict(json.loads(data)["Volume"])


def test_anonymous(docker: Dockerd, seen: Recorder) -> None:
    """It has a name of 64 digits, and goes with its container."""
    words = ["--volume-driver", seen.name, "-v", DATA]
    assert docker("run", "--rm", *words, IMAGE, "cat", f"{DATA}/hello") == "hello"
    assert seen.counts(*CALLS) == (1, 1, 1, 1)
    assert host.names() == []


def test_volumes_from(docker: Dockerd, seen: Recorder) -> None:
    docker("run", "--name", "one", "--volume-driver", seen.name, "-v", DATA, IMAGE, "true")
    docker("run", "--rm", "--volumes-from", "one", IMAGE, "ls", DATA)
    docker("rm", "-fv", "one")
    assert seen.counts(*CALLS) == (1, 1, 2, 2)
    assert host.names() == []


def test_rm_with_volumes(docker: Dockerd, seen: Recorder) -> None:
    docker("run", "--name", "one", "--volume-driver", seen.name, "-v", DATA, IMAGE, "true")
    docker("rm", "-fv", "one")
    assert seen.counts(*CALLS) == (1, 1, 1, 1)


def test_a_dead_driver_blocks_nobody(docker: Dockerd, dv: DriverProcess) -> None:
    """Neither for other drivers nor, which matters to us, for ours."""
    spec = Path("/etc/docker/plugins") / f"down-{dv.name}.spec"
    spec.parent.mkdir(parents=True, exist_ok=True)
    spec.write_text("tcp://127.0.0.7:9")
    waiting = docker.start_command("volume", "create", "-d", spec.stem)
    try:
        wait_for(lambda: "127.0.0.7:9" in docker.log.read_text(), "the first attempt")
        began = time.monotonic()
        docker("volume", "create", "-d", dv.name, "alive")
        assert time.monotonic() - began < 5
        assert waiting.poll() is None
    finally:
        spec.unlink()
        waiting.kill()
        waiting.communicate()
        docker.restart()  # it would wait for that driver at each `volume ls`


def test_a_driver_that_appears_two_seconds_late(docker: Dockerd, tmp_path: Path) -> None:
    late = DriverProcess(tmp_path, docker.host)
    words = ["--volume-driver", late.name, "-v", f"late:{DATA}", IMAGE, "cat", f"{DATA}/hello"]
    waiting = docker.start_command("run", "--rm", *words)
    try:
        time.sleep(2)  # the two seconds
        assert waiting.poll() is None
        late.start()
        out, err = waiting.communicate(timeout=20)
        assert (waiting.returncode, out) == (0, "hello\n"), err
        docker("volume", "rm", "late")
    finally:
        waiting.kill()
        late.stop()
    assert host.names() == []


def test_inspect_of_a_container(docker: Dockerd, dv: DriverProcess) -> None:
    docker("volume", "create", "-d", dv.name, "foo")
    docker("run", "-d", "--name", "testing", "-v", f"foo:{DATA}", IMAGE, "top")
    found = docker(
        "inspect", "--format", "{{range .Mounts}}{{.Name}} {{.Driver}}{{end}}", "testing"
    )
    assert found == f"foo {dv.name}"


def test_ls_asks_once(docker: Dockerd, seen: Recorder) -> None:
    docker("volume", "create", "-d", seen.name, "abc3")
    lists = seen.count("List")
    lines = docker("volume", "ls").splitlines()
    assert [seen.name, "abc3"] in [line.split() for line in lines]
    assert seen.count("List") == lists + 1


def test_inspect(docker: Dockerd, seen: Recorder) -> None:
    assert "no such volume" in docker.fails("volume", "inspect", "dummy").lower()
    docker("volume", "create", "-d", seen.name, "test")
    asked = seen.count("Get")
    status = docker.inspect("test")["Status"]
    assert seen.count("Get") == asked + 1
    assert status["image"] == "AMCC"
    assert status["version"].startswith("AMCC@main ")
    assert status["size"] == "64.0 MiB"
    assert status["changed"] == "0 B"


def test_dockerd_restart(docker: Dockerd, dv: DriverProcess) -> None:
    docker("volume", "create", "-d", dv.name, "abc1")
    docker.restart()
    assert docker("run", "--rm", "-v", f"abc1:{DATA}", IMAGE, "cat", f"{DATA}/hello") == "hello"
    assert docker.inspect("abc1")["Driver"] == dv.name


def test_get_with_an_empty_answer(docker: Dockerd, seen: Recorder) -> None:
    """A driver may say neither volume nor error; Docker does not fall over, and ours recovers."""
    docker("volume", "create", "-d", seen.name, "abc2")
    seen.on = lambda command, _: {} if command == "Get" else None
    assert "no such volume" in docker.fails("volume", "inspect", "abc2").lower()
    seen.on = lambda *_: None
    assert docker.inspect("abc2")["Name"] == "abc2"


def test_create_and_ls_ask_for_no_path(docker: Dockerd, seen: Recorder) -> None:
    docker("volume", "create", "-d", seen.name, "test")
    docker("volume", "ls")
    assert seen.count("Path") == 0


def test_mount_ids(docker: Dockerd, seen: Recorder) -> None:
    """Each use has an ID of its own, and gives that back."""
    docker("volume", "create", "-d", seen.name, "test")
    for _ in range(2):
        docker("run", "--rm", "-v", f"test:{DATA}", IMAGE, "true")
    ids = {
        command: [body["ID"] for one, body in seen.calls if one == command]
        for command in ("Mount", "Unmount")
    }
    assert ids["Mount"] == ids["Unmount"]
    assert len(set(ids["Mount"])) == 2


def test_capabilities_are_asked_for_once(docker: Dockerd, seen: Recorder) -> None:
    docker.restart()
    assert seen.counts("Activate", "Capabilities") == (0, 0)
    for number in range(3):
        docker("volume", "create", "-d", seen.name, f"test{number}")
        assert seen.counts("Activate", "Capabilities") == (1, 1)
        assert docker.inspect(f"test{number}")["Scope"] == "global"


def test_removed_behind_dockers_back(docker: Dockerd, dv: DriverProcess) -> None:
    docker("volume", "create", "-d", dv.name, "test")
    assert "must be unique" in docker.fails("volume", "create", "-d", "local", "test")
    host.remove("test")  # as `horcrux-cli rm test` does
    options = ["-o", "ref=main", "-o", "readonly=true"]
    docker("volume", "create", "-d", dv.name, *options, "test")
    found = docker.inspect("test")
    assert (found["Driver"], found["Options"]) == (dv.name, {"ref": "main", "readonly": "true"})
    assert found["Status"]["read-only"]
    host.remove("test")
    docker("volume", "create", "-d", "local", "test")
    try:
        found = docker.inspect("test")
        assert found["Driver"] == "local"
        assert not found["Options"]
    finally:
        docker("volume", "rm", "test")


def test_no_unmount_after_a_mount_that_failed(docker: Dockerd, seen: Recorder) -> None:
    docker("volume", "create", "-d", seen.name, "test")
    (host.folder_of("test") / "volume.json").write_text("{}")
    for words in ([], ["-w", DATA]):
        said = docker.fails("run", *words, "-v", f"test:{DATA}", IMAGE, "true")
        assert "is damaged" in said
        assert "restore it from a backup" in said
    assert seen.counts("Mount", "Unmount") == (2, 0)
    assert host.mounts("test") == []
    docker("rm", *docker("ps", "-aq").split())
    shutil.rmtree(host.folder_of("test"))


def test_cp_of_a_running_container(docker: Dockerd, seen: Recorder, tmp_path: Path) -> None:
    """Docker mounts for the copy, with an ID that it may have used: the container keeps its own."""
    docker("volume", "create", "-d", seen.name, "test")
    script = f"touch {DATA}/there; while sleep 0.1; do cat {DATA}/hello || exit 1; done"
    docker("run", "-d", "--name", "one", "-v", f"test:{DATA}", IMAGE, "sh", "-c", script)
    assert seen.counts("Mount", "Unmount") == (1, 0)
    docker("cp", f"one:{DATA}/hello", tmp_path / "copied")
    assert (tmp_path / "copied").read_text() == "hello\n"
    assert seen.counts("Mount", "Unmount") == (2, 1)
    assert len(host.mounts("test")) == 1
    docker("exec", "one", "cat", f"{DATA}/there")
    docker("kill", "one")
    wait_for(lambda: seen.count("Unmount") == 2, "the last unmount")
    wait_for(lambda: not host.mounts("test"), "the end of the mount")


def test_the_real_name(docker: Dockerd, tmp_path: Path) -> None:
    """As everybody calls it: `-d horcrux`, by the command of the original's README."""
    path = PLUGINS / "horcrux.sock"
    docker.restart()  # it forgets the other name
    with driver(tmp_path, docker.host, path):
        words = ["-o", "--name=AMCC", "-o", "--access=team"]
        docker("volume", "create", "-d", "horcrux", "--name", "real", *words)
        assert docker("run", "--rm", "-v", f"real:{DATA}", IMAGE, "cat", f"{DATA}/hello") == "hello"
        docker("volume", "rm", "real")
    docker.restart()
    assert host.names() == []


def test_parallel_creates_and_mounts(docker: Dockerd, dv: DriverProcess) -> None:
    """Eight containers at once, on four volumes, two on each."""
    names = [f"p{number % 4}" for number in range(8)]
    done: list[subprocess.CompletedProcess[str]] = []

    def use(name: str) -> None:
        words = ["--volume-driver", dv.name, "-v", f"{name}:{DATA}", IMAGE, "cat", f"{DATA}/hello"]
        done.append(docker.run("run", "--rm", *words))

    threads = [threading.Thread(target=use, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [one.stdout for one in done] == ["hello\n"] * 8, [one.stderr for one in done]
    assert volumes(docker, dv.name) == ["p0", "p1", "p2", "p3"]
    wait_for(lambda: not any(host.mounts(name) for name in names), "the last unmounts")

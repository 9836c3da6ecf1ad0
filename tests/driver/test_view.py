"""What a container sees of a volume, and what becomes of it when it is removed."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from horcrux_driver import records
from horcrux_nbd import host, paths
from tests.attach.conftest import needs_fuse
from tests.cli.support import fails, run
from tests.servers.dockerd import IMAGE, Dockerd

from .support import DriverProcess, wait_for

pytestmark = needs_fuse

DATA = "/data"  # no folder of the image


def write(docker: Dockerd, volume: str, text: str = "x") -> None:
    docker("run", "--rm", "-v", f"{volume}:{DATA}", IMAGE, "sh", "-c", f"echo {text} > {DATA}/new")


# ---- files


def test_exactly_what_was_generated(docker: Dockerd, dv: DriverProcess) -> None:
    """Owners and modes, of the root folder too; and no lost+found."""
    docker("volume", "create", "-d", dv.name, "vol")
    script = f"stat -c '%n %u:%g %a' {DATA} {DATA}/*; ls -a {DATA}"
    found = docker("run", "--rm", "-v", f"vol:{DATA}", IMAGE, "sh", "-c", script).splitlines()
    assert found[:3] == [f"{DATA} 70:70 750", f"{DATA}/hello 0:0 644", f"{DATA}/private 70:71 700"]
    assert found[3:] == [".", "..", "hello", "private"]


def test_over_a_folder_of_the_image(docker: Dockerd, dv: DriverProcess) -> None:
    """Docker leaves a volume that has files as it is, with and without `nocopy`."""
    docker("volume", "create", "-d", dv.name, "vol")
    look = [IMAGE, "sh", "-c", "stat -c '%u:%g %a' /tmp; ls /tmp"]
    for words in ("vol:/tmp:nocopy", "vol:/tmp"):
        found = docker("run", "--rm", "-v", words, *look).splitlines()
        assert found == ["70:70 750", "hello", "private"]


def test_a_new_volume_takes_the_images_files(docker: Dockerd, dv: DriverProcess) -> None:
    """As with Docker's own volumes: that takes one that is really empty."""
    docker("volume", "create", "-d", dv.name, "-o", "size=64M", "fresh")
    assert "busybox" in docker("run", "--rm", "-v", "fresh:/bin", IMAGE, "ls", "/bin")
    assert docker("run", "--rm", "-v", f"fresh:{DATA}", IMAGE, "ls", f"{DATA}/busybox")
    assert "changes that exist nowhere else" in docker.fails("volume", "rm", "fresh")


def test_se_linux_labels(docker: Dockerd, dv: DriverProcess) -> None:
    """`z` and `Z` do nothing where the host has no SELinux."""
    docker("volume", "create", "-d", dv.name, "vol")
    for flag in ("z", "Z"):
        words = ["-v", f"vol:{DATA}:{flag}", IMAGE, "cat", f"{DATA}/hello"]
        assert docker("run", "--rm", *words) == "hello"


def test_two_containers_share_one(docker: Dockerd, dv: DriverProcess) -> None:
    docker("volume", "create", "-d", dv.name, "vol")
    for name in ("one", "two"):
        docker("run", "-d", "--name", name, "-v", f"vol:{DATA}", IMAGE, "sleep", "600")
    assert len(host.mounts("vol")) == 1
    docker("exec", "one", "touch", f"{DATA}/from-one")
    docker("rm", "-f", "one")
    assert docker("exec", "two", "ls", f"{DATA}/from-one")
    assert docker.inspect("vol")["Status"]["containers"] == ["two"]
    docker("rm", "-f", "two")
    wait_for(lambda: not host.mounts("vol"), "the unmount")


def test_read_only(docker: Dockerd, dv: DriverProcess) -> None:
    """Shared by any number, written by none, also over a folder of the image; nothing to lose."""
    docker("volume", "create", "-d", dv.name, "-o", "readonly=true", "vol")
    for name in ("one", "two"):
        docker("run", "-d", "--name", name, "-v", f"vol:{DATA}", IMAGE, "sleep", "600")
    assert "Read-only" in docker.fails("exec", "one", "touch", f"{DATA}/x")
    assert docker("exec", "two", "cat", f"{DATA}/hello") == "hello"
    docker("rm", "-f", "one", "two")
    words = ["-v", "vol:/tmp:nocopy", IMAGE, "cat", "/tmp/hello"]
    assert docker("run", "--rm", *words) == "hello"
    docker("volume", "rm", "vol")
    assert host.names() == []


def test_read_only_for_one_container(docker: Dockerd, dv: DriverProcess) -> None:
    """`:ro` is Docker's own: the volume itself can be written."""
    docker("volume", "create", "-d", dv.name, "vol")
    said = docker.fails("run", "--rm", "-v", f"vol:{DATA}:ro", IMAGE, "touch", f"{DATA}/x")
    assert "Read-only" in said
    write(docker, "vol")


def test_nobody_else_of_the_host_gets_in(docker: Dockerd, dv: DriverProcess) -> None:
    docker("volume", "create", "-d", dv.name, "vol")
    docker("run", "-d", "--name", "one", "-v", f"vol:{DATA}", IMAGE, "sleep", "600")
    (mount,) = host.mounts("vol")
    assert stat.S_IMODE(Path(mount.target).parent.stat().st_mode) == 0o700
    assert {"nosuid", "nodev", "noatime"} <= mount.options


# ---- a version's life


def test_commit_and_push_what_a_container_wrote(docker: Dockerd, dv: DriverProcess) -> None:
    docker("volume", "create", "-d", dv.name, "vol")
    docker("run", "-d", "--name", "one", "-v", f"vol:{DATA}", IMAGE, "sleep", "600")
    docker("exec", "one", "sh", "-c", f"echo written > {DATA}/new; sync")
    run("commit", "vol", "-m", "from a container")
    docker("exec", "one", "sh", "-c", f"echo later > {DATA}/new; sync")
    run("push", "vol")
    words = ["--volume-driver", dv.name, "-v", f"AMCC@main:{DATA}", IMAGE, "cat", f"{DATA}/new"]
    assert docker("run", "--rm", *words) == "written"
    docker("volume", "rm", "AMCC@main")
    assert docker("exec", "one", "cat", f"{DATA}/new") == "later"


def test_a_new_volume_is_pushed(docker: Dockerd, dv: DriverProcess) -> None:
    """Without another word it goes to the default repository, by its own name."""
    docker("volume", "create", "-d", dv.name, "-o", "size=64M", "fresh")
    assert docker.inspect("fresh")["Status"]["size"] == "64.0 MiB"
    write(docker, "fresh", "made")
    run("commit", "fresh", "-m", "first")
    run("push", "fresh")
    docker("volume", "rm", "fresh")
    words = ["-v", f"fresh@main:{DATA}", "--volume-driver", dv.name, IMAGE, "cat", f"{DATA}/new"]
    assert docker("run", "--rm", *words) == "made"


def test_a_volume_of_the_command_line(docker: Dockerd, dv: DriverProcess) -> None:
    """Docker uses it by its name alone, with all that was written to it."""
    run("create", "mine", "team", "AMCC")
    run("mount", "mine", paths.root() / "m")
    (paths.root() / "m" / "note").write_text("kept")
    assert "is mounted on" in docker.fails(
        "run", "--rm", "--volume-driver", dv.name, "-v", f"mine:{DATA}", IMAGE, "true"
    )
    run("umount", "mine")
    words = ["--volume-driver", dv.name, "-v", f"mine:{DATA}", IMAGE, "cat", f"{DATA}/note"]
    assert docker("run", "--rm", *words) == "kept"
    said = dv.error("Create", Name="mine", Opts={"ref": "v9"})
    assert "exists already with other options" in said
    docker("run", "-d", "--name", "one", "-v", f"mine:{DATA}", IMAGE, "sleep", "600")
    assert "is mounted" in fails(5, "rm", "mine")


# ---- removal


def test_only_mounted_is_not_changed(docker: Dockerd, dv: DriverProcess) -> None:
    """A mount writes to the disk, but nobody would miss that."""
    docker("volume", "create", "-d", dv.name, "vol")
    docker("run", "--rm", "-v", f"vol:{DATA}", IMAGE, "ls", DATA)
    assert host.status("vol").survey.written > 0
    docker("volume", "rm", "vol")


def test_refuse(docker: Dockerd, dv: DriverProcess) -> None:
    docker("volume", "create", "-d", dv.name, "vol")
    write(docker, "vol")
    said = docker.fails("volume", "rm", "vol")
    assert "changes that exist nowhere else" in said
    assert "horcrux-cli rm --force vol" in said
    assert "on-remove" in said
    run("commit", "vol", "-m", "mine")
    assert "1 version that never" in docker.fails("volume", "rm", "vol")
    run("push", "vol")
    docker("volume", "rm", "vol")


def test_keep(docker: Dockerd, dv: DriverProcess) -> None:
    """Docker forgets it, this host does not; made again it has all that was written."""
    docker("volume", "create", "-d", dv.name, "-o", "on-remove=keep", "vol")
    write(docker, "vol", "kept")
    docker("volume", "rm", "vol")
    assert docker("volume", "ls", "-q", "--filter", f"driver={dv.name}") == ""
    assert host.names() == ["vol"]
    assert records.names() == []
    docker("volume", "create", "-d", dv.name, "-o", "on-remove=keep", "vol")
    assert docker("run", "--rm", "-v", f"vol:{DATA}", IMAGE, "cat", f"{DATA}/new") == "kept"


def test_keep_has_nothing_to_keep(docker: Dockerd, dv: DriverProcess) -> None:
    docker("volume", "create", "-d", dv.name, "-o", "on-remove=keep", "vol")
    docker("volume", "rm", "vol")
    assert host.names() == []


def test_delete(docker: Dockerd, dv: DriverProcess) -> None:
    docker("volume", "create", "-d", dv.name, "-o", "on-remove=delete", "vol")
    write(docker, "vol")
    docker("volume", "rm", "vol")
    assert host.names() == []


def test_another_volume_of_that_name(alone: DriverProcess) -> None:
    """It is on this host, and something else: that is not handed out."""
    run("create", "vol", "team", "AMCC", "--read-only")
    said = alone.error("Create", Name="vol", Opts={"name": "AMCC", "access": "team"})
    assert "there is a volume vol on this host already" in said
    alone.ask("Create", Name="vol", Opts={})


@pytest.mark.parametrize("what", ["record", "state"])
def test_damage_is_no_reason_to_be_forgotten(alone: DriverProcess, what: str) -> None:
    """Docker forgets a volume whose Get fails."""
    alone.ask("Create", Name="vol", Opts={})
    if what == "record":
        (file,) = records.folder().iterdir()
    else:
        file = host.folder_of("vol") / "volume.json"
    whole = file.read_text()
    file.write_text("{")
    assert "damaged" in alone.ask("Get", Name="vol")["Volume"]["Status"]["problem"]
    assert [one["Name"] for one in alone.ask("List")["Volumes"]] == ["vol"]
    assert "damaged" in alone.error("Mount", Name="vol", ID="1")
    file.write_text(whole)
    alone.ask("Mount", Name="vol", ID="1")
    alone.ask("Unmount", Name="vol", ID="1")


# ---- containers that are paused for it


def test_commit_with_paused_containers(docker: Dockerd, dv: DriverProcess) -> None:
    """They stand still while it is frozen, and go on."""
    docker("volume", "create", "-d", dv.name, "vol")
    script = f"n=0; while sleep 0.05; do n=$((n+1)); echo $n > {DATA}/count; sync; done"
    for name, words in (("one", ["-v", f"vol:{DATA}"]), ("apart", [])):
        docker("run", "-d", "--name", name, *words, IMAGE, "sh", "-c", script)
    wait_for(lambda: docker.run("exec", "one", "cat", f"{DATA}/count").stdout, "a count")
    run("commit", "vol", "-m", "paused", "--pause", env={"DOCKER_HOST": docker.host})
    words = ("--since", "10m", "--until", "0s", "--filter", "event=pause", "--filter",
             "event=unpause", "--format", "{{.Action}} {{.Actor.Attributes.name}}")  # fmt: skip

    def told() -> list[str]:
        return docker("events", *words).splitlines()

    wait_for(lambda: len(told()) >= 2, "what Docker did")  # `--until` leaves this second out
    assert told() == ["pause one", "unpause one"]
    before = docker("exec", "one", "cat", f"{DATA}/count")
    wait_for(lambda: docker("exec", "one", "cat", f"{DATA}/count") != before, "the next count")


def test_paused_containers_go_on_after_a_failure(docker: Dockerd, dv: DriverProcess) -> None:
    docker("volume", "create", "-d", dv.name, "vol")
    docker("run", "-d", "--name", "one", "-v", f"vol:{DATA}", IMAGE, "sleep", "600")
    env = {"DOCKER_HOST": docker.host}
    for hook in ("--before", "--after"):
        said = run(
            "commit", "vol", "-m", "x", "--allow-empty", "--pause", hook, "false", env=env, ok=False
        )
        assert said.code == 1
        assert docker("inspect", "--format", "{{.State.Status}}", "one") == "running"


def test_no_docker_to_pause(alone: DriverProcess) -> None:
    alone.ask("Create", Name="vol", Opts={})
    said = run(
        "commit", "vol", "-m", "x", "--pause", env={"DOCKER_HOST": "unix:///nowhere"}, ok=False
    )
    assert said.code == 1
    assert "does not answer" in said.err
    assert said.err.count("\n") == 1

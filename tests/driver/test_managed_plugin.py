"""The managed plugin: its configuration says what it needs, and a real Docker runs it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers.dockerd import Dockerd, dockerd

from .support import PLUGINS

PROJECT = Path(__file__).parents[2]
CONFIG = PROJECT / "packaging/plugin/config.json"


def test_the_configuration() -> None:
    value = json.loads(CONFIG.read_text())
    assert value["interface"] == {"socket": "horcrux.sock", "types": ["docker.volumedriver/1.0"]}
    # Docker replaces this beginning of what Mount answers by the folder on the host.
    assert value["propagatedmount"] == "/var/lib/horcrux/mounts"
    entry = (PROJECT / "packaging/plugin/plugin-entry").read_text()
    assert value["entrypoint"] == ["/opt/horcrux/plugin-entry"]
    assert "--socket /run/docker/plugins/horcrux.sock" in entry
    destinations = {mount["name"]: mount["destination"] for mount in value["mounts"]}
    assert destinations["dev"] == "/dev"
    # Nothing may be mounted over the folder that Docker shares with the host, or around it.
    assert not [one for one in destinations.values() if one.startswith("/var")]
    assert {mount["name"] for mount in value["mounts"] if mount.get("settable")} == {
        "state", "config", "ssh", "aws", "docker",
    }  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    if os.geteuid() != 0 or not shutil.which("mmdebstrap"):
        pytest.skip("needs root and mmdebstrap: apt-get install mmdebstrap")
    folder = tmp_path_factory.mktemp("plugin") / "p"
    subprocess.run([PROJECT / "scripts/plugin", "build", folder], check=True, timeout=1200)
    config = json.loads((folder / "config.json").read_text())
    # What this machine's root lacks, a container cannot have: fewer can be tested here.
    bounding = next(
        int(line.split()[1], 16)
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("CapBnd")
    )
    numbers = {"CAP_SYS_PTRACE": 19, "CAP_SYS_ADMIN": 21, "CAP_SYS_RESOURCE": 24}
    capabilities = config["linux"]["capabilities"]
    assert set(capabilities) == set(numbers)
    config["linux"]["capabilities"] = [one for one in capabilities if bounding >> numbers[one] & 1]
    (folder / "config.json").write_text(json.dumps(config))
    yield folder
    shutil.rmtree(folder)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_real_docker_runs_it(built: Path, images: Path, tmp_path: Path) -> None:
    folder = tmp_path.parent / "pd"
    folder.mkdir()
    with dockerd(folder, PLUGINS) as docker:
        docker("plugin", "create", "horcrux", built, limit=300)
        (tmp_path / "state").mkdir()
        shutil.copytree(images, tmp_path / "state/repository")
        for name in ("config", "ssh", "aws", "docker"):
            (tmp_path / name).mkdir()
        for name in ("state", "config", "ssh", "aws", "docker"):
            docker("plugin", "set", "horcrux", f"{name}.source={tmp_path / name}")
        docker("plugin", "enable", "--timeout", "120", "horcrux", limit=120)
        try:
            _use(docker, tmp_path / "state")
        finally:
            docker.run("rm", "-f", *docker("ps", "-aq").split())
            docker.run("plugin", "disable", "-f", "horcrux")
        docker("plugin", "rm", "-f", "horcrux")
        assert (tmp_path / "state/volumes/vol/volume.json").exists()  # not the plugin's to lose


def _use(docker: Dockerd, state: Path) -> None:
    access = "access=cp:///state/repository"
    docker("volume", "create", "-d", "horcrux", "-o", "name=AMCC", "-o", access, "vol")
    run = ("run", "--rm", "-v", "vol:/data", "bb")
    assert docker(*run, "cat", "/data/hello") == "hello"
    docker(*run, "sh", "-c", "echo written >/data/new")
    assert docker.inspect("vol")["Status"]["mounts"] == 0
    assert "exist nowhere else" in docker.fails("volume", "rm", "vol")
    assert "in use" in docker.fails("plugin", "disable", "horcrux")
    docker("plugin", "disable", "-f", "horcrux")
    docker("plugin", "enable", "horcrux", limit=120)
    assert docker(*run, "cat", "/data/new") == "written"

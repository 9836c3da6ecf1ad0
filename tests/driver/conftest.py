"""One dockerd for a whole run; a driver, a repository and a host for each test."""

from __future__ import annotations

import itertools
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from horcrux_nbd import host, paths
from horcrux_nbd.attach.mountinfo import mounts
from tests.attach.conftest import needs_fuse
from tests.cli.support import run
from tests.servers import fixtures
from tests.servers.dockerd import MISSING, Dockerd, available, dockerd

from .support import FOLDER, PLUGINS, DriverProcess, Recorder, shared_folder
from .support import driver as running_driver

pytestmark = needs_fuse

sshd_server, ssh = fixtures.sshd_server, fixtures.ssh

_numbers = itertools.count(1)


@pytest.fixture(scope="session", autouse=True)
def folder() -> Iterator[None]:
    with shared_folder():
        yield


@pytest.fixture(autouse=True)
def short_host(folder: None, horcrux_host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = FOLDER / str(next(_numbers))
    monkeypatch.setenv("HORCRUX_ROOT", str(host / "root"))
    monkeypatch.setenv("HORCRUX_RUN", str(host / "run"))


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the image AMCC, of 64 MiB: a file, and a folder of somebody's own."""
    folder = tmp_path_factory.mktemp("images")
    source = folder / "source"
    (source / "private").mkdir(parents=True)
    (source / "hello").write_text("hello\n")
    (source / "private").chmod(0o700)
    shutil.chown(source / "private", 70, 71)
    source.chmod(0o750)
    shutil.chown(source, 70, 70)
    run("generate", "-q", "--size", "64M", "AMCC", source, folder / "repository")
    return folder / "repository"


@pytest.fixture
def repository(images: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may take away."""
    shutil.copytree(images, tmp_path / "repository")
    return tmp_path / "repository"


@pytest.fixture
def configured(repository: Path) -> Path:
    """The configuration: the repository is the remote `team`, and AMCC what a volume is of."""
    file = paths.config_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        f'[remotes.team]\nurl = "cp://{repository}"\n[docker]\naccess = "team"\nname = "AMCC"\n'
    )
    return file


@pytest.fixture(scope="session")
def the_dockerd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dockerd]:
    if not available():
        pytest.skip(MISSING)
    # Short: containerd's sockets lie deep below it, and have 107 bytes.
    folder = tmp_path_factory.getbasetemp() / "d"
    folder.mkdir()
    with dockerd(folder, PLUGINS) as daemon:
        yield daemon


@pytest.fixture
def docker(the_dockerd: Dockerd, configured: Path, tmp_path: Path) -> Iterator[Dockerd]:
    """The dockerd, without containers before and after."""
    yield the_dockerd
    if found := the_dockerd("ps", "-aq").split():
        the_dockerd("rm", "-f", *found)


@pytest.fixture
def dv(docker: Dockerd, tmp_path: Path) -> Iterator[DriverProcess]:
    """A driver that Docker knows; in the end its volumes are gone, and all that they took."""
    with running_driver(tmp_path, docker.host) as process:
        yield process
        remove_all(docker, process.name)
    clean_host()


@pytest.fixture
def seen(docker: Dockerd, tmp_path: Path) -> Iterator[Recorder]:
    """As `dv`, with a recorder between Docker and the driver: Docker knows only that."""
    private = paths.run().parent / "dv.sock"
    private.parent.mkdir()
    with running_driver(tmp_path, docker.host, private) as process:
        recorder = Recorder(process.socket)
        try:
            yield recorder
            recorder.on = lambda *_: None
            remove_all(docker, recorder.name)
        finally:
            recorder.close()
    clean_host()


def remove_all(docker: Dockerd, driver_name: str) -> None:
    if found := docker("ps", "-aq").split():
        docker("rm", "-f", *found)
    for volume in docker("volume", "ls", "-qf", f"driver={driver_name}").split():
        docker.run("volume", "rm", volume)


@pytest.fixture
def alone(configured: Path, tmp_path: Path) -> Iterator[DriverProcess]:
    """A driver without any Docker, for what the protocol itself says."""
    with running_driver(tmp_path) as process:
        yield process
    clean_host()


def clean_host() -> None:
    """Take every volume of this test's host down."""
    for name in host.names():
        if host.status(name).attachment is not None or host.status(name).server is not None:
            host.detach(name, force=True)
        host.remove(name, force=True)
    left = [m.target for m in mounts() if m.target.startswith(str(paths.root()))]
    for target in left:
        subprocess.run(["umount", "--lazy", target], check=False)
    assert not left, left

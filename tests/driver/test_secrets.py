"""No secret of a repository is in what Docker keeps or shows, or in what the driver writes."""

from __future__ import annotations

import re
from pathlib import Path

from horcrux_nbd import paths
from tests.attach.conftest import needs_fuse
from tests.cli.support import run
from tests.security.test_secrets import files, processes
from tests.servers.dockerd import IMAGE, Dockerd

from .support import DriverProcess

pytestmark = needs_fuse

WORDS = "canary-passphrase-d0c4"
PASSWORD = "canary-password-77"


def test_a_volume_of_an_encrypted_repository(
    docker: Dockerd, dv: DriverProcess, tmp_path: Path
) -> None:
    """It needs no option for the key, so there is none to be seen."""
    (tmp_path / "words").write_text(WORDS)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "hello").write_text("hello\n")
    url = f"cp://{tmp_path / 'encrypted'}"
    secret = ["--passphrase-file", tmp_path / "words"]
    run("generate", "-q", "--size", "64M", "--encrypt", *secret, "AMCC", tmp_path / "source", url)
    create = ["volume", "create", "-d", dv.name, "-o", f"access={url}", "-o", "name=AMCC", "sealed"]
    run("key", "lock", url)
    assert "horcrux-cli key unlock" in docker.fails(*create)
    run("key", "unlock", *secret, url)
    (held,) = (paths.run() / "keys").iterdir()
    found = re.search("[0-9a-f]{64}", held.read_text())
    assert found is not None
    docker(*create)
    docker("run", "-d", "--name", "reads", "-v", "sealed:/data", IMAGE, "top")
    assert docker("exec", "reads", "cat", "/data/hello") == "hello"
    for bad in (f"scp://me:{PASSWORD}@nas:/x", f"s3://AKIA:{PASSWORD}@bucket"):
        said = docker.fails("volume", "create", "-d", dv.name, "-o", f"access={bad}", "bad")
        assert PASSWORD not in said
    shown = docker("inspect", "reads") + docker("volume", "inspect", "sealed") + docker("info")
    log = dv.log.read_text()
    assert "sealed" in log
    for word in (WORDS, PASSWORD, found[0]):
        assert word not in shown
        assert word not in log
        assert not [one for one in processes(word) if "docker" not in one]
        left = files(paths.run(), word) + files(paths.root(), word)
        assert left == ([held] if word == found[0] else [])

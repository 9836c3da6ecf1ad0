"""What Docker's own tests ask of a volume driver, on a real dockerd.

Translated from moby's integration-cli/docker_cli_external_volume_driver_test.go.
"""

from __future__ import annotations

from tests.attach.conftest import needs_fuse
from tests.servers.dockerd import IMAGE, Dockerd

from .support import DriverProcess

pytestmark = needs_fuse


def test_named_volume(docker: Dockerd, dv: DriverProcess) -> None:
    words = ["--volume-driver", dv.name, "-v", "named:/data"]
    assert docker("run", "--rm", *words, IMAGE, "cat", "/data/hello") == "hello"
    docker("volume", "rm", "named")
    assert docker("volume", "ls", "-q") == ""

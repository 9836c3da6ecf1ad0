"""A driver on TCP: found by a .spec file, or over TLS by a .json file."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from horcrux_nbd import host
from tests.attach.conftest import needs_fuse
from tests.servers.dockerd import IMAGE, Dockerd
from tests.servers.process import free_port

from .conftest import clean_host, remove_all
from .support import NAME, DriverProcess
from .test_main import fails

pytestmark = needs_fuse

FOLDER = Path("/etc/docker/plugins")


def certificate(folder: Path, name: str, authority: str, subject: str) -> None:
    """NAME.pem and NAME.key, signed by the authority, which is made where it is missing."""
    if not (folder / f"{authority}.pem").exists():
        openssl(
            "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
            "-days", "2", "-subj", f"/CN={authority}", "-keyout", folder / f"{authority}.key",
            "-out", folder / f"{authority}.pem",
        )  # fmt: skip
    openssl(
        "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
        "-subj", f"/CN={subject}", "-keyout", folder / f"{name}.key", "-out", folder / "csr",
    )  # fmt: skip
    (folder / "ext").write_text("subjectAltName=IP:127.0.0.1\n")
    openssl(
        "x509", "-req", "-in", folder / "csr", "-CA", folder / f"{authority}.pem",
        "-CAkey", folder / f"{authority}.key", "-CAcreateserial", "-days", "2",
        "-extfile", folder / "ext", "-out", folder / f"{name}.pem",
    )  # fmt: skip


def openssl(*words: str | Path) -> None:
    subprocess.run(["openssl", *words], check=True, capture_output=True, timeout=60)


@pytest.fixture
def over_tcp(docker: Dockerd, tmp_path: Path) -> Iterator[DriverProcess]:
    """A driver that is not started yet; what it leaves is taken away."""
    docker.restart()  # it forgets where it found the driver the last time
    process = DriverProcess(tmp_path, docker.host)
    process.port = free_port()
    process.words += ["--listen", f"127.0.0.1:{process.port}"]
    FOLDER.mkdir(parents=True, exist_ok=True)
    yield process
    remove_all(docker, process.name)
    process.stop()
    for suffix in ("spec", "json"):
        (FOLDER / f"{NAME}.{suffix}").unlink(missing_ok=True)
    docker.restart()
    clean_host()


def use(docker: Dockerd) -> str:
    words = ["--volume-driver", NAME, "-v", "tcp:/data", IMAGE, "cat", "/data/hello"]
    return docker("run", "--rm", *words)


def test_spec(docker: Dockerd, over_tcp: DriverProcess) -> None:
    over_tcp.start()
    (FOLDER / f"{NAME}.spec").write_text(f"tcp://127.0.0.1:{over_tcp.port}")
    assert use(docker) == "hello"
    docker("volume", "rm", "tcp")
    assert host.names() == []


def test_json_with_tls(docker: Dockerd, over_tcp: DriverProcess, tmp_path: Path) -> None:
    """Docker and the driver show each other certificates; who has none does not get in."""
    certificate(tmp_path, "driver", "ca", "driver")
    certificate(tmp_path, "docker", "ca", "docker")
    certificate(tmp_path, "stranger", "other", "docker")
    for word, name in (("cert", "driver.pem"), ("key", "driver.key"), ("ca", "ca.pem")):
        over_tcp.words += [f"--tls-{word}", str(tmp_path / name)]
    over_tcp.start()
    url = f"https://127.0.0.1:{over_tcp.port}"

    def ask(name: str | None) -> int:
        client = [] if name is None else ["--cert", f"{name}.pem", "--key", f"{name}.key"]
        words = [
            "curl",
            "-s",
            "--cacert",
            "ca.pem",
            *client,
            "-X",
            "POST",
            f"{url}/Plugin.Activate",
        ]
        return subprocess.run(words, cwd=tmp_path, timeout=30, check=False).returncode

    assert ask("docker") == 0
    assert ask("stranger") != 0
    assert ask(None) != 0
    tls = {
        "InsecureSkipVerify": False,
        "CAFile": str(tmp_path / "ca.pem"),
        "CertFile": str(tmp_path / "docker.pem"),
        "KeyFile": str(tmp_path / "docker.key"),
    }
    (FOLDER / f"{NAME}.json").write_text(json.dumps({"Name": NAME, "Addr": url, "TLSConfig": tls}))
    assert use(docker) == "hello"
    docker("volume", "rm", "tcp")


def test_refusals(configured: Path, tmp_path: Path) -> None:
    assert "lets other machines in" in fails(2, "--listen", "0.0.0.0:0")
    assert "is no place to listen" in fails(2, "--listen", "localhost:1")
    some = tmp_path / "some"
    some.write_text("x")
    assert "belong together" in fails(2, "--listen", "127.0.0.1:0", "--tls-cert", some)
    all_three = ["--tls-cert", some, "--tls-key", some, "--tls-ca", some]
    assert "cannot be used for TLS" in fails(2, "--listen", "127.0.0.1:0", *all_three)
    assert "for --listen" in fails(2, *all_three)

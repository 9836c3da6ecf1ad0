"""`serve --tcp`: TLS with certificates on both sides, or an explicit word that it is plain."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from horcrux_nbd import host, server, tcp
from horcrux_nbd.attach.processes import wait_until
from horcrux_nbd.errors import UsageError

from .cli.support import fails, run
from .servers.certificates import Authority
from .servers.process import free_port
from .versions.support import IMAGE, small_repository

SIZE = "524288"


@pytest.fixture
def certificates(tmp_path: Path) -> Path:
    """The server's folder, and the clients': `good`, of the same authority, and `bad`."""
    ours, theirs = Authority(tmp_path / "ca"), Authority(tmp_path / "other")
    for folder, authority, name in (
        ("server", ours, "server"), ("good", ours, "client"), ("bad", theirs, "client")
    ):  # fmt: skip
        (tmp_path / folder).mkdir()
        for path, kind in zip(authority.sign(name), ("cert", "key"), strict=True):
            shutil.copy2(path, tmp_path / folder / f"{name}-{kind}.pem")
        shutil.copy(ours.certificate, tmp_path / folder / "ca-cert.pem")
    (tmp_path / "none").mkdir()
    shutil.copy(ours.certificate, tmp_path / "none")
    shutil.copy(theirs.certificate, tmp_path / "bad" / "ca-cert.pem")
    return tmp_path


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[str]:
    url = small_repository(tmp_path / "repository")
    run("create", "v", url, IMAGE)
    yield "v"
    run("detach", "--force", "v", ok=False)


def size(uri: str) -> str:
    """What a client finds at `uri`; nothing where it is not let in."""
    done = subprocess.run(
        ["nbdinfo", "--size", uri], capture_output=True, text=True, timeout=30, check=False
    )
    return done.stdout.strip()


def test_both_sides_prove_themselves(volume: str, certificates: Path) -> None:
    port = free_port()
    uri = run("serve", volume, "--tcp", str(port), "--tls", certificates / "server").out.strip()
    assert uri == f"nbds://127.0.0.1:{port}"
    client = f"{uri}?tls-certificates={certificates}"
    assert size(f"{client}/good") == SIZE
    assert size(f"{client}/none") == ""  # no certificate of its own
    assert size(f"{client}/bad") == ""  # one that somebody else signed, who trusts somebody else
    assert size(uri.replace("nbds", "nbd")) == ""  # in the clear
    running = server.running(volume)
    assert running is not None
    assert size(f"nbd+unix:///?socket={running.socket}") == SIZE
    # The front ends with the server.
    host.stop(volume)
    assert wait_until(lambda: size(f"{client}/good") == "", 20)


def test_any_client(volume: str, certificates: Path) -> None:
    words = ["--tls", certificates / "server", "--any-client"]
    uri = run("serve", volume, "--tcp", str(free_port()), *words).out.strip()
    assert size(f"{uri}?tls-certificates={certificates}/none") == SIZE
    assert size(uri.replace("nbds", "nbd")) == ""


def test_plain_only_in_so_many_words(volume: str, certificates: Path) -> None:
    port = str(free_port())
    assert "--plain if that network" in fails(2, "serve", volume, "--tcp", port)
    both = ["--plain", "--tls", certificates / "server"]
    assert "one of the two" in fails(2, "serve", volume, "--tcp", port, *both)
    assert "go with --tcp" in fails(2, "serve", volume, "--plain")
    assert server.running(volume) is None
    assert run("serve", volume, "--tcp", port, "--plain").out.strip() == f"nbd://127.0.0.1:{port}"
    assert size(f"nbd://127.0.0.1:{port}") == SIZE


def test_what_is_wrong_is_told_before_anything_runs(volume: str, certificates: Path) -> None:
    port, folder = str(free_port()), certificates / "server"
    (folder / "server-key.pem").chmod(0o644)
    assert "chmod 600" in fails(2, "serve", volume, "--tcp", port, "--tls", folder)
    (folder / "server-key.pem").unlink()
    assert "has no server-key.pem" in fails(2, "serve", volume, "--tcp", port, "--tls", folder)
    assert server.running(volume) is None


def test_a_port_that_is_taken(volume: str) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert "already" in fails(5, "serve", volume, "--tcp", port, "--plain")
    assert server.running(volume) is None  # nothing is half served


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10809", ("127.0.0.1", 10809)),
        ("0.0.0.0:1", ("0.0.0.0", 1)),
        ("[::1]:65535", ("::1", 65535)),
        ("nas:9", ("nas", 9)),
    ],
)
def test_addresses(text: str, expected: tuple[str, int]) -> None:
    assert tcp.parse(text) == expected


@pytest.mark.parametrize("text", ["", "a", "0", "65536", "1.2.3.4", "host:", "²", "-1", "a:b:c"])
def test_no_addresses(text: str) -> None:
    with pytest.raises(UsageError, match="HOST:PORT"):
        tcp.parse(text)

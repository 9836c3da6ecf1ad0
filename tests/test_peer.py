"""Who may connect: nobody from another machine over TCP without TLS, unless that is wanted."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import struct
import subprocess
from pathlib import Path

import pytest

from horcrux_nbd import peer
from horcrux_nbd.errors import UsageError

from .servers import nbdkit
from .servers.process import free_port, server
from .volume.support import IMAGE, make_image


def test_addresses() -> None:
    assert peer.parse(struct.pack("=H", socket.AF_UNIX)) is None
    assert peer.parse(b"") is None
    four = struct.pack("=HH4s8x", socket.AF_INET, 1, bytes([10, 0, 0, 1]))
    assert peer.parse(four) == ipaddress.ip_address("10.0.0.1")

    def six(text: str) -> object:
        packed = ipaddress.IPv6Address(text).packed
        return peer.parse(struct.pack("=HHI16sI", socket.AF_INET6, 1, 0, packed, 0))

    assert six("::1") == ipaddress.ip_address("::1")
    assert six("::ffff:127.0.0.1") == ipaddress.ip_address("127.0.0.1")
    assert six("::ffff:10.0.0.1") == ipaddress.ip_address("10.0.0.1")
    for strange in (struct.pack("=H14x", socket.AF_VSOCK), four[:6]):
        with pytest.raises(UsageError, match="refused"):
            peer.parse(strange)


def own_address() -> str:
    """An address of this machine that is no loopback. Sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("needs a network interface besides lo: ip link add d type dummy")
        return str(probe.getsockname()[0])


def info(host: str, port: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["nbdinfo", "--size", f"nbd://{host}:{port}"],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip


def exports(host: str, port: int) -> list[str]:
    """The names of exports that a client is told."""
    nbd = nbdkit.libnbd()
    assert nbd is not None
    names: list[str] = []
    handle = nbd.NBD()
    handle.set_opt_mode(True)
    handle.connect_uri(f"nbd://{host}:{port}")
    with contextlib.suppress(nbd.Error):
        handle.opt_list(lambda name, description: names.append(name))
    return names


@pytest.mark.skipif(not nbdkit.available(), reason=nbdkit.MISSING)
@pytest.mark.parametrize("wanted", [False, True])
def test_the_bare_plugin_over_tcp(tmp_path: Path, wanted: bool) -> None:
    """nbdkit listens on all interfaces unless told otherwise: this machine gets in, others not."""
    url = make_image(tmp_path / "r", b"secret" * 20_000)
    outside, port = own_address(), free_port()
    command = [
        "nbdkit", "--foreground", "--port", str(port), "python", str(nbdkit.PLUGIN),
        f"repo={url}", f"name={IMAGE}", "readonly=true", f"cache={tmp_path / 'c'}",
        *(["plain_tcp=true"] if wanted else []),
    ]  # fmt: skip
    with server(command, port, tmp_path / "log"):
        assert info("127.0.0.1", port).returncode == 0
        found = info(outside, port)
        listed = exports(outside, port)
    if wanted:
        assert found.returncode == 0, found.stderr
        assert listed == [IMAGE]
        return
    assert found.returncode != 0
    assert listed == []  # nor a name, or a commit's message
    said = (tmp_path / "log").read_text()
    assert f"refused {outside}, which came over TCP without TLS" in said
    assert "Traceback" not in said

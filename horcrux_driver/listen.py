"""Where the driver listens: a Unix socket, one that systemd hands over, or TCP."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import ssl
import stat
from pathlib import Path

from aiohttp import web

from horcrux_nbd import files
from horcrux_nbd.errors import Busy, UsageError

FIRST_INHERITED = 3  # sd_listen_fds(3)
BACKLOG = 128


def inherited() -> list[socket.socket]:
    """The sockets that systemd passes on (sd_listen_fds(3)); none where it does not."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    count = int(os.environ.get("LISTEN_FDS", "0"))
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):  # not for nbdkit
        os.environ.pop(name, None)
    found = []
    for number in range(FIRST_INHERITED, FIRST_INHERITED + count):
        os.set_inheritable(number, False)
        found.append(socket.socket(fileno=number))
    return found


def unix(path: Path) -> socket.socket:
    """A new socket at `path`, for root alone. Raises Busy where somebody listens there."""
    if len(os.fsencode(path)) > 107:
        raise UsageError(f"--socket {path} is too long for a socket (107 bytes)")
    files.make_folder(path.parent)
    if path.exists():
        if not stat.S_ISSOCK(path.stat().st_mode):
            raise UsageError(f"--socket {path} is there already, and no socket")
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(path))
            except OSError:
                pass
            else:
                raise Busy(f"another program listens on {path} already: stop that first")
    # Docker looks into the folder at any time: it must not find a socket that nobody serves, so it
    # is bound elsewhere, and renamed when it listens.
    temporary = path.with_name(f"{files.TEMPORARY_PREFIX}{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    old = os.umask(0o177)
    try:
        found.bind(str(temporary))
    finally:
        os.umask(old)
    found.listen(BACKLOG)
    os.rename(temporary, path)
    return found


async def site(runner: web.BaseRunner, address: str, secured: ssl.SSLContext | None = None) -> None:
    """Serve on `address`: the path of a Unix socket, for root alone, or ADDRESS:PORT.

    Raises UsageError, Busy, OSError where it is taken.
    """
    if address.startswith("/"):
        await web.SockSite(runner, unix(Path(address))).start()
        return
    await web.TCPSite(runner, *place(address), ssl_context=secured).start()


def place(address: str) -> tuple[str, int]:
    """Address and port of ADDRESS:PORT. Raises UsageError."""
    name, _, port = address.rpartition(":")
    try:
        ipaddress.ip_address(name.strip("[]"))
        number = int(port)
    except ValueError:
        number = -1
    if not 0 <= number <= 65535:
        raise UsageError(
            f"{address} is no place to listen: give a path (/run/horcrux/metrics.sock), or an "
            "address and a port (127.0.0.1:9748)"
        )
    return name.strip("[]"), number


def secured(
    address: str, certificate: Path | None, key: Path | None, authority: Path | None
) -> ssl.SSLContext | None:
    """TLS for a driver on TCP, where a client has to show a certificate of `authority`.

    Whoever reaches a driver can do with volumes as root can: without TLS it is for this host alone.
    Raises UsageError.
    """
    given = [file for file in (certificate, key, authority) if file is not None]
    if not given:
        if not ipaddress.ip_address(place(address)[0]).is_loopback:
            raise UsageError(
                f"--listen {address} lets other machines in: give --tls-cert, --tls-key and "
                "--tls-ca, or listen on 127.0.0.1"
            )
        return None
    if certificate is None or key is None or authority is None:
        raise UsageError("--tls-cert, --tls-key and --tls-ca belong together: give all three")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_cert_chain(certificate, key)
        context.load_verify_locations(authority)
    except OSError as error:  # ssl.SSLError too
        raise UsageError(f"{', '.join(map(str, given))} cannot be used for TLS: {error}") from None
    return context

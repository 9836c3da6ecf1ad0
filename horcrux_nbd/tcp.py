"""NBD over TCP: an nbdkit in front of a volume's server, which ends with it.

The server itself listens on its Unix socket only. The front has TLS, with certificates on both
sides, unless somebody says in so many words that the network may read and write everything.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import stat
from dataclasses import dataclass
from pathlib import Path

from . import server
from .attach.processes import Process, wait_until
from .errors import Busy, EnvironmentProblem, HorcruxError, UsageError

DEFAULT_HOST = "127.0.0.1"
LIMIT = 20.0  # seconds until it listens
THREADS = 16
LOG = "tcp.log"
# What nbdkit-tls(1) wants in the folder.
CERTIFICATES = ("ca-cert.pem", "server-cert.pem", "server-key.pem")
CHOOSE = (
    "--tcp takes --tls DIR with certificates, or --plain if that network may read and change "
    "everything: one of the two"
)


@dataclass(frozen=True)
class Front:
    """Where a volume is served over TCP, and by whom."""

    uri: str
    process: Process


def parse(text: str) -> tuple[str, int]:
    """`[HOST:]PORT`; without HOST only this machine gets in. Raises UsageError."""
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]") or DEFAULT_HOST
    if not (port.isascii() and port.isdigit() and 1 <= int(port) <= 65535):
        raise UsageError(f"--tcp {text}: write PORT or HOST:PORT, such as 10809 or 10.0.0.1:10809")
    return host, int(port)


def check_certificates(folder: Path) -> None:
    """Raises UsageError where one is missing, or others can read the private key."""
    for name in CERTIFICATES:
        if not (folder / name).is_file():
            raise UsageError(
                f"{folder} has no {name}: nbdkit wants {', '.join(CERTIFICATES)} (man nbdkit-tls)"
            )
    key = folder / "server-key.pem"
    if stat.S_IMODE(key.stat().st_mode) & 0o007:
        raise UsageError(f"{key} can be read by everybody: chmod 600 it")


def serve(
    name: str,
    serving: server.Server,
    address: tuple[str, int],
    certificates: Path | None,
    *,
    any_client: bool = False,
    plain: bool = False,
) -> Front:
    """Serve what `serving` serves over TCP too.

    With TLS by the `certificates` in a folder, for clients whose own the same authority signed, or
    for `any_client`; or `plain`. Raises UsageError, Busy, HorcruxError with what nbdkit said.
    """
    if plain == (certificates is not None):
        raise UsageError(CHOOSE)
    nbdkit = shutil.which("nbdkit", path=os.environ.get("PATH", "") + ":/usr/bin:/usr/sbin")
    if nbdkit is None:
        raise EnvironmentProblem("nbdkit is not installed: apt-get install nbdkit")
    host, port = address
    if _listens(host, port):
        raise Busy(f"somebody listens on {host}:{port} already: choose another port")
    argv = [
        nbdkit, "--foreground", "--ipaddr", host, "--port", str(port),
        "--threads", str(THREADS), "--filter=exitwhen",
    ]  # fmt: skip
    if certificates is not None:
        check_certificates(certificates)
        argv += ["--tls=require", f"--tls-certificates={certificates.absolute()}"]
        argv += [] if any_client else ["--tls-verify-peer"]
    argv += [
        "nbd", f"socket={serving.socket}",
        f"exit-when-process-exits={serving.pid}", "exit-when-poll=1",
    ]  # fmt: skip
    log = server.folder_of(name) / LOG
    process = server.launch(argv, log)
    if not wait_until(lambda: not process.alive() or _listens(host, port), LIMIT) or (
        not process.alive()
    ):
        process.signal(signal.SIGKILL)
        raise HorcruxError(f"{host}:{port} cannot be served: {server.said(log)}")
    shown = f"[{host}]" if ":" in host else host
    return Front(f"{'nbd' if plain else 'nbds'}://{shown}:{port}", process)


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=2).close()
    except OSError:
        return False
    return True

"""nbdkit processes: one for each served volume, started, found again and stopped.

They outlive whoever started them. What is needed to find one lies in `<run>/<volume>/`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

from . import files, paths
from .attach.processes import Process, boot_id, io_flusher, wait_until
from .attach.sockets import listener
from .errors import Busy, Damaged, EnvironmentProblem, HorcruxError
from .names import check_name

# nbdkit threads for each connection: 16 keep a 20 ms line busy (786 reads/s, PEERS.md) and cost
# warm reads least; four connections have 64.
THREADS = 16
START_LIMIT = 90.0  # seconds; the store may need its 60 s to say that it is away
STOP_LIMIT = 60.0  # seconds for the last flush
DYING = 2.0  # seconds for the sockets of a killed process to go

SOCKET, CONTROL, LOG, RECORD = "nbd.sock", "control.sock", "nbdkit.log", "server.json"


@dataclass(frozen=True)
class Server:
    """A running nbdkit. `socket` is where it listens."""

    process: Process
    socket: Path
    boot: str

    @property
    def pid(self) -> int:
        return self.process.pid


def folder_of(name: str) -> Path:
    """Where a volume's sockets are; mode 0700."""
    return paths.run() / check_name("volume", name)


def plugin_path() -> Path:
    """The nbdkit plugin of this installation."""
    return Path(__file__).with_name("plugin.py")


def running(name: str) -> Server | None:
    """The server of a volume, if it lives."""
    folder = folder_of(name)
    try:
        value = files.read_json(folder / RECORD)
        server = Server(Process(**value["process"]), Path(value["socket"]), value["boot"])
    except FileNotFoundError:
        return None
    except (KeyError, TypeError) as error:
        raise Damaged(f"{folder / RECORD} cannot be read ({error!r}): remove it") from None
    return server if server.boot == boot_id() and server.process.alive() else None


def start(
    name: str,
    volume: Path,
    *,
    socket: Path | None = None,
    read_only: bool = False,
    options: dict[str, str] | None = None,
) -> Server:
    """Serve the volume in the folder `volume`; returns when it listens.

    `options` are more keys for the plugin (`cache`, `cache_size`, `timeout`). Raises Busy if it is
    served already; what nbdkit said if it does not start.
    """
    if found := running(name):
        raise Busy(f"volume {name} is served already, by process {found.pid} on {found.socket}")
    nbdkit = shutil.which("nbdkit", path=os.environ.get("PATH", "") + ":/usr/bin:/usr/sbin")
    if nbdkit is None:
        raise EnvironmentProblem(
            "nbdkit is not installed: apt-get install nbdkit nbdkit-plugin-python"
        )
    folder = folder_of(name)
    files.make_folder(folder, 0o700)
    socket = (socket or folder / SOCKET).absolute()
    if len(os.fsencode(socket)) > 107:
        raise HorcruxError(f"{socket} is too long for a socket (107 bytes): choose a shorter path")
    # One that was just killed may take a moment to let go of its socket.
    if not wait_until(lambda: listener(socket) == 0, DYING):
        raise Busy(f"another server listens on {socket} already")
    for stale in (socket, folder / RECORD):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(stale)
    keys = {
        "volume": str(volume.absolute()),
        "control": str(folder / CONTROL),
        **({"readonly": "true"} if read_only else {}),
        **(options or {}),
    }
    argv = [
        nbdkit, "--foreground", "--unix", str(socket), "--threads", str(THREADS),
        "python", str(plugin_path()), *(f"{key}={value}" for key, value in keys.items()),
    ]  # fmt: skip
    process = _launch(argv, folder / LOG)
    server = Server(process, socket, boot_id())
    files.publish_json(folder / RECORD, {**asdict(server), "socket": str(socket)})

    def ready() -> bool:
        return not process.alive() or listener(socket) != 0

    if not wait_until(ready, START_LIMIT) or not process.alive():
        process.stop(0)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(folder / RECORD)
        raise HorcruxError(f"volume {name} cannot be served: {_said(folder / LOG)}")
    return server


# nbdkit 1.32.5 has the kernel send it SIGTERM when its parent ends, also without
# --exit-with-parent. So it begins as a shell of a session of its own, which says its pid and waits
# until it is init's child. There it outlives us and our terminal.
_LAUNCHER = (
    "setsid", "--fork", "sh", "-c", 'echo $$; read -r _; exec "$@" </dev/null >&2', "sh",
)  # fmt: skip


def _launch(argv: list[str], log: Path) -> Process:
    with open(log, "wb") as output, io_flusher():
        launcher = subprocess.Popen(
            [*_LAUNCHER, *argv],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            cwd="/",
            env={**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/bin:/bin"},
        )
    assert launcher.stdin is not None
    assert launcher.stdout is not None
    with launcher.stdin, launcher.stdout:
        pid = launcher.stdout.readline().strip()
        launcher.wait()
        process = Process.of(int(pid)) if pid else None
        if process is None:
            raise HorcruxError(f"nbdkit cannot be started: {_said(log)}")
        launcher.stdin.write(b"\n")
    return process


def _said(log: Path) -> str:
    """The reason in nbdkit's output: its error line without the decoration."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line]
    line = (errors or lines or ["nbdkit said nothing"])[0]
    return line.rsplit("error: ", 1)[-1]


def stop(name: str, *, limit: float = STOP_LIMIT, force: bool = False) -> bool:
    """End the server after its last flush; False if there was none.

    Raises Busy if it does not end within `limit` seconds; with `force` it is killed then, which
    loses only what was never flushed.
    """
    server = running(name)
    folder = folder_of(name)
    if server is not None:
        import signal

        server.process.signal(signal.SIGTERM)
        gone = server.process.wait_gone(limit) or (force and server.process.stop(1.0))
        if not gone:
            raise Busy(
                f"the server of {name} (process {server.pid}) is still busy after {limit:.0f} s"
            )
    for leftover in (SOCKET, CONTROL, RECORD):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(folder / leftover)
    return server is not None

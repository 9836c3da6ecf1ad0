"""nbdkit processes: one for each served volume, started, found again and stopped.

They outlive whoever started them. What is needed to find one lies in `<run>/<volume>/`. Beside each
waits a watcher: a shell that becomes `supervise.py` when nbdkit is gone and KEEP is still there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from . import files, paths
from .attach.processes import Process, boot_id, io_flusher, wait_until
from .attach.sockets import listener
from .errors import Busy, Damaged, EnvironmentProblem, HorcruxError
from .names import check_name
from .native import build

# nbdkit threads for each connection: 16 keep a 20 ms line busy (786 reads/s, PEERS.md) and cost
# warm reads least; four connections have 64.
THREADS = 16
START_LIMIT = 90.0  # seconds; the store may need its 60 s to say that it is away
STOP_LIMIT = 60.0  # seconds for the last flush
DYING = 2.0  # seconds for the sockets of a killed process to go

SOCKET, CONTROL, LOG, RECORD = "nbd.sock", "control.sock", "nbdkit.log", "server.json"
KEEP = "keep"  # while it is there, a server that dies is to be started again
SUPERVISOR_LOG = "supervisor.log"
LAST_LOG = f"{LOG}.1"  # of the server before this one: why it died
# Signals that would end nbdkit, which then answers all requests with an error, mounted or not
# (ESHUTDOWN, nbdkit 1.32.5). They are blocked, so that a logout or a shutdown of the host, which
# sends them to everything, finds a server that ends when its device is free (serving.py).
BLOCKED = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
END = signal.SIGQUIT  # nbdkit ends on it as well


@dataclass(frozen=True)
class Server:
    """A running nbdkit. `socket` is where it listens."""

    process: Process
    socket: Path
    boot: str
    read_only: bool = False
    options: Mapping[str, str] = field(default_factory=dict)  # for the plugin
    began: float = 0.0  # time.monotonic() of its start
    restarts: int = 0  # of this volume's server since somebody asked for it

    @property
    def pid(self) -> int:
        return self.process.pid


def folder_of(name: str) -> Path:
    """Where a volume's sockets are; mode 0700."""
    return paths.run() / check_name("volume", name)


def plugin_path() -> Path:
    """The nbdkit plugin of this installation."""
    return Path(__file__).with_name("plugin.py")


def filters(nbdkit: str | Path = "nbdkit") -> list[str]:
    """nbdkit's option for the native filter, where there is one that fits."""
    found = build.found(nbdkit)
    return [] if found is None else [f"--filter={found}"]


def running(name: str) -> Server | None:
    """The server of a volume, if it lives."""
    server = last(name)
    return server if server is not None and server.process.alive() else None


def last(name: str) -> Server | None:
    """The server that a volume has, or had last in this boot, unless it was stopped."""
    folder = folder_of(name)
    try:
        value = files.read_json(folder / RECORD)
        known = {**value, "process": Process(**value["process"]), "socket": Path(value["socket"])}
        server = Server(**known)
    except FileNotFoundError:
        return None
    except (KeyError, TypeError) as error:
        raise Damaged(f"{folder / RECORD} cannot be read ({error!r}): remove it") from None
    return server if server.boot == boot_id() else None


def keep(name: str) -> None:
    """From now on the server is started again should it die (supervise.py), until `stop`."""
    (folder_of(name) / KEEP).touch(0o600)


def release(name: str) -> None:
    """Undo `keep`."""
    (folder_of(name) / KEEP).unlink(missing_ok=True)


def kept(name: str) -> bool:
    """Whether `keep` is in force."""
    return (folder_of(name) / KEEP).exists()


def start(
    name: str,
    volume: Path,
    *,
    socket: Path | None = None,
    read_only: bool = False,
    options: Mapping[str, str] | None = None,
    restarts: int = 0,
) -> Server:
    """Serve the volume in the folder `volume`; returns when it listens.

    `options` are more keys for the plugin (`cache`, `cache_size`, `timeout`); `restarts` is how
    often it was started anew before. Raises Busy if it is served already; what nbdkit said if it
    does not start.
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
    with contextlib.suppress(FileNotFoundError):
        os.unlink(socket)
    with contextlib.suppress(FileNotFoundError):
        os.rename(folder / LOG, folder / LAST_LOG)
    keys = {
        "volume": str(volume.absolute()),
        "control": str(folder / CONTROL),
        **({"readonly": "true"} if read_only else {}),
        **(options or {}),
    }
    argv = [
        nbdkit, "--foreground", "--unix", str(socket), "--threads", str(THREADS),
        *filters(nbdkit), "python", str(plugin_path()),
        *(f"{key}={value}" for key, value in keys.items()),
    ]  # fmt: skip
    # nbdkit holds one end of a pipe for its life, and the watcher reads the other.
    watched, life = os.pipe()
    try:
        process = launch(argv, folder / LOG, life)
        try:
            server = Server(
                process, socket, boot_id(), read_only, dict(options or {}), time.monotonic(),
                restarts,
            )  # fmt: skip
            files.publish_json(folder / RECORD, {**asdict(server), "socket": str(socket)})

            def ready() -> bool:
                return not process.alive() or listener(socket) != 0

            if not wait_until(ready, START_LIMIT) or not process.alive():
                raise HorcruxError(f"volume {name} cannot be served: {said(folder / LOG)}")
            _watch(name, folder, watched)  # not before: one that cannot start is not started again
        except BaseException:
            # Nobody would find it, and it holds the volume's lock.
            process.signal(signal.SIGKILL)
            process.wait_gone(DYING)
            raise
    finally:
        os.close(watched)
        os.close(life)
    return server


# nbdkit 1.32.5 has the kernel send it SIGTERM when its parent ends, also without
# --exit-with-parent. So it begins as a shell of a session of its own, which says its pid and waits
# until it is init's child. There it outlives us and our terminal.
_LAUNCHER = (
    "setsid", "--fork", "sh", "-c", 'echo $$; read -r _; exec "$@" </dev/null >&2', "sh",
)  # fmt: skip


def launch(argv: list[str], log: Path, *inherited: int) -> Process:
    """Start nbdkit for good, with the descriptors `inherited`. Raises HorcruxError."""
    with open(log, "wb") as output, io_flusher(), _blocked():
        launcher = subprocess.Popen(
            [*_LAUNCHER, *argv],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            cwd="/",
            env={**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/bin:/bin"},
            pass_fds=inherited,
        )
    assert launcher.stdin is not None
    assert launcher.stdout is not None
    with launcher.stdin, launcher.stdout:
        pid = launcher.stdout.readline().strip()
        launcher.wait()
        process = Process.of(int(pid)) if pid else None
        if process is None:
            raise HorcruxError(f"nbdkit cannot be started: {said(log)}")
        launcher.stdin.write(b"\n")
    return process


@contextlib.contextmanager
def _blocked() -> Iterator[None]:
    """Processes started inside have the signals BLOCKED (signal(7): kept by fork and exec)."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# Waits in less than a MiB, where a Python would take 20; becomes one when it has something to do.
_WATCHER = (
    "setsid", "--fork", "sh", "-c",
    'read -r _; [ -e "$1" ] || exit 0; shift; exec "$@" </dev/null', "sh",
)  # fmt: skip


def _watch(name: str, folder: Path, watched: int) -> None:
    """Start the watcher of the server, whose end is the end of the pipe `watched`."""
    supervise = [sys.executable, "-P", "-m", f"{__package__}.supervise", name]
    with open(folder / SUPERVISOR_LOG, "ab") as log, io_flusher():
        subprocess.run(
            [*_WATCHER, str(folder / KEEP), *supervise],
            stdin=watched,
            stdout=log,
            stderr=log,
            cwd="/",
            env={**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/bin:/bin"},
            check=False,
        )


def said(log: Path) -> str:
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
    release(name)
    if server is not None:
        server.process.signal(END)
        gone = server.process.wait_gone(limit) or (force and _kill(server.process))
        if not gone:
            raise Busy(
                f"the server of {name} (process {server.pid}) is still busy after {limit:.0f} s"
            )
    for leftover in (SOCKET, CONTROL, RECORD):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(folder / leftover)
    return server is not None


def _kill(process: Process) -> bool:
    process.signal(signal.SIGKILL)
    return process.wait_gone(DYING)

"""A real dockerd with a data root, an exec root and a socket of its own, and no network."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .process import PATIENCE, end_with_parent

MISSING = "needs root, dockerd and busybox: apt-get install docker.io busybox-static"
LIMIT = 60.0 * PATIENCE  # seconds for one docker command, and for dockerd to start
IMAGE = "bb"
APPLETS = ("sh", "cat", "ls", "touch", "top", "sleep", "true", "sync", "stat", "id", "dd", "mkdir")


def available() -> bool:
    return os.geteuid() == 0 and bool(shutil.which("dockerd") and _busybox())


def _busybox() -> str | None:
    return shutil.which("busybox", path="/bin:/usr/bin")


def docker_program() -> str:
    """Debian's, which is as old as its dockerd; another one on the PATH may be of any version."""
    return "/usr/bin/docker" if os.path.exists("/usr/bin/docker") else "docker"


# Other drivers on this machine, and sockets of dead ones, for each of which `volume ls` waits 15 s,
# are none of ours. So dockerd has a mount namespace of its own, which follows mounts of this one.
# The next dockerd has the same, as live restore needs it.
_HOLD = """
mkdir -p /run/docker/plugins && mount --bind "$0" /run/docker/plugins && echo && exec sleep infinity
"""


class DockerFailed(AssertionError):
    """A docker command ended with an error; `said` is its standard error."""

    def __init__(self, words: tuple[str, ...], said: str) -> None:
        super().__init__(f"docker {' '.join(words)}: {said}")
        self.said = said


class Dockerd:
    """Call it with the words of a docker command; what that printed."""

    def __init__(self, folder: Path, plugins: Path) -> None:
        self.folder, self.plugins = folder, plugins
        self.socket = folder / "docker.sock"
        self.host = f"unix://{self.socket}"
        self.log = folder / "dockerd.log"
        self.options: list[str] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._holder: subprocess.Popen[bytes] | None = None

    # ---- the daemon

    def _namespace(self) -> int:
        """The process whose mount namespace is dockerd's."""
        if self._holder is None:
            words = ["unshare", "--mount", "--propagation", "slave", "sh", "-c", _HOLD]
            self._holder = subprocess.Popen(
                [*words, str(self.plugins)],
                stdout=subprocess.PIPE,
                preexec_fn=end_with_parent,  # noqa: PLW1509 - the tests start it from one thread
            )
            assert self._holder.stdout is not None
            assert self._holder.stdout.readline() == b"\n"
        return self._holder.pid

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Returns when it answers."""
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                [
                    *("nsenter", "--target", str(self._namespace()), "--mount", "dockerd"),
                    *("--data-root", str(self.folder / "data")),
                    *("--exec-root", str(self.folder / "exec")),
                    *("--pidfile", str(self.folder / "dockerd.pid")),
                    *("--host", self.host),
                    *("--iptables=false", "--bridge=none"),
                    *self.options,
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=end_with_parent,  # noqa: PLW1509 - the tests start it from one thread
            )
        deadline = time.monotonic() + LIMIT
        while not self._answers():
            assert self._process.poll() is None, self._tail()
            assert time.monotonic() < deadline, f"dockerd does not answer: {self._tail()}"
            time.sleep(0.02)

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(5)
            connection.connect(str(self.socket))
            connection.sendall(b"GET /_ping HTTP/1.0\r\nHost: docker\r\n\r\n")
            return b" 200 " in connection.recv(64)
        return False

    def _tail(self) -> str:
        return self.log.read_text(errors="replace")[-2000:]

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """As the kernel does when memory runs out: nothing is tidied up."""
        self._end(signal.SIGKILL)
        # Its containerd ends with it. Where nobody reaps that, the next dockerd waits for a zombie.
        (self.folder / "exec" / "containerd" / "containerd.pid").unlink(missing_ok=True)

    def _end(self, number: int) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            try:
                self._process.wait(LIMIT)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(LIMIT)
        self._process = None

    def restart(self) -> None:
        self.stop()
        self.start()

    def tidy(self) -> None:
        """End what a killed dockerd left: its containerd and the containers' processes."""
        if self._holder is not None:
            assert self._holder.stdout is not None
            self._holder.stdout.close()
            self._holder.kill()
            self._holder.wait(LIMIT)
        for _ in range(2):
            for folder in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    command = (folder / "cmdline").read_bytes()
                    if str(self.folder).encode() in command and int(folder.name) != os.getpid():
                        os.kill(int(folder.name), signal.SIGKILL)
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        for target in sorted((line.split()[4] for line in lines), reverse=True):
            if target.startswith(str(self.folder)):
                subprocess.run(["umount", "--lazy", target], check=False, capture_output=True)

    # ---- commands

    def __call__(self, *words: str | Path, limit: float = LIMIT) -> str:
        """Standard output without the last newline. Raises DockerFailed."""
        done = self.run(*words, limit=limit)
        if done.returncode:
            raise DockerFailed(tuple(map(str, words)), done.stderr.strip())
        return done.stdout.rstrip("\n")

    def run(self, *words: str | Path, limit: float = LIMIT) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*words),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=limit,
            check=False,
        )

    def start_command(self, *words: str | Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*words),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def command(self, *words: str | Path) -> list[str]:
        return [docker_program(), "--host", self.host, *map(str, words)]

    def fails(self, *words: str | Path) -> str:
        """The error that a command ends with."""
        done = self.run(*words)
        assert done.returncode != 0, f"docker {words} worked: {done.stdout}"
        return done.stderr.strip()

    def inspect(self, volume: str) -> dict[str, Any]:
        (found,) = json.loads(self("volume", "inspect", volume))
        return dict(found)

    def import_image(self) -> None:
        """IMAGE: busybox, and a few empty folders."""
        if IMAGE in self("images", "--format", "{{.Repository}}").split():
            return
        tree = io.BytesIO()
        with tarfile.open(fileobj=tree, mode="w") as tar:
            for folder in ("bin", "tmp", "etc"):
                entry = tarfile.TarInfo(folder)
                entry.type, entry.mode = tarfile.DIRTYPE, 0o755
                tar.addfile(entry)
            busybox = _busybox()
            assert busybox is not None
            tar.add(busybox, "bin/busybox")
            for applet in APPLETS:
                link = tarfile.TarInfo(f"bin/{applet}")
                link.type, link.linkname = tarfile.SYMTYPE, "busybox"
                tar.addfile(link)
        subprocess.run(
            self.command("import", "-", IMAGE),
            input=tree.getvalue(),
            check=True,
            capture_output=True,
            timeout=LIMIT,
        )


@contextlib.contextmanager
def dockerd(folder: Path, plugins: Path) -> Iterator[Dockerd]:
    """A running one, which finds its plugins in `plugins`; with all its containers it is gone at
    the end.
    """
    daemon = Dockerd(folder, plugins)
    try:
        daemon.start()
        daemon.import_image()
        yield daemon
    finally:
        daemon.stop()
        daemon.tidy()

"""A real nbdkit on a real ext4 image, and the check that a test leaves the machine as it was."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from horcrux_nbd.attach import device as attaching
from horcrux_nbd.attach.base import Attachment
from horcrux_nbd.attach.mountinfo import mounts
from horcrux_nbd.attach.sockets import listener
from tests.servers.process import PATIENCE

LIMIT = 30.0 * PATIENCE  # seconds for anything that a test waits for

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: run as root (sudo)")
needs_fuse = pytest.mark.skipif(
    os.geteuid() != 0
    or not shutil.which("nbdfuse")
    or not os.path.exists("/dev/fuse")
    or not os.path.exists("/dev/loop-control"),
    reason="needs root, /dev/fuse, /dev/loop-control and nbdfuse: apt-get install libnbd-bin",
)

needs_nbd = pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists("/sys/module/nbd"),
    reason="needs root and the nbd module: `modprobe nbd`, or run `scripts/vm-test`",
)
WAYS = ["fuse", "nbd"] if os.path.exists("/sys/module/nbd") else ["fuse"]


def wait_for(done: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + LIMIT
    while not done():
        assert time.monotonic() < deadline, f"{what} did not come within {LIMIT} s"
        time.sleep(0.02)


class Server:
    """An nbdkit that can be killed and started again on the same socket and image."""

    def __init__(self, folder: Path, image: Path) -> None:
        self.socket, self.image, self.log = folder / "nbd.sock", image, folder / "requests"
        self.process: subprocess.Popen[bytes] | None = None
        self.filters: list[str] = []
        self.arguments: list[str] = []
        self.options: list[str] = []

    def start(self) -> None:
        self.socket.unlink(missing_ok=True)
        self.process = subprocess.Popen(
            [
                "nbdkit",
                "--foreground",
                f"--unix={self.socket}",
                "--threads=8",
                *self.options,
                *(f"--filter={name}" for name in ("log", *self.filters)),
                "file",
                str(self.image),
                f"logfile={self.log}",
                "logappend=true",
                *self.arguments,
            ]
        )
        wait_for(lambda: listener(self.socket), "nbdkit")

    def kill(self) -> None:
        assert self.process
        self.process.kill()
        self.process.wait(LIMIT)

    def stop(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.kill()

    def requests(self, kind: str) -> list[str]:
        """The lines of nbdkit's log that begin a request of `kind` (Read, Write, Flush, Trim)."""
        return [line for line in self.log.read_text().splitlines() if f" {kind} id=" in line]


@pytest.fixture(scope="session")
def ext4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "ext4.img"
    with open(path, "wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-E", "lazy_itable_init=0", str(path)], check=True)
    return path


@pytest.fixture
def image(ext4: Path, tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    subprocess.run(["cp", "--sparse=always", str(ext4), str(path)], check=True)
    return path


@pytest.fixture
def server(tmp_path: Path, image: Path) -> Iterator[Server]:
    server = Server(tmp_path, image)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    """Where attachments of the test go; what it left there is taken away even if it failed."""
    state = tmp_path / "run" / "volume" / "attach"
    yield state
    attaching.clean_up(state)


@pytest.fixture(params=WAYS)
def via(request: pytest.FixtureRequest) -> str:
    """Each way to attach that this machine has."""
    return str(request.param)


@pytest.fixture
def attached(server: Server, state: Path, via: str) -> Attachment:
    # Short time-outs, so that a test need not wait long for what the kernel sends again.
    return attaching.attach(
        server.socket, name="volume", state=state, via=via, request_timeout=6, dead_timeout=60
    )


@pytest.fixture
def target(tmp_path: Path) -> Path:
    target = tmp_path / "mount point"  # the space is on purpose: mountinfo escapes it
    target.mkdir()
    return target


def leftovers() -> set[str]:
    """Mounts, bound loop devices, connected NBD devices and nbdfuse processes of this machine."""
    found = {f"mount {mount.target}" for mount in mounts()}
    for name in os.listdir("/sys/block"):
        if Path(f"/sys/block/{name}/loop/backing_file").exists():
            found.add(f"loop device {name}")
        if Path(f"/sys/block/{name}/pid").exists():
            found.add(f"NBD device {name}")
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                words = Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if words[0].endswith((b"nbdfuse", b"losetup")):
                found.add(f"process {b' '.join(words).decode()}")
    return found


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[None]:
    """Other programs of the machine may come and go, so only what names this test's folder counts.

    Loop devices do not name it in `leftovers`, hence the second look at their files.
    """
    yield
    mine = {line for line in leftovers() if str(tmp_path) in line}
    for name in os.listdir("/sys/block"):
        file = Path(f"/sys/block/{name}/loop/backing_file")
        if file.exists() and str(tmp_path) in file.read_text():
            mine.add(f"loop device {name} on {file.read_text().strip()}")
        backend = Path(f"/sys/block/{name}/backend")
        if backend.exists() and str(tmp_path) in backend.read_text():
            mine.add(f"NBD device {name}")
    assert not mine

"""The kernel's own NBD client, and above all a server that dies under it.

Runs where the module is: `scripts/vm-test` has it in a VM.
"""

from __future__ import annotations

import os
import random
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from horcrux_nbd.attach import device, kernel_nbd, mount, nbd_netlink
from horcrux_nbd.attach.base import Attachment
from horcrux_nbd.attach.mountinfo import mounted_at
from horcrux_nbd.attach.processes import TimedOut, run
from horcrux_nbd.errors import Busy, HorcruxError, NotFound

from .conftest import Server, needs_nbd, wait_for

pytestmark = needs_nbd
MiB = 1 << 20


@pytest.fixture
def via() -> str:
    return "nbd"


@pytest.fixture
def io_errors() -> None:
    """For a test that provokes I/O errors."""


@pytest.fixture(autouse=True)
def no_io_errors(request: pytest.FixtureRequest) -> Iterator[None]:
    """The kernel must not report one, except where a test says that it provokes some."""
    before = _complaints()
    yield
    if "io_errors" not in request.fixturenames:
        assert _complaints()[len(before) :] == []


def _complaints() -> list[str]:
    lines = subprocess.run(["dmesg"], capture_output=True, text=True, check=True).stdout
    bad = ("I/O error", "EXT4-fs error", "Remounting filesystem read-only", "JBD2: ")
    return [line for line in lines.splitlines() if any(word in line for word in bad)]


def sysfs(attachment: Attachment, name: str) -> str:
    return (Path("/sys/block") / Path(attachment.device).name / name).read_text().strip()


class Writer(threading.Thread):
    """Writes files of random content and syncs each, until told to stop."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.ending = folder, threading.Event()
        self.synced: dict[str, bytes] = {}
        self.error: OSError | None = None

    def run(self) -> None:
        generator = random.Random(1)
        try:
            while not self.ending.is_set():
                name, content = f"file{generator.randrange(20)}", generator.randbytes(100_000)
                self.synced.pop(name, None)
                with open(self.folder / name, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                self.synced[name] = content
        except OSError as error:
            self.error = error

    def end(self) -> None:
        self.ending.set()
        self.join(60)
        assert not self.is_alive()


def test_the_device_is_what_the_server_serves(attached: Attachment, server: Server) -> None:
    assert attached.size == server.image.stat().st_size
    assert int(sysfs(attached, "size")) * 512 == attached.size
    assert sysfs(attached, "backend") == kernel_nbd.identifier(Path(attached.state))
    assert sysfs(attached, "queue/write_cache") == "write back"
    assert sysfs(attached, "queue/max_sectors_kb") == "1024"
    assert device.status(attached).alive
    assert attached.processes == ()
    with open(attached.device, "rb") as file:
        assert file.read(4 * MiB) == server.image.read_bytes()[: 4 * MiB]


def test_several_connections_are_used(attached: Attachment, server: Server) -> None:
    assert attached.connections == 4
    job = ["--rw=randread", "--bs=4k", "--iodepth=16", "--numjobs=4", "--size=4M", "--direct=1"]
    run(["fio", "--name=x", f"--filename={attached.device}", "--ioengine=libaio", *job], 60)
    used = {line.split("connection=")[1].split()[0] for line in server.requests("Read")}
    assert len(used) > 1


def test_flush_and_discard_reach_the_server(
    attached: Attachment, server: Server, target: Path
) -> None:
    mount.mount(attached.device, target)
    before = len(server.requests("Flush"))
    with open(target / "file", "wb") as file:
        file.write(b"x")
        file.flush()
        os.fsync(file.fileno())
    fua = [line for line in server.requests("Write") if " fua=1" in line]
    assert len(server.requests("Flush")) > before or fua
    run(["fstrim", str(target)], 60)
    assert server.requests("Trim")
    mount.unmount(target)


def test_a_killed_server_is_a_pause(attached: Attachment, server: Server, target: Path) -> None:
    mount.mount(attached.device, target)
    writer = Writer(target)
    writer.start()
    wait_for(lambda: len(writer.synced) > 2, "the first files")
    for _ in range(2):
        server.kill()
        assert "gone" in device.status(attached).problem
        count = len(server.requests("Write"))
        time.sleep(1)  # nothing announces that nothing happens
        assert writer.error is None
        assert len(server.requests("Write")) == count
        server.start()
        assert device.status(attached).reconnect
        attached = device.reconnect(attached)
        assert device.status(attached).alive
        assert device.reconnect(attached) == attached  # again is no error
        wait_for(lambda n=count: len(server.requests("Write")) > n + 10, "more writes")
    writer.end()
    assert writer.error is None
    assert "ro" not in (mounted_at(target) or pytest.fail("not mounted")).super_options
    for name, content in writer.synced.items():
        assert (target / name).read_bytes() == content
    mount.unmount(target)
    device.detach(attached)
    subprocess.run(["e2fsck", "-fn", str(server.image)], check=True, capture_output=True)


@pytest.mark.usefixtures("io_errors")
def test_a_server_that_never_comes_back_is_an_error_in_the_end(server: Server, state: Path) -> None:
    attachment = device.attach(
        server.socket, name="volume", state=state, via="nbd", request_timeout=3, dead_timeout=2
    )
    server.kill()
    began = time.monotonic()
    with pytest.raises(OSError):
        Path(attachment.device).open("rb").read(4096)
    assert 1 < time.monotonic() - began < 20
    with pytest.raises(NotFound, match="no NBD server listens"):
        device.reconnect(attachment)
    device.detach(attachment, force=True)


@pytest.mark.usefixtures("io_errors")
def test_detach_without_a_server_is_limited_and_force_gets_through(
    attached: Attachment, server: Server, state: Path
) -> None:
    server.kill()
    with pytest.raises(TimedOut, match=r"/dev/nbd\d+ \(volume\) does not answer .*--force"):
        device.detach(attached, timeout=2)
    assert device.detach(attached, timeout=10, force=True)
    assert not state.exists()


@pytest.mark.usefixtures("io_errors")
def test_force_ends_who_waits_in_the_kernel(
    attached: Attachment, server: Server, target: Path
) -> None:
    mount.mount(attached.device, target)
    server.kill()
    waiting = subprocess.Popen(
        [
            "dd",
            "if=" + attached.device,
            "of=/dev/null",
            "bs=1M",
            "skip=40",
            "count=1",
            "iflag=direct",
        ],
        stderr=subprocess.DEVNULL,
    )
    with pytest.raises(subprocess.TimeoutExpired):
        waiting.wait(1)
    device.detach(attached, timeout=10, force=True)
    assert waiting.wait(10) != 0
    assert mounted_at(target) is None


def test_another_image_on_the_socket_is_refused(attached: Attachment, server: Server) -> None:
    server.kill()
    with open(server.image, "r+b") as file:
        file.truncate(32 * MiB)
    server.start()
    with pytest.raises(HorcruxError, match="it is another image"):
        device.reconnect(attached)
    device.detach(attached, force=True)


def test_read_only(server: Server, state: Path, target: Path) -> None:
    attachment = device.attach(server.socket, name="volume", state=state, via="nbd", read_only=True)
    assert attachment.read_only
    assert sysfs(attachment, "ro") == "1"
    assert mount.mount(attachment.device, target, read_only=True).read_only
    mount.unmount(target)
    device.detach(attachment)
    assert not server.requests("Write")


def test_a_server_without_multi_conn_gets_one_connection(server: Server, state: Path) -> None:
    server.stop()
    server.filters, server.arguments = ["multi-conn"], ["multi-conn-mode=disable"]
    server.start()
    attachment = device.attach(server.socket, name="volume", state=state, via="nbd")
    assert attachment.connections == 1
    device.detach(attachment)


def test_the_kernel_picks_free_devices_for_many_at_once(server: Server, tmp_path: Path) -> None:
    states = [tmp_path / f"state{n}" for n in range(20)]  # more than the 16 that it begins with
    found: list[Attachment] = []

    def work(state: Path) -> None:
        found.append(device.attach(server.socket, name="v", state=state, via="nbd", connections=1))

    threads = [threading.Thread(target=work, args=(state,)) for state in states]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({attachment.device for attachment in found}) == len(states)
    for attachment in found:
        device.detach(attachment)


def test_many_rounds_leave_nothing(server: Server, state: Path) -> None:
    descriptors = f"/proc/{os.getpid()}/fd"
    before = len(os.listdir(descriptors))
    for _ in range(10):  # 50 passed as well; each takes 2 s and more under emulation
        attachment = device.attach(server.socket, name="volume", state=state, via="nbd")
        device.detach(attachment)
        assert not state.exists()
        assert kernel_nbd.numbers(kernel_nbd.identifier(state)) == []
    assert len(os.listdir(descriptors)) == before


def test_the_device_of_others_is_left_alone(attached: Attachment, server: Server) -> None:
    number = int(attached.device.removeprefix("/dev/nbd"))
    with pytest.raises(nbd_netlink.KernelRefused, match="refused to reconnect"):
        nbd_netlink.reconnect(number, [], backend="somebody else")
    assert kernel_nbd.numbers("somebody else") == []
    device.clean_up(Path(attached.state).with_name("other"))
    assert device.status(attached).alive


def test_a_mounted_device_is_not_detached(attached: Attachment, target: Path) -> None:
    mount.mount(attached.device, target)
    with pytest.raises(Busy, match="mounted on"):
        device.detach(attached)
    mount.unmount(target)
    device.detach(attached)

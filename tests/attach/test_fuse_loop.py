"""The whole path: file system → loop device → nbdfuse → NBD server."""

from __future__ import annotations

import hashlib
import mmap
import os
import random
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from horcrux_nbd import files
from horcrux_nbd.attach import device, fuse_loop, mount
from horcrux_nbd.attach.base import Attachment
from horcrux_nbd.attach.processes import Process, run
from horcrux_nbd.errors import Busy, EnvironmentProblem

from .conftest import Server, needs_fuse, wait_for

pytestmark = needs_fuse
MiB = 1 << 20


@pytest.fixture
def via() -> str:
    return "fuse"


def sysfs(attachment: Attachment, name: str) -> str:
    return (Path("/sys/block") / Path(attachment.device).name / name).read_text().strip()


def test_the_device_is_what_the_server_serves(attached: Attachment, server: Server) -> None:
    assert attached.size == server.image.stat().st_size
    assert sysfs(attached, "loop/dio") == "1"
    assert sysfs(attached, "loop/autoclear") == "0"
    assert sysfs(attached, "queue/logical_block_size") == "512"
    assert sysfs(attached, "queue/write_cache") == "write back"  # so that flushes are sent
    assert device.status(attached).alive
    expected = server.image.read_bytes()[: 4 * MiB]
    assert Path(attached.device).open("rb").read(4 * MiB) == expected


def test_reads_that_wait_for_the_store_run_in_parallel(server: Server, state: Path) -> None:
    """A request under way holds its connection, so their number is that of cold reads at once."""
    server.stop()
    server.filters, server.arguments = ["delay"], ["rdelay=200ms"]
    server.start()
    attachment = device.attach(server.socket, name="volume", state=state, via="fuse")
    job = ["--rw=randread", "--bs=4k", "--iodepth=32", "--number_ios=40", "--direct=1"]
    run(["fio", "--name=x", f"--filename={attachment.device}", "--ioengine=libaio", *job], 30)
    device.detach(attachment)
    used = {line.split("connection=")[1].split()[0] for line in server.requests("Read")}
    assert len(used) >= attachment.connections


def test_only_root_gets_to_the_fuse_file(attached: Attachment) -> None:
    state = Path(attached.state)
    assert state.stat().st_mode & 0o777 == 0o700
    assert (state / "fuse").parent.stat().st_uid == os.geteuid()
    code = f"import os; os.setuid(65534); open({str(state / 'fuse' / 'nbd')!r}, 'rb')"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert b"PermissionError" in child.stderr


def test_it_outlives_who_started_it(server: Server, state: Path) -> None:
    """nbdfuse is in a session of its own, so neither a hang-up nor our end reaches it."""
    code = (
        "import sys; from pathlib import Path; from horcrux_nbd.attach import device; "
        "device.attach(Path(sys.argv[1]), name='v', state=Path(sys.argv[2]), via='fuse')"
    )
    subprocess.run([sys.executable, "-c", code, str(server.socket), str(state)], check=True)
    attachment = Attachment.load(state)
    assert attachment is not None
    assert device.status(attachment).alive
    (helper,) = attachment.processes
    assert os.getsid(helper.pid) == helper.pid
    for number in (0, 1, 2):
        assert "pipe" not in os.readlink(f"/proc/{helper.pid}/fd/{number}")
    device.detach(attachment)


def test_flush_of_the_file_system_reaches_the_server(
    attached: Attachment, server: Server, target: Path
) -> None:
    mount.mount(attached.device, target)
    for name in ("one", "two"):
        before = len(server.requests("Flush"))
        with open(target / name, "wb") as file:
            file.write(b"x" * 5000)
            file.flush()
            os.fsync(file.fileno())
        assert len(server.requests("Flush")) > before
    mount.unmount(target)


def test_discard_reaches_the_server(attached: Attachment, server: Server, target: Path) -> None:
    mount.mount(attached.device, target)
    run(["fstrim", str(target)], 30)
    mount.unmount(target)
    trimmed = sum(int(line.split("count=")[1].split()[0], 16) for line in server.requests("Trim"))
    assert trimmed > 32 * MiB


def test_read_only_is_read_only_in_every_layer(server: Server, state: Path, target: Path) -> None:
    attachment = device.attach(
        server.socket, name="volume", state=state, via="fuse", read_only=True
    )
    assert attachment.read_only
    assert sysfs(attachment, "ro") == "1"
    with files.opened(attachment.device, os.O_RDONLY) as fd, pytest.raises(OSError):
        os.write(fd, bytes(4096))
    with pytest.raises(PermissionError), files.opened(attachment.device, os.O_RDWR) as fd:
        os.write(fd, bytes(4096))
    assert mount.mount(attachment.device, target).read_only
    mount.unmount(target)
    device.detach(attachment)
    assert not server.requests("Write")


def test_a_read_only_server_makes_a_read_only_device(server: Server, state: Path) -> None:
    server.stop()
    server.options = ["--read-only"]
    server.start()
    attachment = device.attach(server.socket, name="volume", state=state, via="fuse")
    assert attachment.read_only
    assert sysfs(attachment, "ro") == "1"


def test_concurrent_direct_writes_come_back_as_written(
    attached: Attachment, server: Server
) -> None:
    """The test that qemu-storage-daemon 7.2 failed with 228 of 3,000 (PEERS.md)."""
    pieces, rounds, size = 8, 24, attached.size
    written: dict[int, bytes] = {}
    failures: list[str] = []

    def work(worker: int) -> None:
        generator = random.Random(worker)
        fd = os.open(attached.device, os.O_RDWR | os.O_DIRECT)
        buffer = mmap.mmap(-1, MiB)  # page-aligned, which O_DIRECT asks for
        try:
            for _ in range(rounds):
                # Each worker has blocks of its own, so what a block must hold is known.
                offset = generator.randrange(size // MiB // pieces) * pieces * MiB + worker * MiB
                content = generator.randbytes(MiB)
                buffer[:] = content
                assert os.pwrite(fd, buffer, offset) == MiB
                written[offset] = hashlib.sha256(content).digest()
                assert os.preadv(fd, [buffer], offset) == MiB
                if bytes(buffer) != content:
                    failures.append(f"block at {offset} read back wrong")
        finally:
            os.close(fd)

    workers = [threading.Thread(target=work, args=(n,)) for n in range(pieces)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    device.detach(attached)
    with open(server.image, "rb") as file:
        for offset, digest in written.items():
            file.seek(offset)
            if hashlib.sha256(file.read(MiB)).digest() != digest:
                failures.append(f"block at {offset} is wrong in the image")
    assert not failures
    assert len(written) > pieces


@pytest.mark.slow
def test_fifty_rounds_leave_nothing(server: Server, state: Path, target: Path) -> None:
    assert server.process
    for _ in range(50):
        attachment = device.attach(server.socket, name="volume", state=state, via="fuse")
        device.detach(attachment)
        assert not state.exists()
    descriptors = f"/proc/{os.getpid()}/fd"
    before = len(os.listdir(descriptors))
    device.detach(device.attach(server.socket, name="volume", state=state, via="fuse"))
    assert len(os.listdir(descriptors)) == before
    wait_for(
        lambda: len(os.listdir(f"/proc/{server.process.pid}/fd")) < 60,  # type: ignore[union-attr]
        "the end of the server's connections",
    )


def test_a_server_that_hangs_up_is_one_line(tmp_path: Path, state: Path) -> None:
    path = tmp_path / "rude.sock"
    with socket.socket(socket.AF_UNIX) as rude:
        rude.bind(str(path))
        rude.listen()

        def hang_up() -> None:
            rude.accept()[0].close()

        threading.Thread(target=hang_up).start()
        with pytest.raises(EnvironmentProblem, match=r"nbdfuse did not start: .+") as caught:
            device.attach(path, name="volume", state=state, via="fuse")
    assert "\n" not in str(caught.value)
    assert not state.exists()


def test_status_tells_what_died(attached: Attachment, server: Server) -> None:
    server.kill()
    assert "gone" in device.status(attached).problem
    server.start()
    status = device.status(attached)
    assert "started again" in status.problem
    assert status.reconnect
    with pytest.raises(EnvironmentProblem, match="cannot connect again"):
        device.reconnect(attached)
    attached.processes[0].signal(9)
    wait_for(lambda: "nbdfuse" in device.status(attached).problem, "the death of nbdfuse")
    assert not device.status(attached).alive


def test_somebody_who_has_the_device_open_stops_detach(attached: Attachment) -> None:
    child = subprocess.Popen(["sleep", "60"], stdin=open(attached.device, "rb"))
    try:
        with pytest.raises(Busy, match=rf"sleep \(pid {child.pid}, has the device open\)"):
            device.detach(attached)
        assert device.status(attached).alive
    finally:
        child.kill()
        child.wait()
    device.detach(attached)


def test_missing_programs_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fuse_loop.ENVIRONMENT, "PATH", "/nowhere")
    assert fuse_loop.DRIVER.missing() == (
        "nbdfuse is not installed",
        "apt-get install libnbd-bin",
    )


def test_the_helper_is_marked_where_that_is_allowed(attached: Attachment) -> None:
    if fuse_loop.DRIVER.warning():
        pytest.skip("needs CAP_SYS_RESOURCE: `scripts/vm-test` has it")
    (helper,) = attached.processes
    assert Process.of(helper.pid) == helper
    text = Path(f"/proc/{helper.pid}/stat").read_text()
    assert int(text[text.rindex(")") :].split()[7]) & 0x180000 == 0x180000

"""Images in the formats of virtual machines, read through a real qemu-nbd."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from horcrux_nbd.errors import EnvironmentProblem, UsageError
from horcrux_nbd.progress import Progress
from horcrux_nbd.source import open_source
from horcrux_nbd.source.qemu import QemuSource
from horcrux_nbd.source.tools import run_tool
from horcrux_nbd.units import MiB

pytestmark = pytest.mark.skipif(
    not shutil.which("qemu-nbd"), reason="needs qemu: apt-get install qemu-utils"
)


def qemu_img(*arguments: str | Path) -> None:
    result = run_tool(["qemu-img", *map(str, arguments)])
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qemu") / "raw"
    with open(path, "wb") as file:
        file.truncate(48 * MiB)
        for offset, length in ((0, 5000), (7 * MiB, 3 * MiB), (40 * MiB, MiB)):
            file.seek(offset)
            file.write(os.urandom(length // 2) + b"compressible" * (length // 24))
    return path


@pytest.mark.parametrize("kind", ["qcow2", "qcow2 -c", "vmdk", "vdi", "vhdx", "vpc", "qed"])
def test_format(raw: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "image"
    qemu_img("convert", "-O", *kind.split(), raw, path)
    with open_source(path) as source:
        assert isinstance(source, QemuSource)
        assert source.size >= 48 * MiB  # vpc rounds up to its cylinders
        extents = list(source.extents())
        # vhdx has blocks of 8 MiB and more.
        assert kind == "vhdx" or sum(length for _, length in extents) <= 8 * MiB
        content = bytearray(source.size)
        pieces = [
            (at, min(300_001, offset + length - at))
            for offset, length in extents
            for at in range(offset, offset + length, 300_001)
        ]
        with ThreadPoolExecutor(6) as pool:  # more than there are connections
            for (at, length), data in zip(
                pieces, pool.map(lambda piece: source.read(*piece), pieces), strict=True
            ):
                content[at : at + length] = data
        assert content[: 48 * MiB] == raw.read_bytes()
        assert source.read(source.size - 10, 20) == bytes(20)
        assert source.problems() == []


class Notes(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, line: str) -> None:
        self.lines.append(line)


def test_backing_file_is_read_and_named(raw: Path, tmp_path: Path) -> None:
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    qemu_img("convert", "-O", "qcow2", raw, base)
    qemu_img("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "base.qcow2", top)
    notes = Notes()
    with open_source(top, progress=notes) as source:
        assert str(base) in notes.lines[0]
        assert source.read(7 * MiB, 4096) == raw.read_bytes()[7 * MiB : 7 * MiB + 4096]
        os.utime(base)
        assert source.problems() == [f"{base}: changed while it was read"]


def test_backing_that_is_no_local_file_is_refused(tmp_path: Path) -> None:
    """An image from elsewhere could make us read any address that it names."""
    path = tmp_path / "image"
    qemu_img(
        *("create", "-q", "-u", "-f", "qcow2", "-F", "raw"),
        *("-b", "nbd://localhost:1/x", path, "64M"),
    )
    with pytest.raises(UsageError, match="no local file"):
        open_source(path)


def test_data_in_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={tmp_path}/data", path, "64M")
    with pytest.raises(UsageError, match="another file"):
        open_source(path)


def test_damaged(raw: Path, tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu_img("convert", "-O", "qcow2", raw, path)
    os.truncate(path, 100)
    with pytest.raises(UsageError, match="image"):
        open_source(path)


def test_in_use_by_a_virtual_machine(raw: Path, tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu_img("convert", "-O", "qcow2", raw, path)
    writer = subprocess.Popen(
        ["qemu-nbd", "--persistent", f"--socket={tmp_path}/s", "--format=qcow2", str(path)]
    )
    try:
        wait_for((tmp_path / "s").exists)
        with pytest.raises(UsageError, match="another process using"):
            open_source(path)
    finally:
        writer.terminate()
        writer.wait()


def test_name_that_looks_like_a_protocol(raw: Path, tmp_path: Path) -> None:
    path = tmp_path / "nbd:x"
    qemu_img("convert", "-O", "qcow2", raw, tmp_path / "image")
    (tmp_path / "image").rename(path)
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        with open_source("nbd:x") as source:
            assert source.size == 48 * MiB
    finally:
        os.chdir(here)


def test_lost_server_is_an_error_not_a_hang(raw: Path, tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu_img("convert", "-O", "qcow2", raw, path)
    with open_source(path) as source:
        assert isinstance(source, QemuSource)
        assert source._server
        source._server.kill()
        source._server.wait()
        for _ in range(6):
            with pytest.raises(OSError, match="qemu"):
                source.read(0, 4096)


def test_nothing_is_left(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after SIGKILL: qemu-nbd ends with its last connection, the socket has no name."""
    path = tmp_path / "image"
    folder = tmp_path / "tmp"
    folder.mkdir()
    qemu_img("convert", "-O", "qcow2", raw, path)
    program = (
        "import sys, time; from horcrux_nbd.source import open_source\n"
        f"source = open_source({str(path)!r})\n"
        "print(source._server.pid, flush=True); time.sleep(100)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(folder)},
    )
    assert child.stdout
    server = int(child.stdout.readline())
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    wait_for(lambda: not running(server))
    assert os.listdir(folder) == []


def test_closed(raw: Path, tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu_img("convert", "-O", "qcow2", raw, path)
    source = open_source(path)
    assert isinstance(source, QemuSource)
    assert source._server
    server = source._server.pid
    source.close()
    source.close()
    assert not running(server)


def test_without_qemu_raw_files_work(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "image"
    qemu_img("convert", "-O", "qcow2", raw, path)
    monkeypatch.setattr("horcrux_nbd.source.tools._SBIN", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    with open_source(raw) as source:
        assert source.size == 48 * MiB
    with pytest.raises(EnvironmentProblem, match="qemu-utils"):
        open_source(path)


def running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition: object) -> None:
    assert callable(condition)
    limit = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.01)


def test_info_is_json() -> None:
    """What the code relies on: the version of qemu prints the fields that are read."""
    result = run_tool(["qemu-img", "info", "--output=json", "/dev/null"])
    assert json.loads(result.stdout)["format"] == "raw"

"""Files that are there whole or not at all, and locks that die with their holder."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from horcrux_nbd import files
from horcrux_nbd.errors import Busy, Damaged, NoSpace


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


# ---- publish


def test_publish_replaces(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.publish(path, b"one")
    files.publish(path, b"two", mode=0o600)
    assert path.read_bytes() == b"two"
    assert path.stat().st_mode & 0o777 == 0o600
    assert names(tmp_path) == ["file"]


def test_exclusive_never_replaces(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.publish(path, b"one", exclusive=True)
    with pytest.raises(FileExistsError):
        files.publish(path, b"two", exclusive=True)
    assert path.read_bytes() == b"one"
    assert names(tmp_path) == ["file"]


def test_one_exclusive_writer_wins(tmp_path: Path) -> None:
    path, won = tmp_path / "file", []
    start = threading.Barrier(8)

    def write(number: int) -> None:
        start.wait()
        try:
            files.publish(path, b"%d" % number, exclusive=True)
            won.append(number)
        except FileExistsError:
            pass

    threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(won) == 1
    assert path.read_bytes() == b"%d" % won[0]
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("call", ["pwrite", "fsync", "rename"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_failure_leaves_what_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    path = tmp_path / "file"
    files.publish(path, b"one")

    def fail(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(NoSpace if number == errno.ENOSPC else OSError):
        files.publish(path, b"two")
    monkeypatch.undo()
    assert path.read_bytes() == b"one"
    assert names(tmp_path) == ["file"]


def test_synced_in_the_order_that_matters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data before the name, the name before it returns."""
    calls: list[str] = []
    real = {name: getattr(os, name) for name in ("fsync", "rename")}

    def fsync(fd: int) -> None:
        calls.append("folder" if os.path.isdir(f"/proc/self/fd/{fd}") else "data")
        real["fsync"](fd)

    def rename(*args: Path) -> None:
        calls.append("name")
        real["rename"](*args)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    files.publish(tmp_path / "file", b"one")
    assert calls == ["data", "name", "folder"]
    calls.clear()
    files.publish(tmp_path / "file", b"one", durable=False)
    assert calls == ["name"]


def test_short_writes_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:3], at))
    files.publish(tmp_path / "file", b"0123456789")
    assert (tmp_path / "file").read_bytes() == b"0123456789"


def test_a_write_that_goes_nowhere_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: 0)
    with pytest.raises(OSError, match="no progress"):
        files.publish(tmp_path / "file", b"0")


# ---- JSON, reading, folders, sweeping


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    files.publish_json(path, {"b": 1, "a": "ü"})
    assert files.read_json(path) == {"b": 1, "a": "ü"}
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_text('{"a": ')
    with pytest.raises(Damaged, match=r"file\.json is damaged"):
        files.read_json(path)
    with pytest.raises(FileNotFoundError):
        files.read_json(tmp_path / "other")


def test_read_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    with files.opened(path, os.O_RDONLY) as fd:
        assert files.read_exactly(fd, 4, 2) == b"2345"
        assert files.read_exactly(fd, 4, 8) == b"89\0\0"
        assert files.read_exactly(fd, 4, 100) == bytes(4)
        assert files.read_exactly(fd, 0, 0) == b""
        real = os.pread
        monkeypatch.setattr(os, "pread", lambda fd, n, at: real(fd, min(n, 3), at))
        assert files.read_exactly(fd, 12, 0) == b"0123456789\0\0"
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)


def test_make_folder(tmp_path: Path) -> None:
    files.make_folder(tmp_path / "a" / "b", 0o700)
    files.make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        files.make_folder(tmp_path / "file" / "c")


def test_sweep(tmp_path: Path) -> None:
    for name in (".tmp-1", ".tmp-2", "file"):
        (tmp_path / name).touch()
    assert files.sweep_temporaries(tmp_path) == 2
    assert names(tmp_path) == ["file"]


# ---- locks

HOLD = (
    "import sys; from horcrux_nbd.files import FileLock\n"
    "FileLock(sys.argv[1], 'it').acquire(); print('held', flush=True); sys.stdin.read()"
)


def test_lock(tmp_path: Path) -> None:
    lock = files.FileLock(tmp_path / "lock", "volume x")
    assert lock.held_by_somebody() is None
    with lock:
        assert files.FileLock(tmp_path / "lock", "it").held_by_somebody() == os.getpid()
        with pytest.raises(Busy, match=f"volume y is in use by process {os.getpid()}"):
            files.FileLock(tmp_path / "lock", "volume y").acquire()
    with files.FileLock(tmp_path / "lock", "volume y"):
        pass
    lock.release()


def test_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    assert child.stdin is not None
    with child.stdin, child.stdout:
        assert child.stdout.readline() == b"held\n"
        lock = files.FileLock(path, "it")
        assert lock.held_by_somebody() == child.pid
        with pytest.raises(Busy, match=str(child.pid)):
            lock.acquire()
        child.kill()
        child.wait(10)
    lock.acquire()
    lock.release()


def test_waiting_for_a_lock(tmp_path: Path) -> None:
    first = files.FileLock(tmp_path / "lock", "it").acquire()
    timer = threading.Timer(0.1, first.release)
    timer.start()
    files.FileLock(tmp_path / "lock", "it").acquire(wait=10).release()
    timer.join()


def test_a_lock_needs_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A volume on a full disk can be served, and so be freed of what is too much."""
    lock = files.FileLock(tmp_path / "lock", "it")

    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        lock.acquire()
    with pytest.raises(Busy, match="in use"):
        files.FileLock(tmp_path / "lock", "it").acquire()
    lock.release()


def test_json_of_10_gib_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    files.publish_json(path, {"a": 1})
    os.truncate(path, 10 << 30)
    with pytest.raises(Damaged, match="over 16 MiB"):
        files.read_json(path)
    path.write_text("[" * 100_000)
    with pytest.raises(Damaged):
        files.read_json(path)

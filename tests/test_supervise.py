"""A server that dies under an attached volume comes back, whoever mounted it, and only one does.

What takes kernel NBD runs in `scripts/vm-test` and `scripts/vm-docker`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from horcrux_nbd import host, server, supervise
from horcrux_nbd.attach.mountinfo import mounted_at
from horcrux_nbd.attach.processes import Process, with_argument

from .attach.conftest import WAYS, needs_fuse, needs_nbd
from .cli.support import make_directory, run
from .servers.process import PATIENCE

LIMIT = 60.0 * PATIENCE  # seconds


def wait_for(done: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + LIMIT
    while not done():
        assert time.monotonic() < deadline, f"{what} did not come within {LIMIT:.0f} s"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("supervise")
    make_directory(folder / "source")
    run("generate", "-q", "--size", "64M", "AMCC", folder / "source", folder / "repository")
    return folder / "repository"


@pytest.fixture
def volume(repository: Path, horcrux_host: Path) -> Iterator[str]:
    run("create", "v", repository, "AMCC")
    # Reads fail after a second at the latest, so the kernel sends again after 17 and not 90.
    (horcrux_host / "config.toml").write_text("[store]\ntimeout = 1\n")
    yield "v"
    run("umount", "--force", "v", ok=False)
    run("detach", "--force", "v", ok=False)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "mnt").mkdir()
    return tmp_path / "mnt"


def servers() -> list[Process]:
    """nbdkit processes that serve this test's volume: never two."""
    return with_argument("nbdkit", f"volume={host.folder_of('v')}")


def killed() -> server.Server:
    """The server that is killed here."""
    found = server.running("v")
    assert found is not None
    os.kill(found.pid, signal.SIGKILL)
    found.process.wait_gone(LIMIT)
    return found


def watchers() -> list[Process]:
    return with_argument("sh", str(server.folder_of("v") / server.KEEP))


def test_the_pause_grows() -> None:
    assert supervise.delay_of(0, 0.1) == 0
    assert supervise.delay_of(1, 0.1) == 0
    pauses = [supervise.delay_of(n, 1.0) for n in range(2, 12)]
    assert pauses == sorted(pauses)
    assert 0 < pauses[0] < pauses[-1] == supervise.MOST_DELAY
    assert supervise.delay_of(10**9, 1.0) == supervise.MOST_DELAY
    assert supervise.delay_of(10**9, 61.0) == 0


def test_a_watcher_waits_for_its_server_and_no_longer(volume: str) -> None:
    run("serve", volume)
    (watcher,) = watchers()
    rss = int(Path(f"/proc/{watcher.pid}/statm").read_text().split()[1]) * 4096
    assert rss < 2 << 20
    killed()
    assert watcher.wait_gone(LIMIT)
    assert servers() == []  # not attached: nobody's file system waits for it
    run("serve", volume)
    (watcher,) = watchers()
    assert host.stop(volume)
    assert watcher.wait_gone(LIMIT)
    assert not (server.folder_of(volume) / server.KEEP).exists()


def test_one_that_cannot_start_is_not_started_again(volume: str, tmp_path: Path) -> None:
    state = host.folder_of(volume) / "volume.json"
    text = state.read_text()
    state.write_text("{}")
    with pytest.raises(Exception, match="cannot"):
        server.start(volume, host.folder_of(volume))
    assert watchers() == []
    assert server.running(volume) is None
    state.write_text(text)
    host.serve(volume)
    host.stop(volume)


@needs_fuse
def test_a_fuse_file_cannot_be_saved(volume: str, target: Path) -> None:
    run("mount", "--via", "fuse", volume, target)
    (watcher,) = watchers()
    killed()
    assert watcher.wait_gone(LIMIT)
    assert servers() == []
    assert not supervise.supervise(volume, 1)
    run("umount", "--force", volume)


@needs_fuse
@pytest.mark.parametrize("via", WAYS)
def test_what_a_shutdown_sends_waits_for_the_unmount(volume: str, target: Path, via: str) -> None:
    """systemd sends TERM and HUP to all of a session while file systems are still mounted."""
    run("mount", "--via", via, volume, target)
    found = server.running(volume)
    assert found is not None
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
        os.kill(found.pid, number)
    log = server.folder_of(volume) / server.LOG
    wait_for(lambda: "ends when its device is free" in log.read_text(), "a word about it")
    with open(target / "new", "wb") as file:
        file.write(b"written after SIGTERM" * 100_000)
        file.flush()
        os.fsync(file.fileno())
    subprocess.run(["umount", str(target)], check=True, timeout=LIMIT)
    assert found.process.wait_gone(LIMIT)
    run("umount", "--force", volume, ok=False)
    run("detach", "--force", volume, ok=False)
    run("mount", volume, target)
    assert (target / "new").read_bytes() == b"written after SIGTERM" * 100_000
    run("umount", volume)


def test_a_socket_that_nobody_attached_ends_on_a_signal(volume: str) -> None:
    run("serve", volume)
    found = server.running(volume)
    assert found is not None
    os.kill(found.pid, signal.SIGTERM)
    assert found.process.wait_gone(LIMIT)
    assert not (server.folder_of(volume) / server.CONTROL).exists()  # it closed its volume


# ---- kernel NBD


@contextlib.contextmanager
def no_complaints() -> Iterator[None]:
    def complaints() -> list[str]:
        lines = subprocess.run(["dmesg"], capture_output=True, text=True, check=True).stdout
        bad = ("I/O error", "EXT4-fs error", "Remounting filesystem read-only", "JBD2: ")
        return [line for line in lines.splitlines() if any(word in line for word in bad)]

    before = complaints()
    yield
    assert complaints()[len(before) :] == []


@needs_nbd
def test_nbd_a_killed_server_is_back(volume: str, target: Path) -> None:
    """Killed idle and under load, and killed while it is being started again."""
    run("mount", "--via", "nbd", volume, target)
    with no_complaints():
        for number in range(3):
            before = killed()
            if number == 2:  # the one that comes back dies as well
                wait_for(lambda: server.running(volume), "a server")
                killed()
            (target / f"file{number}").write_bytes(os.urandom(300_000))
            subprocess.run(["sync", "--file-system", str(target)], check=True, timeout=120)
            wait_for(lambda: host.status(volume).problem == "", "a healthy volume")
            (now,) = servers()
            assert now != before.process
        found = server.running(volume)
        assert found is not None
        assert found.restarts >= 4
        assert dict(found.options) == {"timeout": "1"}
        mounted = mounted_at(target)
        assert mounted is not None
        assert "ro" not in mounted.super_options
        subprocess.run(["umount", str(target)], check=True, timeout=LIMIT)
    assert "restart 1" in (server.folder_of(volume) / server.SUPERVISOR_LOG).read_text()
    run("detach", volume)
    assert servers() == []
    wait_for(lambda: not watchers(), "the end of the watcher")


@needs_nbd
def test_nbd_stopped_is_not_started_again(volume: str, target: Path) -> None:
    run("mount", "--via", "nbd", volume, target)
    run("umount", volume)
    assert not supervise.supervise(volume, 1)
    assert servers() == []
    run("mount", "--via", "nbd", volume, target)
    killed()
    run("umount", "--force", volume)
    wait_for(lambda: not watchers(), "the end of the watcher")
    wait_for(lambda: not with_argument("python", supervise.__name__), "the end of its program")
    assert servers() == []


@needs_nbd
def test_nbd_a_watcher_that_was_killed(volume: str, target: Path) -> None:
    """Then whoever looks next mends it: `revive` is what the Docker driver calls."""
    run("mount", "--via", "nbd", volume, target)
    for watcher in watchers():
        os.kill(watcher.pid, signal.SIGKILL)
        watcher.wait_gone(LIMIT)
    killed()
    assert servers() == []
    revived = supervise.revive(volume)
    assert revived is not None
    assert supervise.revive(volume) is None
    (target / "file").write_text("there")
    run("umount", volume)

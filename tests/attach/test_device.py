"""Attachments whose programs die: at every step of theirs, and every part of it at any time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from horcrux_nbd.attach import device, mount
from horcrux_nbd.attach.base import RECORD, Attachment
from horcrux_nbd.attach.mountinfo import mounted_at
from horcrux_nbd.attach.processes import Process
from horcrux_nbd.errors import Busy, HorcruxError, NotFound

from .conftest import Server, needs_fuse, wait_for

pytestmark = needs_fuse

# Audit events (PEP 578) for what changes the machine: folders made, files written, programs begun.
CHANGES = ("subprocess.Popen", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def die(what: Callable[[], object], step: int, into: float) -> bool:
    """Do `what` in a child that dies at its `step`-th change: right before it, or a moment into it.

    Whether it died; False if it had come to its end.
    """
    child = os.fork()
    if child == 0:
        left = step

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            if event not in CHANGES and not (event == "open" and (arguments[2] or 0) & WRITING):
                return
            if left == 0 and into:
                signal.setitimer(signal.ITIMER_REAL, into)
            elif left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # deadly; pytest-timeout had it
            sys.addaudithook(hook)
            what()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL, -signal.SIGALRM)
    return status != 0


@pytest.mark.slow
@pytest.mark.parametrize("into", [0, 0.02])
@pytest.mark.parametrize("what", ["attach", "detach"])
def test_killed_at_every_step(
    what: str, into: float, via: str, server: Server, state: Path
) -> None:
    def attach() -> Attachment:
        return device.attach(server.socket, name="volume", state=state, via=via)

    died = completed = 0
    while completed < (3 if into else 1):  # the timer may come after the end
        if what == "detach":
            attachment = attach()
            dead = die(lambda a=attachment: device.detach(a), died + completed, into)  # type: ignore[misc]
        else:
            dead = die(attach, died + completed, into)
        died += dead
        completed += not dead
        device.clean_up(state)
        assert not state.exists()
        assert not _processes_of(state)
    assert died > (1 if into else 4)
    device.detach(attach())  # and then it works as if nothing had been


def test_what_a_dead_program_left_at_work_is_ended(tmp_path: Path, state: Path) -> None:
    """A losetup that was under way could bind a device after all was cleaned up."""
    program = tmp_path / "losetup"
    program.write_text("#!/usr/bin/python3\nimport time\ntime.sleep(60)\n")
    program.chmod(0o755)
    child = subprocess.Popen([str(program), "--find", str(state / "fuse" / "nbd")])
    wait_for(lambda: Process(child.pid, 0).name() == "losetup", "exec")
    assert device.clean_up(state)
    child.wait(1)


def _processes_of(state: Path) -> list[str]:
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                line = Path(f"/proc/{entry}/cmdline").read_bytes()
            except OSError:
                continue
            if os.fsencode(state) in line:
                found.append(line.decode())
    return found


@pytest.mark.parametrize("victim", ["helper", "server"])
def test_a_dead_part_under_a_mounted_file_system(
    victim: str, server: Server, attached: Attachment, state: Path, target: Path
) -> None:
    if victim == "helper" and not attached.processes:
        pytest.skip(f"--via {attached.via} needs no helper")
    mount.mount(attached.device, target)
    (target / "file").write_text("written, and never synced")
    if victim == "server":
        server.kill()
    else:
        attached.processes[0].signal(signal.SIGKILL)
        assert attached.processes[0].wait_gone(10)
    assert not device.status(attached).alive
    removed = device.detach(attached, force=True, timeout=10)
    assert f"unmounted {target}" in removed
    assert mounted_at(target) is None
    assert not state.exists()


def test_a_dead_server_refuses_the_last_writes_in_one_line(server: Server, state: Path) -> None:
    attachment = device.attach(server.socket, name="volume", state=state, via="fuse")
    with open(attachment.device, "r+b") as file:
        file.write(b"x" * 4096)
        server.kill()
    with pytest.raises(HorcruxError, match=r"did not take its last writes .*--force"):
        device.detach(attachment, timeout=10)


def test_force_writes_out_first_what_a_living_server_takes(
    attached: Attachment, server: Server, target: Path
) -> None:
    mount.mount(attached.device, target)
    child = subprocess.Popen(["sleep", "60"], cwd=target)
    try:
        (target / "file").write_text("not synced by anybody")
        device.detach(attached, force=True)
    finally:
        child.kill()
        child.wait()
    command = ["debugfs", "-R", "cat file", str(server.image)]
    said = subprocess.run(command, check=True, capture_output=True).stdout
    assert said == b"not synced by anybody"


def test_force_says_what_ends_later(attached: Attachment, target: Path, state: Path) -> None:
    mount.mount(attached.device, target)
    child = subprocess.Popen(["sleep", "60"], cwd=target)
    try:
        removed = device.detach(attached, force=True, timeout=5)
        assert any(
            f"it ends with its last user: sleep (pid {child.pid}" in line for line in removed
        )
        assert any(line.endswith("goes away once nobody uses it any more") for line in removed)
        assert not state.exists()
    finally:
        child.kill()
        child.wait()
    sysfs = Path("/sys/block") / Path(attached.device).name
    wait_for(
        lambda: not (sysfs / "loop").exists() and not (sysfs / "backend").exists(),
        "the end of the device",
    )


def test_attaching_twice_is_refused_and_detaching_twice_is_not(
    server: Server, attached: Attachment, state: Path
) -> None:
    with pytest.raises(Busy, match=f"attached already, as {attached.device}"):
        device.attach(server.socket, name="volume", state=state)
    assert device.detach(attached)
    assert device.detach(attached) == []
    assert not device.status(attached).alive


def test_an_old_record_does_not_detach_a_new_attachment(
    server: Server, attached: Attachment, state: Path
) -> None:
    device.detach(attached)
    again = device.attach(server.socket, name="volume", state=state, via=attached.via)
    if again != attached:  # kernel NBD has no helper that would tell them apart
        with pytest.raises(Busy, match="attached anew"):
            device.detach(attached)
    device.detach(again)


def test_no_server_is_said_before_anything_is_made(tmp_path: Path, state: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(NotFound, match="no NBD server listens on"):
            device.attach(path, name="volume", state=state)
    assert not state.exists()


def test_the_record_of_an_earlier_boot_counts_for_nothing(
    server: Server, attached: Attachment, state: Path
) -> None:
    device.detach(attached)
    state.mkdir(mode=0o700)
    record = state / RECORD
    attached.save()
    record.write_text(record.read_text().replace(attached.boot, "0" * 36))
    assert Attachment.load(state) is None
    assert not device.status(attached).alive
    again = device.attach(server.socket, name="volume", state=state, via="fuse")
    device.detach(again)


def test_clean_up_of_nothing_does_nothing(state: Path) -> None:
    assert device.clean_up(state) == []

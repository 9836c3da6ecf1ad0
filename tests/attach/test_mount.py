from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from horcrux_nbd.attach import device, mount, mountinfo
from horcrux_nbd.attach.base import Attachment
from horcrux_nbd.attach.processes import TimedOut
from horcrux_nbd.errors import Busy, EnvironmentProblem, NotFound, UsageError

from .conftest import Server, needs_fuse, needs_root, wait_for


@needs_fuse
def test_mounts_with_safe_options_and_data_survives(
    attached: Attachment, via: str, server: Server, state: Path, target: Path
) -> None:
    mounted = mount.mount(attached.device, target)
    assert {"noatime", "nosuid", "nodev", "rw"} <= mounted.options
    assert mounted.fstype == "ext4"
    assert mounted.target == str(target)
    (target / "file").write_text("kept")
    assert mount.unmount(target)
    assert not mount.unmount(target)  # again is no error
    device.detach(attached)
    again = device.attach(server.socket, name="volume", state=state, via=via)
    mount.mount(again.device, target)
    assert (target / "file").read_text() == "kept"
    mount.unmount(target)


@needs_fuse
def test_options_can_be_widened_by_name(attached: Attachment, target: Path) -> None:
    mounted = mount.mount(attached.device, target, options=["suid,dev", "errors=remount-ro"])
    assert not {"nosuid", "nodev"} & mounted.options
    assert "errors=remount-ro" in mounted.super_options
    mount.unmount(target)


@needs_root
@pytest.mark.parametrize(
    "option", ["loop", "bind", "remount", "offset=5", "x-systemd.automount", "helper=x", "a\nb"]
)
def test_options_that_mount_something_else_are_refused(
    option: str, image: Path, target: Path
) -> None:
    with pytest.raises(UsageError, match="leave it out"):
        mount.mount(str(image), target, options=[option])


@needs_fuse
def test_an_unknown_option_is_one_line(attached: Attachment, target: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="could not be mounted"):
        mount.mount(attached.device, target, options=["nonsense"])
    assert mountinfo.mounted_at(target) is None


@needs_fuse
def test_a_target_that_is_taken_or_missing_is_refused(attached: Attachment, target: Path) -> None:
    with pytest.raises(NotFound, match="make it first"):
        mount.mount(attached.device, target / "deeper")
    mount.mount(attached.device, target)
    with pytest.raises(Busy, match="mounted on it already"):
        mount.mount(attached.device, target)
    mount.unmount(target)


@needs_fuse
def test_a_symlink_as_target_mounts_where_it_points(
    attached: Attachment, target: Path, tmp_path: Path
) -> None:
    link = tmp_path / "link"
    link.symlink_to(target)
    assert mount.mount(attached.device, link).target == str(target)
    assert mountinfo.mounted_at(target)
    mount.unmount(target)


@needs_fuse
def test_a_dirty_file_system_mounts_on_a_read_only_device(
    server: Server, state: Path, via: str, target: Path
) -> None:
    """Its journal cannot be replayed there, and the kernel refuses without `noload`."""
    assert server.process
    server.stop()
    run = subprocess.run
    run(
        ["debugfs", "-w", "-R", "feature needs_recovery", str(server.image)],
        check=True,
        capture_output=True,
    )
    server.start()
    attachment = device.attach(server.socket, name="v", state=state, via=via, read_only=True)
    mounted = mount.mount(attachment.device, target, read_only=True)
    assert mounted.read_only
    mount.unmount(target)
    assert not server.requests("Write")


@needs_root
def test_what_is_no_file_system_never_reaches_the_kernel(tmp_path: Path, target: Path) -> None:
    path = tmp_path / "squash"
    path.write_bytes(b"hsqs" + bytes(100000))
    with pytest.raises(UsageError, match="holds no file system"):
        mount.mount(str(path), target)


def test_without_root_the_message_names_ways_without_it(
    monkeypatch: pytest.MonkeyPatch, target: Path
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(EnvironmentProblem, match=r"needs root.*serve.*guestmount"):
        mount.mount("/dev/null", target)
    with pytest.raises(EnvironmentProblem, match=r"needs root.*serve.*qemu"):
        device.attach(target, name="v", state=target / "state")


@needs_fuse
@pytest.mark.parametrize("use", ["file", "folder", "root", "map", "mount"])
def test_a_busy_mount_says_by_whom(
    attached: Attachment, target: Path, use: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mount, "RETRY_BUSY", 0.2)
    mount.mount(attached.device, target)
    (target / "folder").mkdir()
    shutil.copy(shutil.which("sleep") or "", target / "sleep")
    (target / "data").write_bytes(bytes(8192))
    code = "print(1, flush=True); import time; time.sleep(60)"
    before = {
        "file": f"f = open({str(target / 'data')!r})",
        "folder": f"import os; os.chdir({str(target / 'folder')!r})",
        "root": f"import os, time; os.chroot({str(target / 'folder')!r})",
        "map": f"import mmap; f = open({str(target / 'data')!r}, 'r+b'); "
        "m = mmap.mmap(f.fileno(), 0); f.close()",
        "mount": "",
    }[use]
    expected = {
        "file": "has .*data open",
        "folder": "its working directory is .*folder",
        "root": "its root is .*folder",
        "map": "(has|maps) .*data",
        "mount": "tmpfs mounted on .*folder",
    }[use]
    if use == "mount":
        subprocess.run(["mount", "-t", "tmpfs", "none", str(target / "folder")], check=True)
    child = subprocess.Popen(
        [sys.executable, "-c", f"import time; {before}\n{code}"], stdout=subprocess.PIPE
    )
    try:
        assert child.stdout
        child.stdout.readline()
        with pytest.raises(Busy, match=expected) as caught:
            mount.unmount(target)
        if use != "mount":
            assert f"pid {child.pid}" in str(caught.value)
    finally:
        child.kill()
        child.communicate()
        if use == "mount":
            subprocess.run(["umount", str(target / "folder")], check=True)
    assert mount.unmount(target)


@needs_fuse
def test_a_user_who_is_just_ending_is_waited_for(attached: Attachment, target: Path) -> None:
    mount.mount(attached.device, target)
    child = subprocess.Popen(["sleep", "0.5"], cwd=target)
    mount.unmount(target)
    child.wait()


@needs_fuse
def test_a_lazy_unmount_hides_it_at_once(attached: Attachment, target: Path) -> None:
    mount.mount(attached.device, target)
    child = subprocess.Popen(["sleep", "60"], cwd=target)
    try:
        assert mount.unmount(target, lazy=True)
        assert mountinfo.mounted_at(target) is None
        with pytest.raises(Busy, match="holds it exclusively"):
            device.detach(attached)
    finally:
        child.kill()
        child.wait()
    wait_for(lambda: not _refused(attached), "the end of the lazy mount")


def _refused(attachment: Attachment) -> bool:
    try:
        device.detach(attachment)
    except Busy:
        return True
    return False


@needs_fuse
def test_a_mount_in_another_namespace_stops_detach(attached: Attachment, target: Path) -> None:
    """A container that was started meanwhile has a copy of the mount, which ours does not show."""
    mount.mount(attached.device, target)
    child = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", "echo 1; exec sleep 60"],
        stdout=subprocess.PIPE,
    )
    try:
        assert child.stdout
        child.stdout.readline()
        mount.unmount(target)
        with pytest.raises(Busy, match=rf"pid {child.pid}, its mount namespace has it mounted on"):
            device.detach(attached)
    finally:
        child.kill()
        child.communicate()
    wait_for(lambda: not _refused(attached), "the end of the namespace")


@needs_fuse
def test_unmount_device_finds_all_of_its_mounts(
    attached: Attachment, target: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    mount.mount(attached.device, target)
    subprocess.run(["mount", "--bind", str(target), str(other)], check=True)
    assert mount.unmount_device(attached.device) == [str(other), str(target)]
    device.detach(attached)


@needs_fuse
def test_a_server_that_hangs_does_not_hang_us(
    server: Server, attached: Attachment, state: Path, target: Path
) -> None:
    attachment = attached
    assert server.process
    os.kill(server.process.pid, 19)  # SIGSTOP: the socket takes connections, nobody answers
    try:
        with pytest.raises(TimedOut, match="took longer than 1 s"):
            mount.mount(attachment.device, target, timeout=1)
        with pytest.raises(TimedOut, match=r"/dev/\w+ \(volume\) does not answer .*force"):
            device.detach(attachment, timeout=1)
        assert device.detach(attachment, timeout=1, force=True)
    finally:
        os.kill(server.process.pid, 18)
    assert not state.exists()

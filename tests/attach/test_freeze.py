from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from horcrux_nbd.attach import freeze, mount
from horcrux_nbd.attach.base import Attachment
from horcrux_nbd.attach.freeze import Freezer
from horcrux_nbd.errors import HorcruxError

from .conftest import Server, needs_fuse

pytestmark = needs_fuse


def write_in_child(path: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", f"open({str(path)!r}, 'w').write('y')"])


def holds(image: Path, name: str, size: int) -> bool:
    """Whether the file system in `image`, read past the kernel's cache, has the file."""
    command = ["debugfs", "-R", f"stat {name}", str(image)]
    said = subprocess.run(command, check=True, capture_output=True).stdout
    return f"Size: {size}".encode() in said


def test_frozen_means_written_out_and_still(
    attached: Attachment, server: Server, target: Path
) -> None:
    mount.mount(attached.device, target)
    (target / "before").write_text("x" * 10000)
    with Freezer([target]) as freezer:
        freezer.freeze()
        # The image is whole now: a read-only check finds nothing to mend, and the file is in it.
        subprocess.run(["e2fsck", "-fn", str(server.image)], check=True, capture_output=True)
        assert holds(server.image, "before", 10000)
        writer = write_in_child(target / "during")
        with pytest.raises(subprocess.TimeoutExpired):
            writer.wait(0.5)
        freezer.thaw()
        assert writer.wait(10) == 0
    assert (target / "during").read_text() == "y"
    mount.unmount(target)


def test_it_is_thawed_when_something_fails_inside(attached: Attachment, target: Path) -> None:
    mount.mount(attached.device, target)

    def fail() -> None:
        with Freezer([target]) as freezer:
            freezer.freeze()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert write_in_child(target / "after").wait(10) == 0
    mount.unmount(target)


def test_it_is_thawed_when_we_are_killed(attached: Attachment, target: Path) -> None:
    mount.mount(attached.device, target)
    code = (
        "import sys, time; from pathlib import Path\n"
        "from horcrux_nbd.attach.freeze import Freezer\n"
        "with Freezer([Path(sys.argv[1])]) as freezer:\n"
        "    freezer.freeze(); print(1, flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(target)], stdout=subprocess.PIPE)
    assert holder.stdout
    assert holder.stdout.readline() == b"1\n"
    writer = write_in_child(target / "file")
    with pytest.raises(subprocess.TimeoutExpired):
        writer.wait(0.5)
    os.kill(holder.pid, signal.SIGKILL)
    assert writer.wait(10) == 0
    holder.communicate()
    mount.unmount(target)


def test_it_is_thawed_when_the_child_that_froze_it_is_killed(
    attached: Attachment, target: Path
) -> None:
    mount.mount(attached.device, target)
    with Freezer([target]) as freezer:
        freezer.freeze()
        assert freezer._child is not None
        os.kill(freezer._child.pid, signal.SIGKILL)
        writer = write_in_child(target / "file")
        with pytest.raises(HorcruxError, match="no answer"):
            freezer.thaw()
    assert writer.wait(10) == 0
    mount.unmount(target)


def test_it_does_not_last_longer_than_it_may(
    attached: Attachment, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(freeze, "LONGEST", 1)
    mount.mount(attached.device, target)
    with Freezer([target]) as freezer:
        freezer.freeze()
        began = time.monotonic()
        assert write_in_child(target / "file").wait(10) == 0
        assert time.monotonic() - began < 5
        with pytest.raises(HorcruxError, match="let go on"):
            freezer.thaw()
    mount.unmount(target)


def test_what_cannot_be_frozen_is_named(tmp_path: Path) -> None:
    with Freezer([]) as freezer:  # a volume that is not mounted
        freezer.freeze()
        freezer.thaw()
    with (
        pytest.raises(HorcruxError, match="cannot freeze"),
        Freezer([tmp_path / "none"]) as freezer,
    ):
        freezer.ready()


def test_write_out_reaches_the_server(attached: Attachment, server: Server, target: Path) -> None:
    mount.mount(attached.device, target)
    content = os.urandom(5000)
    (target / "file").write_bytes(content)
    flushes = len(server.requests("Flush"))
    freeze.write_out(target)
    assert content in server.image.read_bytes()
    assert len(server.requests("Flush")) > flushes
    mount.unmount(target)

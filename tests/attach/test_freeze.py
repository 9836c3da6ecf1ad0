from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from horcrux_nbd.attach import freeze, mount
from horcrux_nbd.attach.base import Attachment
from horcrux_nbd.attach.processes import ProgramFailed

from .conftest import Server, needs_fuse

pytestmark = needs_fuse


def test_frozen_means_written_out_and_still(
    attached: Attachment, server: Server, target: Path
) -> None:
    mount.mount(attached.device, target)
    (target / "before").write_text("x" * 10000)
    code = f"open({str(target / 'during')!r}, 'w').write('y')"
    with freeze.frozen(target):
        # The image is whole now: a read-only check finds nothing to mend, and the file is in it.
        subprocess.run(["e2fsck", "-fn", str(server.image)], check=True, capture_output=True)
        said = subprocess.run(
            ["debugfs", "-R", "stat before", str(server.image)], check=True, capture_output=True
        )
        assert b"Size: 10000" in said.stdout
        writer = subprocess.Popen([sys.executable, "-c", code])
        with pytest.raises(subprocess.TimeoutExpired):
            writer.wait(0.5)
    assert writer.wait(10) == 0
    assert (target / "during").read_text() == "y"
    assert not freeze.thaw(target)  # it is thawed already
    mount.unmount(target)


def test_it_is_thawed_when_something_fails_inside(attached: Attachment, target: Path) -> None:
    mount.mount(attached.device, target)
    with pytest.raises(RuntimeError), freeze.frozen(target):
        raise RuntimeError
    (target / "after").write_text("works")
    mount.unmount(target)


def test_what_a_killed_program_left_frozen_can_be_thawed(
    attached: Attachment, target: Path
) -> None:
    mount.mount(attached.device, target)
    subprocess.run(["fsfreeze", "--freeze", str(target)], check=True)
    with pytest.raises(ProgramFailed, match="busy"), freeze.frozen(target):
        pass
    assert freeze.thaw(target)
    mount.unmount(target)

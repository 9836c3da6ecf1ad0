"""The VM harness, and in it what needs a kernel with NBD."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(
        os.geteuid() != 0
        or not shutil.which("mmdebstrap")
        or not shutil.which("qemu-system-x86_64"),
        reason="needs root and: apt-get install mmdebstrap qemu-system-x86",
    ),
]


def vm(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(PROJECT / "scripts/vm"), "run", *words],
        cwd=PROJECT / "docs",
        capture_output=True,
        text=True,
        check=False,
    )


def test_output_status_and_place_come_through() -> None:
    said = vm("--", "sh", "-c", 'pwd; echo "$0"; echo wrong >&2; exit 7', "a  'b")
    assert said.returncode == 7
    assert said.stdout.splitlines() == [str(PROJECT / "docs"), "a  'b", "wrong"]


def test_what_is_written_stays_inside() -> None:
    said = vm("--", "sh", "-c", 'echo x >"$PROJECT/written-in-vm" && ls "$PROJECT"')
    assert "written-in-vm" in said.stdout
    assert not (PROJECT / "written-in-vm").exists()


def test_the_time_limit_holds() -> None:
    said = vm("--timeout", "30", "--", "sleep", "600")
    assert said.returncode == 124
    assert "ended after 30 s" in said.stderr


def test_a_crash_of_the_vm_is_no_success() -> None:
    said = vm("--", "sh", "-c", "echo c >/proc/sysrq-trigger; sleep 60")
    assert said.returncode == 125
    assert "sysrq" in said.stderr


def test_kernel_nbd() -> None:
    subprocess.run([str(PROJECT / "scripts/vm-test")], check=True)

"""What holds for every test does hold: a host of its own, and nothing is left behind unnoticed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from horcrux_nbd import paths


def test_a_host_of_its_own(horcrux_host: Path) -> None:
    assert paths.root().parent == paths.run().parent == paths.config_file().parent == horcrux_host
    assert not horcrux_host.exists()
    socket = paths.run() / "a-volume-with-a-name-of-some-length" / "control.sock"
    assert len(str(socket)) <= 107


def session(folder: Path, test: str) -> subprocess.CompletedProcess[str]:
    """A test session of its own, with our conftest.py and one test."""
    shutil.copy(Path(__file__).with_name("conftest.py"), folder)
    (folder / "test_it.py").write_text(test)
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--basetemp",
         folder / "base", "-c", os.devnull, "--rootdir", folder, folder],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_a_process_left_behind_fails_the_session(tmp_path: Path) -> None:
    done = session(
        tmp_path,
        "import subprocess\n"
        "def test_it():\n"
        "    child = subprocess.Popen(['sleep', '60'], start_new_session=True)\n"
        f"    open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n",
    )
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    assert "1 passed" in done.stdout
    assert done.returncode == 1
    assert "the tests left behind" in done.stdout
    assert "sleep 60" in done.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount: run as root (sudo)")
def test_a_mount_left_behind_fails_the_session(tmp_path: Path) -> None:
    done = session(
        tmp_path,
        "import subprocess\n"
        "def test_it(tmp_path):\n"
        "    subprocess.run(['mount', '-t', 'tmpfs', 'x', tmp_path], check=True)\n"
        f"    open({str(tmp_path / 'mount')!r}, 'w').write(str(tmp_path))\n",
    )
    target = (tmp_path / "mount").read_text()
    subprocess.run(["umount", target], check=True, timeout=30)
    assert done.returncode == 1
    assert f"mount {target}" in done.stdout


def test_a_clean_session_passes(tmp_path: Path) -> None:
    done = session(tmp_path, "def test_it(tmp_path):\n    pass\n")
    assert (done.returncode, "left behind" in done.stdout) == (0, False)

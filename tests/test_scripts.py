"""The scripts: they say what they do, keep quiet about the network, and the quickstart works."""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(
    path
    for path in [*(ROOT / "scripts").iterdir(), *(ROOT / ".ci").iterdir()]
    if path.is_file() and path.suffix == ""
)
LIMIT = 300.0  # seconds


def is_installed() -> bool:
    """Whether `scripts/install` has nothing left to do for Python."""
    stamp = ROOT / ".venv" / ".installed"
    data = (ROOT / "setup.cfg").read_bytes() + (ROOT / "pyproject.toml").read_bytes()
    return stamp.exists() and stamp.read_text().split()[0] == hashlib.sha256(data).hexdigest()


needs_installed = pytest.mark.skipif(
    not is_installed(), reason="setup.cfg changed since the last installation: scripts/install"
)


def run(*words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        env={**os.environ, **environment},
        check=False,
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(script: Path) -> None:
    """They can be run, parse, stop at the first error, and say at the top what they are for."""
    assert os.access(script, os.X_OK)
    text = script.read_text()
    lines = text.splitlines()
    assert lines[0] in ("#!/bin/bash", "#!/bin/sh", "#!/usr/bin/env python3")
    assert lines[1].startswith(("# ", '"""'))
    if "python" not in lines[0]:
        assert run(lines[0][2:], "-n", script).returncode == 0
    if lines[0] == "#!/bin/bash":
        assert "set -euo pipefail" in text
    if shutil.which("shellcheck"):
        done = run("shellcheck", "--severity=warning", script)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["install", "quickstart"])
def test_what_it_does_not_know(name: str) -> None:
    done = run(ROOT / "scripts" / name, "--nonsense")
    assert done.returncode == 2
    assert f"scripts/{name}" in done.stderr


@needs_installed
def test_install_again_needs_no_network() -> None:
    """With all there, not even loopback is up."""
    if os.geteuid() != 0 or not shutil.which("unshare"):
        pytest.skip("needs root and unshare (apt-get install util-linux), to take the network away")
    done = run("unshare", "--net", ROOT / "scripts" / "install")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("all there") == 2


@needs_installed
@pytest.mark.slow
@pytest.mark.timeout(LIMIT)
def test_quickstart(tmp_path: Path) -> None:
    """The whole session, on a small directory and a small database; and it leaves nothing."""
    (tmp_path / "file").write_text("x")
    # Not in tmp_path, which PostgreSQL's user cannot reach.
    with tempfile.TemporaryDirectory() as work:
        os.chmod(work, 0o711)
        done = run(ROOT / "scripts" / "quickstart", tmp_path, TMPDIR=work, SCALE="1")
        assert done.returncode == 0, done.stdout + done.stderr
        assert os.listdir(work) == []
    summary = done.stdout.split("# Done")[1]
    assert "is what its id says" in summary
    has_mount = os.geteuid() == 0 and shutil.which("nbdfuse") and os.path.exists("/dev/fuse")
    assert summary.count("ok: ") >= (3 if has_mount else 2)
    if has_mount and glob.glob("/usr/lib/postgresql/*/bin/initdb"):
        assert "rows written to the database are there" in summary


def test_quickstart_says_what_is_wrong(tmp_path: Path) -> None:
    done = run(ROOT / "scripts" / "quickstart", tmp_path / "none", TMPDIR=str(tmp_path))
    assert done.returncode == 2
    assert "is no directory" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_ci_runs_the_tests_and_nothing_else() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    code = [line for line in lines if line and not line.startswith("#")]
    assert code == [
        "set -euo pipefail",
        "export CI=true",
        'exec "$(dirname "$0")/../scripts/test" </dev/null',
    ]

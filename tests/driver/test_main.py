"""The command horcrux-dv: what it refuses, and how it starts and ends."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from horcrux_driver.main import main
from horcrux_nbd import paths
from tests.attach.conftest import needs_fuse

from .support import LIMIT, PROGRAM, DriverProcess

pytestmark = needs_fuse


def fails(code: int, *words: str | Path) -> str:
    """The one line that it ends with."""
    done = subprocess.run(
        [PROGRAM, *words], capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert done.returncode == code, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_without_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec

    def without(name: str, *others: Any) -> Any:
        return None if name == "aiohttp" else found(name, *others)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    assert main([]) == 9
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "pip install 'horcrux-nbd[driver]'" in line


def test_a_wrong_configuration_is_told_at_once(tmp_path: Path) -> None:
    file = paths.config_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text('[docker]\nacess = "team"\n')
    line = fails(2, "--socket", tmp_path / "s")
    assert "unknown key 'docker.acess'" in line
    assert "docker.access" in line


def test_a_socket_that_is_none(configured: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert "no socket" in fails(2, "--socket", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    assert "too long" in fails(2, "--socket", tmp_path / ("x" * 120))


def test_ends_when_told_and_takes_its_socket_along(alone: DriverProcess) -> None:
    assert alone.socket.stat().st_mode & 0o777 == 0o600
    assert alone.stop() == 0
    assert not alone.socket.exists()


def test_starts_over_a_dead_socket(alone: DriverProcess) -> None:
    alone.kill()
    assert alone.socket.exists()
    alone.start()
    assert alone.ask("List") == {"Volumes": []}


def test_two_at_once(alone: DriverProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second waits for the first to end, as an upgrade needs it, and then says who it is."""
    monkeypatch.setattr("horcrux_driver.main.TAKE_OVER", 0.2)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert main(["--socket", str(alone.socket)]) == 5

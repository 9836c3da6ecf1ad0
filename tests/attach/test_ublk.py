"""What can be told without a ublk device: see the module's own words about that."""

from __future__ import annotations

from pathlib import Path

import pytest

from horcrux_nbd.attach import ublk
from horcrux_nbd.attach.base import Request


def request(state: Path, read_only: bool) -> Request:
    return Request(
        socket=Path("/run/s.sock"),
        name="v",
        state=state,
        read_only=read_only,
        connections=3,
        request_timeout=90,
        dead_timeout=300,
    )


def test_the_command_line_is_that_of_the_manual(tmp_path: Path) -> None:
    assert ublk.command(request(tmp_path, False), 7) == [
        "nbdublk",
        "--connections=3",
        "/dev/ublkb7",
        "--unix",
        "/run/s.sock",
    ]
    assert "--readonly" in ublk.command(request(tmp_path, True), 7)


def test_a_free_number_has_neither_node(tmp_path: Path) -> None:
    assert ublk.free_number(tmp_path) == 0
    (tmp_path / "ublkb0").touch()
    (tmp_path / "ublkc1").touch()
    assert ublk.free_number(tmp_path) == 2


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ublk, "ENVIRONMENT", {"PATH": str(tmp_path)})
    missing = ublk.DRIVER.missing()
    assert missing is not None
    assert missing[0] == "nbdublk is not installed"
    for program in ("nbdublk", "ublk"):
        (tmp_path / program).write_text("#!/bin/sh\n")
        (tmp_path / program).chmod(0o755)
    monkeypatch.setattr(ublk, "CONTROL", tmp_path / "control")
    missing = ublk.DRIVER.missing()
    assert missing is not None
    assert missing[0].endswith("control is not there")
    (tmp_path / "control").touch()
    assert ublk.DRIVER.missing() is None


def test_a_state_without_a_device_has_nothing_to_release(tmp_path: Path) -> None:
    assert ublk.chosen(tmp_path) is None
    ublk.DRIVER.abort(tmp_path)
    assert ublk.DRIVER.devices(tmp_path) == []
    assert ublk.DRIVER.release(tmp_path, timeout=1, force=True) == []

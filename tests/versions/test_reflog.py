"""The reflog of a volume."""

from __future__ import annotations

from pathlib import Path

import pytest

from horcrux_nbd.versions import reflog


def test_newest_first(tmp_path: Path) -> None:
    for number in range(3):
        reflog.append(tmp_path, "commit", "a", "b", f"line\n{number}")
    assert [move.message for move in reflog.read(tmp_path)] == ["line\n2", "line\n1", "line\n0"]


def test_a_torn_line_is_passed_over(tmp_path: Path) -> None:
    reflog.append(tmp_path, "commit", "a", "b", "whole")
    with open(tmp_path / reflog.FILE, "a") as file:
        file.write('{"time": "20')
    assert [move.message for move in reflog.read(tmp_path)] == ["whole"]


def test_none_yet(tmp_path: Path) -> None:
    assert reflog.read(tmp_path) == []


def test_it_stays_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reflog, "KEPT", 5)
    for number in range(100):
        reflog.append(tmp_path, "commit", "a" * 64, "b" * 64, f"{number} {'x' * 300}")
    moves = reflog.read(tmp_path)
    assert moves[0].message.startswith("99 ")
    assert len(moves) <= 11


def test_a_full_disk_is_no_reason_to_fail(tmp_path: Path) -> None:
    reflog.append(tmp_path / "missing", "commit", "a", "b", "m")

"""What `generate` is given decides what is made of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from horcrux_nbd.errors import EnvironmentProblem, UsageError
from horcrux_nbd.source import empty_filesystem, open_source
from horcrux_nbd.source.directory import Ext4Source
from horcrux_nbd.source.raw import RawSource
from horcrux_nbd.units import GiB


def test_directory_and_file(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "raw").write_bytes(b"x" * 1000)
    with open_source(tmp_path / "tree") as source:
        assert isinstance(source, Ext4Source)
        assert source.filesystem == "ext4"
    with open_source(str(tmp_path / "raw")) as source:
        assert isinstance(source, RawSource)
        assert source.filesystem is None


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="missing: No such file"):
        open_source(tmp_path / "missing")


def test_neither(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UsageError, match="neither"):
        open_source(tmp_path / "fifo")


def test_no_size_for_an_image(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(b"x")
    for options in ({"size": GiB}, {"free": GiB}):
        with pytest.raises(UsageError, match="disk image"):
            open_source(tmp_path / "raw", **options)  # type: ignore[arg-type]


def test_unknown_file_system(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="ext4, xfs"):
        open_source(tmp_path, filesystem="ntfs")
    with pytest.raises(UsageError, match="ext4, xfs"):
        empty_filesystem(GiB, "ntfs")


def test_no_folder_for_temporary_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere"):
        open_source(tmp_path, temporary=tmp_path / "nowhere")


def test_no_mke2fs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("horcrux_nbd.source.tools._SBIN", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvironmentProblem, match="apt-get install e2fsprogs"):
        open_source(tmp_path)

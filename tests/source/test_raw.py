"""Disk images that exist: files with holes, block devices."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from horcrux_nbd.errors import UsageError
from horcrux_nbd.progress import Progress
from horcrux_nbd.source import open_source
from horcrux_nbd.source.tools import run_tool
from horcrux_nbd.units import MiB

from .conftest import needs_root


def test_holes_are_known(tmp_path: Path) -> None:
    path = tmp_path / "image"
    with open(path, "wb") as file:
        file.truncate(64 * MiB + 77)
        for offset in (0, 10 * MiB, 64 * MiB):
            file.seek(offset)
            file.write(b"data" * 10)
    with open_source(path) as source:
        assert source.size == 64 * MiB + 77
        extents = list(source.extents())
        assert sum(length for _, length in extents) <= MiB
        assert source.read(10 * MiB, 8) == b"datadata"
        assert source.read(64 * MiB + 38, 100) == b"ta" + bytes(98)
        assert source.problems() == []
        covered = b"".join(source.read(*extent) for extent in extents)
        assert covered.count(b"data") == 30


def test_change_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"x" * 10_000)
    with open_source(path) as source:
        path.write_bytes(b"y" * 10_000)
        assert source.problems() == [f"{path}: changed while it was read"]


def test_empty_file(tmp_path: Path) -> None:
    (tmp_path / "image").touch()
    with pytest.raises(UsageError, match="is empty"):
        open_source(tmp_path / "image")


def test_file_system_inside_is_recognised(image: Path, tmp_path: Path) -> None:
    with open_source(image) as source:
        assert source.filesystem == "ext4"
    path = tmp_path / "ext2"
    path.write_bytes(b"")
    os.truncate(path, 8 * MiB)
    assert run_tool(["/sbin/mke2fs", "-q", "-t", "ext2", str(path)]).returncode == 0
    with open_source(path) as source:
        assert source.filesystem is None


@contextmanager
def loop_device(path: Path) -> Iterator[str]:
    result = run_tool(["losetup", "--find", "--show", str(path)])
    assert result.returncode == 0, result.stderr
    try:
        yield result.stdout.strip()
    finally:
        assert run_tool(["losetup", "--detach", result.stdout.strip()]).returncode == 0


class Notes(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, line: str) -> None:
        self.lines.append(line)


@needs_root
def test_block_device(image: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.write_bytes(os.urandom(3 * MiB))
    with loop_device(small) as device:
        with open_source(device) as source:
            assert source.size == 3 * MiB
            assert list(source.extents()) == [(0, 3 * MiB)]
            assert source.read(MiB + 1, MiB) == small.read_bytes()[MiB + 1 : 2 * MiB + 1]
            assert source.problems() == []


@needs_root
def test_mounted_block_device_is_pointed_out(image: Path, tmp_path: Path) -> None:
    notes = Notes()
    with loop_device(image) as device:
        point = tmp_path / "mnt"
        point.mkdir()
        assert run_tool(["mount", "-o", "ro", device, str(point)]).returncode == 0
        try:
            with open_source(device, progress=notes):
                assert "in use" in notes.lines[0]
        finally:
            assert run_tool(["umount", str(point)]).returncode == 0

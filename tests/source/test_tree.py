"""What is seen of a directory, and what is said of what cannot be seen."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from horcrux_nbd.errors import UsageError
from horcrux_nbd.source import open_source
from horcrux_nbd.source.tools import run_tool
from horcrux_nbd.source.tree import Tree, show

from .conftest import needs_root
from .trees import open_to_all


def test_order_is_that_of_names_directory_by_directory(tmp_path: Path) -> None:
    for name in ("b/2", "b/1", "a/x/deep", "a/y", "c"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    tree = Tree(tmp_path)
    paths = [entry.path().decode() for entry in tree.walk()]
    assert paths == [".", "a", "b", "c", "a/x", "a/y", "a/x/deep", "b/1", "b/2"]
    assert tree.files == 8


def test_link_to_a_directory_is_a_source(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/file").touch()
    (tmp_path / "link").symlink_to("real")
    tree = Tree(tmp_path / "link")
    assert tree.files == 1
    assert list(tree.changes()) == []


def test_odd_names_make_one_line() -> None:
    assert show(b"a\nb") == "a\\nb"
    assert show(b"\xff") == "\\xff"
    assert show("ünï".encode()) == "ünï"


def test_sparse_files_count_what_they_hold(tmp_path: Path) -> None:
    with open(tmp_path / "file", "wb") as file:
        file.truncate(100 << 20)
        file.seek(50 << 20)
        file.write(b"x" * 4096)
    (entry,) = Tree(tmp_path).root.children
    assert entry.data == entry.allocated
    assert entry.data is not None
    assert sum(length for _, length in entry.data) <= 128 << 10
    tree = Tree(tmp_path)
    assert tree.file_bytes == 100 << 20
    assert tree.allocated_bytes < 1 << 20


@needs_root
def test_unreadable_files_are_all_counted(tmp_path: Path) -> None:
    """Before anything is made: as a user who may not read them."""
    for number in range(5):
        (tmp_path / f"secret{number}").write_bytes(b"x")
        (tmp_path / f"secret{number}").chmod(0o600)
    (tmp_path / "folder").mkdir(mode=0o700)
    open_to_all(tmp_path)
    os.seteuid(65534)
    try:
        with pytest.raises(UsageError) as error:
            open_source(tmp_path)
    finally:
        os.seteuid(0)
    message = str(error.value)
    assert f"{tmp_path}/secret0 (Permission denied)" in message
    assert "and 3 more" in message
    assert "\n" not in message


@needs_root
def test_made_up_file_systems_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "other").mkdir()
    for kind, name in (("proc", "proc"), ("tmpfs", "other")):
        assert run_tool(["mount", "-t", kind, "none", str(tmp_path / name)]).returncode == 0
    try:
        (tmp_path / "other/file").write_bytes(b"x")
        tree = Tree(tmp_path)
        assert [entry.path() for entry in tree.walk()] == [b".", b"other", b"proc", b"other/file"]
        assert tree.notes() == ["proc: proc, left out"]
        with pytest.raises(UsageError, match="no files that could be kept"):
            Tree(tmp_path / "proc")
    finally:
        for name in ("proc", "other"):
            assert run_tool(["umount", str(tmp_path / name)]).returncode == 0


@pytest.mark.parametrize("name", ["missing", "file"])
def test_no_directory(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=name):
        Tree(tmp_path / name)

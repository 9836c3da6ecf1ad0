"""A directory as XFS, copied by the kernel of this machine."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from horcrux_nbd.errors import EnvironmentProblem, UsageError
from horcrux_nbd.progress import Progress
from horcrux_nbd.source import empty_filesystem, open_source
from horcrux_nbd.source.tools import run_tool
from horcrux_nbd.source.tree import Tree
from horcrux_nbd.units import GiB, MiB

from .conftest import needs_root
from .trees import describe, mounted, open_to_all, write_image

pytestmark = [
    pytest.mark.skipif(
        shutil.which("mkfs.xfs") is None, reason="needs mkfs.xfs: apt-get install xfsprogs"
    ),
    pytest.mark.skipif(
        "\txfs\n" not in Path("/proc/filesystems").read_text()
        and run_tool(["modprobe", "xfs"]).returncode != 0,
        reason="this kernel has no XFS: use another kernel",
    ),
]


class Notes(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, line: str) -> None:
        self.lines.append(line)


@needs_root
def test_kernel_sees_the_same(tree: Path, tmp_path: Path) -> None:
    shallow = tmp_path / "tree"  # cp reaches no path longer than the kernel takes
    shallow.mkdir(mode=0o711)
    names = [str(tree / name) for name in os.listdir(tree) if name != "deep"]
    assert run_tool(["cp", "-a", *names, str(shallow)]).returncode == 0
    (shallow / "links/to-3000").unlink()  # XFS takes 1,024 bytes
    os.setxattr(shallow, b"user.root", b"of the root")
    os.utime(shallow, ns=(5, 1_000_000_007))
    before = describe(shallow)
    notes = Notes()
    with open_source(
        shallow, filesystem="xfs", temporary=tmp_path, progress=notes, label="AMCC"
    ) as source:
        assert source.filesystem == "xfs"
        assert os.listdir(tmp_path) == ["tree"]
        assert "temporary space" in notes.lines[0]
        write_image(source, tmp_path / "image")
        assert source.problems() == []
        (shallow / "sizes/1").write_bytes(b"other")
        assert len(source.problems()) == 1
    with mounted(tmp_path / "image", tmp_path / "mnt", "xfs") as point:
        after = describe(point)
        again = Tree(point)  # XFS as the source of an ext4: its own attributes are not taken
        found = {name for entry in again.walk() for name, _ in entry.xattrs}
        assert b"system.posix_acl_default" in found
        assert not any(b"SGI" in name for name in found)
    assert before.keys() == after.keys()
    for path, entry in before.items():
        assert entry == after[path], path


@needs_root
def test_nothing_is_mounted_after(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "large").write_bytes(os.urandom(MiB))
    before = Path("/proc/self/mounts").read_text(), run_tool(["losetup", "--list"]).stdout
    with open_source(tmp_path / "tree", filesystem="xfs", size=GiB) as source:
        assert source.size == GiB
    assert "xfs" not in run_tool(["losetup", "--list"]).stdout
    assert Path("/proc/self/mounts").read_text().count("horcrux-xfs") == before[0].count(
        "horcrux-xfs"
    )


@needs_root
def test_too_small(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(500 * MiB))
    for size, text in ((100 * MiB, "too small"), (400 * MiB, "too small")):
        with pytest.raises(UsageError, match=text):
            open_source(tmp_path, filesystem="xfs", size=size)


@needs_root
def test_not_without_rights(tmp_path: Path) -> None:
    open_to_all(tmp_path)
    os.seteuid(65534)
    try:
        with pytest.raises(EnvironmentProblem, match="root"):
            open_source(tmp_path, filesystem="xfs")
    finally:
        os.seteuid(0)


@needs_root
def test_empty(tmp_path: Path) -> None:
    with empty_filesystem(GiB, "xfs", label="scratch") as source:
        assert sum(length for _, length in source.extents()) < 80 * MiB
        write_image(source, tmp_path / "image")
    with mounted(tmp_path / "image", tmp_path / "mnt", "xfs") as point:
        assert os.listdir(point) == []


def test_empty_too_small() -> None:
    with pytest.raises(UsageError, match="at least"):
        empty_filesystem(100 * MiB, "xfs")

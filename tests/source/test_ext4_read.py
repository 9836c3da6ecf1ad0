"""The reader of ext4 finds what the builder wrote and what the kernel wrote."""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from horcrux_nbd.errors import Damaged, HorcruxError, UsageError
from horcrux_nbd.source import empty_filesystem, open_source, read_layout
from horcrux_nbd.source.directory import Ext4Source
from horcrux_nbd.source.ext4_read import Ext4Image
from horcrux_nbd.source.tools import run_tool
from horcrux_nbd.units import MiB

from .conftest import needs_root
from .test_layout import chunks
from .trees import describe, write_image


def test_contents_are_where_it_says(tree: Path) -> None:
    with open_source(tree, label="AMCC") as source:
        image = Ext4Image(source.read)
        inodes = dict(image.walk())
        for path, entry in describe(tree).items():
            inode = inodes[path[1:] or b"."]
            kind, mode, owner, links, _, _, size, _, content, _ = entry
            assert stat.S_IFMT(inode.mode) | stat.S_IMODE(inode.mode) == kind | mode  # type: ignore[operator]
            assert ((inode.uid, inode.gid), inode.links) == (owner, links)
            assert size is None or inode.size == size
            if stat.S_ISREG(inode.mode):
                found = []
                for logical, block, count in image.extents(inode):
                    for at in range(count):
                        offset = (logical + at) * 4096
                        data = source.read((block + at) * 4096, 4096)
                        if data.count(0) != 4096:
                            found.append((offset, data[: inode.size - offset]))
                assert found == content, path


def test_layout_can_be_kept(tree: Path) -> None:
    with open_source(tree, label="AMCC") as source:
        layout, before = read_layout(source.read), chunks(source)
    # The number of inodes that was asked for is not known any more; what it came to is enough.
    with open_source(tree, label="AMCC", previous=layout) as again:
        assert chunks(again) == before


@needs_root
def test_after_the_kernel_has_written(tree: Path, image: Path, tmp_path: Path) -> None:
    """Files that a database has moved stay where it put them."""
    copy, point = tmp_path / "copy", tmp_path / "mnt"
    assert run_tool(["cp", "--sparse=always", str(image), str(copy)]).returncode == 0
    point.mkdir()
    assert run_tool(["mount", "-o", "loop", str(copy), str(point)]).returncode == 0
    try:
        (point / "sizes/4096").unlink()
        for number in range(500):
            (point / f"by the kernel {number}").write_bytes(os.urandom(10_000))
        with open(point / "sizes/100000", "ab") as file:
            file.write(os.urandom(300_000))
        sizes = {path.name: path.stat().st_size for path in point.iterdir() if path.is_file()}
    finally:
        assert run_tool(["umount", str(point)]).returncode == 0
    with open_source(copy) as source:
        reader = Ext4Image(source.read)
        found = dict(reader.walk())
        layout = read_layout(source.read)
    assert b"sizes/4096" not in found
    for name, size in sizes.items():
        assert found[os.fsencode(name)].size == size
        assert stat.S_ISREG(found[os.fsencode(name)].mode)
    with open_source(tree, label="AMCC", previous=layout) as again:
        assert isinstance(again, Ext4Source)
        for path, place in again.layout.places.items():
            if path != b"sizes/4096":
                assert place.inode == layout.places[path].inode, path


def test_no_ext4() -> None:
    with pytest.raises(UsageError, match="no ext4"):
        read_layout(lambda offset, length: bytes(length))


def test_not_unmounted() -> None:
    with empty_filesystem(64 * MiB) as source:
        read = altered(source.read, {1024 + 0x60: b"\xc6"})
        with pytest.raises(UsageError, match="not unmounted"):
            read_layout(read)


def altered(
    read: Callable[[int, int], bytes], changes: dict[int, bytes]
) -> Callable[[int, int], bytes]:
    def read_altered(offset: int, length: int) -> bytes:
        data = bytearray(read(offset, length))
        for at, value in changes.items():
            if offset <= at and at + len(value) <= offset + length:
                data[at - offset : at - offset + len(value)] = value
        return bytes(data)

    return read_altered


def test_directory_in_itself_ends(tmp_path: Path) -> None:
    (tmp_path / "tree/a/b").mkdir(parents=True)
    (tmp_path / "tree/a/b/c").mkdir()
    with open_source(tmp_path / "tree") as source:
        image = Ext4Image(source.read)
        by_path = dict(image.walk())
        ((_, block, _),) = image.extents(by_path[b"a/b"])
        assert source.read(block * 4096 + 24, 4) == by_path[b"a/b/c"].number.to_bytes(4, "little")
        number = by_path[b"a"].number.to_bytes(4, "little")
        with pytest.raises(Damaged, match="two places"):
            read_layout(altered(source.read, {block * 4096 + 24: number}))


@pytest.fixture(scope="module")
def small_image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("damage")
    (folder / "tree").mkdir()
    for number in range(200):
        (folder / f"tree/file with a long name {number}").write_bytes(b"x" * number)
    with open_source(folder / "tree", size=32 * MiB) as source:
        write_image(source, folder / "image")
    return (folder / "image").read_bytes()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_damage_is_an_error_of_ours(small_image: bytes, seed: int) -> None:
    """Whatever is in an image, reading it ends, and with no error but ours."""
    choose = random.Random(seed)
    data = bytearray(small_image)
    interesting = [
        offset for offset in range(0, len(data), 4096) if any(data[offset : offset + 64])
    ]
    for _ in range(20):
        at = choose.choice(interesting) + choose.randrange(4096)
        data[at] = choose.randrange(256)

    def read(offset: int, length: int) -> bytes:
        return bytes(data[offset : offset + length]).ljust(length, b"\0")

    try:
        read_layout(read)
    except HorcruxError:
        return

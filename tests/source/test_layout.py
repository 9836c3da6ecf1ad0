"""The next version of an image leaves everything where it was (issue 4, part 8: refresh)."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from horcrux_nbd.source import Source, open_source
from horcrux_nbd.source.directory import Ext4Source
from horcrux_nbd.source.ext4_make import Geometry
from horcrux_nbd.source.ext4_read import Ext4Image
from horcrux_nbd.source.layout import Layout, Place, follow_moves
from horcrux_nbd.units import MiB

from .conftest import needs_root
from .test_directory import check
from .trees import describe, mounted, write_image

CHUNK = 512 << 10


def chunks(source: Source) -> dict[int, bytes]:
    """Number → content of all chunks that are not all zeros."""
    found = {}
    numbers = sorted(
        {
            number
            for offset, length in source.extents()
            for number in range(offset // CHUNK, (offset + length - 1) // CHUNK + 1)
        }
    )
    for number in numbers:
        data = source.read(number * CHUNK, CHUNK)
        if data.count(0) != CHUNK:
            found[number] = data
    return found


@pytest.fixture
def growing(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    choose = random.Random(7)
    for folder in range(30):
        (root / f"folder {folder}").mkdir(parents=True)
        for number in range(40):
            (root / f"folder {folder}/file {number}").write_bytes(
                choose.randbytes(choose.randrange(1, 60_000))
            )
    for number in range(4):
        (root / f"large {number}").write_bytes(choose.randbytes(6 * MiB))
    return root


def change(root: Path) -> int:
    """What a night may bring; about how many bytes are new."""
    new = 0
    (root / "folder 0/file 0").unlink()  # at the very beginning
    with open(root / "folder 3/file 5", "r+b") as file:
        file.write(b"changed in place")
        new += 4096
    with open(root / "large 1", "ab") as file:
        file.write(os.urandom(2 * MiB))
        new += 2 * MiB
    with open(root / "folder 7/file 7", "ab") as file:
        file.write(os.urandom(200_000))
        new += 200_000
    os.truncate(root / "large 2", 4 * MiB + 5)
    (root / "a new folder").mkdir()
    for number in range(50):
        (root / f"a new folder/{number}").write_bytes(os.urandom(5000))
        new += 8192
    os.rename(root / "folder 9/file 9", root / "folder 9/moved")
    new += 60_000
    return new


def test_unchanged_is_the_same_image(growing: Path) -> None:
    with open_source(growing, label="x") as first:
        assert isinstance(first, Ext4Source)
        before, layout = chunks(first), first.layout
    with open_source(growing, label="x", previous=layout) as second:
        assert chunks(second) == before


@needs_root
def test_only_what_changed_is_new(growing: Path, tmp_path: Path) -> None:
    with open_source(growing, label="x") as first:
        assert isinstance(first, Ext4Source)
        before, layout = chunks(first), first.layout
    new_bytes = change(growing)
    with open_source(growing, label="x", previous=layout) as second:
        after = chunks(second)
        write_image(second, tmp_path / "image")
    check(tmp_path / "image")
    with mounted(tmp_path / "image", tmp_path / "mnt", "ext4") as point:
        assert describe(growing) == describe(point)
    fresh = sum(1 for number, data in after.items() if before.get(number) != data)
    # Beside the new bytes: inode table, bitmaps, directories, and where small files have gone.
    assert fresh * CHUNK < new_bytes + 16 * CHUNK
    with open_source(growing, label="x") as without:
        shifted = chunks(without)
    moved = sum(1 for number, data in shifted.items() if before.get(number) != data)
    assert moved > 2 * fresh


@needs_root
def test_many_nights(growing: Path, tmp_path: Path) -> None:
    """Files come, grow, shrink and go, again and again: it stays sound and complete."""
    choose = random.Random(3)
    layout: Layout | None = None
    for night in range(12):
        files = sorted(path for path in growing.rglob("*") if path.is_file())
        for path in choose.sample(files, 40):
            match choose.randrange(4):
                case 0:
                    path.unlink()
                case 1:
                    with open(path, "ab") as file:
                        file.write(choose.randbytes(choose.randrange(100_000)))
                case 2:
                    os.truncate(path, choose.randrange(80_000))  # shorter or with a hole
                case 3:
                    fresh = path.with_name(f"night {night} {choose.randrange(10**6)}")
                    fresh.write_bytes(choose.randbytes(choose.randrange(30_000)))
        with open_source(growing, label="x", previous=layout) as source:
            assert isinstance(source, Ext4Source)
            layout = source.layout
            if night % 4 == 3:
                write_image(source, tmp_path / "image")
                check(tmp_path / "image")
                with mounted(tmp_path / "image", tmp_path / f"mnt{night}", "ext4") as point:
                    assert describe(growing) == describe(point)


def test_new_files_lie_together(growing: Path) -> None:
    """Not in the holes of those that went, where each would change a chunk of old files."""
    with open_source(growing, label="x") as first:
        assert isinstance(first, Ext4Source)
        layout = first.layout
    for folder in range(30):
        (growing / f"folder {folder}/file 3").unlink()
        (growing / f"folder {folder}/new").write_bytes(b"x" * 4096)
    with open_source(growing, label="x", previous=layout) as second:
        assert isinstance(second, Ext4Source)
        new = [
            place.extents[0][1]
            for path, place in second.layout.places.items()
            if path.endswith(b"/new")
        ]
        behind = max(
            block + count for place in layout.places.values() for _, block, count in place.extents
        )
    assert sorted(new) == list(range(min(new), min(new) + 30))
    assert min(new) >= behind


def test_outgrown(tmp_path: Path) -> None:
    """A tree that no longer fits gets a new file system instead of an error."""
    root = tmp_path / "tree"
    root.mkdir()
    (root / "file").write_bytes(b"x" * MiB)
    with open_source(root, label="x", free=0) as first:
        assert isinstance(first, Ext4Source)
        layout = first.layout
    (root / "more").write_bytes(os.urandom(100 * MiB))
    with open_source(root, label="x", previous=layout) as second:
        assert second.size > first.size
        write_image(second, tmp_path / "image")
    check(tmp_path / "image")


PLACES = st.builds(
    Place,
    st.integers(0, 3000),
    st.lists(
        st.tuples(st.integers(0, 40), st.integers(0, 12_000), st.integers(1, 30)), max_size=5
    ).map(tuple),
    st.lists(st.integers(0, 12_000), max_size=3).map(tuple),
    st.integers(0, 12_000),
)


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(PLACES, min_size=8, max_size=8))
def test_any_layout_gives_a_sound_image(tmp_path: Path, places: list[Place]) -> None:
    """One that was read from a damaged or hostile image, too."""
    root = tmp_path / "tree"
    if not root.exists():
        (root / "folder").mkdir(parents=True)
        (root / "a").write_bytes(os.urandom(100_000))
        (root / "folder/b").write_bytes(os.urandom(70_000))
        with open(root / "comb", "wb") as file:
            for number in range(8):
                file.seek(number * 8192)
                file.write(b"%d" % number)
        os.setxattr(root / "a", "user.large", b"x" * 1000)
        os.symlink("x" * 200, root / "link")
    paths = [b".", b"folder", b"a", b"folder/b", b"comb", b"link", b"gone", b"also/gone"]
    layout = Layout(Geometry(48 * MiB, 3072), dict(zip(paths, places, strict=True)))
    with open_source(root, previous=layout) as source:  # runs e2fsck over its metadata
        image = Ext4Image(source.read)
        inodes = dict(image.walk())
        used = [
            block + at
            for inode in inodes.values()
            for _, block, count in image.extents(inode)
            for at in range(count)
        ]
        assert len(used) == len(set(used))
        for name in ("a", "folder/b", "comb"):
            content = bytearray(inodes[os.fsencode(name)].size + 4096)
            for logical, block, count in image.extents(inodes[os.fsencode(name)]):
                data = source.read(block * 4096, count * 4096)
                content[logical * 4096 : logical * 4096 + len(data)] = data
            assert content[: inodes[os.fsencode(name)].size] == (root / name).read_bytes()


def test_a_place_follows_what_moved() -> None:
    def places(*paths: bytes) -> dict[bytes, Place]:
        return {path: Place(number, ()) for number, path in enumerate(paths)}

    before = places(
        b".", b"base", b"base/1", b"base/1/12", b"base/2", b"base/2/12", b"old", b"gone"
    )
    after = [b".", b"b", b"b/1", b"b/1/12", b"b/2", b"b/2/12", b"x/old", b"fresh"]
    moved = {path: place.inode for path, place in follow_moves(before, after).items()}
    assert moved == {b".": 0, b"b/1": 2, b"b/1/12": 3, b"b/2": 4, b"b/2/12": 5, b"x/old": 6}
    # What could be either is neither.
    assert follow_moves(places(b"a/f", b"b/f"), [b"c/f"]) == {}
    assert follow_moves({}, [b"a"]) == {}

"""A directory as ext4: the kernel must see in the image what it sees in the directory."""

from __future__ import annotations

import itertools
import os
import random
import re
import shutil
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from blake3 import blake3

from horcrux_nbd.errors import NoSpace, UsageError
from horcrux_nbd.progress import Progress
from horcrux_nbd.source import Source, empty_filesystem, open_source
from horcrux_nbd.source.directory import Ext4Source
from horcrux_nbd.source.ext4_read import Ext4Image
from horcrux_nbd.source.tools import find_tool, run_tool
from horcrux_nbd.source.tree import Tree
from horcrux_nbd.units import GiB, MiB

from .conftest import needs_root
from .trees import describe, mounted, open_to_all, write_image


def check(image: Path) -> None:
    """e2fsck finds nothing to mend."""
    result = run_tool([find_tool("e2fsck", "e2fsprogs"), "-f", "-n", str(image)])
    assert result.returncode == 0, result.stdout


def digest(source: Source) -> str:
    """Of all that it holds and where."""
    total = blake3()
    for offset, length in source.extents():
        total.update(f"{offset} {length} ".encode())
        total.update(source.read(offset, length))
    return total.hexdigest()


@needs_root
def test_kernel_sees_the_same(tree: Path, image: Path, tmp_path: Path) -> None:
    before = describe(tree)
    with mounted(image, tmp_path / "mnt", "ext4") as point:
        after = describe(point)
    assert before.keys() == after.keys()  # no lost+found either
    for path, entry in before.items():
        assert entry == after[path], path


def test_e2fsck_finds_nothing(image: Path) -> None:
    check(image)


def test_contents_without_a_mount(tree: Path, image: Path, tmp_path: Path) -> None:
    for name in ("sizes/100000", "sizes/5000000", "links/two"):
        out = tmp_path / "out"
        run_tool([find_tool("debugfs", "e2fsprogs"), "-R", f"dump /{name} {out}", str(image)])
        assert out.read_bytes() == (tree / name).read_bytes()
        out.unlink()


def test_same_tree_same_bytes(tree: Path, tmp_path: Path) -> None:
    """Of two copies: other inode numbers, access and change times, order of names on disk."""
    digests = []
    for copy, order in ((tmp_path / "one", 1), (tmp_path / "two", -1)):
        copy.mkdir()
        # cp cannot copy what is deeper than a path is long.
        names = [name for name in sorted(os.listdir(tree)) if name != "deep"][::order]
        result = run_tool(
            ["cp", "--archive", "--sparse=auto", *(str(tree / name) for name in names), str(copy)]
        )
        assert result.returncode == 0, result.stderr
        os.utime(copy, ns=(order, 0))
        (copy / "sizes/1").read_bytes()
        with open_source(copy, label="AMCC", temporary=tmp_path) as source:
            digests.append(digest(source))
    assert digests[0] == digests[1]


def test_label_names_the_file_system(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    for label in ("AMCC", "a-label-of-more-than-sixteen-bytes"):
        with open_source(tmp_path / "tree", label=label) as source:
            super_block = source.read(1024, 1024)
        assert super_block[0x78:0x88].rstrip(b"\0").decode() == label[:16]


def test_any_order_any_thread(tree: Path, image: Path) -> None:
    """Pieces of odd sizes at odd places, read by several threads, are those of the image."""
    size = image.stat().st_size
    choose = random.Random(1)
    with open_source(tree, label="AMCC") as source, open(image, "rb") as file:
        extents = list(source.extents())
        assert extents == sorted(extents)
        assert all(a + b < c for (a, b), (c, _) in itertools.pairwise(extents))
        pieces = [(0, 1 << 20), (size - 100, 200), (size + 5, 10), (7, 0)]
        for _ in range(300):
            start, length = choose.choice(extents)
            offset = max(start + choose.randrange(length) - choose.randrange(9000), 0)
            pieces.append((offset, choose.choice([1, 511, 4096, 70_001, 524_288])))
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(lambda piece: source.read(*piece), pieces))
        for (offset, length), got in zip(pieces, results, strict=True):
            expected = os.pread(file.fileno(), length, offset).ljust(length, b"\0")
            assert got == expected, (offset, length)
        with pytest.raises(ValueError, match="negative"):
            source.read(-1, 5)


def test_outside_the_extents_all_is_zero(image: Path, tree: Path) -> None:
    with open_source(tree, label="AMCC") as source:
        at = 0
        for offset, length in [*source.extents(), (source.size, 0)]:
            for start in {at, (at + offset) // 2, max(offset - MiB, at)}:
                assert source.read(start, min(MiB, offset - start)).count(0) == min(
                    MiB, offset - start
                )
            at = offset + length


def test_nothing_of_mke2fs_shows_in_files(tmp_path: Path) -> None:
    """lost+found's blocks are given to files; what lay in them must not come with them."""
    root = tmp_path / "tree"
    root.mkdir()
    with open(root / "file", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, MiB)
    with open_source(root) as source:
        image = Ext4Image(source.read)
        extents = image.extents(dict(image.walk())[b"file"])
        assert sum(count for _, _, count in extents) == 256
        for _, block, count in extents:
            assert source.read(block * 4096, count * 4096).count(0) == count * 4096


@needs_root
@pytest.mark.timeout(180)
def test_directory_of_100000_names(tmp_path: Path) -> None:
    """Indexed in two levels; the kernel finds every name by its hash and takes new ones."""
    root = tmp_path / "tree"
    root.mkdir()
    fd = os.open(root, os.O_RDONLY)
    names = [f"a name to make entries long enough {number}" for number in range(100_000)]
    os.close(os.open("first", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
    os.mkdir("sub", dir_fd=fd)
    for number, name in enumerate(names):
        if number % 10_000 == 0:  # a file has 65,000 names at most
            os.close(os.open(f"file{number}", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
        os.link(f"file{number - number % 10_000}", name, src_dir_fd=fd, dst_dir_fd=fd)
    os.close(fd)
    with open_source(root) as source:
        write_image(source, tmp_path / "image")
    check(tmp_path / "image")
    tree_of_names = run_tool(
        [find_tool("debugfs", "e2fsprogs"), "-R", "htree /", str(tmp_path / "image")]
    ).stdout
    assert "Indirect levels: 1" in tree_of_names
    point = tmp_path / "mnt"
    point.mkdir()
    mount = run_tool(["mount", "-o", "loop", str(tmp_path / "image"), str(point)])
    assert mount.returncode == 0, mount.stderr
    try:
        assert all((point / name).exists() for name in names[::7])
        assert len(os.listdir(point)) == len(os.listdir(root))
        for number in range(2000):
            (point / f"a new one {number}").touch()
        for name in names[::3]:
            (point / name).unlink()
    finally:
        assert run_tool(["umount", str(point)]).returncode == 0
    check(tmp_path / "image")


# ---- size ---------------------------------------------------------------------------------------


def test_room_by_default_and_on_request(tmp_path: Path) -> None:
    root = tmp_path / "tree"
    root.mkdir()
    (root / "file").write_bytes(b"x" * 3_000_000)
    for size, free, low, high in (
        (None, None, GiB, 2 * GiB),
        (None, 100 * MiB, 100 * MiB, 200 * MiB),
        (None, 0, 3 * MiB, 64 * MiB),
        (300 * MiB, None, 300 * MiB, 300 * MiB),
        (300 * MiB + 5, None, 300 * MiB, 300 * MiB),
    ):
        with open_source(root, size=size, free=free) as source:
            assert low <= source.size <= high
            blocks = int.from_bytes(source.read(1024 + 12, 4), "little")
            assert blocks * 4096 >= (free or 0)
            write_image(source, tmp_path / "image")
        check(tmp_path / "image")


@pytest.mark.parametrize("size", [33 * MiB, 64 * MiB, 200 * MiB])
def test_too_small_says_what_it_takes(tmp_path: Path, size: int) -> None:
    """And that is enough, and not much more than that."""
    root = tmp_path / "tree"
    root.mkdir()
    for number in range(700):
        (root / f"{number}").write_bytes(os.urandom(20))
    with open(root / "large", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, 250 * MiB)
    with pytest.raises(UsageError, match="too small") as error:
        open_source(root, size=size)
    least = int(str(error.value).split("(")[-1].split(" bytes")[0])
    with open_source(root, size=least) as source:
        write_image(source, tmp_path / "image")
    check(tmp_path / "image")
    assert least < 330 * MiB


def test_size_or_free_but_not_both(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    with pytest.raises(UsageError, match="not both"):
        open_source(tmp_path / "tree", size=GiB, free=GiB)


def test_more_files_than_usual(tmp_path: Path) -> None:
    """An image of this size would have fewer inodes than there are files."""
    root = tmp_path / "tree"
    for folder in range(20):
        (root / f"{folder}").mkdir(parents=True)
        for number in range(500):
            os.symlink("target", root / f"{folder}" / f"{number}")
    with open_source(root, free=MiB) as source:
        assert int.from_bytes(source.read(1024, 4), "little") > 10_000
        write_image(source, tmp_path / "image")
    check(tmp_path / "image")


@pytest.mark.parametrize("size", [0, 4096, MiB, 31 * MiB])
def test_no_room_for_a_file_system(tmp_path: Path, size: int) -> None:
    (tmp_path / "tree").mkdir()
    with pytest.raises(UsageError, match="at least"):
        open_source(tmp_path / "tree", size=size)


@needs_root
def test_without_any_rights(tmp_path: Path) -> None:
    """The whole way in, as a user: no root, no mount, no loop device."""
    open_to_all(tmp_path)
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/file").write_bytes(b"x" * 10_000)
    (tmp_path / "own").mkdir()
    os.chown(tmp_path / "own", 65534, 65534)
    os.seteuid(65534)
    try:
        with open_source(tmp_path / "tree", temporary=tmp_path / "own") as source:
            content = b"".join(source.read(*extent) for extent in source.extents())
            assert b"x" * 10_000 in content
    finally:
        os.seteuid(0)


# ---- temporary space ----------------------------------------------------------------------------


class Notes(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, line: str) -> None:
        self.lines.append(line)


def test_temporary_file_is_small_said_and_nameless(tree: Path, tmp_path: Path) -> None:
    notes = Notes()
    with open_source(tree, temporary=tmp_path, progress=notes) as source:
        assert os.listdir(tmp_path) == []  # so it is gone however this process ends
        assert 0 < source.temporary_bytes < 16 * MiB
    assert "temporary space" in notes.lines[0]
    assert str(tmp_path) in notes.lines[0]


@needs_root
def test_full_temporary_folder(tree: Path, tmp_path: Path) -> None:
    point = tmp_path / "small"
    point.mkdir()
    assert run_tool(["mount", "-t", "tmpfs", "-o", "size=1M", "none", str(point)]).returncode == 0
    try:
        with pytest.raises(NoSpace, match="temporary space"):
            open_source(tree, temporary=point)
    finally:
        assert run_tool(["umount", str(point)]).returncode == 0


def test_error_closes_the_temporary_file(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(UsageError):
        open_source(tmp_path / "tree", size=MiB)
    assert len(os.listdir("/proc/self/fd")) == before


# ---- what changes meanwhile ---------------------------------------------------------------------


def read_all(source: Source) -> None:
    for offset, length in source.extents():
        source.read(offset, length)


def test_changes_are_reported(tmp_path: Path) -> None:
    root = tmp_path / "tree"
    (root / "folder").mkdir(parents=True)
    for name in ("kept", "grown", "shrunk", "gone", "replaced", "touched", "empty", "linked"):
        (root / name).write_bytes(b"" if name == "empty" else b"x" * 10_000)
    source = open_source(root)
    with source:
        (root / "grown").write_bytes(b"y" * 20_000)
        os.truncate(root / "shrunk", 10)
        (root / "gone").unlink()
        (root / "replaced").unlink()
        (root / "replaced").symlink_to("kept")
        os.utime(root / "touched")
        (root / "empty").write_bytes(b"no more")
        (root / "folder" / "new").touch()
        read_all(source)
        problems = source.problems()
    named = sorted(line.split(":")[0] for line in problems)
    assert named == [".", "empty", "folder", "gone", "grown", "replaced", "shrunk", "touched"]
    assert next(line for line in problems if line.startswith("gone")).startswith("gone: ")


def test_change_after_reading_is_reported(tmp_path: Path) -> None:
    root = tmp_path / "tree"
    root.mkdir()
    (root / "file").write_bytes(b"x" * 10_000)
    with open_source(root) as source:
        read_all(source)
        assert source.problems() == []
        (root / "file").write_bytes(b"y" * 10_000)
        assert source.problems() == ["file: changed while it was read"]


def test_replaced_by_a_link_is_not_followed(tmp_path: Path) -> None:
    """Nobody gets a file into the image that was not in the directory."""
    root, secret = tmp_path / "tree", tmp_path / "secret"
    (root / "folder").mkdir(parents=True)
    secret.mkdir()
    (root / "folder/file").write_bytes(b"public " * 1000)
    (root / "file").write_bytes(b"public " * 1000)
    (secret / "file").write_bytes(b"secret " * 1000)
    with open_source(root) as source:
        (root / "file").unlink()
        (root / "file").symlink_to(secret / "file")
        shutil.rmtree(root / "folder")
        (root / "folder").symlink_to(secret)
        content = b"".join(source.read(*extent) for extent in source.extents())
        assert b"secret" not in content
        assert len(source.problems()) >= 2


def test_replaced_by_a_fifo_does_not_hang(tmp_path: Path) -> None:
    root = tmp_path / "tree"
    root.mkdir()
    (root / "file").write_bytes(b"x" * 10_000)
    with open_source(root) as source:
        (root / "file").unlink()
        os.mkfifo(root / "file")
        read_all(source)
        assert [line.partition(":")[0] for line in source.problems()] == ["file", "."]


# ---- what ext4 cannot hold ----------------------------------------------------------------------


def test_a_file_larger_than_ext4_takes(tmp_path: Path) -> None:
    root = tmp_path / "tree"
    root.mkdir()
    (root / "file").write_bytes(b"x")
    seen = Tree(root)
    seen.root.children[0].size = 17 << 40
    seen.root.children[0].data = seen.root.children[0].allocated = ((0, 4096),)
    with pytest.raises(UsageError, match="file is larger than a file can be"):
        Ext4Source(seen)


def test_a_file_with_more_names_than_ext4_takes(tmp_path: Path) -> None:
    root = tmp_path / "tree"
    root.mkdir()
    (root / "file").write_bytes(b"x")
    seen = Tree(root)
    seen.root.children[0].links = 65_001
    with pytest.raises(UsageError, match="file has 65001 names"):
        Ext4Source(seen)


# ---- empty --------------------------------------------------------------------------------------


@needs_root
def test_empty_file_system(tmp_path: Path) -> None:
    with empty_filesystem(10 * GiB, label="scratch") as source:
        assert source.size == 10 * GiB
        assert sum(length for _, length in source.extents()) < 8 * MiB
        write_image(source, tmp_path / "image")
    check(tmp_path / "image")
    with mounted(tmp_path / "image", tmp_path / "mnt", "ext4") as point:
        assert os.listdir(point) == []
        status = os.stat(point)
        assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (0, 0, 0o755)


def test_empty_file_system_is_the_same_each_time() -> None:
    def made() -> str:
        with empty_filesystem(64 * MiB, label="scratch") as source:
            return digest(source)

    assert made() == made()


def test_kernel_has_nothing_to_initialise(image: Path) -> None:
    """Else it would zero all inode tables after the first mount: into the first commit."""
    groups = run_tool([find_tool("dumpe2fs", "e2fsprogs"), str(image)]).stdout
    heads = re.findall(r"^Group \d+:.*", groups, re.MULTILINE)
    assert heads
    assert all("ITABLE_ZEROED" in line for line in heads)

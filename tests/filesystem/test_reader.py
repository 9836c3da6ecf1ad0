"""The reader sees what the kernel sees, in every kind of ext."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from horcrux_nbd.errors import Damaged, EnvironmentProblem, HorcruxError, NotFound, UsageError
from horcrux_nbd.filesystem import open_filesystem
from horcrux_nbd.units import GiB, KiB, MiB

from .support import Disk, needs_root, read, run, seen
from .trees import make_deep, make_tree

pytestmark = needs_root

KINDS = {
    "ext4": ("ext4", "-I", "256"),
    "small blocks": ("ext4", "-b", "1024"),
    "inline data": ("ext4", "-O", "inline_data"),
    "inline data, large inodes": ("ext4", "-O", "inline_data", "-I", "1024"),
    "no checksums": ("ext4", "-O", "^metadata_csum,^64bit,uninit_bg"),
    "checksum seed": ("ext4", "-O", "metadata_csum_seed"),
    "values in inodes": ("ext4", "-O", "ea_inode"),
    "clusters": ("ext4", "-O", "bigalloc", "-C", "16384"),
    "meta groups": ("ext4", "-O", "meta_bg,^resize_inode", "-g", "1024"),
    "two backups": ("ext4", "-O", "sparse_super2"),
    "no file types": ("ext4", "-O", "^filetype,^dir_index"),
    "small inodes": ("ext4", "-I", "128", "-O", "^metadata_csum"),
    "no journal": ("ext4", "-O", "^has_journal"),
    "orphan file": ("ext4", "-O", "orphan_file"),
    "ext3": ("ext3", "-I", "128"),
    "ext2": ("ext2", "-b", "1024"),
}


def make(path: Path, kind: str, **more: int) -> Disk:
    fstype, *options = KINDS[kind]
    return Disk.make(path, *options, kind=fstype, **more)


@pytest.mark.parametrize("kind", KINDS)
def test_as_the_kernel_sees_it(tmp_path: Path, kind: str) -> None:
    disk = make(tmp_path / "image", kind, size=64 * MiB)
    with disk.mounted("user_xattr", "acl") as root:
        make_tree(root)
        expected = seen(root)
    assert read(disk.reader()) == expected


def test_values_of_attributes_up_to_64_kib(tmp_path: Path) -> None:
    disk = make(tmp_path / "image", "values in inodes")
    value = os.urandom(60_000)
    with disk.mounted() as root:
        (root / "file").touch()
        os.setxattr(root / "file", "user.large", value)
    reader = disk.reader()
    assert reader.xattrs(reader.lookup("file")) == {b"user.large": value}


@pytest.mark.slow
def test_a_hundred_thousand_names_in_one_directory(tmp_path: Path) -> None:
    disk = Disk.make(tmp_path / "image", "-N", "110000", size=128 * MiB)
    with disk.mounted() as root:
        (root / "d").mkdir()
        here = os.open(root / "d", os.O_RDONLY)
        os.mknod("first", 0o100644, dir_fd=here)
        for number in range(100_000):
            os.link(
                "first", f"n{number}", src_dir_fd=here, dst_dir_fd=here
            ) if number < 60_000 else (os.mknod(f"n{number}", 0o100644, dir_fd=here))
        os.close(here)
    reader = disk.reader()
    began = time.monotonic()
    names = [path for path, _ in reader.walk()]
    assert len(names) == 100_000 + 3  # d, first, lost+found
    assert time.monotonic() - began < 10
    assert reader.lookup("d/n99999").is_file


def test_deeper_than_a_path(tmp_path: Path) -> None:
    disk = Disk.make(tmp_path / "image")
    with disk.mounted() as root:
        make_deep(root, 150, "n" * 200)
    found = [path for path, _ in disk.reader().walk()]
    assert max(map(len, found)) == 150 * 201 + len("bottom")


def test_a_file_of_a_terabyte_with_little_in_it(tmp_path: Path) -> None:
    disk = Disk.make(tmp_path / "image")
    with disk.mounted() as root, open(root / "sparse", "wb") as file:
        file.truncate(1024 * GiB)
        os.pwrite(file.fileno(), b"here", 900 * GiB)
    reader = disk.reader()
    inode = reader.lookup("sparse")
    assert inode.size == 1024 * GiB
    pieces = list(reader.read_pieces(inode))
    assert [(at, data.rstrip(b"\0")) for at, data in pieces] == [(900 * GiB, b"here")]


def test_room_that_was_never_written_is_zeros(tmp_path: Path) -> None:
    """Whatever somebody else's file left there."""
    disk = Disk.make(tmp_path / "image", size=16 * MiB)
    with disk.mounted() as root:
        (root / "before").write_bytes(b"secret" * (2 * MiB))
        os.sync()
        (root / "before").unlink()
        with open(root / "after", "wb") as file:
            os.posix_fallocate(file.fileno(), 0, 10 * MiB)
            os.pwrite(file.fileno(), b"mine", 5 * MiB)
        expected = (root / "after").read_bytes()
    reader = disk.reader()
    assert b"".join(reader.read_file(reader.lookup("after"))) == expected
    assert b"secret" not in expected


def test_paths(tmp_path: Path) -> None:
    disk = Disk.make(tmp_path / "image")
    with disk.mounted() as root:
        make_tree(root)
    reader = disk.reader()
    names = {path: inode.number for path, inode in reader.walk()}
    for path in (b"modes/0", b"/modes//0", b"./modes/../modes/0", b"../modes/0", b"to-folder/0"):
        assert reader.lookup(path).number == names[b"modes/0"]
    assert reader.lookup("to-file").number == names[b"size-100"]
    assert reader.lookup("to-file", follow=False).is_link
    assert reader.lookup(b"\xff\xfe not text").number == names[b"\xff\xfe not text"]
    assert reader.lookup(os.fsdecode(b"\xff\xfe not text")).number == names[b"\xff\xfe not text"]
    assert reader.lookup("/").number == 2
    with pytest.raises(NotFound, match="nowhere"):
        reader.lookup("modes/nowhere")
    with pytest.raises(NotFound, match="too many"):
        reader.lookup("loop")
    with pytest.raises(NotFound, match="not a directory"):
        reader.lookup("hard/x")
    with pytest.raises(UsageError):
        list(reader.read_file(reader.lookup("modes")))


def test_encrypted_files_are_said_to_be(tmp_path: Path) -> None:
    disk = Disk.make(tmp_path / "image", "-O", "encrypt,^metadata_csum")
    with disk.mounted() as root:
        (root / "d").mkdir()
    reader = disk.reader()
    block, at = reader.inodes.place(reader.lookup("d").number)
    place = block * reader.image.block_size + at + 0x20
    flags = int.from_bytes(disk.read(place, 4), "little") | 0x800
    disk.write(place, flags.to_bytes(4, "little"))
    reader = disk.reader()
    with pytest.raises(EnvironmentProblem, match="fscrypt"):
        list(reader.listdir(reader.lookup("d")))


@pytest.mark.parametrize("fstype", ["xfs", "btrfs"])
def test_another_file_system(tmp_path: Path, fstype: str) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"")
    os.truncate(path, 512 * MiB)
    try:
        run("mkfs." + fstype, "-q" if fstype == "xfs" else "-f", str(path))
    except FileNotFoundError:
        pytest.skip(f"needs mkfs.{fstype}: apt-get install xfsprogs btrfs-progs")
    with pytest.raises(UsageError, match=f"(?i){fstype}.*--blocks"):
        Disk(path).reader()


def test_what_is_none_at_all() -> None:
    for data in (b"", b"x" * 100, bytes(1 * MiB), os.urandom(1 * MiB)):
        with pytest.raises(HorcruxError):
            open_filesystem(lambda o, n, d=data: d[o : o + n], len(data))  # type: ignore[misc]


def test_an_image_cut_off(tmp_path: Path) -> None:
    disk = Disk.make(tmp_path / "image")
    data = disk.path.read_bytes()[: 8 * MiB]
    with pytest.raises(Damaged, match="image"):
        open_filesystem(lambda o, n: data[o : o + n], len(data))


def test_reads_no_more_than_it_must(tmp_path: Path) -> None:
    """A look at one file of a large image touches a few blocks."""
    disk = Disk.make(tmp_path / "image", size=4 * GiB)
    with disk.mounted() as root:
        (root / "a/b").mkdir(parents=True)
        (root / "a/b/c").write_bytes(b"x" * 100)
    count = [0]

    def reading(offset: int, length: int) -> bytes:
        count[0] += length
        return disk.read(offset, length)

    reader = open_filesystem(reading, disk.path.stat().st_size)
    assert b"".join(reader.read_file(reader.lookup("a/b/c"))) == b"x" * 100
    assert count[0] < 64 * KiB


def test_what_reading_raises_passes_through() -> None:
    def reading(offset: int, length: int) -> bytes:
        raise NotFound("away")

    with pytest.raises(NotFound, match="away"):
        open_filesystem(reading, 1 * MiB)

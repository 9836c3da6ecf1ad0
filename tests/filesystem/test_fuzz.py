"""Damaged and hostile images: one clear error or the right answer, soon, and in little memory."""

from __future__ import annotations

import os
import random
import struct
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from horcrux_nbd.errors import Damaged, HorcruxError
from horcrux_nbd.filesystem import Reader, compare, open_filesystem
from horcrux_nbd.units import MiB

from .support import Disk, needs_root
from .trees import make_tree

pytestmark = needs_root

LONGEST = 10.0  # seconds for one image; they take hundredths
MOST_MEMORY = 64 * MiB

KINDS = {
    "ext4": ("-O", "inline_data,ea_inode"),
    "no checksums": ("-O", "^metadata_csum,inline_data,ea_inode"),
    "block lists": ("-O", "^metadata_csum,^extent,^64bit", "-b", "1024"),
}


def make_image(path: Path, kind: str, *, in_use: bool) -> bytes:
    """An image with some of everything, and with a journal that was not replayed if `in_use`."""
    disk = Disk.make(path, *KINDS[kind], size=24 * MiB)
    with disk.mounted("user_xattr", "acl") as root:
        make_tree(root)
        os.sync()
        for number in range(50):
            (root / f"later-{number}").symlink_to("x" * number * 4 + "x")
        fd = os.open(root / "hard", os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
        if in_use:
            return disk.path.read_bytes()
    return disk.path.read_bytes()


@pytest.fixture(scope="module", params=KINDS)
def sound(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return make_image(tmp_path_factory.mktemp("fuzz") / "image", request.param, in_use=True)


def opened(data: bytes) -> Reader:
    return open_filesystem(lambda offset, length: data[offset : offset + length], len(data))


def everything(data: bytes) -> dict[bytes, object]:
    """All that can be told of an image, but for the content of files and the times."""
    reader = opened(data)
    found: dict[bytes, object] = {}
    for path, inode in reader.walk():
        target = reader.readlink(inode) if inode.is_link else None
        size = 0
        if inode.is_file:
            size = sum(len(piece) for _, piece in reader.read_pieces(inode))
        found[path] = inode[:13], reader.xattrs(inode), target, size
    reader.lookup("modes/hard-too")
    reader.lookup("to-folder/0")
    return found


def metadata_blocks(data: bytes) -> list[int]:
    """Places of blocks of 1 KiB that hold something that is no file's content."""
    reader = opened(data)
    content: set[int] = set()
    for _, inode in reader.walk():
        short = inode.is_link and inode.size < 60
        if not inode.is_dir and not short and reader.inline(inode) is None:
            for _, place, length in reader.pieces(inode):
                content.update(range(place // 1024, -(-(place + length) // 1024)))
    zeros = bytes(1024)
    return [
        at
        for at in range(len(data) // 1024)
        if at not in content and data[at * 1024 : (at + 1) * 1024] != zeros
    ]


def flipped(data: bytes, blocks: list[int], chance: random.Random) -> bytes:
    """With a few bytes changed."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 3, 30))):
        at = chance.choice(blocks) * 1024 + chance.randrange(1024)
        changed[at] = chance.choice((0, 0xFF, changed[at] ^ 1 << chance.randrange(8)))
    return bytes(changed)


def damaged(data: bytes, blocks: list[int], chance: random.Random) -> bytes:
    """With a few bytes changed, or a whole block in the place of another one."""
    if chance.random() < 0.8:
        return flipped(data, blocks, chance)
    one, other = chance.choice(blocks), chance.choice(blocks)
    changed = bytearray(data)
    changed[one * 1024 : (one + 1) * 1024] = data[other * 1024 : (other + 1) * 1024]
    return bytes(changed)


def timed(work: Callable[[], object]) -> bool:
    """Whether it worked; if not, with one clear error. Soon, in any case."""
    began = time.monotonic()
    problem = None
    try:
        work()
    except HorcruxError as error:
        problem = str(error)
    assert time.monotonic() - began < LONGEST
    assert problem is None or (problem and "\n" not in problem)
    return problem is None


def test_checksums_find_all_damage_of_metadata(tmp_path: Path) -> None:
    data = make_image(tmp_path / "image", "ext4", in_use=False)
    blocks, truth = metadata_blocks(data), everything(data)
    results: list[object] = []
    for seed in range(80):
        changed = flipped(data, blocks, random.Random(seed))
        if timed(lambda changed=changed: results.append(everything(changed))):  # type: ignore[misc]
            assert results[-1] == truth, f"seed {seed}"
    assert len(results) < 75, "the damage is where nobody looks"


def test_damage_does_no_harm(sound: bytes) -> None:
    blocks = metadata_blocks(sound)
    worked = [
        timed(lambda seed=seed: everything(damaged(sound, blocks, random.Random(seed))))  # type: ignore[misc]
        for seed in range(40)
    ]
    assert 0 < sum(worked) < len(worked)


def test_a_comparison_with_damage(sound: bytes) -> None:
    blocks = metadata_blocks(sound)
    for seed in range(25):
        data = damaged(sound, blocks, random.Random(1000 + seed))
        timed(lambda data=data: compare(opened(sound), opened(data)))  # type: ignore[misc]
        timed(lambda data=data: compare(opened(data), opened(sound)))  # type: ignore[misc]


def test_damage_takes_no_memory(sound: bytes) -> None:
    blocks = metadata_blocks(sound)
    tracemalloc.start()
    try:
        for seed in range(6):
            data = damaged(sound, blocks, random.Random(2000 + seed))
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            timed(lambda data=data: everything(data))  # type: ignore[misc]
            assert tracemalloc.get_traced_memory()[1] - before < MOST_MEMORY
    finally:
        tracemalloc.stop()


# ---- forged on purpose


class Forge:
    """An image without checksums, changed field by field."""

    def __init__(self, path: Path, *options: str) -> None:
        self.disk = Disk.make(
            path, "-b", "1024", "-O", ",".join(["^metadata_csum", *options]), size=16 * MiB
        )
        with self.disk.mounted() as root:
            (root / "d").mkdir()
            (root / "e").mkdir()
            for number in range(60):
                (root / f"d/name-{number}").touch()
            (root / "file").write_bytes(b"x" * 5000)
        self.reader = self.disk.reader()

    def inode(self, path: str, at: int, data: bytes) -> None:
        block, skip = self.reader.inodes.place(self.reader.lookup(path).number)
        self.disk.write(block * 1024 + skip + at, data)

    def super(self, at: int, data: bytes) -> None:
        self.disk.write(1024 + at, data)

    def look(self) -> Iterator[object]:
        reader = self.disk.reader()
        for path, inode in reader.walk():
            yield path
            if inode.is_file:
                for _ in reader.read_pieces(inode):
                    pass


@pytest.fixture
def forge(tmp_path: Path) -> Forge:
    return Forge(tmp_path / "forged")


def extents(*pieces: tuple[int, int, int], depth: int = 0) -> bytes:
    """The body of an inode: (logical, physical, count)."""
    head = struct.pack("<HHHHI", 0xF30A, len(pieces), 4, depth, 0)
    for logical, physical, count in pieces:
        if depth:
            head += struct.pack("<IIHH", logical, physical, 0, 0)
        else:
            head += struct.pack("<IHHI", logical, count, 0, physical)
    return head.ljust(60, b"\0")


def bad(forge: Forge, match: str = "damaged") -> None:
    began = time.monotonic()
    with pytest.raises(Damaged, match=match):
        list(forge.look())
    assert time.monotonic() - began < LONGEST


@pytest.mark.parametrize(
    "pieces",
    [
        ((0, 1 << 31, 5),),  # beyond the end
        ((0, 10_000, 32_000),),
        ((0, 100, 3), (2, 200, 3)),  # overlapping
        ((3, 100, 2), (0, 200, 2)),  # descending
        ((0, 0, 5),),  # the boot block
        ((0, 100, 0),),  # nothing
    ],
)
def test_extents_that_cannot_be(forge: Forge, pieces: tuple[tuple[int, int, int], ...]) -> None:
    forge.inode("file", 0x28, extents(*pieces))
    bad(forge)


def test_an_extent_tree_that_leads_to_itself(forge: Forge) -> None:
    reader = forge.reader
    ((_, place, _),) = list(reader.pieces(reader.lookup("file")))
    block = place // 1024
    node = extents((0, block, 0), depth=4)[:24]
    forge.disk.write(place, node.ljust(1024, b"\0"))
    forge.inode("file", 0x28, extents((0, block, 0), depth=5))
    bad(forge, "extent tree")


def test_a_block_list_that_leads_to_itself(tmp_path: Path) -> None:
    """Three levels of one block full of its own number: 16 million blocks out of one."""
    forge = Forge(tmp_path / "forged", "^extent", "^64bit")
    reader = forge.reader
    place = next(place for _, place, _ in reader.pieces(reader.lookup("file")))
    block = place // 1024
    forge.disk.write(place, struct.pack("<I", block) * 256)
    forge.inode("file", 0x28, struct.pack("<15I", *[0] * 12, block, block, block))
    forge.inode("file", 0x6C, struct.pack("<I", 0xFF))  # a size of a terabyte
    bad(forge, "twice")


def test_one_block_of_names_in_many_directories(forge: Forge) -> None:
    """Directories cost 256 bytes each; what they list must not cost a block of names each time."""
    reader = forge.reader
    ((_, place, _), *_) = list(reader.pieces(reader.lookup("d")))
    forge.inode("e", 0x28, extents((0, place // 1024, 1)))
    bad(forge, "in use already")


def test_one_block_of_names_many_times_in_a_directory(forge: Forge) -> None:
    reader = forge.reader
    ((_, place, _), *_) = list(reader.pieces(reader.lookup("d")))
    forge.inode("d", 0x28, extents(*((n, place // 1024, 1) for n in range(4))))
    forge.inode("d", 4, struct.pack("<I", 4096))
    bad(forge, "in use already")


def test_a_file_of_an_exabyte(forge: Forge) -> None:
    """Its size is what the inode says; its data is what is mapped, and reading that ends."""
    forge.inode("file", 4, struct.pack("<I", 0xFFFFFFFF))
    forge.inode("file", 0x6C, struct.pack("<I", 0x0FFFFFFF))
    assert len(list(forge.look())) > 60


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (0x18, 60), (0x18, 7), (0x20, 0), (0x28, 0), (0x28, 0xFFFFFFFF), (0x4, 0xFFFFFFFF),
        (0x0, 0xFFFFFFFF), (0x0, 0), (0x14, 0x7FFFFFFF), (0x58, 3), (0x58, 0), (0x58, 0x8000),
        (0xFE, 3), (0xFE, 0), (0x60, 0xFFFFFFFF), (0x60, 0x1), (0x60, 0x8), (0xE0, 0xFFFFFF),
        (0x104, 0xFFFFFFFF),
    ],
)  # fmt: skip
def test_superblocks_that_cannot_be(forge: Forge, at: int, value: int) -> None:
    width = 2 if at in (0x58, 0xFE) else 4
    forge.super(at, value.to_bytes(width, "little"))
    timed(lambda: list(forge.look()))


def test_inode_tables_anywhere(forge: Forge) -> None:
    for place in (0, 1, 0xFFFFFFFF, 16 * 1024 - 1):
        forge.disk.write(2048 + 8, struct.pack("<I", place))
        bad(forge, "inode table")


@pytest.mark.parametrize("length", [0, 1, 4, 7, 9, 0xFFFC, 0xFFFF])
def test_entries_of_any_length(forge: Forge, length: int) -> None:
    reader = forge.reader
    ((_, place, _), *_) = list(reader.pieces(reader.root))
    forge.disk.write(place + 12 + 12 + 4, struct.pack("<H", length))
    bad(forge, "an entry")


def test_names_of_inodes_that_there_are_not(forge: Forge) -> None:
    reader = forge.reader
    ((_, place, _), *_) = list(reader.pieces(reader.root))
    for number, match in ((0xFFFFFFFF, "inode"), (reader.superblock.inodes, "not in use")):
        forge.disk.write(place + 24, struct.pack("<I", number))
        bad(forge, match)


def test_a_journal_that_goes_round_and_round(tmp_path: Path) -> None:
    """A ring in which every block continues the log."""
    disk = Disk.make(tmp_path / "image", "-O", "^metadata_csum", "-b", "1024", size=16 * MiB)
    reader = disk.reader()
    inode = reader.inode(reader.superblock.journal_inode)
    pieces = list(reader.pieces(inode))
    for at, place, length in pieces:
        for block in range(length // 1024):
            if at + block:
                kind = struct.pack(">III", 0xC03B3998, 5, 7) + struct.pack(">I", 16)
                disk.write(place + block * 1024, kind.ljust(1024, b"\0"))
    disk.write(pieces[0][1] + 24, struct.pack(">II", 7, 1))  # sequence, start
    incompat = struct.unpack("<I", disk.read(1024 + 0x60, 4))[0]
    disk.write(1024 + 0x60, struct.pack("<I", incompat | 4))
    began = time.monotonic()
    assert disk.reader().image.overlay == {}
    assert time.monotonic() - began < LONGEST

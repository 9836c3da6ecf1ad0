"""Comparisons against two looks of the kernel."""

from __future__ import annotations

import os
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from horcrux_nbd.errors import Damaged
from horcrux_nbd.filesystem import Change, Changed, compare, open_filesystem
from horcrux_nbd.filesystem import content as contents
from horcrux_nbd.units import GiB, KiB, MiB

from .support import Disk, check_changes, needs_root, run, seen
from .trees import ODD, make_tree

pytestmark = needs_root


def differences(old: Disk, new: Disk) -> Changed:
    """What bytes of two image files differ, told by the bytes."""
    a, b = old.path.read_bytes(), new.path.read_bytes()
    size, grain = max(len(a), len(b)), 4096
    differing = [at for at in range(0, size, grain) if a[at : at + grain] != b[at : at + grain]]

    def changed(offset: int, length: int) -> Iterator[tuple[int, int]]:
        for at in differing:
            low, high = max(at, offset), min(at + grain, offset + length)
            if low < high:
                yield low, high

    return changed


def changes_of(old: Disk, new: Disk) -> list[Change]:
    """The comparison, told what differs; told nothing it may only call more files modified."""
    told = compare(old.reader(), new.reader(), differences(old, new))
    untold = compare(old.reader(), new.reader())
    assert {c.path for c in untold} >= {c.path for c in told}
    assert [c for c in untold if c.kind in ("added", "deleted")] == [
        c for c in told if c.kind in ("added", "deleted")
    ]
    return told


class Pair:
    """A disk before and after what a test does to it."""

    def __init__(self, path: Path, *options: str) -> None:
        self.new = Disk.make(path / "image", *options, size=48 * MiB)
        self.old = self.new

    def prepare(self, work: Callable[[Path], None]) -> None:
        with self.new.mounted("user_xattr", "acl") as root:
            work(root)
        self.old = self.new.copy("before")
        with self.old.mounted("ro") as root:
            self.before = seen(root)

    def change(self, work: Callable[[Path], None]) -> list[Change]:
        with self.new.mounted("user_xattr", "acl") as root:
            work(root)
        with self.new.mounted("ro") as root:
            self.after = seen(root)
        found = changes_of(self.old, self.new)
        self.renamed = check_changes(found, self.before, self.after)
        return found


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    made = Pair(tmp_path, "-b", "4096")
    made.prepare(make_tree)
    return made


def _one(changes: list[Change], path: bytes) -> Change:
    (found,) = [change for change in changes if change.path == path]
    return found


def test_nothing(pair: Pair) -> None:
    assert pair.change(lambda root: None) == []


def test_each_kind_of_change(pair: Pair) -> None:
    def work(root: Path) -> None:
        (root / "new").write_bytes(b"n" * 10_000)
        (root / "size-4096").unlink()
        os.rename(root / "size-150", root / "modes/renamed")
        with open(root / "size-70000", "r+b") as file:
            os.pwrite(file.fileno(), b"changed", 20_000)
        with open(root / "size-4095", "ab") as file:
            file.write(b"appended")
        os.truncate(root / "size-1024", 100)
        os.chmod(root / "size-59", 0o600)
        os.chown(root / "size-60", 5, 6)
        os.setxattr(root / "size-61", "user.new", b"v" * 500)
        os.utime(root / "size-1", ns=(1, 2))
        os.link(root / "hard", root / "harder")
        (root / "newer-link").symlink_to("somewhere")
        (root / "link-1").unlink()
        (root / "link-1").symlink_to("elsewhere")
        (root / "fifo").unlink()
        (root / "fifo").mkdir()
        os.truncate(root / "size-0", 1 * GiB)
        with open(root / "comb", "r+b") as file:
            os.pwrite(file.fileno(), b"in a hole", 4096)

    changes = pair.change(work)
    assert pair.renamed == {b"size-150": b"modes/renamed"}
    assert _one(changes, b"size-70000").changed_bytes == 4096
    assert _one(changes, b"size-70000").what == ("content", "times")
    assert _one(changes, b"size-4095").changed_bytes == 4095 + 8
    assert _one(changes, b"size-1024").changed_bytes == 0
    assert _one(changes, b"new").changed_bytes == 10_000
    assert _one(changes, b"comb").changed_bytes == 4096
    assert _one(changes, b"size-0").changed_bytes == 0
    assert _one(changes, b"size-59").what == ("mode",)
    assert [c.kind for c in changes if c.path == b"fifo"] == ["added", "deleted"]


def test_written_as_it_was_is_no_change_of_content(pair: Pair) -> None:
    def work(root: Path) -> None:
        content = (root / "size-70000").read_bytes()
        with open(root / "size-70000", "r+b") as file:
            file.write(content)  # in place
        (root / "temporary").write_bytes((root / "size-4097").read_bytes())
        os.rename(root / "temporary", root / "size-4097")  # as editors do
        content = (root / "size-1024").read_bytes()
        (root / "size-1024").write_bytes(content)  # truncated, and in other blocks then

    changes = pair.change(work)
    assert {c.path: c.what for c in changes} == {
        b"size-70000": ("times",),
        b"size-4097": ("times",),
        b"size-1024": ("times",),
    }


def test_moved_directories(pair: Pair) -> None:
    """Into new ones, out of removed ones, into each other; with changes inside."""

    def work(root: Path) -> None:
        (root / "a/b").mkdir(parents=True)
        os.rename(root / "many", root / "a/b/many")
        (root / "a/b/many/name-1").write_text("changed")
        os.rename(root / "a/b/many/name-2", root / "name-2")
        os.rename(root / "modes", root / "a/b/many/modes")
        (root / "a/b/many/modes/new").touch()

    changes = pair.change(work)
    assert pair.renamed == {
        b"many": b"a/b/many",
        b"modes": b"a/b/many/modes",
        b"many/name-2": b"name-2",
    }
    assert len(changes) < 10, "what only moved with its directory is not listed"


def test_out_of_a_removed_directory(pair: Pair) -> None:
    def work(root: Path) -> None:
        os.rename(root / "many/name-3", root / "kept")
        shutil.rmtree(root / "many")

    changes = pair.change(work)
    assert pair.renamed == {b"many/name-3": b"kept"}
    assert sum(c.kind == "deleted" for c in changes) > 500


def test_names_swapped(pair: Pair) -> None:
    def work(root: Path) -> None:
        os.rename(root / "size-100", root / "t")
        os.rename(root / "size-150", root / "size-100")
        os.rename(root / "t", root / "size-150")

    pair.change(work)


def test_an_inode_used_again_is_another_file(pair: Pair) -> None:
    def work(root: Path) -> None:
        for number in range(1, 20):
            (root / f"many/name-{number}").unlink(missing_ok=True)
        for number in range(100, 120):
            (root / f"many/other-{number}").write_text("other")

    pair.change(work)
    assert pair.renamed == {}


def test_hard_links(pair: Pair) -> None:
    """A change shows under each name; one name less is no change of the others."""

    def work(root: Path) -> None:
        os.link(root / "hard", root / "third")
        (root / "hard").write_text("changed")

    changes = pair.change(work)
    assert {c.path: c.kind for c in changes} == {
        b"hard": "modified",
        b"modes/hard-too": "modified",
        b"third": "added",
    }


@pytest.mark.parametrize("options", [("-O", "inline_data"), ("-b", "1024"), ("-O", "ea_inode")])
def test_other_kinds_of_ext(tmp_path: Path, options: tuple[str, ...]) -> None:
    pair = Pair(tmp_path, *options)
    pair.prepare(make_tree)

    def work(root: Path) -> None:
        (root / "size-59").write_bytes(b"grown" * 100)
        (root / "size-100").write_bytes(b"s")
        (root / "size-60").write_bytes(b"other of the same size"[:20] * 3)
        os.truncate(root / "size-70000", 3000)
        with open(root / "comb", "r+b") as file:
            os.pwrite(file.fileno(), b"x" * 1024, 16384)
        os.setxattr(root / "size-4096", "user.v", os.urandom(900))
        (root / "many/name-1").unlink()

    pair.change(work)


def test_small_blocks_beside_each_other(tmp_path: Path) -> None:
    """What is told as one changed block may be four, of several files."""
    pair = Pair(tmp_path, "-b", "1024")

    def begin(root: Path) -> None:
        for number in range(40):
            (root / f"f{number}").write_bytes(b"%d" % number * 400)

    def work(root: Path) -> None:
        for number in range(40):
            if number % 4:
                os.utime(root / f"f{number}", ns=(1, number))
            else:
                with open(root / f"f{number}", "r+b") as file:
                    file.write(b"x")

    pair.prepare(begin)
    changes = pair.change(work)
    assert [c.what for c in changes].count(("times",)) == 30


# ---- any sequence

NAMES = st.sampled_from([f"n{number}" for number in range(8)] + [os.fsdecode(n) for n in ODD[:3]])
PATHS = st.one_of(NAMES, st.tuples(st.sampled_from(["d0", "d1", "d0/d2"]), NAMES).map("/".join))
ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(
            ["write", "append", "overwrite", "truncate", "rename", "remove", "mkdir", "chmod",
             "chown", "setxattr", "link", "symlink", "touch", "rewrite", "punch"]
        ),
        PATHS,
        PATHS,
        st.integers(0, 40_000),
    ),
    max_size=25,
)  # fmt: skip


def act(root: Path, action: str, path: Path, other: Path, number: int) -> None:
    """One change, where it is possible."""
    is_file = path.is_file() and not path.is_symlink()
    if action == "write" and not path.is_dir():
        path.write_bytes(bytes([number % 255 + 1]) * number)
    elif action in ("append", "overwrite", "rewrite", "punch") and is_file:
        with open(path, "r+b") as file:
            size = os.fstat(file.fileno()).st_size
            if action == "append":
                os.pwrite(file.fileno(), b"a" * (number % 5000), size)
            elif action == "overwrite":
                os.pwrite(file.fileno(), b"o" * (number % 700), number)
            elif action == "rewrite":
                os.pwrite(file.fileno(), os.pread(file.fileno(), 9000, 0), 0)
            else:
                run("fallocate", "-p", "-o", str(number // 2), "-l", "6000", str(path))
    elif action == "truncate" and is_file:
        os.truncate(path, number)
    elif action == "rename" and path.exists():
        os.rename(path, other)
    elif action == "remove":
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    elif action == "mkdir":
        path.mkdir()
    elif action == "chmod" and path.exists():
        os.chmod(path, number % 0o10000)
    elif action == "chown":
        os.chown(path, number, number + 1, follow_symlinks=False)
    elif action == "setxattr" and is_file:
        os.setxattr(path, "user.x", b"v" * (number % 300))
    elif action == "link" and is_file:
        os.link(path, other)
    elif action == "symlink":
        path.symlink_to("t" * (number % 200 + 1))
    elif action == "touch" and path.exists():
        os.utime(path, ns=(number, number))


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(first=ACTIONS, second=ACTIONS)
def test_any_changes(
    tmp_path_factory: pytest.TempPathFactory,
    first: list[tuple[str, str, str, int]],
    second: list[tuple[str, str, str, int]],
) -> None:
    folder = tmp_path_factory.mktemp("any")
    pair = Pair(folder)

    def work(root: Path, actions: list[tuple[str, str, str, int]]) -> None:
        for action, path, other, number in actions:
            try:
                act(root, action, root / path, root / other, number)
            except OSError:
                continue  # not possible there

    def begin(root: Path) -> None:
        (root / "d0/d2").mkdir(parents=True)
        (root / "d1").mkdir()
        work(root, first)

    try:
        pair.prepare(begin)
        pair.change(lambda root: work(root, second))
    finally:
        shutil.rmtree(folder)


# ---- a volume in use, other file systems, limits


def test_with_a_journal_that_was_not_replayed(tmp_path: Path) -> None:
    """A version, and the same disk in use: its newest names are in the journal only."""
    pair = Pair(tmp_path)
    pair.prepare(make_tree)
    with pair.new.mounted("data=journal") as root:
        with open(root / "size-70000", "r+b") as file:
            os.pwrite(file.fileno(), b"changed", 30_000)
        (root / "added").write_bytes(b"a" * 5000)
        (root / "size-100").unlink()
        os.rename(root / "hard", root / "harder")
        for number in range(300):
            (root / "many" / f"more-{number}").touch()
        fd = os.open(root / "added", os.O_RDONLY)
        os.fsync(fd)  # into the journal, and no further
        os.close(fd)
        in_use = pair.new.copy("in-use")
        after = seen(root)
    assert in_use.reader().image.overlay
    changes = compare(pair.old.reader(), in_use.reader(), differences(pair.old, in_use))
    assert check_changes(changes, pair.before, after) == {b"hard": b"harder"}


def test_two_file_systems_that_are_no_versions_of_each_other(tmp_path: Path) -> None:
    """Told by path; the same size and time count as the same content."""
    one, two = Pair(tmp_path), Disk.make(tmp_path / "two", "-b", "1024", size=64 * MiB)
    one.prepare(make_tree)
    with one.new.mounted("ro") as source, two.mounted("user_xattr", "acl") as root:
        run("cp", "-a", f"{source}/.", str(root))
        (root / "size-100").write_bytes(b"changed")
        (root / "size-150").unlink()
        (root / "many/new").touch()
        after = seen(root)
    changes = compare(one.old.reader(), two.reader())
    assert check_changes(changes, one.before, after) == {}
    assert {c.path for c in changes} >= {b"size-100", b"size-150", b"many/new"}


def test_a_larger_file_system(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    pair.prepare(make_tree)
    os.truncate(pair.new.path, 160 * MiB)
    run("e2fsck", "-fy", str(pair.new.path))
    run("resize2fs", str(pair.new.path))

    def work(root: Path) -> None:
        for number in range(40):
            (root / f"dir-{number}").mkdir()
        (root / "size-100").unlink()

    pair.change(work)


def test_reads_only_what_differs(tmp_path: Path) -> None:
    disk = Disk.make(tmp_path / "image", size=256 * MiB)
    with disk.mounted() as root:
        for folder in range(20):
            (root / f"d{folder}").mkdir()
            for number in range(100):
                (root / f"d{folder}/f{number}").write_bytes(b"x" * 5000)
    old = disk.copy("before")
    with disk.mounted() as root:
        (root / "d7/f50").write_bytes(b"y" * 100)
    count = [0]

    def counting(disk: Disk) -> Callable[[int, int], bytes]:
        def reading(offset: int, length: int) -> bytes:
            count[0] += length
            return disk.read(offset, length)

        return reading

    size = disk.path.stat().st_size
    readers = [open_filesystem(counting(one), size) for one in (old, disk)]
    changes = compare(*readers, differences(old, disk))
    assert [c.path for c in changes] == [b"d7/f50"]
    assert count[0] < 400 * KiB


def test_data_that_moved_is_read_up_to_a_limit(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond it what moved counts as changed."""
    monkeypatch.setattr(contents, "READ_LIMIT", 0)
    with pair.new.mounted() as root:
        content = (root / "size-70000").read_bytes()
        (root / "t").write_bytes(content)
        os.rename(root / "t", root / "size-70000")
    (change,) = compare(pair.old.reader(), pair.new.reader(), differences(pair.old, pair.new))
    assert change.what == ("content", "times")
    assert change.changed_bytes == 70_000


def test_a_directory_with_two_names_is_damage(pair: Pair) -> None:
    """A loop of directories would be walked for ever."""
    disk = Disk.make(
        pair.new.path.with_name("loop"), "-b", "1024", "-O", "^metadata_csum", size=8 * MiB
    )
    with disk.mounted() as root:
        (root / "a/b").mkdir(parents=True)
    old = disk.copy("loop-before")
    reader = disk.reader()
    (entry,) = list(reader.listdir(reader.lookup("a")))
    ((_, place, _),) = list(reader.pieces(reader.lookup("a")))
    data = disk.read(place, 1024)
    at = data.index(struct.pack("<I", entry.inode))
    at = data.index(b"\1\2b") - 6  # the entry: inode, length, length of the name, type, name
    above = reader.lookup("a").number
    disk.write(place + at, struct.pack("<I", above))
    block, at = reader.inodes.place(above)
    disk.write(block * 1024 + at + 0x10, b"time")  # a change has a time
    with pytest.raises(Damaged, match="two names"):
        list(disk.reader().walk())
    with pytest.raises(Damaged):
        compare(old.reader(), disk.reader())


def test_many_changes_are_fast_enough(tmp_path: Path) -> None:
    """Extents without number: the merge of two maps is no product of them."""
    disk = Disk.make(tmp_path / "image", size=128 * MiB)
    with disk.mounted() as root, open(root / "comb", "wb") as file:
        for number in range(6000):
            os.pwrite(file.fileno(), b"x" * 4096, number * 8192)
    old = disk.copy("before")
    chance = random.Random(1)
    with disk.mounted() as root, open(root / "comb", "r+b") as file:
        for _ in range(500):
            os.pwrite(file.fileno(), b"y" * 4096, chance.randrange(6000) * 8192)
    (change,) = changes_of(old, disk)
    assert 400 * 4096 < change.changed_bytes <= 500 * 4096

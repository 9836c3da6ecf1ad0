"""What is restored is what the kernel shows of the image; and nothing gets out of the folder."""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from horcrux_nbd.errors import Damaged, HorcruxError, NoSpace, NotFound, UsageError
from horcrux_nbd.filesystem import open_filesystem
from horcrux_nbd.filesystem import restore as restoring
from horcrux_nbd.filesystem.restore import remove_tree, restore
from horcrux_nbd.units import GiB, KiB, MiB

from .support import Disk, needs_root, seen
from .trees import make_deep, make_tree

pytestmark = needs_root


CAPABILITY = struct.pack("<IIIII", 0x02000000, 1 << 10, 0, 0, 0)  # linux/capability.h, version 2


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Disk:
    made = Disk.make(tmp_path_factory.mktemp("restore") / "image", size=64 * MiB)
    with made.mounted("user_xattr", "acl") as root:
        make_tree(root)
        (root / "upper/lower").mkdir(parents=True)
        os.setxattr(root / "size-59", "security.capability", CAPABILITY)
    return made


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system that can hold all that an image can (/tmp may be a tmpfs)."""
    made = Disk.make(tmp_path / "target", "-O", "ea_inode", size=256 * MiB)
    with made.mounted("user_xattr", "acl") as root:
        (root / "lost+found").rmdir()
        yield root


def test_all_of_it(disk: Disk, target: Path) -> None:
    done = restore(disk.reader(), "/", target, trusted=True)
    with disk.mounted("ro") as root:
        assert seen(target) == seen(root)
    assert done.left_out == []
    holes = target / "all-hole"
    assert holes.stat().st_size == 1 * GiB
    assert holes.stat().st_blocks == 0
    assert (target / "hard").samefile(target / "modes/hard-too")


def test_what_gives_power_is_left_out(disk: Disk, target: Path) -> None:
    done = restore(disk.reader(), "/", target)
    found = seen(target)
    assert b"null" not in found
    assert b"disk" not in found
    assert not any(look.mode & stat.S_ISUID for look in found.values())
    names = {name for look in found.values() for name, _ in look.xattrs}
    assert names == {
        b"user.small", b"user.empty", b"user.big", b"user.on-folder",
        b"system.posix_acl_access", b"system.posix_acl_default",
    }  # fmt: skip
    assert done.left_out_count == 2 + 2 + 2
    assert any("modes/4755" in line for line in done.left_out)
    assert any("security.capability" in line for line in done.left_out)


def test_one_file_and_one_directory(disk: Disk, target: Path) -> None:
    reader = disk.reader()
    done = restore(reader, "many/name-1", target)
    assert (target / "name-1").read_bytes() == b"1"
    assert (done.files, done.directories, done.bytes) == (1, 0, 1)
    done = restore(reader, "/many/", target)
    assert len(os.listdir(target / "many")) == done.files == 600 - 86
    restore(reader, "to-folder", target)
    assert os.readlink(target / "to-folder") == "modes"
    with pytest.raises(NotFound):
        restore(reader, "nowhere", target)
    with pytest.raises(UsageError):
        restore(reader, "upper/lower/..", target)


def test_what_is_there_stays_unless_told(disk: Disk, target: Path) -> None:
    reader = disk.reader()
    (target / "many").mkdir()
    (target / "many/mine").write_text("mine")
    (target / "hard").symlink_to("/etc/passwd")
    for path in ("many", "hard", "/"):
        with pytest.raises(UsageError, match="--force"):
            restore(reader, path, target)
    assert sorted(os.listdir(target)) == ["hard", "many"]
    restore(reader, "many", target, force=True)
    assert not (target / "many/mine").exists(), "replaced, not mixed"
    restore(reader, "hard", target, force=True)
    assert not (target / "hard").is_symlink()
    assert (target / "hard").read_text() == "hard"
    assert sorted(os.listdir(target)) == ["hard", "many"]


def test_a_full_disk_leaves_nothing(disk: Disk, tmp_path: Path) -> None:
    small = Disk.make(tmp_path / "small", "-b", "1024", "-O", "^has_journal", size=400 * KiB)
    with small.mounted() as root:
        (root / "mine").write_text("mine")
        with pytest.raises(NoSpace):
            restore(disk.reader(), "comb", root)
        with pytest.raises(NoSpace):
            restore(disk.reader(), "many", root)
        assert sorted(os.listdir(root)) == ["lost+found", "mine"]


def test_a_file_that_is_too_large_for_the_folder(tmp_path: Path, target: Path) -> None:
    disk = Disk.make(tmp_path / "image", "-b", "4096")
    with disk.mounted() as root:
        (root / "file").touch()
        os.truncate(root / "file", 15 * 1024 * GiB)
    small = Disk.make(tmp_path / "small", "-b", "1024", kind="ext3")
    with small.mounted() as root:
        with pytest.raises(HorcruxError, match="more than this file system can hold"):
            restore(disk.reader(), "file", root)
        assert os.listdir(root) == ["lost+found"]


def test_deeper_than_a_path(tmp_path: Path, target: Path) -> None:
    disk = Disk.make(tmp_path / "image")
    with disk.mounted() as root:
        make_deep(root, 1200, "n" * 50)
    reader = disk.reader()
    done = restore(reader, "n" * 50, target)
    assert (done.directories, done.files) == (1200, 1)
    folder = os.open(target, os.O_RDONLY)
    try:
        remove_tree(folder, b"n" * 50)
    finally:
        os.close(folder)
    assert os.listdir(target) == []


def test_interrupted(disk: Disk, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever breaks it off, the folder is as it was."""
    made = []

    def symlink(*words: object, **more: object) -> None:
        made.append(words)
        if len(made) == 3:
            raise KeyboardInterrupt
        original(*words, **more)  # type: ignore[arg-type]

    original = os.symlink
    monkeypatch.setattr(restoring.os, "symlink", symlink)
    with pytest.raises(KeyboardInterrupt):
        restore(disk.reader(), "/", target)
    assert os.listdir(target) == []


# ---- images that mean harm


def forge(tmp_path: Path, make: Callable[[Path], None], change: Callable[[bytes], bytes]) -> Disk:
    """An image in which the blocks of the root directory were changed by hand."""
    disk = Disk.make(tmp_path / "forged", "-O", "^metadata_csum,^dir_index", size=8 * MiB)
    with disk.mounted() as root:
        make(root)
    reader = disk.reader()
    for _, place, length in reader.pieces(reader.root):
        data = change(disk.read(place, length))
        assert len(data) == length
        disk.write(place, data)
    return disk


@pytest.mark.parametrize(
    "name", [b"../../../evil", b"/tmp/evil----", b"a/b/c/../evil", b"nul\0in-a-name", b".."]
)
def test_names_that_lead_out(tmp_path: Path, target: Path, name: bytes) -> None:
    placeholder = b"p" * len(name)
    disk = forge(
        tmp_path,
        lambda root: (root / os.fsdecode(placeholder)).write_text("evil"),
        lambda data: data.replace(placeholder, name),
    )
    if name == b"..":  # one more of those that every directory has
        restore(disk.reader(), "/", target)
        assert os.listdir(target) == ["lost+found"]
        return
    with pytest.raises(Damaged, match="name that cannot be"):
        restore(disk.reader(), "/", target)
    assert os.listdir(target) == []


def test_a_name_that_is_a_link_and_a_folder(tmp_path: Path, target: Path) -> None:
    """A link first, then a directory of the same name with a file in it: the file must not land
    where the link leads to.
    """
    outside = tmp_path / "outside"
    outside.mkdir()

    def make(root: Path) -> None:
        (root / "top").mkdir()
        (root / "top/aaaa").symlink_to(outside)
        (root / "top/bbbb").mkdir()
        (root / "top/bbbb/file").write_text("evil")

    disk = forge(tmp_path, make, lambda data: data)
    reader = disk.reader()
    ((_, place, length),) = list(reader.pieces(reader.lookup("top")))
    disk.write(place, disk.read(place, length).replace(b"bbbb", b"aaaa"))
    with pytest.raises(Damaged, match="a name twice"):
        restore(disk.reader(), "top", target)
    with pytest.raises(HorcruxError):
        restore(disk.reader(), "/", target)
    assert os.listdir(outside) == []
    assert os.listdir(target) == []


def test_the_same_name_twice_at_the_top(tmp_path: Path, target: Path) -> None:
    def make(root: Path) -> None:
        (root / "aaaa").symlink_to("/etc")
        (root / "bbbb").mkdir()

    disk = forge(tmp_path, make, lambda data: data.replace(b"bbbb", b"aaaa"))
    with pytest.raises(Damaged, match="a name twice"):
        restore(disk.reader(), "/", target)
    assert os.listdir(target) == []


def test_a_directory_in_itself(tmp_path: Path, target: Path) -> None:
    def make(root: Path) -> None:
        (root / "a/b").mkdir(parents=True)

    disk = forge(tmp_path, make, lambda data: data)
    reader = disk.reader()
    a, b = reader.lookup("a"), reader.lookup("a/b")
    ((_, place, length),) = list(reader.pieces(a))
    data = disk.read(place, length)
    at = data.index(b"\1\2b") - 6
    assert data[at : at + 4] == struct.pack("<I", b.number)
    disk.write(place + at, struct.pack("<I", a.number))
    with pytest.raises(Damaged, match=r"two names|in use already"):
        restore(disk.reader(), "a", target)
    assert os.listdir(target) == []


def test_by_somebody_else_than_root(tmp_path: Path, target: Path) -> None:
    """Owners stay one's own; folders without write permission are made and removed all the same."""
    made = Disk.make(tmp_path / "image")
    with made.mounted() as root:
        (root / "closed/in").mkdir(parents=True)
        (root / "closed/in/file").write_text("x")
        os.chown(root / "closed/in/file", 5, 5)
        os.chmod(root / "closed/in", 0o500)
        os.chmod(root / "closed", 0o555)
    os.chown(target, 65534, 65534)
    # Another user cannot walk here; what is open is open.
    folder = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
    data = made.path.read_bytes()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            reader = open_filesystem(lambda at, length: data[at : at + length], len(data))
            here = Path(f"/proc/self/fd/{folder}")
            restore(reader, "closed", here)
            restore(reader, "closed/in", here)
            restore(reader, "closed", here, force=True)
            code = 0
        except (HorcruxError, OSError) as error:
            os.write(2, repr(error).encode())
        finally:
            os._exit(code)
    os.close(folder)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert stat.S_IMODE((target / "closed").stat().st_mode) == 0o555
    assert stat.S_IMODE((target / "in").stat().st_mode) == 0o500
    assert (target / "closed/in/file").stat().st_uid == 65534
    assert sorted(os.listdir(target)) == ["closed", "in"]

"""A file system that was not unmounted: what is in the journal only counts. The kernel, which
replays a copy of the same image, is the oracle.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
from pathlib import Path

import pytest

from horcrux_nbd.errors import Damaged, EnvironmentProblem
from horcrux_nbd.filesystem import Reader
from horcrux_nbd.filesystem.journal import Journal, _after
from horcrux_nbd.units import MiB

from .support import Disk, Seen, needs_root, read, run, seen

pytestmark = needs_root

KINDS = {
    "checksums": ((), ()),
    "no checksums": (("-O", "^metadata_csum"), ()),
    "32 bit": (("-O", "^64bit,^metadata_csum"), ()),
    "small blocks": (("-b", "1024"), ()),
    "old checksums": (("-O", "^metadata_csum"), ("journal_checksum",)),
    "data too": ((), ("data=journal",)),
    "data too, no checksums": (("-O", "^metadata_csum"), ("data=journal",)),
}


def work(root: Path, seed: int) -> None:
    """Many small transactions, with blocks that are metadata, freed, and something else then."""
    chance = random.Random(seed)
    for step in range(60):
        name = root / f"d{chance.randrange(6)}"
        action = chance.randrange(6)
        if action == 0 and name.exists():
            shutil.rmtree(name)
        elif action <= 3:
            name.mkdir(exist_ok=True)
            for number in range(chance.randrange(80)):
                (name / f"{step}-{number}").symlink_to("target" * chance.randrange(1, 30))
        elif action == 4:
            # Begins like a block of the journal itself, which has to be escaped there.
            (root / f"f{step}").write_bytes(b"\xc0\x3b\x39\x98" + bytes([step]) * 9000)
        else:
            (root / f"f{chance.randrange(60)}").unlink(missing_ok=True)
        if step % 5 == 0:
            commit(root)


def crashed(tmp_path: Path, kind: str, seed: int) -> Disk:
    """A copy of a disk in use, with transactions in its journal."""
    options, mounting = KINDS[kind]
    disk = Disk.make(tmp_path / "image", *options, size=48 * MiB)
    with disk.mounted(*mounting) as root:
        work(root, seed)
        commit(root)
        return disk.copy("crashed")


def commit(root: Path) -> None:
    """End the transaction; what it changed stays in the journal, sync(2) would put it in place."""
    path = root / "commit"
    path.write_bytes(os.urandom(8))
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def replayed(disk: Disk) -> dict[bytes, Seen]:
    copy = disk.copy("replayed")
    with copy.mounted() as root:
        return seen(root)


@pytest.mark.parametrize("kind", KINDS)
def test_as_the_kernel_replays_it(tmp_path: Path, kind: str) -> None:
    disk = crashed(tmp_path, kind, seed=len(kind))
    reader = disk.reader()
    assert reader.superblock.needs_recovery
    assert reader.image.overlay, "nothing in the journal: the test shows nothing"
    assert read(reader) == replayed(disk)


def test_without_the_journal_it_would_be_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests above see a reader that ignores the journal, or its revoke records."""
    disk = crashed(tmp_path, "no checksums", seed=3)
    expected = replayed(disk)
    assert read(disk.reader()) == expected
    monkeypatch.setattr(Journal, "replay", lambda self: {})
    with contextlib.suppress(Damaged):
        assert read(disk.reader()) != expected


def test_what_was_revoked_does_not_come_back(tmp_path: Path) -> None:
    """Blocks of a directory are logged, freed, and hold a file's data then, which no journal has:
    the old copy of the directory must not be taken for the file.
    """
    disk = Disk.make(tmp_path / "image", "-b", "1024", "-J", "size=4", size=16 * MiB)
    with disk.mounted() as root:
        (root / "d").mkdir()
        for number in range(1500):
            (root / "d" / f"{number:0200}").touch()
        commit(root)
        shutil.rmtree(root / "d")
        commit(root)
        fd = os.open(root / "fill", os.O_WRONLY | os.O_CREAT)
        with contextlib.suppress(OSError):  # ENOSPC, in the end
            while True:
                os.write(fd, b"data" * 256)
        os.fsync(fd)
        os.close(fd)
        copy = disk.copy("crashed")
    reader = copy.reader()
    assert reader.image.overlay
    content = b"".join(reader.read_file(reader.lookup("fill")))
    assert len(content) > 8 * MiB
    assert content == b"data" * (len(content) // 4)
    assert read(reader) == replayed(copy)


def test_a_transaction_without_its_commit_does_not_count(tmp_path: Path) -> None:
    """The log cut off at any of its last blocks is as far as its last whole transaction."""
    disk = crashed(tmp_path, "checksums", seed=5)
    reader = disk.reader()
    journal = _journal(reader)
    whole = len(list(journal._transactions()))
    assert whole > 1
    # The end of the log: the block after the last commit.
    block, seen_commits = journal._start, 0
    commits = []
    while seen_commits < whole:
        data = journal._block(block)
        if data[:8] == b"\xc0\x3b\x39\x98\0\0\0\2":
            commits.append(block)
            seen_commits += 1
        block = journal._next(block)
    size = reader.image.block_size
    place = journal._place(commits[-1]) * size
    disk.write(place + 100, b"damage")
    assert len(list(_journal(disk.reader())._transactions())) == whole - 1
    disk.write(place, bytes(size))
    assert len(list(_journal(disk.reader())._transactions())) == whole - 1
    assert read(disk.reader()) == replayed(disk)


def test_a_log_that_goes_over_the_end_of_its_ring(tmp_path: Path) -> None:
    disk = Disk.make(tmp_path / "image", "-b", "1024", "-J", "size=1", size=24 * MiB)
    with disk.mounted() as root:
        for turn in range(400):
            (root / f"d{turn % 20}").mkdir(exist_ok=True)
            for number in range(20):
                path = root / f"d{turn % 20}" / f"{turn // 20}-{number}"
                path.symlink_to("target" * 12)
            commit(root)
            if turn % 3:
                continue
            copy = disk.copy("crashed")
            journal = _journal(copy.reader())
            places = [read_block.args[0] for read_block in copy.reader().image.overlay.values()]  # type: ignore[attr-defined]
            if journal._start and min(places) < journal._place(journal._start):
                break
        else:
            raise AssertionError("it never did")
    assert read(copy.reader()) == replayed(copy)


def _journal(reader: Reader) -> Journal:
    inode = reader.inode(reader.superblock.journal_inode)
    extents = list(reader._mapper.extents(inode, reader.inodes.seed(inode)))
    return Journal(reader.image, extents)


def test_a_flipped_bit_in_a_logged_block_is_found(tmp_path: Path) -> None:
    disk = crashed(tmp_path, "checksums", seed=6)
    reader = disk.reader()
    size = reader.image.block_size
    for read_block in reader.image.overlay.values():
        place = read_block.args[0]  # type: ignore[attr-defined]
        data = bytearray(disk.read(place * size, size))
        data[100] ^= 1
        disk.write(place * size, bytes(data))
    with pytest.raises(Damaged, match="checksum of a block in the journal"):
        read(disk.reader())


def test_a_frozen_file_system_has_nothing_to_replay(tmp_path: Path) -> None:
    disk = Disk.make(tmp_path / "image")
    with disk.mounted() as root:
        work(root, 1)
        expected = seen(root)
        run("fsfreeze", "--freeze", str(root))
        try:
            copy = disk.copy("frozen")
        finally:
            run("fsfreeze", "--unfreeze", str(root))
    reader = copy.reader()
    assert not reader.superblock.needs_recovery
    assert read(reader) == expected


def test_fast_commits_are_refused_where_there_are_some(tmp_path: Path) -> None:
    disk = Disk.make(tmp_path / "image", "-O", "fast_commit", size=48 * MiB)
    with disk.mounted() as root:
        work(root, 2)
        before = disk.copy("before")
        for number in range(5):
            (root / f"fast-{number}").touch()
            fd = os.open(root / f"fast-{number}", os.O_WRONLY)
            os.write(fd, b"x")
            os.fsync(fd)
            os.close(fd)
        after = disk.copy("after")
    assert read(before.reader()) == replayed(before)
    if _has_fast_commits(after):
        with pytest.raises(EnvironmentProblem, match="fast commits"):
            after.reader()
    else:  # this kernel made whole transactions of them
        assert read(after.reader()) == replayed(after)


def _has_fast_commits(disk: Disk) -> bool:
    """What a reader without the check sees is not what the kernel sees."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "_check_fast_commits", lambda self, sequence: None)
        return read(disk.reader()) != replayed(disk)


def test_numbers_of_transactions_wrap() -> None:
    assert _after(5, 4)
    assert not _after(4, 5)
    assert not _after(5, 5)
    assert _after(3, 0xFFFFFFFE)
    assert not _after(0xFFFFFFFE, 3)

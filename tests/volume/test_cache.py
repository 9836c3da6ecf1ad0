from __future__ import annotations

import errno
import logging
import os
import random
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from horcrux_nbd import files
from horcrux_nbd.errors import NoSpace
from horcrux_nbd.units import KiB
from horcrux_nbd.volume import cache as caches
from horcrux_nbd.volume.cache import META, TRAILER, Cache

from .support import noise, open_descriptors

SIZE = 64 * KiB
ON_DISK = SIZE + TRAILER.size


def oid_of(number: int) -> bytes:
    return noise(32, f"id {number}")


def content_of(number: int) -> bytes:
    return noise(SIZE, f"content {number}")


def bytes_on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*/??/*"))


def got(cache: Cache, number: int) -> bytes | None:
    return cache.content(oid_of(number), SIZE)


def fill(cache: Cache, *numbers: int) -> None:
    for number in numbers:
        cache.insert(oid_of(number), content_of(number))


def reopened(cache: Cache) -> Cache:
    cache.close()
    return Cache(cache.folder, cache.limit)


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    cache = Cache(tmp_path / "cache", 100 * SIZE)
    yield cache
    cache.close()


def path_of(cache: Cache, number: int) -> Path:
    return Path(cache._path("chunks", oid_of(number)))


def test_what_is_inserted_is_there_for_everybody(cache: Cache) -> None:
    assert got(cache, 1) is None
    fill(cache, 1, 2)
    assert got(cache, 1) == content_of(1)
    other = Cache(cache.folder)
    assert got(other, 2) == content_of(2)
    assert other.has(oid_of(1))
    assert not other.has(oid_of(3))
    part = bytearray(100)
    file = other.open(oid_of(1))
    assert file is not None
    assert file.read_into(SIZE - 100, memoryview(part))
    assert part == content_of(1)[-100:]
    assert not file.read_into(SIZE, memoryview(bytearray(100))), "the trailer is no content"
    other.close()


def test_the_last_bytes_are_not_the_trailers(cache: Cache) -> None:
    fill(cache, 1)
    file = cache.open(oid_of(1))
    assert file is not None
    assert not file.read_into(SIZE - 10, memoryview(bytearray(20)))


def test_nodes_are_kept_apart_from_chunks(cache: Cache) -> None:
    cache.insert(oid_of(1), b"a node", meta=True)
    assert cache.read(oid_of(1)) == b"a node"
    assert cache.open(oid_of(1)) is None
    assert [(e.area, e.id) for e in cache.entries()] == [(META, oid_of(1).hex())]


# ---- damage: never served, deleted, fetched again


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path, Path], object]] = {
    "a bit": lambda path, other: _flip(path, 1234),
    "a bit of the trailer": lambda path, other: _flip(path, -3),
    "cut off": lambda path, other: os.truncate(path, SIZE - 1),
    "trailer cut off": lambda path, other: os.truncate(path, SIZE),
    "empty": lambda path, other: os.truncate(path, 0),
    "zeros": lambda path, other: path.write_bytes(bytes(ON_DISK)),
    "longer": lambda path, other: path.write_bytes(path.read_bytes() + b"x"),
    "10 GiB": lambda path, other: os.truncate(path, 10 << 30),
    "another chunk's file": lambda path, other: path.write_bytes(other.read_bytes()),
    "a folder": lambda path, other: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_never_served(
    cache: Cache, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    fill(cache, 1, 2)
    path = path_of(cache, 1)
    DAMAGE[damage](path, path_of(cache, 2))
    again = reopened(cache)
    assert got(again, 1) is None
    assert again.damaged == 1
    assert caplog.messages == [m for m in caplog.messages if str(path) in m]
    assert len(caplog.messages) == 1
    if not path.is_dir():
        assert not path.exists()
        fill(again, 1)
        assert got(again, 1) == content_of(1)
    assert got(again, 2) == content_of(2)
    again.close()


def test_a_file_that_is_cut_off_while_it_is_open_is_noticed(cache: Cache) -> None:
    fill(cache, 1)
    file = cache.open(oid_of(1))
    assert file is not None
    os.truncate(path_of(cache, 1), 1000)
    assert not file.read_into(0, memoryview(bytearray(SIZE)))
    assert not file.read_into(2000, memoryview(bytearray(10)))
    assert got(cache, 1) is None
    cache.drop(oid_of(1))
    assert not cache.has(oid_of(1))


def test_a_disk_that_cannot_read_is_a_miss(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(cache, 1)

    def fail(*args: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    file = cache.open(oid_of(1))
    assert file is not None
    with monkeypatch.context() as patched:
        patched.setattr(os, "preadv", fail)
        assert not file.read_into(0, memoryview(bytearray(10)))
    again = reopened(cache)
    with monkeypatch.context() as patched:
        patched.setattr(os, "pread", fail)
        assert again.open(oid_of(1)) is None
    again.close()


def test_too_many_open_files_are_a_miss(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(cache, 1)
    again = reopened(cache)

    def fail(*args: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", fail)
        assert again.open(oid_of(1)) is None
        again.insert(oid_of(2), content_of(2))
    assert again.damaged == 0
    assert got(again, 1) == content_of(1)
    again.close()


def test_names_in_the_folder_that_are_no_chunks_are_left_alone(cache: Cache) -> None:
    fill(cache, 1)
    shard = path_of(cache, 1).parent
    strange = [shard / "notes.txt", cache.folder / "chunks" / "README", cache.folder / "lost"]
    for path in strange:
        path.write_text("somebody's")
    old, new = shard / ".tmp-aa", shard / ".tmp-bb"
    for path in (old, new):
        path.write_bytes(b"half a chunk")
    os.utime(old, (0, 0))
    assert [e.id for e in cache.entries()] == [oid_of(1).hex()]
    assert cache.clear() == ON_DISK
    assert all(path.exists() for path in strange)
    assert not old.exists(), "left by a writer that was killed long ago"
    assert new.exists(), "somebody may be writing it"


# ---- bounds


def test_the_oldest_go_first_and_nodes_last(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 10 * ON_DISK)
    cache.insert(oid_of(99), b"a node", meta=True)
    os.utime(cache._path(META, oid_of(99)), (1, 1))
    fill(cache, *range(9))
    for number in range(9):
        os.utime(path_of(cache, number), (1000 + number, 1000 + number))
    removed = cache.trim(5 * ON_DISK, 0.6)
    assert [number for number in range(9) if cache.has(oid_of(number))] == [7, 8]
    assert removed == 7 * ON_DISK
    assert cache.read(oid_of(99)) == b"a node"
    assert cache.trim(100 * ON_DISK) == 0
    cache.clear()
    assert list(cache.entries()) == []
    assert cache.size() == 0
    cache.close()


def test_it_stays_within_its_limit(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 3 * ON_DISK)
    for number in range(40):
        fill(cache, number)
        assert bytes_on_disk(cache.folder) <= 3 * ON_DISK
        assert got(cache, number) == content_of(number)
    assert cache.size() == bytes_on_disk(cache.folder)
    assert open_room(cache) <= 2 * ON_DISK
    cache.close()


def open_room(cache: Cache) -> int:
    """Bytes of evicted files that are held open."""
    opened = cache._opened().values()
    return sum(os.fstat(f.fd).st_size for f in opened if os.fstat(f.fd).st_nlink == 0)


def test_a_cache_smaller_than_a_chunk_keeps_nothing(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", SIZE // 2)
    fill(cache, 1)
    assert got(cache, 1) is None
    assert bytes_on_disk(cache.folder) == 0
    cache.close()


def test_little_over_the_limit_is_evicted_in_the_background(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 100 * ON_DISK)
    trimmed = threading.Event()
    trim = cache.trim

    def noted(limit: int, keep: float = 1.0) -> int:
        removed = trim(limit, keep)
        if threading.current_thread().name == "cache":
            trimmed.set()
        return removed

    cache.trim = noted  # type: ignore[method-assign]
    fill(cache, *range(101))
    assert trimmed.wait(10)
    assert bytes_on_disk(cache.folder) <= 91 * ON_DISK
    cache.close()


def test_what_is_used_while_it_is_open_is_not_the_oldest(cache: Cache) -> None:
    """An open file is found without looking at the disk, so its time would stay what it was."""
    fill(cache, *range(10))
    for number in range(10):
        os.utime(path_of(cache, number), (1000 + number, 1000 + number))
    assert got(cache, 0) == content_of(0)
    cache.trim(5 * ON_DISK)
    assert cache.has(oid_of(0))
    assert not cache.has(oid_of(1))


def test_uses_are_noted_for_other_processes(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "TOUCH_AFTER", 0.0)
    fill(cache, 1, 2)
    for number in (1, 2):
        os.utime(path_of(cache, number), (1000, 1000))
    assert got(cache, 1) == content_of(1)
    cache._wake.set()
    deadline = time.monotonic() + 10
    while path_of(cache, 1).stat().st_mtime == 1000:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert path_of(cache, 2).stat().st_mtime == 1000


def test_what_another_process_evicted_is_let_go(cache: Cache) -> None:
    fill(cache, 1, 2)
    assert got(cache, 1) == content_of(1)
    other = Cache(cache.folder)
    other.clear()
    other.close()
    assert got(cache, 1) == content_of(1), "still readable by who has it open"
    cache._wake.set()
    deadline = time.monotonic() + 10
    while oid_of(1) in cache._open:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("usage", [b"", b"\x01\x02", struct.pack("<Q16s", 5, bytes(16))])
def test_the_count_is_made_anew_where_it_cannot_be_trusted(cache: Cache, usage: bytes) -> None:
    """Nothing is synced here: after a power cut the count may be gone while the files are not."""
    fill(cache, *range(20))
    (cache.folder / "usage").write_bytes(usage)
    again = Cache(cache.folder, 10 * ON_DISK)
    assert again.size() == 20 * ON_DISK
    fill(again, 50)
    assert bytes_on_disk(again.folder) <= 10 * ON_DISK
    assert again.size() == bytes_on_disk(again.folder)
    again.close()


def test_no_more_files_are_open_than_allowed(cache: Cache) -> None:
    cache.max_open = 5
    fill(cache, *range(20))
    assert len(cache._open) == 5
    assert all(got(cache, number) == content_of(number) for number in range(20))
    assert len(cache._open) == 5


def test_no_descriptor_and_no_thread_is_left(tmp_path: Path) -> None:
    before, threads = open_descriptors(), threading.active_count()
    cache = Cache(tmp_path / "cache")
    assert threading.active_count() == threads, "nbdkit forks after the cache was opened"
    fill(cache, 1, 2)
    assert got(cache, 1) == content_of(1)
    cache.close()
    fill(cache, 3)
    assert open_descriptors() == before
    assert threading.active_count() == threads


# ---- a full disk


def test_a_full_disk_is_told_once_and_gives_way(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fill(cache, *range(20))
    caplog.set_level(logging.WARNING)

    def full(*args: object, **options: object) -> None:
        raise NoSpace("no space left for it")

    with monkeypatch.context() as patched:
        patched.setattr(files, "publish", full)
        fill(cache, *range(30, 40))
    assert len(caplog.messages) == 1
    assert "not cached now" in caplog.messages[0]
    deadline = time.monotonic() + 10
    while bytes_on_disk(cache.folder) > 18 * ON_DISK:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    fill(cache, 50)
    assert got(cache, 50) == content_of(50)


def test_an_unreadable_usage_file_harms_nobody(cache: Cache) -> None:
    (cache.folder / "usage").mkdir()
    fill(cache, 1)
    assert got(cache, 1) == content_of(1)


# ---- several processes


def hammer(folder: str, seed: int, seconds: float) -> None:
    """Run by the test below in processes of their own; prints what is wrong."""
    cache = Cache(Path(folder), 3 * ON_DISK)
    chance = random.Random(seed)
    end = time.monotonic() + seconds
    reads = 0

    def read() -> None:
        nonlocal reads
        try:
            while time.monotonic() < end:
                number = chance.randrange(8)
                file = cache.open(oid_of(number))
                if file is None:
                    fill(cache, number)
                    continue
                data = bytearray(SIZE)
                if file.read_into(0, memoryview(data)) and data != content_of(number):
                    print(f"chunk {number} is wrong")
                reads += 1
        except BaseException as error:
            print(repr(error))

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cache.close()
    if not reads:
        print("nothing was read")


def test_three_processes_share_three_chunks_of_room(tmp_path: Path) -> None:
    """Each evicts what the others read, and inserts what they evict."""
    folder = tmp_path / "cache"
    code = "import sys; from tests.volume.test_cache import hammer; hammer(sys.argv[1], {}, 1.5)"
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code.format(seed), str(folder)],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        for seed in range(3)
    ]
    for worker in workers:
        said, _ = worker.communicate(timeout=60)
        assert (worker.returncode, said) == (0, b"")
    assert bytes_on_disk(folder) <= 3 * ON_DISK
    last = Cache(folder, 3 * ON_DISK)
    assert last.size() >= bytes_on_disk(folder)
    last.close()


def test_blocks_that_are_the_same_are_proven(cache: Cache) -> None:
    fill(cache, 1)
    path = path_of(cache, 1)
    content = path.read_bytes()
    blocks = {n: content[n * 4096 : (n + 1) * 4096] for n in range(2)}
    other = Cache(cache.folder)
    assert other.same_blocks(oid_of(1), {0: blocks[0], 1: bytes(4096)}) == {0}
    assert other.same_blocks(oid_of(2), blocks) is None
    other.close()
    # One that is the same in a damaged file counts for nothing.
    _flip(path, 5000)
    other = Cache(cache.folder)
    assert other.same_blocks(oid_of(1), {0: blocks[0]}) is None
    assert not path.exists()
    other.close()


def test_the_oldest_span_goes_first(tmp_path: Path) -> None:
    """Last uses that lie hours apart, and some within one span: the order is that of the uses."""
    cache = Cache(tmp_path / "cache", 100 * ON_DISK)
    used = {n: 10_000 + (n * 7 % 9) * 3600 for n in range(9)} | {9: 99_000, 10: 99_002, 11: 99_001}
    fill(cache, *used)
    with cache._lock:
        cache._open.clear()  # else their uses are noted before an eviction
    for number, when in used.items():
        os.utime(path_of(cache, number), (when, when))
    order = sorted(used, key=lambda number: used[number])
    for gone in range(1, 13):
        assert cache.trim((12 - gone) * ON_DISK) == ON_DISK
        assert [number for number in order if cache.has(oid_of(number))] == order[gone:]
    cache.close()

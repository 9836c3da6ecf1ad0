from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from horcrux_nbd import files
from horcrux_nbd.errors import Damaged, NoSpace
from horcrux_nbd.volume import layer as layers
from horcrux_nbd.volume import recent
from horcrux_nbd.volume.blockmap import BASE, DATA, ZERO
from horcrux_nbd.volume.layer import BLOCK_SIZE, Layer, SyncFailed

from .disk import Disk
from .support import noise, open_descriptors

ID = bytes(range(16))
SIZE = 1 << 46


def new_layer(folder: Path) -> Layer:
    return Layer.create(folder, ID, SIZE)


def reopened(folder: Path, read_only: bool = False) -> Layer:
    return Layer(folder, ID, SIZE).open(read_only)


def put(layer: Layer, block: int, data: bytes) -> None:
    layer.write(block * BLOCK_SIZE, data)
    layer.mark(block, len(data) // BLOCK_SIZE, DATA)


def get(layer: Layer, block: int, count: int = 1) -> bytes:
    data = bytearray(count * BLOCK_SIZE)
    layer.read_into(block * BLOCK_SIZE, memoryview(data))
    return bytes(data)


def test_after_a_power_cut_what_was_flushed_is_there_and_what_was_not_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(tmp_path, monkeypatch)
    layer = new_layer(tmp_path / "l")
    put(layer, 7, noise(BLOCK_SIZE * 3))
    layer.zero(100, 5000)
    layer.flush()
    put(layer, 20, noise(BLOCK_SIZE, 1))
    layer.zero(8, 1)
    layer.close()
    disk.cut(random.Random(1))
    again = reopened(tmp_path / "l")
    assert [again.blocks.state(b) for b in (6, 7, 8, 9, 10, 20)] == [BASE, DATA, DATA, DATA, 0, 0]
    assert again.blocks.state(100) == again.blocks.state(5099) == ZERO
    assert get(again, 7) == noise(BLOCK_SIZE * 3)[:BLOCK_SIZE]
    assert get(again, 8) in (noise(BLOCK_SIZE * 3)[BLOCK_SIZE : 2 * BLOCK_SIZE], bytes(BLOCK_SIZE))


def test_after_the_death_of_the_process_all_is_there_and_the_next_flush_means_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that connects again believes in what was acknowledged, and flushes it then."""
    disk = Disk(tmp_path, monkeypatch)
    layer = new_layer(tmp_path / "l")
    put(layer, 7, noise(BLOCK_SIZE))
    layer.flush()
    layer.write(7 * BLOCK_SIZE, noise(BLOCK_SIZE, "in place"))
    put(layer, 20, noise(BLOCK_SIZE, 1))
    layer.zero(1000, 5000)
    die(layer)
    again = reopened(tmp_path / "l")
    assert [again.blocks.state(b) for b in (7, 20, 1000, 5999, 6000)] == [DATA, DATA, ZERO, ZERO, 0]
    again.flush()
    die(again)
    disk.cut(random.Random(2))
    last = reopened(tmp_path / "l")
    assert get(last, 7) == noise(BLOCK_SIZE, "in place")
    assert get(last, 20) == noise(BLOCK_SIZE, 1)
    assert last.blocks.count() == (2, 5000)
    last.close()


def test_the_death_of_the_process_between_two_tries_of_a_flush(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = new_layer(tmp_path / "l")
    put(layer, 1, noise(BLOCK_SIZE))
    with monkeypatch.context() as patched:
        patched.setattr(layer._log, "append", _raise(NoSpace("full")))
        for block in range(2, 6):
            with pytest.raises(NoSpace):
                layer.flush()
            put(layer, block, noise(BLOCK_SIZE, block))
    die(layer)
    assert reopened(tmp_path / "l").blocks.count() == (5, 0)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_an_open_that_fails_keeps_what_the_dead_process_had_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Found by tests/faults/test_sweep.py: too many open files, and `recent` was removed."""
    layer = new_layer(tmp_path)
    put(layer, 3, noise(BLOCK_SIZE, "acknowledged"))
    die(layer)
    real, calls = os.open, itertools.count(1)

    def fails(*args, **kw):  # type: ignore[no-untyped-def]
        if next(calls) == number:
            raise OSError(errno.EMFILE, "Too many open files")
        return real(*args, **kw)

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", fails)
        with contextlib.suppress(OSError):
            reopened(tmp_path).close()
        assert next(calls) > number
    layer = reopened(tmp_path)
    assert get(layer, 3) == noise(BLOCK_SIZE, "acknowledged")
    layer.close()


def test_without_room_for_notes_the_death_of_the_process_loses_nothing_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by tests/faults/test_full.py."""

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        layer = new_layer(tmp_path)
    put(layer, 3, noise(BLOCK_SIZE, "acknowledged"))
    layer.zero(9, 2)
    die(layer)
    layer = reopened(tmp_path)
    assert get(layer, 3) == noise(BLOCK_SIZE, "acknowledged")
    assert layer.blocks.state(9) == ZERO
    layer.close()


def test_when_there_is_no_room_for_marks_a_flush_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recent, "HALF", 64 + 10 * 24)
    layer = new_layer(tmp_path / "l")
    for block in range(0, 200, 2):
        put(layer, block, noise(BLOCK_SIZE, block))
        layer.zero(500, 1)  # changes nothing after the first, and is noted all the same
    die(layer)
    again = reopened(tmp_path / "l")
    assert again.blocks.count() == (100, 1)
    assert get(again, 198) == noise(BLOCK_SIZE, 198)
    again.close()
    assert not (tmp_path / "l" / "recent").exists(), "nothing is left to note"


def die(layer: Layer) -> None:
    """Close as the death of the process does: without any last act."""
    layer._log.close()
    layer._recent.close()
    layer._journal.close()
    layer._files = {}


def test_data_is_synced_before_the_map_that_shows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = new_layer(tmp_path / "l")
    events: list[str] = []
    fdatasync, write_all = os.fdatasync, files.write_all

    def name(fd: int) -> str:
        return os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))

    def sync(fd: int) -> None:
        events.append(f"sync {name(fd)}")
        fdatasync(fd)

    def write(fd: int, data: bytes, offset: int) -> None:
        events.append(f"write {name(fd)}")
        write_all(fd, data, offset)

    monkeypatch.setattr(os, "fdatasync", sync)
    monkeypatch.setattr(files, "write_all", write)
    put(layer, 1, noise(BLOCK_SIZE))
    layer.flush()
    fresh = ["write data-000000", "sync data-000000", "write map", "sync map"]
    assert events == fresh
    events.clear()
    layer.write(BLOCK_SIZE + 10, b"in place")
    layer.flush()
    assert events == ["write data-000000", "sync data-000000"], "the map had nothing to say"
    events.clear()
    layer.flush()
    assert events == [], "nothing to sync"
    layer.close()


def test_a_new_data_file_has_its_name_before_its_data_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = new_layer(tmp_path / "l")
    synced: list[Path] = []
    sync_folder = files.sync_folder
    monkeypatch.setattr(files, "sync_folder", lambda f: (synced.append(f), sync_folder(f))[1])
    put(layer, 0, noise(BLOCK_SIZE))
    assert synced == [tmp_path / "l"]
    put(layer, 1, noise(BLOCK_SIZE))
    assert synced == [tmp_path / "l"]
    layer.close()


def test_requests_across_data_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "SEGMENT", 16 * BLOCK_SIZE)
    layer = new_layer(tmp_path / "l")
    data = noise(40 * BLOCK_SIZE)
    put(layer, 10, data)
    layer.flush()
    assert get(layer, 10, 40) == data
    layer.close()
    again = reopened(tmp_path / "l")
    assert get(again, 10, 40) == data
    assert len(list((tmp_path / "l").glob("data-*"))) == 4
    again.zero(12, 30)
    assert get(again, 10, 2) == data[: 2 * BLOCK_SIZE]
    assert get(again, 42, 8) == data[-8 * BLOCK_SIZE :]
    assert again.allocated() <= 12 * BLOCK_SIZE


def test_zeroing_gives_room_back(tmp_path: Path) -> None:
    layer = new_layer(tmp_path / "l")
    for block in range(0, 1024, 2):
        put(layer, block, noise(BLOCK_SIZE, block))
    layer.flush()
    assert layer.allocated() >= 512 * BLOCK_SIZE
    layer.zero(0, 1 << 30)
    assert layer.allocated() == 0
    layer.close()


def test_64_tib_are_trimmed_at_once(tmp_path: Path) -> None:
    layer = new_layer(tmp_path / "l")
    put(layer, 5, noise(BLOCK_SIZE))
    put(layer, SIZE // BLOCK_SIZE - 1, noise(BLOCK_SIZE))
    layer.zero(0, SIZE // BLOCK_SIZE)
    layer.flush()
    assert layer.blocks.count() == (0, SIZE // BLOCK_SIZE)
    assert (tmp_path / "l" / "map").stat().st_size < 1000
    layer.close()


# ---- flushes at once


def test_flushes_at_once_share_syncs_and_each_covers_what_was_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = new_layer(tmp_path / "l")
    fdatasync, syncs = os.fdatasync, []
    first_sync, go_on = threading.Event(), threading.Event()

    def slow(fd: int) -> None:
        syncs.append(fd)
        first_sync.set()
        assert go_on.wait(10)
        fdatasync(fd)

    monkeypatch.setattr(os, "fdatasync", slow)

    def work(number: int) -> None:
        put(layer, number, noise(BLOCK_SIZE, number))
        layer.flush()

    threads = [threading.Thread(target=work, args=(0,))]
    threads[0].start()
    assert first_sync.wait(10)
    threads += [threading.Thread(target=work, args=(n,)) for n in range(1, 16)]
    for thread in threads[1:]:
        thread.start()
    deadline = threading.Event()
    while layer._asked < 16:
        assert not deadline.wait(0.001)
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert len(syncs) == 4, "data and map, for the first and for all the others together"
    on_disk = reopened(tmp_path / "l", read_only=True)
    for number in range(16):
        assert get(on_disk, number) == noise(BLOCK_SIZE, number)
    layer.close()


def test_after_each_flush_the_disk_has_what_was_written(tmp_path: Path) -> None:
    """Many threads write and flush; the map on disk is read after each flush, as after a kill."""
    layer = new_layer(tmp_path / "l")
    problems: list[str] = []

    def work(number: int) -> None:
        chance = random.Random(number)
        for turn in range(12):
            block = number * 100 + chance.randrange(8)
            put(layer, block, noise(BLOCK_SIZE, (number, turn)))
            layer.flush()
            on_disk = reopened(tmp_path / "l", read_only=True)
            if on_disk.blocks.state(block) != DATA:
                problems.append(f"thread {number} turn {turn}")

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert problems == []
    layer.close()


# ---- what goes wrong


def test_a_failed_sync_stays_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = new_layer(tmp_path / "l")
    put(layer, 1, noise(BLOCK_SIZE))
    layer.flush()
    layer.write(BLOCK_SIZE, noise(BLOCK_SIZE, 1))
    with monkeypatch.context() as patched:
        patched.setattr(os, "fdatasync", _raise(errno.EIO))
        with pytest.raises(SyncFailed, match="could not be synced"):
            layer.flush()
    # The disk works again, and does not tell a second time that pages were lost.
    for action in (
        layer.flush,
        lambda: layer.write(0, bytes(BLOCK_SIZE)),
        lambda: layer.mark(0, 1, DATA),
        lambda: layer.zero(0, 1),
    ):
        with pytest.raises(SyncFailed) as caught:
            action()
        assert caught.value.errno == errno.EIO
    assert get(layer, 1) == noise(BLOCK_SIZE, 1), "reads go on"
    layer.close()
    assert reopened(tmp_path / "l").blocks.state(1) == DATA


@pytest.mark.parametrize("what", ["take_dirty", "append"])
def test_any_failure_of_a_flush_that_took_changes_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """A later flush would not know of them and succeed."""
    layer = new_layer(tmp_path / "l")
    put(layer, 1, noise(BLOCK_SIZE))
    target = layer.blocks if what == "take_dirty" else layer._log
    with monkeypatch.context() as patched:
        patched.setattr(target, what, _raise(MemoryError))
        with pytest.raises(SyncFailed):
            layer.flush()
    with pytest.raises(SyncFailed):
        layer.flush()
    layer.close()


def test_who_waited_for_a_flush_that_failed_fails_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = new_layer(tmp_path / "l")
    syncing, go_on = threading.Event(), threading.Event()

    def fail(fd: int) -> None:
        syncing.set()
        assert go_on.wait(10)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fail)
    put(layer, 1, noise(BLOCK_SIZE))
    outcomes: list[str] = []

    def flush() -> None:
        try:
            layer.flush()
            outcomes.append("flushed")
        except SyncFailed:
            outcomes.append("failed")

    threads = [threading.Thread(target=flush) for _ in range(5)]
    for thread in threads:
        thread.start()
    assert syncing.wait(10)
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert outcomes == ["failed"] * 5
    layer.close()


def test_a_map_without_room_is_flushed_when_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = new_layer(tmp_path / "l")
    put(layer, 1, noise(BLOCK_SIZE))
    layer.zero(10_000, 5000)
    with monkeypatch.context() as patched:
        patched.setattr(layer._log, "append", _raise(NoSpace("full")))
        with pytest.raises(NoSpace):
            layer.flush()
        put(layer, 2, noise(BLOCK_SIZE, 2))
        with pytest.raises(NoSpace):
            layer.flush()
    layer.flush()
    layer.close()
    again = reopened(tmp_path / "l")
    assert again.blocks.count() == (2, 5000)
    assert get(again, 2) == noise(BLOCK_SIZE, 2)


def test_compaction_without_room_appends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = new_layer(tmp_path / "l")
    monkeypatch.setattr(layer._log, "wants_compaction", lambda entries: True)
    put(layer, 1, noise(BLOCK_SIZE))
    with monkeypatch.context() as patched:
        patched.setattr(files, "publish", _raise(NoSpace("full")))
        layer.flush()
    put(layer, 2, noise(BLOCK_SIZE))
    layer.flush()
    layer.close()
    assert reopened(tmp_path / "l").blocks.count() == (2, 0)


def test_a_frozen_layer_is_not_compacted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = new_layer(tmp_path / "l")
    put(layer, 1, noise(BLOCK_SIZE))
    layer.flush()
    monkeypatch.setattr(layer._log, "wants_compaction", lambda entries: True)
    monkeypatch.setattr(layer._log, "compact", _raise(AssertionError))
    layer.retire()
    layer.flush()
    layer.close()


def test_a_data_file_that_was_cut_off_is_damage_not_zeros(tmp_path: Path) -> None:
    layer = new_layer(tmp_path / "l")
    put(layer, 0, noise(BLOCK_SIZE * 4))
    layer.flush()
    layer.close()
    data = tmp_path / "l" / "data-000000"
    os.truncate(data, BLOCK_SIZE + 100)
    again = reopened(tmp_path / "l")
    assert get(again, 0) == noise(BLOCK_SIZE * 4)[:BLOCK_SIZE]
    for block in (1, 2):
        with pytest.raises(Damaged, match="data-000000 is shorter than its map says"):
            get(again, block)
    again.close()
    data.unlink()
    gone = reopened(tmp_path / "l")
    with pytest.raises(Damaged, match="data-000000"):
        get(gone, 0)
    gone.close()
    (tmp_path / "l" / "map").unlink()
    with pytest.raises(Damaged, match="map is missing"):
        reopened(tmp_path / "l")


def test_what_a_killed_compaction_left_is_removed(tmp_path: Path) -> None:
    new_layer(tmp_path / "l").close()
    left = tmp_path / "l" / ".tmp-0011"
    left.write_bytes(b"half a map")
    (tmp_path / "l" / "data-notes").write_text("somebody's")
    reopened(tmp_path / "l", read_only=True).close()
    assert left.exists(), "who only looks changes nothing"
    reopened(tmp_path / "l").close()
    assert not left.exists()


def test_no_descriptor_is_left(tmp_path: Path) -> None:
    before = open_descriptors()
    layer = new_layer(tmp_path / "l")
    put(layer, 0, noise(BLOCK_SIZE))
    layer.flush()
    layer.close()
    reopened(tmp_path / "l", read_only=True).close()
    whole = (tmp_path / "l" / "map").read_bytes()
    (tmp_path / "l" / "map").write_bytes(b"x" + whole[1:])
    with pytest.raises(Damaged):
        reopened(tmp_path / "l")
    assert open_descriptors() == before


def _raise(error: int | type[BaseException] | BaseException):  # type: ignore[no-untyped-def]
    def fail(*args: object, **options: object) -> None:
        raise OSError(error, os.strerror(error)) if isinstance(error, int) else error

    return fail


# ---- a disk that is really full


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An ext4 of 24 MiB on a loop device."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small ext4 needs root: run the tests as root")
    image, where = tmp_path / "disk.img", tmp_path / "disk"
    where.mkdir()
    with image.open("wb") as file:
        file.truncate(24 << 20)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-m", "0", image], check=True)
    command = ["mount", "-o", "loop", image, where]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"this machine mounts no loop device: {mounted.stderr.strip()}")
    try:
        yield where
    finally:
        subprocess.run(["umount", where], check=True)


def test_a_full_disk_refuses_the_write_and_keeps_the_rest(small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(8 << 20))
    layer = new_layer(small_disk / "l")
    written: dict[int, bytes] = {}
    block = 0

    def fill() -> None:
        nonlocal block
        while True:
            data = noise(16 * BLOCK_SIZE, block)
            put(layer, block, data)
            written[block] = data
            block += 3000  # far apart, so that the map grows as well

    with pytest.raises(NoSpace, match="no space left in"):
        fill()
    assert len(written) > 100
    layer.flush()
    with pytest.raises(NoSpace):
        put(layer, block, noise(1 << 20))
    on_disk = reopened(small_disk / "l", read_only=True)
    assert all(get(on_disk, at, 16) == data for at, data in written.items())
    on_disk.close()
    ballast.unlink()
    put(layer, block, noise(1 << 20))
    layer.flush()
    layer.close()
    again = reopened(small_disk / "l")
    assert all(get(again, at, 16) == data for at, data in written.items())
    assert get(again, block, 256) == noise(1 << 20)
    again.close()

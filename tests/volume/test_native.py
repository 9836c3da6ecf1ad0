"""What only the native part does: which requests it serves, and how it lets go of things.

That it does the same as Python is tested by the other files, which go through both.
"""

from __future__ import annotations

import gc
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from horcrux_nbd.errors import NoSpace
from horcrux_nbd.native import handles, library
from horcrux_nbd.volume import journal, recent
from horcrux_nbd.volume.blockmap import DATA
from horcrux_nbd.volume.layer import Layer, SyncFailed
from horcrux_nbd.volume.overlay import Overlay
from horcrux_nbd.volume.volume import Volume

from .support import (
    BLOCK,
    CHUNK,
    flush,
    make_image,
    make_volume,
    noise,
    open_descriptors,
    read,
    write,
)

SIZE = 12 * CHUNK
IMAGE = noise(8 * CHUNK)


@pytest.fixture(autouse=True)
def part(shared_object: Path) -> Iterator[library.Library]:
    found = library.Library(shared_object)
    found.sync_with(lambda fd: os.fdatasync(fd))  # noqa: PLW0108 - it is patched later
    with library.forced(found):
        yield found


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Volume]:
    url = make_image(tmp_path / "repo", {0: IMAGE}, size=SIZE)
    make_volume(tmp_path / "v", url)
    opened = Volume.open(tmp_path / "v", cache=tmp_path / "cache")
    yield opened
    opened.close()


def natively(volume: Volume, offset: int, length: int) -> bytes:
    """What the native part reads of a request, from its start."""
    assert volume.native is not None
    data = bytearray(length)
    done = volume.native.read(offset, memoryview(data))
    return bytes(data[:done])


def put(volume: Volume, offset: int, data: bytes) -> bool:
    assert volume.native is not None
    return volume.native.write(offset, data)


def test_what_was_read_once_is_read_natively(volume: Volume) -> None:
    assert natively(volume, 0, BLOCK) == b""
    volume.read_into(0, memoryview(bytearray(2 * CHUNK)))  # fetched
    volume.read_into(0, memoryview(bytearray(2 * CHUNK)))  # found in the cache
    volume.read_into(9 * CHUNK, memoryview(bytearray(10)))  # a hole
    assert natively(volume, 5, 2 * CHUNK - 5) == IMAGE[5 : 2 * CHUNK]
    assert natively(volume, CHUNK + 7, 2 * CHUNK) == IMAGE[CHUNK + 7 : 2 * CHUNK], "and no more"
    assert natively(volume, 9 * CHUNK + 100, CHUNK - 100) == bytes(CHUNK - 100)
    assert volume.native is not None
    sums = volume.native.sums()
    assert sums["native_reads"] == 3
    assert sums["native_read_bytes"] == 2 * CHUNK - 5 + CHUNK - 7 + CHUNK - 100
    assert sums["native_cache_hits"] == 3, "of chunks, not of holes"
    assert sums["native_writes"] == sums["native_written_bytes"] == 0


def test_which_writes_are_native(volume: Volume) -> None:
    assert not put(volume, 0, noise(BLOCK)), "no data file yet"
    volume.write(0, memoryview(noise(BLOCK)))
    assert put(volume, 0, noise(BLOCK, 1)), "in place"
    assert put(volume, 100, b"part of a block that is here")
    assert put(volume, 4 * BLOCK, noise(3 * BLOCK, 2)), "whole blocks for the first time"
    assert not put(volume, 20 * BLOCK + 1, noise(BLOCK)), "needs what is below"
    assert not put(volume, 20 * BLOCK, noise(BLOCK + 1))
    volume.zero(30 * BLOCK, BLOCK)
    assert not put(volume, 30 * BLOCK, b"part"), "Python fills the rest of the block"
    assert put(volume, 30 * BLOCK, noise(BLOCK, 3))
    expected = bytearray(noise(BLOCK, 1))
    expected[100:128] = b"part of a block that is here"
    assert natively(volume, 0, BLOCK) == expected
    assert natively(volume, 4 * BLOCK, 3 * BLOCK) == noise(3 * BLOCK, 2)
    assert read(volume, 3 * BLOCK, BLOCK) == IMAGE[3 * BLOCK : 4 * BLOCK]
    assert read(volume, 30 * BLOCK, 2 * BLOCK) == noise(BLOCK, 3) + IMAGE[31 * BLOCK : 32 * BLOCK]


def test_native_marks_are_logged_by_the_next_flush_and_noted_before(
    tmp_path: Path, part: library.Library
) -> None:
    layer = Layer.create(tmp_path / "l", bytes(16), 1 << 40)
    layer.write(0, bytes(BLOCK))
    layer.mark(0, 1, DATA)
    layer.flush()
    overlay = Overlay([layer], _Nothing())
    assert overlay.native is not None
    assert overlay.native.write(1000 * BLOCK, noise(5 * BLOCK))
    assert recent.Recent(tmp_path / "l" / "recent").load()[-1] == (1000, 5, DATA)
    seen = Layer(tmp_path / "l", bytes(16), 1 << 40).open(read_only=True)
    assert seen.blocks.count() == (6, 0), "as the next server finds it after a kill"
    layer.flush()
    assert recent.Recent(tmp_path / "l" / "recent").load() == [(1000, 5, DATA)], "in the old half"
    os.unlink(tmp_path / "l" / "recent")
    assert Layer(tmp_path / "l", bytes(16), 1 << 40).open(read_only=True).blocks.count() == (6, 0)
    assert not layer.blocks.is_dirty
    layer.close()
    seen.close()


def test_marks_without_room_are_left_to_python_which_flushes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recent, "HALF", 64 + 3 * 24)
    layer = Layer.create(tmp_path / "l", bytes(16), 1 << 40)
    overlay = Overlay([layer], _Nothing())
    assert overlay.native is not None
    overlay.write(0, memoryview(bytes(BLOCK)))
    native = [overlay.native.write(block * BLOCK, noise(BLOCK)) for block in (2, 4, 6, 8)]
    assert native == [True, True, False, False]
    overlay.write(6 * BLOCK, memoryview(noise(BLOCK, "again")))
    assert overlay.native.write(8 * BLOCK, noise(BLOCK))
    assert layer.blocks.count() == (5, 0)
    layer.close()


class _Nothing:
    table = None

    def read_into(self, offset: int, view: memoryview) -> None:
        view[:] = bytes(len(view))

    def extents(self, offset: int, stop: int) -> Iterator[tuple[int, int, bool]]:
        yield offset, stop, False


def test_after_a_failed_sync_nothing_is_written_natively(
    volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(volume, 0, noise(BLOCK))
    assert put(volume, 0, noise(BLOCK))

    def fail(fd: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fdatasync", fail)
        with pytest.raises(SyncFailed):
            volume.flush()
    assert not put(volume, 0, noise(BLOCK)), "in place"
    assert not put(volume, 8 * BLOCK, noise(BLOCK))
    with pytest.raises(SyncFailed):
        volume.write(0, memoryview(noise(BLOCK)))
    assert natively(volume, 0, BLOCK) == noise(BLOCK), "reads go on"
    assert volume.overlay is not None
    volume.overlay.layers[0]._failed = None  # for its close


def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    fdatasync = os.fdatasync

    def sync(fd: int) -> None:
        names.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
        fdatasync(fd)

    monkeypatch.setattr(os, "fdatasync", sync)
    return names


def test_which_flushes_are_native(volume: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    assert volume.native is not None
    write(volume, 0, noise(BLOCK))
    names = synced(monkeypatch)
    assert not volume.native.flush(), "a new block has a word for the map"
    volume.flush()
    assert put(volume, 0, noise(BLOCK, 1))
    names.clear()
    assert volume.native.flush()
    assert names == ["data-000000"]
    assert volume.native.flush()
    assert names == ["data-000000"], "nothing to sync"
    for number in range(journal.AFTER + 1):  # who flushes often gets a journal
        write(volume, (10 + number) * BLOCK, noise(BLOCK, number))
        flush(volume)
    before = sum(volume.native.flushes()[0])
    names.clear()
    for number in range(20, 26):
        assert put(volume, number * BLOCK, noise(BLOCK, number))
        assert put(volume, 3, b"and one that was there")
        assert volume.native.flush()
    assert names == ["journal"] * 6
    assert put(volume, 40 * BLOCK, noise(BLOCK * (journal.MOST + 1)))
    assert not volume.native.flush(), "many"
    volume.flush()
    assert names[6:] == ["data-000000", "map", "journal"]
    volume.zero(0, BLOCK)
    assert not volume.native.flush(), "zeros"
    counts, seconds = volume.native.flushes()
    assert sum(counts) == before + 6
    assert seconds > 0


def test_after_a_native_sync_that_failed_nothing_is_acknowledged(
    volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert volume.native is not None
    write(volume, 0, noise(BLOCK))
    volume.flush()
    assert put(volume, 0, noise(BLOCK, 1))

    def fail(fd: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fdatasync", fail)
        assert not volume.native.flush()
    assert not put(volume, 0, noise(BLOCK))
    for _ in range(2):
        assert not volume.native.flush()
        with pytest.raises(SyncFailed, match="Input/output error"):
            volume.flush()
    with pytest.raises(SyncFailed):
        volume.write(0, memoryview(noise(BLOCK)))
    layer = volume.overlay.layers[0] if volume.overlay else None
    assert layer is not None
    monkeypatch.setattr(layer.core, "failure", lambda: 0)  # for its close
    layer._failed = None


def test_nothing_is_written_natively_while_writers_are_kept_out(volume: Volume) -> None:
    write(volume, 0, noise(BLOCK))
    assert volume.overlay is not None
    done = threading.Event()

    def late() -> None:
        write(volume, 0, noise(BLOCK, "late"))
        done.set()

    with volume.overlay.paused():
        writer = threading.Thread(target=late)
        writer.start()
        assert not done.wait(0.1)
        assert natively(volume, 0, BLOCK) == noise(BLOCK), "reads go on"
    writer.join(10)
    assert natively(volume, 0, BLOCK) == noise(BLOCK, "late")


def test_a_full_disk_is_told_by_python(volume: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    write(volume, 0, noise(BLOCK))
    assert volume.overlay is not None
    layer = volume.overlay.layers[0]
    with open("/dev/full", "rb+") as full:  # each write to it is ENOSPC
        fd = layer._files[0].fd
        layer.core.set_file(0, full.fileno())
        monkeypatch.setattr(layer._files[0], "fd", full.fileno())
        assert not put(volume, 0, noise(BLOCK))
        with pytest.raises(NoSpace):
            volume.write(0, memoryview(noise(BLOCK)))
        monkeypatch.setattr(layer._files[0], "fd", fd)
        layer.core.set_file(0, fd)
    assert natively(volume, 0, BLOCK) == noise(BLOCK)


def test_a_chunk_that_is_evicted_is_let_go_of(volume: Volume, tmp_path: Path) -> None:
    for _ in range(2):
        volume.read_into(0, memoryview(bytearray(CHUNK)))
    assert natively(volume, 0, CHUNK) == IMAGE[:CHUNK]
    cached = str(tmp_path / "cache" / "chunks")
    assert any(cached in name for name in open_descriptors())
    volume.base._cache.clear()
    gc.collect()
    assert natively(volume, 0, CHUNK) == b""
    assert not any(cached in name for name in open_descriptors()), "its room is given back"
    assert read(volume, 0, CHUNK) == IMAGE[:CHUNK]


def test_a_chunk_that_cannot_be_read_is_fetched_again(volume: Volume, tmp_path: Path) -> None:
    for _ in range(2):
        volume.read_into(0, memoryview(bytearray(CHUNK)))
    for path in (tmp_path / "cache" / "chunks").glob("??/*"):
        os.truncate(path, 100)
    assert natively(volume, 0, CHUNK) == b""
    assert read(volume, 0, CHUNK) == IMAGE[:CHUNK]
    volume.read_into(0, memoryview(bytearray(CHUNK)))
    assert natively(volume, 0, CHUNK) == IMAGE[:CHUNK]


def test_native_reads_count_as_use_of_a_chunk(volume: Volume) -> None:
    for _ in range(2):
        volume.read_into(0, memoryview(bytearray(CHUNK)))
    (file,) = volume.base._cache._opened().values()
    file.touch()
    assert not file.used
    natively(volume, 0, 10)
    assert file.used
    file.touch()
    assert not file.used


def test_a_table_is_bounded_and_keeps_what_is_used(tmp_path: Path, part: library.Library) -> None:
    path = tmp_path / "chunk"
    path.write_bytes(noise(CHUNK))
    table = handles.Table(part, CHUNK, 64)
    native = handles.Volume(part)
    native.set([], table, read_only=True)

    def here(number: int) -> bool:
        return native.read(number * CHUNK, memoryview(bytearray(BLOCK))) == BLOCK

    files = {}
    for number in range(1000):
        fd = os.open(path, os.O_RDONLY)
        files[number] = handles.File(part, fd, CHUNK)
        table.put(number << 20, files[number])
        assert here(number << 20)
        assert here(0), "used all the time"
    assert 32 <= sum(here(number << 20) for number in range(1000)) <= 64
    before = len(os.listdir("/proc/self/fd"))
    del files
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before - 1000
    assert not any(here(number << 20) for number in range(1000))
    table.put_zeros(5)
    assert here(5)
    assert not native.write(0, bytes(BLOCK)), "nothing to write to"


def test_chunks_retired_under_reads(tmp_path: Path, part: library.Library) -> None:
    """A descriptor is never used again once it is closed: its number is another file's then."""
    contents = {number: noise(BLOCK, number) * 16 for number in range(8)}
    for number, content in contents.items():
        (tmp_path / str(number)).write_bytes(content)
    table = handles.Table(part, CHUNK, 8)
    native = handles.Volume(part)
    native.set([], table, read_only=True)
    stop = threading.Event()
    wrong: list[int] = []
    served = [0] * 3

    def reader(me: int) -> None:
        chance = random.Random(me)
        view = memoryview(bytearray(CHUNK))
        while not stop.is_set():
            number = chance.randrange(8)
            if done := native.read(number * CHUNK, view):
                served[me] += 1
                if view[:done] != contents[number][:done]:
                    wrong.append(number)

    threads = [threading.Thread(target=reader, args=(me,)) for me in range(3)]
    for thread in threads:
        thread.start()
    chance = random.Random(9)
    kept: dict[int, handles.File] = {}
    for _ in range(3000):
        number = chance.randrange(8)
        fd = os.open(tmp_path / str(number), os.O_RDONLY)
        kept[number] = handles.File(part, fd, CHUNK)  # the one before is retired
        table.put(number, kept[number])
    stop.set()
    for thread in threads:
        thread.join(10)
    assert not wrong
    assert all(served)

"""The journal of small flushes. That no flush is lost in it is tested by the model of the volume
(test_volume.py), which has power cuts.
"""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

from horcrux_nbd.errors import Damaged
from horcrux_nbd.volume import journal
from horcrux_nbd.volume.blockmap import BASE, DATA, ZERO
from horcrux_nbd.volume.journal import AFTER, BLOCK, HEADER, MOST, SIZE
from horcrux_nbd.volume.layer import Layer, SyncFailed

from .disk import Disk
from .support import noise

ID = bytes(range(16))
IMAGE = 1 << 40


@pytest.fixture
def layer(tmp_path: Path) -> Layer:
    return Layer.create(tmp_path / "l", ID, IMAGE)


def put(layer: Layer, block: int, count: int = 1, seed: int = 0) -> None:
    layer.write(block * BLOCK, noise(count * BLOCK, (block, seed)))
    layer.mark(block, count, DATA)


def get(layer: Layer, block: int, count: int = 1) -> bytes:
    data = bytearray(count * BLOCK)
    layer.read_into(block * BLOCK, memoryview(data))
    return bytes(data)


def die(layer: Layer) -> None:
    layer._log.close()
    layer._recent.close()
    layer._journal.close()
    layer._files = {}


def syncs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are synced from here on."""
    names: list[str] = []
    fdatasync = os.fdatasync

    def sync(fd: int) -> None:
        names.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
        fdatasync(fd)

    monkeypatch.setattr(os, "fdatasync", sync)
    return names


def small_flushes(layer: Layer, count: int, first: int = 0, step: int = 10) -> None:
    for number in range(count):
        put(layer, first + number * step)
        layer.flush()


def test_who_flushes_often_gets_a_journal_and_one_sync(
    layer: Layer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = syncs(monkeypatch)
    small_flushes(layer, AFTER)
    assert names == ["data-000000", "map"] * AFTER
    assert not (tmp_path / "l" / "journal").exists(), "a volume that is flushed now and then"
    small_flushes(layer, 5, 10_000)
    assert names[2 * AFTER :] == ["journal"] * 5
    layer.write(0, noise(100))
    layer.flush()
    assert names[-1] == "journal", "a block that is here, while others are in the journal only"
    put(layer, 20_000, MOST + 1)
    layer.flush()
    assert names[-3:] == ["data-000000", "map", "journal"], "the last lets go of its records"
    layer.write(0, noise(100))
    layer.flush()
    assert names[-1] == "data-000000", "one sync, and nothing to copy"
    layer.close()
    assert not (tmp_path / "l" / "journal").exists()


def test_a_full_journal_begins_anew(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "AFTER", 0)
    names = syncs(monkeypatch)
    records = (SIZE - BLOCK) // (2 * BLOCK)
    small_flushes(layer, records)
    assert set(names) == {"journal"}
    small_flushes(layer, 1, 1_000_000)
    assert names[-3:] == ["data-000000", "map", "journal"]
    small_flushes(layer, 3, 2_000_000)
    assert names[-3:] == ["journal"] * 3
    layer.close()


@pytest.mark.parametrize("read_only", [False, True])
def test_after_a_power_cut_it_is_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_only: bool
) -> None:
    monkeypatch.setattr(journal, "AFTER", 0)
    disk = Disk(tmp_path, monkeypatch)
    layer = Layer.create(tmp_path / "l", ID, IMAGE)
    small_flushes(layer, 20)
    put(layer, 10, seed="not flushed")
    die(layer)
    disk.cut(random.Random(7))
    for _ in range(2):  # who only looks changes nothing
        again = Layer(tmp_path / "l", ID, IMAGE).open(read_only=read_only)
        assert again.blocks.count() == (20, 0)
        for number in range(20):
            if number != 1:
                assert get(again, number * 10) == noise(BLOCK, (number * 10, 0))
        assert get(again, 10) == noise(BLOCK, (10, 0)), "what was flushed last"
        part = bytearray(100)
        again.read_into(10 * BLOCK + 7, memoryview(part))
        assert part == noise(BLOCK, (10, 0))[7:107]
        die(again)
    if not read_only:
        disk.cut(random.Random(8))
        assert Layer(tmp_path / "l", ID, IMAGE).open().blocks.count() == (20, 0)


def test_within_the_boot_what_came_later_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "AFTER", 0)
    layer = Layer.create(tmp_path / "l", ID, IMAGE)
    small_flushes(layer, 3)
    put(layer, 10, seed="acknowledged")
    die(layer)
    again = Layer(tmp_path / "l", ID, IMAGE).open()
    assert get(again, 10) == noise(BLOCK, (10, "acknowledged"))
    assert again.blocks.count() == (3, 0)
    again.close()


def test_a_flush_of_everything_ends_what_the_journal_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "AFTER", 0)
    disk = Disk(tmp_path, monkeypatch)
    layer = Layer.create(tmp_path / "l", ID, IMAGE)
    small_flushes(layer, 3)
    put(layer, 10, seed="newer")
    put(layer, 500, MOST + 1)
    layer.flush()
    die(layer)
    disk.cut(random.Random(1))
    again = Layer(tmp_path / "l", ID, IMAGE).open()
    assert get(again, 10) == noise(BLOCK, (10, "newer"))
    again.close()


def test_a_mark_that_comes_after_a_flush_of_its_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another writer's flush falls between the two; the next small flush has to know the block."""
    monkeypatch.setattr(journal, "AFTER", 0)
    disk = Disk(tmp_path, monkeypatch)
    layer = Layer.create(tmp_path / "l", ID, IMAGE)
    layer.write(5 * BLOCK, noise(BLOCK, 5))
    layer.settle()
    layer.mark(5, 1, DATA)
    put(layer, 9)
    layer.flush()
    die(layer)
    disk.cut(random.Random(1))
    again = Layer(tmp_path / "l", ID, IMAGE).open()
    assert [again.blocks.state(block) for block in (5, 9)] == [DATA, DATA]
    assert get(again, 5) == noise(BLOCK, 5)
    again.close()


def test_the_first_flush_after_a_death_syncs_what_no_list_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "AFTER", 0)
    disk = Disk(tmp_path, monkeypatch)
    layer = Layer.create(tmp_path / "l", ID, IMAGE)
    put(layer, 1)
    layer.settle()
    layer.write(BLOCK, noise(BLOCK, "in place, acknowledged"))
    die(layer)
    layer = Layer(tmp_path / "l", ID, IMAGE).open()
    put(layer, 50)
    layer.flush()
    die(layer)
    disk.cut(random.Random(1))
    again = Layer(tmp_path / "l", ID, IMAGE).open()
    assert get(again, 1) == noise(BLOCK, "in place, acknowledged")
    again.close()


def test_zeros_are_never_left_to_the_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "AFTER", 0)
    disk = Disk(tmp_path, monkeypatch)
    layer = Layer.create(tmp_path / "l", ID, IMAGE)
    small_flushes(layer, 3)
    layer.zero(10, 1)
    put(layer, 500)
    layer.flush()
    die(layer)
    disk.cut(random.Random(1))
    again = Layer(tmp_path / "l", ID, IMAGE).open()
    assert [again.blocks.state(b) for b in (0, 10, 20, 500, 501)] == [DATA, ZERO, DATA, DATA, BASE]
    again.close()


def test_a_failed_sync_of_it_stays_failed(
    layer: Layer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "AFTER", 0)
    small_flushes(layer, 3)

    def fail(fd: int) -> None:
        raise OSError(5, "Input/output error")

    put(layer, 100)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fdatasync", fail)
        with pytest.raises(SyncFailed):
            layer.flush()
    with pytest.raises(SyncFailed):
        layer.flush()
    layer.close()
    again = Layer(tmp_path / "l", ID, IMAGE).open()
    assert get(again, 10) == noise(BLOCK, (10, 0))
    again.close()


def test_without_room_for_it_there_is_none(
    layer: Layer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "AFTER", 0)
    write_all = journal.files.write_all

    def full(fd: int, data: bytes, offset: int) -> None:
        if len(data) == SIZE:
            raise OSError(28, "No space left on device")
        write_all(fd, data, offset)

    monkeypatch.setattr(journal.files, "write_all", full)
    names = syncs(monkeypatch)
    small_flushes(layer, 5)
    assert names == ["data-000000", "map"] * 5
    assert not (tmp_path / "l" / "journal").exists()
    layer.close()


def test_damage_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "AFTER", 0)
    layer = Layer.create(tmp_path / "l", ID, IMAGE)
    small_flushes(layer, 6)
    die(layer)
    shutil.copytree(tmp_path / "l", tmp_path / "copy")  # elsewhere, where it would be replayed
    path = tmp_path / "copy" / "journal"
    whole = path.read_bytes()
    assert Layer(tmp_path / "copy", ID, IMAGE).open(read_only=True).blocks.count() == (6, 0)
    chance = random.Random(3)
    end = BLOCK * (1 + 2 * 5)  # of the record before the last
    places = [*range(HEADER.size), *(chance.randrange(BLOCK, end) for _ in range(60))]
    for at in places:
        path.write_bytes(
            whole[:at] + bytes([whole[at] ^ 1 << chance.randrange(8)]) + whole[at + 1 :]
        )
        with pytest.raises(Damaged, match="journal is damaged"):
            Layer(tmp_path / "copy", ID, IMAGE).open(read_only=True)
    path.write_bytes(whole[: SIZE // 2])
    with pytest.raises(Damaged, match="journal is damaged"):
        Layer(tmp_path / "copy", ID, IMAGE).open(read_only=True)
    path.write_bytes(bytes(1000))  # one that was being made
    assert Layer(tmp_path / "copy", ID, IMAGE).open(read_only=True).blocks.count() == (0, 0)

from __future__ import annotations

import errno
import itertools
import os
import random
import threading
from pathlib import Path
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from horcrux_nbd import files
from horcrux_nbd.errors import Damaged, NoSpace
from horcrux_nbd.volume import maplog
from horcrux_nbd.volume.blockmap import DATA, GROUP, ZERO, BlockMap
from horcrux_nbd.volume.maplog import MapLog, pack_states, unpack_states

LAYER, SIZE = bytes(range(16)), 1 << 40


def new_log(path: Path, size: int = SIZE) -> tuple[MapLog, BlockMap]:
    log = MapLog(path, LAYER, size)
    log.create()
    return log, log.open()


def reopened(path: Path, read_only: bool = False) -> BlockMap:
    log = MapLog(path, LAYER, SIZE)
    blocks = log.open(read_only)
    log.close()
    return blocks


def grown(path: Path, flushes: int = 6, seed: int = 1) -> list[tuple[int, BlockMap]]:
    """A log of some flushes; (its length, a copy of the map) after each."""
    log, blocks = new_log(path)
    chance, history = random.Random(seed), []
    for _ in range(flushes):
        for _ in range(3):
            blocks.mark(chance.randrange(5000), chance.randrange(1, 3000), chance.choice([1, 2]))
        log.append(blocks.take_dirty())
        history.append((log.end, reopened(path, read_only=True)))
    log.close()
    return history


def acknowledged(path: Path, batches: int) -> None:
    """Let the note beside a log say so: after a power cut it may be of any earlier time."""
    note = maplog._Flushed(path.with_name("flushed"), LAYER)
    note.write(batches)
    note.close()


def same(a: BlockMap, b: BlockMap) -> bool:
    return list(a.runs(0, 10_000)) == list(b.runs(0, 10_000))


@given(st.binary(min_size=GROUP, max_size=GROUP))
def test_states_survive_packing(noise: bytes) -> None:
    states = bytes(byte % 3 for byte in noise)
    packed = pack_states(states)
    assert len(packed) == GROUP // 4
    assert unpack_states(packed) == states


def test_packing_is_as_the_format_says() -> None:
    """Four states in a byte, the first in its low bits (docs/format.md)."""
    states = bytearray(GROUP)
    states[0], states[1], states[2], states[3], states[4] = 1, 2, 0, 1, 2
    assert pack_states(bytes(states))[:2] == bytes([0b01_00_10_01, 0b10])
    with pytest.raises(ValueError, match="no such state"):
        unpack_states(b"\x03" + bytes(31))


def test_every_flush_is_there_after_opening_again(tmp_path: Path) -> None:
    history = grown(tmp_path / "map")
    assert same(reopened(tmp_path / "map"), history[-1][1])


def test_a_torn_end_is_cut_off_at_every_length(tmp_path: Path) -> None:
    history = grown(tmp_path / "map", 3)
    whole = (tmp_path / "map").read_bytes()
    ends = [maplog.FILE_HEADER.size] + [end for end, _ in history]
    for length in {*range(ends[-2], ends[-1], 7), ends[-1] - 1}:
        torn = tmp_path / "torn"
        acknowledged(torn, 2)
        torn.write_bytes(whole[:length])
        assert same(reopened(torn), history[-2][1])
        assert torn.stat().st_size == ends[-2]
    log = MapLog(torn, LAYER, SIZE)
    blocks = log.open()
    blocks.mark(9999, 1, DATA)
    log.append(blocks.take_dirty())
    log.close()
    assert reopened(torn).state(9999) == DATA


def test_an_end_of_garbage_or_zeros_is_cut_off(tmp_path: Path) -> None:
    history = grown(tmp_path / "map", 3)
    whole = (tmp_path / "map").read_bytes()
    for tail in (bytes(5000), b"BTCH" * 100, random.Random(1).randbytes(5000), whole[48:200]):
        (tmp_path / "map").write_bytes(whole + tail)
        assert same(reopened(tmp_path / "map", read_only=True), history[-1][1])
        assert same(reopened(tmp_path / "map"), history[-1][1])
        assert (tmp_path / "map").read_bytes() == whole


def test_any_damage_before_the_last_batch_is_refused(tmp_path: Path) -> None:
    history = grown(tmp_path / "map", 4)
    path, last = tmp_path / "map", history[-2][0]
    whole = path.read_bytes()
    chance = random.Random(2)
    for at in chance.sample(range(last), 300):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(Damaged, match=str(path)):
            reopened(path)
        assert path.read_bytes() == damaged, "a refused log is left as it is"


def test_damage_of_what_was_acknowledged_last_is_no_torn_end(tmp_path: Path) -> None:
    history = grown(tmp_path / "map", 3)
    path, before, end = tmp_path / "map", history[-2][0], history[-1][0]
    whole = path.read_bytes()
    chance = random.Random(3)
    bits = (whole[:at] + bytes([whole[at] ^ 8]) + whole[at + 1 :] for at in range(before, end, 5))
    cuts = (whole[:at] for at in chance.sample(range(maplog.FILE_HEADER.size, end), 50))
    zeros = (whole[:at] + bytes(end - at) for at in chance.sample(range(before, end), 50))
    for damaged in itertools.chain(bits, cuts, zeros):
        path.write_bytes(damaged)
        for read_only in (False, True):
            with pytest.raises(Damaged, match=str(path)):
                reopened(path, read_only)
            assert path.read_bytes() == damaged, "a refused log is left as it is"


@pytest.mark.parametrize("note", [b"", b"x", bytes(36), b"HRCXFLS1" + b"\xff" * 28, b"z" * 5000])
def test_a_note_that_cannot_be_read_says_nothing(tmp_path: Path, note: bytes) -> None:
    history = grown(tmp_path / "map", 3)
    (tmp_path / "flushed").write_bytes(note)
    assert same(reopened(tmp_path / "map"), history[-1][1])


def test_a_log_that_was_just_replaced_has_no_older_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts its batches from one again: a power cut must find the note gone before it."""
    path = tmp_path / "map"
    log, blocks = new_log(path)
    for number in range(20):
        blocks.mark(number, 1, DATA)
        log.append(blocks.take_dirty())
    real = maplog.files.publish

    def publish(*args: object, **kw: object) -> None:
        assert maplog._Flushed(tmp_path / "flushed", LAYER).read() == 0
        synced.assert_called()
        real(*args, **kw)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        synced = Mock(wraps=maplog.os.fdatasync)
        patched.setattr(maplog.os, "fdatasync", synced)
        patched.setattr(maplog.files, "publish", publish)
        log.compact(blocks.everything())
    assert maplog._Flushed(tmp_path / "flushed", LAYER).read() == 1
    log.close()
    assert same(reopened(path), blocks)


def test_who_looks_while_a_server_writes_sees_no_damage(tmp_path: Path) -> None:
    path = tmp_path / "map"
    log, blocks = new_log(path)
    done = threading.Event()
    seen: list[BaseException] = []

    def look() -> None:
        try:
            while not done.is_set():
                reopened(path, read_only=True)
        except BaseException as error:
            seen.append(error)

    thread = threading.Thread(target=look)
    thread.start()
    for number in range(600):
        blocks.mark(number * 7, 3, DATA)
        log.append(blocks.take_dirty())
        if number % 20 == 19:
            log.compact(blocks.everything())
    done.set()
    thread.join(30)
    log.close()
    assert not seen


def test_a_log_that_is_longer_than_can_be_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "map"
    log = MapLog(path, LAYER, 1 << 20)
    log.create()
    os.truncate(path, 10 << 30)
    with pytest.raises(Damaged, match="more than it can have"):
        log.open()


def test_a_batch_that_is_missing_is_refused(tmp_path: Path) -> None:
    history = grown(tmp_path / "map", 3)
    whole = (tmp_path / "map").read_bytes()
    (first, _), (second, _) = history[:2]
    (tmp_path / "map").write_bytes(whole[:first] + whole[second:])
    with pytest.raises(Damaged):
        reopened(tmp_path / "map")


def test_the_log_of_another_layer_is_refused(tmp_path: Path) -> None:
    grown(tmp_path / "map")
    for log in (MapLog(tmp_path / "map", bytes(16), SIZE), MapLog(tmp_path / "map", LAYER, 5)):
        with pytest.raises(Damaged, match="belongs to another"):
            log.open()
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(Damaged):
        MapLog(tmp_path / "map", bytes(16), SIZE).open()
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_large_changes_are_batches_one_synced_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two batches on their way at once could reach the disk in the other order, and a power cut
    between them would look like damage in the middle."""
    monkeypatch.setattr(maplog, "MAX_BATCH", 1000)
    log, blocks = new_log(tmp_path / "map")
    events: list[str] = []
    write_all, fdatasync = files.write_all, os.fdatasync
    monkeypatch.setattr(
        files, "write_all", lambda *args: (events.append("write"), write_all(*args))[1]
    )
    monkeypatch.setattr(os, "fdatasync", lambda fd: (events.append("sync"), fdatasync(fd))[1])
    for group in range(100):
        blocks.mark(group * GROUP, 1, DATA)
        blocks.mark((200 + group * 20) * GROUP, 8 * GROUP, ZERO)
    log.append(blocks.take_dirty())
    log.close()
    assert events == ["write", "sync"] * (len(events) // 2)
    assert len(events) > 8
    again = reopened(tmp_path / "map")
    assert again.count() == blocks.count()
    # Whatever a cut leaves of the batches is a map that was true at some moment.
    whole = (tmp_path / "map").read_bytes()
    acknowledged(tmp_path / "map", 0)
    for length in random.Random(1).sample(range(48, len(whole)), 50):
        (tmp_path / "cut").write_bytes(whole[:length])
        data, _ = reopened(tmp_path / "cut").count()
        assert data <= 100


def test_a_full_disk_leaves_no_piece_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, blocks = new_log(tmp_path / "map")
    blocks.mark(0, 1, DATA)
    log.append(blocks.take_dirty())
    end = log.end
    blocks.mark(GROUP * 9, GROUP * 300, DATA)
    changes = blocks.take_dirty()
    write_all = files.write_all

    def full(fd: int, data: bytes, offset: int) -> None:
        write_all(fd, data[: len(data) // 2], offset)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(files, "write_all", full)
        with pytest.raises(NoSpace, match="map"):
            log.append(changes)
    assert (tmp_path / "map").stat().st_size == end
    assert reopened(tmp_path / "map", read_only=True).count() == (1, 0)
    log.append(changes)
    log.close()
    assert reopened(tmp_path / "map").count() == blocks.count()


def test_a_compact_log_says_the_same_and_is_short(tmp_path: Path) -> None:
    log, blocks = new_log(tmp_path / "map")
    for turn in range(300):
        for group in range(0, 60):
            blocks.mark(group * GROUP + turn % GROUP, 1, 1 + (turn + group) % 2)
        log.append(blocks.take_dirty())
    blocks.mark(GROUP * 1000, GROUP * 5000, ZERO)
    log.append(blocks.take_dirty())
    assert not log.wants_compaction(1_000_000)
    monkey_end = log.end
    log.compact(blocks.everything())
    assert log.end < monkey_end / 100
    assert (tmp_path / "map").stat().st_size == log.end
    blocks.mark(GROUP * 2000, 1, DATA)
    log.append(blocks.take_dirty())
    log.close()
    again = reopened(tmp_path / "map")
    assert list(again.runs(0, GROUP * 7000)) == list(blocks.runs(0, GROUP * 7000))
    assert again.state(GROUP * 2000) == DATA
    assert again.state(GROUP * 2001) == ZERO


def test_compaction_begins_when_the_log_is_four_times_too_long(tmp_path: Path) -> None:
    log, blocks = new_log(tmp_path / "map")
    turn = 0
    while not log.wants_compaction(blocks.entries):
        for group in range(1000):
            blocks.mark(group * GROUP, 1, 1 + turn % 2)
        log.append(blocks.take_dirty())
        turn += 1
        assert log.end < 2 * maplog.COMPACT_FROM
    log.close()
    assert log.end > maplog.COMPACT_FROM

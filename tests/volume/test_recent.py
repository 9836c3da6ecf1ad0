from __future__ import annotations

import errno
import os
import random
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from horcrux_nbd.volume import core, recent
from horcrux_nbd.volume.recent import ENTRY, FIRST_ENTRY, HALF, Recent

_cores: list[core.Core] = []  # a pen's memory goes with its core


def new_recent(folder: Path) -> Recent:
    _cores.append(core.make(1 << 40, 1 << 40))
    return Recent(folder / "recent", _cores[-1].pen)


def started(folder: Path) -> Recent:
    folder.mkdir(exist_ok=True)
    noted = new_recent(folder)
    noted.load()
    noted.start()
    return noted


def loaded(folder: Path) -> list[tuple[int, int, int]]:
    return Recent(folder / "recent").load()


def test_marks_are_there_for_the_next_process(tmp_path: Path) -> None:
    noted = started(tmp_path)
    assert not noted.noted
    marks = [(5, 1, 1), (1 << 50, 1 << 48, 2), (0, 7, 1)]
    for mark in marks:
        assert noted.note(*mark)
    assert noted.noted
    noted.close()
    assert loaded(tmp_path) == marks
    noted = new_recent(tmp_path)
    noted.load()
    noted.start()
    assert loaded(tmp_path) == [], "they are durable when it is started"
    noted.note(1, 1, 1)
    noted.remove()
    assert loaded(tmp_path) == []


def test_the_last_two_flushes_are_kept_in_their_order(tmp_path: Path) -> None:
    noted = started(tmp_path)
    for turn in range(5):
        for step in range(3):
            noted.note(turn * 10 + step, 1, 1)
        if turn < 4:
            noted.switch()
    assert loaded(tmp_path) == [(n, 1, 1) for n in (30, 31, 32, 40, 41, 42)]
    noted.switch()
    noted.switch()
    assert loaded(tmp_path) == [], "nothing of a half that was used before shows"
    noted.close()


def test_there_is_room_for_many_and_then_a_flush_is_due(tmp_path: Path) -> None:
    noted = started(tmp_path)
    count = 0
    while noted.note(count, 1, 1):
        count += 1
    assert count == (HALF - FIRST_ENTRY) // ENTRY.size
    assert not noted.note(0, 1, 1)
    noted.switch()
    assert noted.note(0, 1, 2)
    assert len(loaded(tmp_path)) == count + 1
    noted.close()


def test_marks_of_before_a_restart_of_the_machine_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel may have written them and not the data."""
    noted = started(tmp_path / "l")
    noted.note(1, 1, 1)
    noted.close()
    with monkeypatch.context() as patched:
        patched.setattr(recent, "boot_id", lambda: bytes(16))
        assert loaded(tmp_path / "l") == []
        again = started(tmp_path / "l")
        assert loaded(tmp_path / "l") == [], "nor once the file is used again"
        again.close()
    noted = started(tmp_path / "l")
    noted.note(1, 1, 1)
    noted.close()
    shutil.copytree(tmp_path / "l", tmp_path / "copy")
    assert loaded(tmp_path / "copy") == [], "a copy may be of another moment than its data"
    assert loaded(tmp_path / "l") == [(1, 1, 1)]


def test_an_entry_that_death_cut_off_ends_the_list(tmp_path: Path) -> None:
    noted = started(tmp_path)
    for number in range(10):
        noted.note(number, 1, 1)
    noted.close()
    path = tmp_path / "recent"
    whole = path.read_bytes()
    (start,) = (
        at for at in (0, HALF) if whole[at + FIRST_ENTRY + 16 : at + FIRST_ENTRY + 20] != bytes(4)
    )
    at = start + FIRST_ENTRY + 7 * ENTRY.size
    for length in range(ENTRY.size):
        path.write_bytes(whole[: at + length] + bytes(ENTRY.size - length) + whole[at + 24 :])
        assert loaded(tmp_path) == [(n, 1, 1) for n in range(7)]


@settings(deadline=None)
@given(st.binary(max_size=200), st.integers(0, 1 << 30))
def test_garbage_is_no_mark(
    tmp_path_factory: pytest.TempPathFactory, tail: bytes, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("l")
    path = folder / "recent"
    path.write_bytes(tail)
    assert loaded(folder) == []
    noted = started(folder)
    noted.note(3, 1, 1)
    noted.close()
    data = bytearray(path.read_bytes())
    at = random.Random(seed).choice([0, HALF]) + random.Random(seed).randrange(FIRST_ENTRY + 24)
    data[at] ^= 1 + seed % 255
    path.write_bytes(data)
    assert loaded(folder) in ([], [(3, 1, 1)])


@pytest.mark.parametrize("call", ["open", "posix_fallocate"])
def test_without_room_it_does_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, call: str
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, call, full)
        noted = started(tmp_path)
    assert noted.note(1, 1, 1)
    noted.switch()
    noted.close()
    assert not (tmp_path / "recent").exists()
    assert "is flushed" in caplog.text


def test_a_write_that_does_a_part_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = recent._pwrite
    monkeypatch.setattr(recent, "_pwrite", lambda fd, data, n, at: real(fd, data, min(n, 5), at))
    noted = started(tmp_path)
    assert noted.note(3, 1, 1)
    noted.close()
    assert loaded(tmp_path) == [(3, 1, 1)]


def test_a_write_that_fails_is_an_error(tmp_path: Path) -> None:
    noted = started(tmp_path)
    os.close(noted._fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        noted.note(1, 1, 1)
    noted._fd = -1

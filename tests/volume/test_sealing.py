"""Freeze, seal, abandon: the content stays the same, and nothing that was written is lost."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from horcrux_nbd.errors import Busy, NoSpace, UsageError
from horcrux_nbd.repository.commits import now
from horcrux_nbd.units import KiB
from horcrux_nbd.volume import sealing, state
from horcrux_nbd.volume.state import Pending, VolumeState
from horcrux_nbd.volume.volume import Volume
from tests.volume.support import make_image, make_volume, noise, read, write

BLOCK = 4096
SIZE = 8 * 64 * KiB


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_volume(tmp_path / "v", make_image(tmp_path / "repo", noise(SIZE)))


@pytest.fixture
def volume(folder: Path) -> Iterator[Volume]:
    volume = Volume.open(folder)
    yield volume
    volume.close()


def pending(message: str = "m") -> Pending:
    return Pending(message, "a", now(), {"ticket": "1"}, False, "group", ("v", "w"))


def layers(volume: Volume) -> set[str]:
    assert volume.folder is not None
    return {path.name for path in (volume.folder / state.OVERLAY).iterdir()}


def test_what_is_frozen_is_what_was_written_before(volume: Volume, folder: Path) -> None:
    write(volume, 100, b"before")
    frozen = volume.freeze(pending())
    assert VolumeState.load(folder) == frozen  # as it was saved, members and all
    assert len(frozen.layers) == 2
    write(volume, 200, b"after")
    assert read(volume, 100, 6) == b"before"
    assert read(volume, 200, 5) == b"after"
    assert volume.overlay is not None
    assert volume.overlay.layers[1].blocks.count() == (1, 0)
    with pytest.raises(Busy, match="begun and not finished"):
        volume.freeze(pending())


def test_a_write_under_way_is_waited_for(volume: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen layer never changes: a write that began before is in it, or in the next."""
    assert volume.overlay is not None
    layer = volume.overlay.layers[0]
    inside, go_on, frozen = threading.Event(), threading.Event(), threading.Event()
    original = layer.write

    def held_up(offset: int, data: memoryview) -> None:
        inside.set()
        assert go_on.wait(30)
        original(offset, data)

    monkeypatch.setattr(layer, "write", held_up)
    writer = threading.Thread(target=write, args=(volume, 0, noise(BLOCK, "new")))
    writer.start()
    assert inside.wait(30)
    freezer = threading.Thread(target=lambda: (volume.freeze(pending()), frozen.set()))
    freezer.start()
    early = frozen.wait(0.5)
    go_on.set()
    writer.join(30)
    freezer.join(30)
    assert frozen.is_set()
    assert not early, "frozen while somebody wrote to the layer"
    assert read(volume, 0, BLOCK) == noise(BLOCK, "new")


def test_an_abandoned_commit_never_was(volume: Volume, folder: Path) -> None:
    write(volume, 100, b"before")
    volume.freeze(pending())
    write(volume, 200, b"after")
    volume.abandon()
    assert VolumeState.load(folder).pending is None
    with pytest.raises(UsageError, match="no commit"):
        volume.abandon()
    volume.freeze(pending())
    assert len(VolumeState.load(folder).layers) == 3
    volume.close()
    again = Volume.open(folder)
    assert (read(again, 100, 6), read(again, 200, 5)) == (b"before", b"after")
    again.close()


def test_a_seal_drops_what_is_in_the_commit(volume: Volume, folder: Path) -> None:
    """Onto the same commit: as where nothing had changed."""
    volume.freeze(pending())
    base = VolumeState.load(folder).base
    sealed = volume.seal(bytes.fromhex(base))
    assert len(sealed.layers) == 1
    volume.close()
    assert layers(volume) == {"000002"}
    with pytest.raises(UsageError, match="no commit"):
        sealing._check_pending(volume, sealed)


def test_a_seal_onto_a_commit_that_is_not_here_changes_nothing(
    volume: Volume, folder: Path
) -> None:
    write(volume, 0, b"x")
    frozen = volume.freeze(pending())
    with pytest.raises(Exception, match="missing"):
        volume.seal(bytes(31) + b"\4")
    assert VolumeState.load(folder) == frozen
    assert read(volume, 0, 1) == b"x"


def test_the_superblock_stays_where_nothing_became_a_commit(volume: Volume, folder: Path) -> None:
    write(volume, 1024, b"bookkeeping")
    volume.freeze(pending())
    volume.seal(bytes.fromhex(VolumeState.load(folder).base))
    assert read(volume, 1024, 11) == b"bookkeeping"


def test_a_full_disk_freezes_nothing(
    volume: Volume, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(volume, 0, b"before")
    before = VolumeState.load(folder)

    def full(*_: object) -> None:
        raise NoSpace("no space")

    with monkeypatch.context() as patch:
        patch.setattr(VolumeState, "save", full)
        with pytest.raises(NoSpace):
            volume.freeze(pending())
    assert VolumeState.load(folder) == before
    assert layers(volume) == {"000001"}
    write(volume, 0, b"after.")
    assert read(volume, 0, 6) == b"after."
    volume.freeze(pending())


def test_a_save_that_fails_after_the_rename_is_taken_back(
    volume: Volume, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the state would call a layer frozen that goes on being written."""
    before = VolumeState.load(folder)
    save, failed = VolumeState.save, []

    def late(self: VolumeState, where: Path) -> None:
        save(self, where)
        if not failed:
            failed.append(1)
            raise OSError(5, "cannot sync the folder")

    monkeypatch.setattr(VolumeState, "save", late)
    with pytest.raises(OSError, match="cannot sync"):
        volume.freeze(pending())
    assert VolumeState.load(folder) == before


def test_writers_go_on_through_many_freezes(volume: Volume, folder: Path) -> None:
    """No write is lost between two layers."""
    stop = threading.Event()
    counts = [0] * 4

    def writer(number: int) -> None:
        while not stop.is_set():
            counts[number] += 1
            write(volume, number * 64 * KiB + 1000, counts[number].to_bytes(8, "big"))

    threads = [threading.Thread(target=writer, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(10):
        volume.freeze(pending())
        volume.abandon()
    stop.set()
    for thread in threads:
        thread.join(30)
    volume.close()
    again = Volume.open(folder)
    for number, count in enumerate(counts):
        assert int.from_bytes(read(again, number * 64 * KiB + 1000, 8), "big") == count
    again.close()

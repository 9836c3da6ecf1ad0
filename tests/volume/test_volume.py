"""A whole volume in this process, over a local repository."""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from horcrux_nbd.errors import Busy, Damaged, UsageError
from horcrux_nbd.volume import fetch
from horcrux_nbd.volume import volume as volumes
from horcrux_nbd.volume.blockmap import BASE, DATA, ZERO
from horcrux_nbd.volume.state import Pending
from horcrux_nbd.volume.volume import Volume

from .disk import Disk
from .support import (
    BLOCK,
    CHUNK,
    Watched,
    abandon,
    chunk_ids,
    flush,
    make_image,
    make_volume,
    noise,
    open_descriptors,
    read,
    resolve,
    write,
)

PENDING = Pending("message", "author", "2026-01-01T00:00:00.000000Z")


# ---- the block device against a model, through flushes, crashes and power cuts


class BlockDevice(RuleBasedStateMachine):
    """Random requests; after a crash each block is what was flushed last or something later.

    `allowed` has for each block what it held since the last flush, oldest first; RELIABILITY.md
    calls this the oracle. A run has a disk of its own (disk.py), so a crash may lose whatever no
    sync made durable.
    """

    folder: Path
    url: str
    size: int
    monkeypatch: pytest.MonkeyPatch
    runs = 0

    def __init__(self) -> None:
        super().__init__()
        BlockDevice.runs += 1
        self.where = self.folder / f"run{self.runs}"
        self.disk = Disk(self.where, self.monkeypatch)
        self.volume: Any = None
        self.freezes = 0

    @initialize()
    def make(self) -> None:
        make_volume(self.where, self.url)
        self.content = bytearray(image_bytes(self.size))
        blocks = -(-self.size // BLOCK)
        self.allowed: list[list[bytes]] = [[self._block(n)] for n in range(blocks)]
        self.open()

    def open(self) -> None:
        cache = self.folder / "cache"
        self.volume = Volume.open(self.where, cache=cache, cache_size=4 * CHUNK)

    def _block(self, number: int) -> bytes:
        return bytes(self.content[number * BLOCK : (number + 1) * BLOCK])

    def _changed(self, offset: int, length: int) -> None:
        for block in range(offset // BLOCK, -(-(offset + length) // BLOCK)):
            if self._block(block) != self.allowed[block][-1]:
                self.allowed[block].append(self._block(block))

    def _range(self, offset: int, length: int) -> tuple[int, int]:
        offset %= self.size
        return offset, min(length, self.size - offset)

    offsets = st.one_of(
        st.integers(0, 1 << 20),
        st.integers(0, 200).map(lambda n: n * BLOCK),
        st.integers(0, 2000).map(lambda n: n * 512),
        st.integers(0, 8).map(lambda n: n * CHUNK),
    )
    lengths = st.one_of(
        st.integers(1, 3 * BLOCK),
        st.integers(1, 24).map(lambda n: n * 512),
        st.integers(1, 40).map(lambda n: n * BLOCK),
        st.just(3 * CHUNK),
        st.just(1 << 30),  # to the end
    )

    @rule(offset=offsets, length=lengths, seed=st.integers(0, 1 << 30))
    def write(self, offset: int, length: int, seed: int) -> None:
        offset, length = self._range(offset, length)
        data = noise(length, seed)
        write(self.volume, offset, data)
        self.content[offset : offset + length] = data
        self._changed(offset, length)

    @rule(offset=offsets, length=lengths)
    def zero(self, offset: int, length: int) -> None:
        offset, length = self._range(offset, length)
        self.volume.zero(offset, length)
        self.content[offset : offset + length] = bytes(length)
        self._changed(offset, length)

    @rule(offset=offsets, length=lengths)
    def read(self, offset: int, length: int) -> None:
        offset, length = self._range(offset, length)
        assert read(self.volume, offset, length) == self.content[offset : offset + length]

    @rule(block=st.integers(0, 100), count=st.integers(1, 6), seed=st.integers(0, 1 << 30))
    def small_flushes(self, block: int, count: int, seed: int) -> None:
        """As a database does it: a block or a part of one, then a flush, again and again."""
        chance = random.Random(seed)
        for turn in range(count):
            self.write((block + turn * chance.choice([0, 1, 7])) * BLOCK, BLOCK, seed + turn)
            if chance.random() < 0.3:
                self.write(block * BLOCK + 700, 1000, seed - turn)
            self.flush()
            if chance.random() < 0.2:
                self.write(block * BLOCK, BLOCK, seed + 100 + turn)

    @rule()
    def flush(self) -> None:
        flush(self.volume)
        self._flushed()

    def _flushed(self) -> None:
        self.allowed = [states[-1:] for states in self.allowed]

    @rule(seed=st.integers(0, 1 << 30))
    def write_back(self, seed: int) -> None:
        self.disk.write_back(random.Random(seed))

    @rule()
    def close_and_open(self) -> None:
        self.volume.close()
        self._flushed()
        self.open()

    @rule()
    def crash(self) -> None:
        """The process dies: all that was acknowledged stays, flushed or not."""
        abandon(self.volume)
        content = bytes(self.content)
        self.open()
        assert read(self.volume, 0, self.size) == content

    @rule(seed=st.integers(0, 1 << 30))
    def power_cut(self, seed: int) -> None:
        abandon(self.volume)
        self.disk.cut(random.Random(seed))
        self._recover()

    def _recover(self) -> None:
        self.open()
        found = read(self.volume, 0, self.size)
        self.content = bytearray(found)
        for number, states in enumerate(self.allowed):
            assert self._block(number) in states, f"block {number} is none of {len(states)} states"
            self.allowed[number] = [self._block(number)]

    @precondition(lambda self: self.freezes < 3)
    @rule()
    def freeze(self) -> None:
        """A commit begins, and is not gone on with: one layer more."""
        self.freezes += 1
        self.volume.freeze(PENDING)
        self.volume.abandon()
        self._flushed()

    @invariant()
    def extents_fit(self) -> None:
        if self.volume is None:
            return
        at = 0
        for start, stop, _, zero in self.volume.extents(0, self.size):
            assert start == at < stop
            assert not zero or not any(self.content[start:stop])
            at = stop
        assert at == self.size

    def teardown(self) -> None:
        if self.volume is not None:
            assert read(self.volume, 0, self.size) == self.content
            self.volume.close()
        shutil.rmtree(self.where, ignore_errors=True)


def image_bytes(size: int) -> bytes:
    """Data, a hole of two chunks, data."""
    image = noise(2 * CHUNK, "a") + bytes(2 * CHUNK) + noise(3 * CHUNK, "b")
    return image[:size]


EXAMPLES = int(os.environ.get("HORCRUX_EXAMPLES", "15"))


@pytest.mark.parametrize("size", [6 * CHUNK, 5 * CHUNK + 3 * BLOCK, 4 * CHUNK + 777, 511])
def test_block_device_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """HORCRUX_EXAMPLES says how many runs; the usual number is for each CI run."""
    data = {
        at: image_bytes(size)[at : at + CHUNK] for at in range(0, size, CHUNK)
        if any(image_bytes(size)[at : at + CHUNK])
    }  # fmt: skip

    class Machine(BlockDevice):
        pass

    Machine.folder, Machine.size, Machine.monkeypatch = tmp_path, size, monkeypatch
    Machine.url = make_image(tmp_path / "repo", data, size=size)
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


# ---- whole volumes


SIZE = 12 * CHUNK + 100


@pytest.fixture
def url(tmp_path: Path) -> str:
    return make_image(tmp_path / "repo", noise(SIZE))


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[Watched]:
    """The stores of volumes that are opened from here on."""
    stores: list[Watched] = []
    open_mirrored = volumes.open_mirrored

    def watch(*args: Any, **options: Any) -> Watched:
        stores.append(Watched(open_mirrored(*args, **options)))
        return stores[-1]

    monkeypatch.setattr(volumes, "open_mirrored", watch)
    return stores


@pytest.fixture
def volume(tmp_path: Path, url: str, watched: list[Watched]) -> Iterator[Volume]:
    volume = Volume.open(make_volume(tmp_path / "v", url), cache=tmp_path / "cache")
    yield volume
    volume.close()


def test_nothing_is_fetched_to_open_it_nor_for_what_is_overwritten(
    volume: Volume, watched: list[Watched]
) -> None:
    write(volume, CHUNK, noise(CHUNK, 1))
    volume.zero(2 * CHUNK, CHUNK)
    volume.flush()
    assert read(volume, CHUNK, CHUNK) == noise(CHUNK, 1)
    assert read(volume, 2 * CHUNK, CHUNK) == bytes(CHUNK)
    assert [store.gets for store in watched] == [[]]
    assert volume.zero_is_fast(9 * CHUNK, SIZE - 9 * CHUNK), "the odd end is no edge"


def test_three_volumes_share_a_cache_of_three_chunks(tmp_path: Path, url: str) -> None:
    """Each evicts what the others are reading."""
    opened = [
        Volume.open(
            make_volume(tmp_path / f"v{n}", url),
            cache=tmp_path / "cache",
            cache_size=3 * CHUNK + 200,
        )
        for n in range(3)
    ]
    problems: list[str] = []

    def work(volume: Volume, seed: int) -> None:
        chance = random.Random(seed)
        try:
            for _ in range(120):
                offset = chance.randrange(SIZE - 5000)
                if read(volume, offset, 5000) != noise(SIZE)[offset : offset + 5000]:
                    problems.append(f"{seed}: {offset}")
        except BaseException as error:
            problems.append(repr(error))

    image = noise(SIZE)
    assert image
    threads = [
        threading.Thread(target=work, args=(volume, seed)) for seed, volume in enumerate(opened * 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert problems == []
    for volume in opened:
        volume.close()


def test_a_cache_on_a_full_disk_only_costs_time(
    tmp_path: Path, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root: run the tests as root")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "horcrux-test", disk], check=True)
    try:
        volume = Volume.open(make_volume(tmp_path / "v", url), cache=disk / "c", cache_size=1 << 40)
        for _ in range(2):
            for chunk in range(12):
                assert read(volume, chunk * CHUNK, CHUNK) == noise(SIZE)[chunk * CHUNK :][:CHUNK]
        volume.close()
        del volume
    finally:
        subprocess.run(["umount", disk], check=True)
    assert "not cached now" in caplog.text


def test_writers_of_one_block_over_a_slow_store(volume: Volume, watched: list[Watched]) -> None:
    """Each owns a sector in every block; all need the same chunk to fill up their blocks."""
    watched[0].delay = 0.02
    blocks = 2 * CHUNK // BLOCK

    def work(sector: int) -> None:
        for block in range(blocks):
            write(volume, block * BLOCK + sector * 512, noise(512, (sector, block)))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for block in range(blocks):
        for sector in range(8):
            at = block * BLOCK + sector * 512
            assert read(volume, at, 512) == noise(512, (sector, block)), (block, sector)


def test_a_second_opener_is_refused(volume: Volume, tmp_path: Path) -> None:
    with pytest.raises(Busy, match=f"process {os.getpid()}"):
        Volume.open(tmp_path / "v", cache=tmp_path / "cache")
    with pytest.raises(Busy):
        Volume.open(tmp_path / "v", cache=tmp_path / "cache", read_only=True)


def test_read_only_volumes_and_versions(tmp_path: Path, url: str) -> None:
    folder = make_volume(tmp_path / "v", url)
    first = Volume.open(folder, cache=tmp_path / "cache")
    write(first, 5, b"written")
    first.close()
    again = Volume.open(folder, cache=tmp_path / "cache", read_only=True)
    assert read(again, 5, 7) == b"written"
    for change in (
        lambda: write(again, 0, b"x"), lambda: again.zero(0, 10), lambda: again.freeze(PENDING),
    ):  # fmt: skip
        with pytest.raises(UsageError, match="read-only"):
            change()
    again.flush()
    again.close()
    version = Volume.open_version(url, resolve(url), cache=tmp_path / "cache")
    assert version.read_only
    assert read(version, 5, 7) == noise(SIZE)[5:12]
    assert list(version.extents(0, SIZE)) == [(0, SIZE, True, False)]
    version.close()


def test_frozen_layers_lie_under_what_is_written_later(volume: Volume, tmp_path: Path) -> None:
    write(volume, 0, noise(3 * BLOCK, 1))
    volume.zero(5 * BLOCK, 2 * BLOCK)
    volume.freeze(PENDING)
    with pytest.raises(Busy):
        volume.freeze(PENDING)
    write(volume, BLOCK + 10, b"above")
    write(volume, 5 * BLOCK + 10, b"above zeros")
    volume.zero(2 * BLOCK, BLOCK)
    expected = bytearray(noise(SIZE))
    expected[: 3 * BLOCK] = noise(3 * BLOCK, 1)
    expected[5 * BLOCK : 7 * BLOCK] = bytes(2 * BLOCK)
    expected[BLOCK + 10 : BLOCK + 15] = b"above"
    expected[5 * BLOCK + 10 : 5 * BLOCK + 21] = b"above zeros"
    expected[2 * BLOCK : 3 * BLOCK] = bytes(BLOCK)
    assert read(volume, 0, SIZE) == expected
    assert volume.overlay is not None
    top = volume.overlay.layers[0].blocks
    assert [top.state(n) for n in range(7)] == [BASE, DATA, ZERO, BASE, BASE, DATA, BASE]
    volume.flush()
    abandon(volume)
    again = Volume.open(tmp_path / "v", cache=tmp_path / "cache")
    assert read(again, 0, SIZE) == expected
    again.close()


def test_what_is_frozen_is_durable(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written between the flush before the pause and the pause is frozen too."""
    disk = Disk(tmp_path, monkeypatch)
    volume = Volume.open(make_volume(tmp_path / "v", url), cache=tmp_path / "cache")
    assert volume.overlay is not None
    flush, flushes = volume.overlay.flush, []

    def write_behind_it() -> None:
        flush()
        flushes.append(1)
        if len(flushes) == 1:
            write(volume, 100, b"just in time")

    monkeypatch.setattr(volume.overlay, "flush", write_behind_it)
    volume.freeze(PENDING)
    abandon(volume)
    disk.cut(random.Random(1))
    again = Volume.open(tmp_path / "v", cache=tmp_path / "cache")
    assert read(again, 100, 12) == b"just in time"
    again.close()


def test_a_lost_or_foreign_layer_is_refused(tmp_path: Path, url: str) -> None:
    folder = make_volume(tmp_path / "v", url)
    (layer,) = (folder / "overlay").iterdir()
    other = make_volume(tmp_path / "w", url)
    (foreign,) = (other / "overlay").iterdir()
    os.rename(layer, tmp_path / "layer")
    before = open_descriptors()
    with pytest.raises(Damaged, match="map is missing"):
        Volume.open(folder, cache=tmp_path / "cache")
    shutil.copytree(foreign, layer)
    with pytest.raises(Damaged, match="belongs to another overlay"):
        Volume.open(folder, cache=tmp_path / "cache")
    assert open_descriptors() == before
    shutil.rmtree(layer)
    os.rename(tmp_path / "layer", layer)
    Volume.open(folder, cache=tmp_path / "cache").close()


def test_a_digit_that_is_another_in_its_state_removes_no_layer(tmp_path: Path, url: str) -> None:
    """Another layer's number made the one in use a stranger, which was swept away."""
    folder = make_volume(tmp_path / "v", url)
    state = folder / "volume.json"
    sound = state.read_text()
    layers = list((folder / "overlay").iterdir())
    state.write_text(sound.replace('"number": 1', '"number": 2'))
    with pytest.raises(Damaged, match="check does not match"):
        Volume.open(folder, cache=tmp_path / "cache")
    # One without a check, as early releases wrote it.
    value = {**json.loads(state.read_text())}
    del value["check"]
    state.write_text(json.dumps(value))
    with pytest.raises(Damaged, match="map is missing"):
        Volume.open(folder, cache=tmp_path / "cache")
    assert list((folder / "overlay").iterdir()) == layers
    state.write_text(sound)
    Volume.open(folder, cache=tmp_path / "cache").close()


def test_closing_lets_go_of_all_whatever_fails(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_volume(tmp_path / "v", url)
    Volume.open(folder, cache=tmp_path / "cache").close()
    before = open_descriptors()
    for step in ("flush", "base", "cache"):
        volume = Volume.open(folder, cache=tmp_path / "cache")
        assert volume.overlay is not None
        target, name = {
            "flush": (volume.overlay, "settle"),
            "base": (volume.base, "close"),
            "cache": (volume.base._cache, "_account"),
        }[step]
        volume.base._cache._unaccounted = 1

        def fails(*args: object, **kw: object) -> None:
            raise RuntimeError("test")

        monkeypatch.setattr(target, name, fails)
        with pytest.raises(RuntimeError):
            volume.close()
        del volume, target
        gc.collect()
        assert open_descriptors() == before, step


def test_nothing_is_left_open(tmp_path: Path, url: str) -> None:
    folder = make_volume(tmp_path / "v", url)
    before, threads = open_descriptors(), threading.active_count()
    volume = Volume.open(folder, cache=tmp_path / "cache")
    assert threading.active_count() == threads, "nbdkit forks after it was opened"
    read(volume, 0, SIZE)
    write(volume, 0, noise(BLOCK))
    volume.freeze(PENDING)
    write(volume, 0, noise(BLOCK))
    volume.close()
    del volume
    assert threading.active_count() == threads
    assert open_descriptors() == before


def test_it_closes_while_the_store_hangs(
    tmp_path: Path, url: str, watched: list[Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "STOP_LIMIT", 0.5)
    volume = Volume.open(make_volume(tmp_path / "v", url), cache=tmp_path / "cache")
    write(volume, 0, noise(BLOCK))
    watched[0].open.clear()
    volume.prefetch(CHUNK, 5 * CHUNK)
    assert watched[0].waiting.acquire(timeout=10)
    began = time.monotonic()
    volume.close()
    assert time.monotonic() - began < 10
    watched[0].open.set()
    again = Volume.open(tmp_path / "v", cache=tmp_path / "cache")
    assert read(again, 0, BLOCK) == noise(BLOCK)
    again.close()


def test_extents_are_merged(volume: Volume) -> None:
    assert list(volume.extents(0, SIZE)) == [(0, SIZE, True, False)]
    write(volume, CHUNK, noise(BLOCK))
    assert list(volume.extents(0, SIZE)) == [(0, SIZE, True, False)]
    volume.zero(2 * CHUNK, BLOCK)
    volume.zero(2 * CHUNK + BLOCK, 3 * BLOCK)
    assert list(volume.extents(100, SIZE - 100)) == [
        (100, 2 * CHUNK, True, False),
        (2 * CHUNK, 2 * CHUNK + 4 * BLOCK, False, True),
        (2 * CHUNK + 4 * BLOCK, SIZE, True, False),
    ]


def test_a_seal_under_readers_and_writers(tmp_path: Path, url: str) -> None:
    """The frozen layer goes into the base while requests are under way in it."""
    folder = make_volume(tmp_path / "v", url)
    volume = Volume.open(folder, cache=tmp_path / "cache")
    base = bytes.fromhex(resolve(url).id.hex())
    stop = threading.Event()
    problems: list[str] = []

    def work(number: int) -> None:
        chance = random.Random(number)
        try:
            while not stop.is_set():
                offset = number * CHUNK + chance.randrange(CHUNK - 100)
                if read(volume, offset, 100) != noise(SIZE)[offset : offset + 100]:
                    problems.append(f"{offset}")
                write(volume, offset, noise(SIZE)[offset : offset + 50])
        except BaseException as error:
            problems.append(repr(error))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    # All that is written is what the base has, so the base itself is the commit of each layer.
    for _ in range(6):
        volume.freeze(PENDING)
        volume.seal(base)
    stop.set()
    for thread in threads:
        thread.join(20)
    assert problems == []
    assert volume.overlay is not None
    assert len(volume.overlay.layers) == 1
    assert read(volume, 0, SIZE) == noise(SIZE)
    volume.close()
    assert len(chunk_ids(url)) == 13

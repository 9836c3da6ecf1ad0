from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from horcrux_nbd.volume.blockmap import DATA, GROUP
from horcrux_nbd.volume.layer import BLOCK_SIZE, Layer
from horcrux_nbd.volume.overlay import STRIPES, Overlay, fill_zeros

from .support import noise

SIZE = 48 * BLOCK_SIZE


class FakeBase:
    """A version in memory that counts what is read of it, and can keep readers waiting."""

    table = None

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.reads: list[tuple[int, int]] = []
        self.before: Callable[[], None] = lambda: None

    def read_into(self, offset: int, view: memoryview) -> None:
        self.reads.append((offset, len(view)))
        self.before()
        found = self.data[offset : offset + len(view)]
        view[:] = found + bytes(len(view) - len(found))

    def extents(self, offset: int, stop: int) -> Iterator[tuple[int, int, bool]]:
        at = offset
        while at < stop:
            end = min(stop, (at // (8 * BLOCK_SIZE) + 1) * 8 * BLOCK_SIZE)
            yield at, end, any(self.data[at:end])
            at = end


class Stacks:
    """Overlays in folders of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0

    def layer(self) -> Layer:
        self.count += 1
        return Layer.create(self.folder / f"{self.count:03d}", bytes(16), 1 << 40)

    def overlay(self, base: FakeBase) -> Overlay:
        return Overlay([self.layer()], base)


@pytest.fixture
def stacks(tmp_path: Path) -> Stacks:
    return Stacks(tmp_path)


def read(overlay: Overlay, offset: int, length: int) -> bytes:
    """As a request is read: natively what can be, then by Python."""
    data = memoryview(bytearray(noise(length, "left by the read before")))
    done = overlay.native.read(offset, data) if overlay.native is not None else 0
    if done < length:
        overlay.read_into(offset + done, data[done:])
    return bytes(data)


def write(overlay: Overlay, offset: int, data: bytes) -> None:
    """As a request is written: natively if it can be, else by Python."""
    if overlay.native is None or not overlay.native.write(offset, data):
        overlay.write(offset, memoryview(data))


def run(*work: Callable[[], None], limit: float = 60) -> None:
    """Run all at once; raise what one of them raised."""
    errors: list[BaseException] = []

    def guarded(task: Callable[[], None]) -> None:
        try:
            task()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(task,)) for task in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(limit)
        assert not thread.is_alive(), "hangs"
    if errors:
        raise errors[0]


# ---- against a model

OFFSETS = st.one_of(
    st.integers(0, SIZE - 1),
    st.integers(0, SIZE // 512 - 1).map(lambda n: n * 512),
    st.integers(0, SIZE // BLOCK_SIZE - 1).map(lambda n: n * BLOCK_SIZE),
)
LENGTHS = st.one_of(
    st.integers(1, 3 * BLOCK_SIZE),
    st.integers(1, 40).map(lambda n: n * 512),
    st.integers(1, 12).map(lambda n: n * BLOCK_SIZE),
)
STEPS = st.lists(st.tuples(st.sampled_from("wwwzzrpm"), OFFSETS, LENGTHS), min_size=1, max_size=25)


@settings(max_examples=120, deadline=None)
@given(STEPS)
def test_content_is_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, int]]
) -> None:
    """Writes and zeros, in layers that are put on top of each other and merged away again."""
    base = FakeBase(noise(SIZE // 2) + bytes(SIZE // 2))
    stacks = Stacks(tmp_path_factory.mktemp("layers"))
    overlay, model = stacks.overlay(base), bytearray(base.data)
    for number, (step, offset, length) in enumerate(steps):
        end = min(offset + length, SIZE)
        if step == "w":
            data = noise(end - offset, number)
            write(overlay, offset, data)
            model[offset:end] = data
        elif step == "z":
            overlay.zero(offset, end - offset)
            model[offset:end] = bytes(end - offset)
        elif step == "r":
            assert read(overlay, offset, end - offset) == model[offset:end]
        elif step == "p" and len(overlay.layers) < 4:
            with overlay.paused():
                overlay.flush()
                overlay.push(stacks.layer())
        elif step == "m" and len(overlay.layers) > 1:  # the layers below go into the base
            base = FakeBase(read(Overlay(overlay.layers[1:], base), 0, SIZE))
            overlay.replace(overlay.layers[:1], base)
        assert read(overlay, 0, SIZE) == model
    pieces = list(overlay.extents(0, SIZE))
    assert [a for a, *_ in pieces] + [SIZE] == [0] + [b for _, b, *_ in pieces]
    for low, high, _, zero in pieces:
        assert not zero or not any(model[low:high]), "a hole with something in it"
    part = list(overlay.extents(700, SIZE - 4000))
    assert part[0][0] == 700
    assert part[-1][1] == SIZE - 4000
    for layer in overlay.layers:
        layer.close()


def test_whole_blocks_are_written_without_reading(stacks: Stacks) -> None:
    base = FakeBase(noise(SIZE))
    overlay = stacks.overlay(base)
    overlay.write(BLOCK_SIZE, memoryview(noise(8 * BLOCK_SIZE)))
    overlay.zero(20 * BLOCK_SIZE, BLOCK_SIZE)
    assert base.reads == []
    overlay.write(BLOCK_SIZE + 5, memoryview(b"in a block that is here"))
    overlay.write(20 * BLOCK_SIZE + 5, memoryview(b"in a block of zeros"))
    assert base.reads == []
    overlay.write(12 * BLOCK_SIZE + 5, memoryview(noise(2 * BLOCK_SIZE)))
    assert base.reads == [(12 * BLOCK_SIZE, BLOCK_SIZE), (14 * BLOCK_SIZE, BLOCK_SIZE)]


def test_zero_is_fast_where_it_reads_nothing(stacks: Stacks) -> None:
    base = FakeBase(noise(SIZE))
    overlay = stacks.overlay(base)
    assert overlay.zero_is_fast(0, 5 * BLOCK_SIZE)
    assert not overlay.zero_is_fast(1, 5 * BLOCK_SIZE)
    assert not overlay.zero_is_fast(0, 5 * BLOCK_SIZE + 1)
    assert not overlay.zero_is_fast(100, 100)
    overlay.write(0, memoryview(bytes(BLOCK_SIZE)))
    overlay.zero(5 * BLOCK_SIZE, BLOCK_SIZE)
    assert overlay.zero_is_fast(1, 5 * BLOCK_SIZE + 7)
    overlay.zero(1, 5 * BLOCK_SIZE + 7)
    assert base.reads == []


def test_reading_below_the_top_fails_and_nothing_is_written(stacks: Stacks) -> None:
    base = FakeBase(noise(SIZE))
    overlay = stacks.overlay(base)

    def away() -> None:
        raise ConnectionError("away")

    base.before = away
    with pytest.raises(ConnectionError):
        overlay.write(100, memoryview(b"half a block"))
    with pytest.raises(ConnectionError):
        overlay.zero(100, 2 * BLOCK_SIZE)
    base.before = lambda: None
    assert read(overlay, 0, SIZE) == base.data


def test_zeros_of_any_length_take_no_memory() -> None:
    data = bytearray(noise(3 << 20))
    fill_zeros(memoryview(data)[5:-5])
    assert data == noise(3 << 20)[:5] + bytes((3 << 20) - 10) + noise(3 << 20)[-5:]


# ---- many threads


def test_writers_of_one_block_lose_nothing(stacks: Stacks) -> None:
    """Eight threads own one sector of 512 bytes each in every block; some blocks are trimmed
    before, so that all three ways of filling up a block are met."""
    blocks = GROUP * 2
    base = FakeBase(noise(blocks * BLOCK_SIZE, "base"))
    barrier = threading.Barrier(8)
    for turn in range(3):
        overlay = stacks.overlay(base)
        expected = bytearray(base.data)
        for block in range(0, blocks, 3):
            overlay.zero(block * BLOCK_SIZE, BLOCK_SIZE)

        def work(sector: int, overlay: Overlay = overlay, turn: int = turn) -> None:
            chance = random.Random(sector)
            for block in range(blocks):
                if block % 16 == 0:
                    barrier.wait(30)  # all at the same blocks at about the same time
                at = block * BLOCK_SIZE + sector * 512
                if chance.random() < 0.2:
                    overlay.zero(at, 512)
                else:
                    write(overlay, at, noise(512, (turn, at)))

        run(*(lambda n=n: work(n) for n in range(8)))
        for sector in range(8):
            chance = random.Random(sector)
            for block in range(blocks):
                at = block * BLOCK_SIZE + sector * 512
                zero = chance.random() < 0.2
                expected[at : at + 512] = bytes(512) if zero else noise(512, (turn, at))
        assert read(overlay, 0, len(expected)) == expected


def test_writers_across_stripes_lose_nothing_and_do_not_lock_up(stacks: Stacks) -> None:
    """Requests that cover many groups of blocks, begun and ended amid blocks that others share."""
    end = GROUP * BLOCK_SIZE * (STRIPES + 8)
    overlay = stacks.overlay(FakeBase(b""))
    cuts = sorted(random.Random(3).sample(range(512, end, 512), 60))
    pieces = list(zip([0, *cuts], [*cuts, end], strict=True))
    large = [piece for piece in pieces if piece[1] - piece[0] > BLOCK_SIZE * GROUP]
    assert large

    def work(mine: list[tuple[int, int]]) -> None:
        for low, high in mine:
            if (low, high) in large:
                overlay.zero(low, high - low)
                write(overlay, low, b"\x01" * 700)
                write(overlay, high - 700, b"\x02" * 700)
            else:
                write(overlay, low, noise(high - low, low))

    run(*(lambda n=n: work(pieces[n::6]) for n in range(6)), lambda: overlay.zero(end, 10 * end))
    for low, high in pieces:
        if (low, high) in large:
            assert read(overlay, low, 701) == b"\x01" * 700 + b"\0"
            assert read(overlay, high - 701, 701) == b"\0" + b"\x02" * 700
        else:
            assert read(overlay, low, high - low) == noise(high - low, low)


def test_layers_pushed_and_merged_under_writers_lose_nothing(stacks: Stacks) -> None:
    blocks = 64
    base = FakeBase(noise(blocks * BLOCK_SIZE, "base"))
    overlay = stacks.overlay(base)
    done = threading.Event()
    finals: dict[int, bytes] = {}

    def work(sector: int) -> None:
        chance = random.Random(sector)
        turn = 0
        while turn < 150 or stacks.count < 5:  # a few commits in between, on any machine
            turn += 1
            at = chance.randrange(blocks) * BLOCK_SIZE + sector * 512
            data = noise(512, (sector, turn))
            write(overlay, at, data)
            finals[at] = data
            assert read(overlay, at, 512) == data, "a writer reads what it wrote"

    def commit() -> None:
        while not done.is_set():
            fresh = stacks.layer()
            with overlay.paused():
                overlay.flush()
                overlay.push(fresh)
            below = Overlay(overlay.layers[1:], overlay._stack.base)
            merged = FakeBase(read(below, 0, blocks * BLOCK_SIZE))
            overlay.replace(overlay.layers[:1], merged)

    def writers() -> None:
        try:
            run(*(lambda n=n: work(n) for n in range(6)))
        finally:
            done.set()

    run(writers, commit)
    expected = bytearray(base.data)
    for at, data in finals.items():
        expected[at : at + 512] = data
    assert read(overlay, 0, len(expected)) == expected


def test_a_layer_pushed_while_a_writer_reads_below(stacks: Stacks) -> None:
    """What the writer read may be of the stack before; it looks again, so no byte is lost."""
    base = FakeBase(noise(SIZE))
    overlay = stacks.overlay(base)
    reading, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        reading.set()
        assert go_on.wait(10)

    base.before = hold
    writer = threading.Thread(target=overlay.write, args=(100, memoryview(b"late")))
    writer.start()
    assert reading.wait(10)
    base.before = lambda: None
    overlay.write(0, memoryview(b"early" + bytes(BLOCK_SIZE - 5)))
    with overlay.paused():  # the writer is not inside the gate while it waits for the network
        overlay.push(stacks.layer())
    go_on.set()
    writer.join(10)
    expected = bytearray(b"early" + bytes(BLOCK_SIZE - 5))
    expected[100:104] = b"late"
    assert read(overlay, 0, BLOCK_SIZE) == expected
    assert overlay.layers[0].blocks.state(0) == DATA


def test_a_pause_waits_for_writers_and_keeps_new_ones_out(
    stacks: Stacks, monkeypatch: pytest.MonkeyPatch
) -> None:
    overlay = stacks.overlay(FakeBase(noise(SIZE)))
    inside, go_on, paused, end_pause = (threading.Event() for _ in range(4))
    write = overlay.layers[0].write

    def slow(offset: int, data: memoryview | bytes) -> None:
        inside.set()
        assert go_on.wait(10)
        write(offset, data)

    monkeypatch.setattr(overlay.layers[0], "write", slow)
    first = threading.Thread(target=overlay.write, args=(0, memoryview(bytes(BLOCK_SIZE))))
    first.start()
    assert inside.wait(10)

    def pause() -> None:
        with overlay.paused():
            paused.set()
            assert end_pause.wait(10)

    pausing = threading.Thread(target=pause)
    pausing.start()
    assert not paused.wait(0.05), "a writer is under way"
    go_on.set()
    assert paused.wait(10)
    others = [
        threading.Thread(target=overlay.write, args=(BLOCK_SIZE, memoryview(bytes(BLOCK_SIZE)))),
        threading.Thread(target=overlay.zero, args=(8 * BLOCK_SIZE, BLOCK_SIZE)),
    ]
    for thread in others:
        thread.start()
        thread.join(0.05)
        assert thread.is_alive()
    assert read(overlay, BLOCK_SIZE, BLOCK_SIZE) == noise(SIZE)[BLOCK_SIZE : 2 * BLOCK_SIZE]
    end_pause.set()
    for thread in (first, pausing, *others):
        thread.join(10)
        assert not thread.is_alive()
    assert read(overlay, BLOCK_SIZE, BLOCK_SIZE) == bytes(BLOCK_SIZE)


def test_a_block_is_marked_after_its_data_is_written(
    stacks: Stacks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flush between the two would make a block durable as data that it does not have yet."""
    overlay = stacks.overlay(FakeBase(noise(SIZE)))
    top = overlay.layers[0]
    seen: list[int] = []
    write = top.write

    def watched(offset: int, data: memoryview | bytes) -> None:
        seen.extend(top.blocks.state(block) for block in range(3))
        write(offset, data)

    monkeypatch.setattr(top, "write", watched)
    overlay.write(100, memoryview(bytearray(noise(2 * BLOCK_SIZE))))
    assert DATA not in seen
    assert top.blocks.uniform(0, 3) == DATA

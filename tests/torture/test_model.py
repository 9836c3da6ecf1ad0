"""The block device against a model: any sequence of requests, shrunk to the shortest that fails.

hypothesis drives a real nbdkit. Each example has a part of one sparse image for itself, as new as
no other example has touched it. Half of the examples run without the native filter.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from horcrux_nbd import host, server, versions
from horcrux_nbd.chunkstore import open_store
from horcrux_nbd.generate import generate
from horcrux_nbd.names import Version
from horcrux_nbd.native import build
from horcrux_nbd.source.base import Source
from tests.servers.nbdkit import MISSING, available, libnbd
from tests.versions.support import AUTHOR
from tests.volume.support import BLOCK, CHUNK, IMAGE, noise

EXAMPLES = int(os.environ.get("HORCRUX_EXAMPLES", "2000"))
STEPS = 14
LIMIT = 20.0

# A part: a chunk of data, one of zeros, one that is half data, and half a chunk of data. So its
# chunks fall differently in each second part.
SIZE = 3 * CHUNK + CHUNK // 2
CONTENT = (
    noise(CHUNK) + bytes(CHUNK) + noise(CHUNK // 2, 1) + bytes(CHUNK // 2) + noise(CHUNK // 2, 2)
)


class Parts(Source):
    """Many parts one after another, and one sector."""

    filesystem = None

    def __init__(self, count: int) -> None:
        self.size = count * SIZE + 512

    def extents(self) -> Iterator[tuple[int, int]]:
        yield 0, self.size

    def read(self, offset: int, length: int) -> bytes:
        first, last = offset // SIZE, (offset + length) // SIZE
        return (CONTENT * (last - first + 1))[offset - first * SIZE :][:length]

    def problems(self) -> list[str]:
        return []

    def close(self) -> None:
        pass


class Device:
    """A served volume with parts for `count` examples."""

    def __init__(self, folder: Path, count: int, *, native: bool) -> None:
        folder.mkdir()
        os.environ["HORCRUX_ROOT"], os.environ["HORCRUX_RUN"] = f"{folder}/root", f"{folder}/run"
        os.environ[build.SWITCH] = "1" if native else "0"
        url = f"cp://{folder}/store"
        with open_store(url, create=True) as store, Parts(count) as source:
            generate(source, store, IMAGE, chunk_size=CHUNK, author="test", message="parts")
        host.create("m", url, Version(IMAGE))
        self.nbd = libnbd()
        self.count, self.used = count, 0
        self.serve()

    def serve(self) -> None:
        host.serve("m")
        self.connect()

    def connect(self) -> None:
        running = server.running("m")
        assert running is not None
        assert self.nbd is not None
        self.handle: Any = self.nbd.NBD()
        self.handle.add_meta_context("base:allocation")
        self.handle.connect_unix(str(running.socket))

    def part(self) -> int:
        """Where a part begins that nobody has used."""
        assert self.used < self.count
        self.used += 1
        return (self.used - 1) * SIZE

    def kill(self) -> None:
        running = server.running("m")
        assert running is not None
        running.process.signal(signal.SIGKILL)
        assert running.process.wait_gone(LIMIT)

    def close(self) -> None:
        self.handle = None
        host.stop("m", force=True)


device: Device

offsets = st.one_of(
    st.integers(0, SIZE - 1),
    st.integers(0, SIZE // BLOCK - 1).map(lambda block: block * BLOCK),
    st.sampled_from([CHUNK - 1, CHUNK, 2 * CHUNK - 512, 2 * CHUNK + CHUNK // 2, SIZE - 512]),
)
lengths = st.one_of(
    st.sampled_from([1, 512, BLOCK, CHUNK, SIZE]), st.integers(1, 3 * BLOCK), st.integers(1, SIZE)
)
rarely = st.integers(0, 99).map(lambda number: number == 99)


class BlockDevice(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.at = device.part()
        self.model = bytearray(CONTENT)

    def _flags(self, fua: bool) -> int:
        return int(device.nbd.CMD_FLAG_FUA) if fua else 0  # type: ignore[union-attr]

    @rule(offset=offsets, length=lengths, byte=st.integers(0, 255), fua=st.booleans())
    def write(self, offset: int, length: int, byte: int, fua: bool) -> None:
        data = bytes([byte]) * min(length, SIZE - offset)
        device.handle.pwrite(data, self.at + offset, self._flags(fua))
        self.model[offset : offset + len(data)] = data

    @rule(offset=offsets, length=lengths, fua=st.booleans(), trim=st.booleans())
    def zero(self, offset: int, length: int, fua: bool, trim: bool) -> None:
        length = min(length, SIZE - offset)
        request = device.handle.trim if trim else device.handle.zero
        request(length, self.at + offset, self._flags(fua))
        self.model[offset : offset + length] = bytes(length)

    @rule(offset=offsets, length=lengths)
    def read(self, offset: int, length: int) -> None:
        length = min(length, SIZE - offset)
        found = device.handle.pread(length, self.at + offset)
        assert found == self.model[offset : offset + length]

    @rule(offset=offsets, length=lengths)
    def prefetch(self, offset: int, length: int) -> None:
        device.handle.cache(min(length, SIZE - offset), self.at + offset)

    @rule(offset=offsets, length=lengths)
    def what_is_called_zero_is(self, offset: int, length: int) -> None:
        length = min(length, SIZE - offset)
        entries: list[int] = []
        device.handle.block_status(
            length, self.at + offset, lambda context, at, found, error: entries.extend(found)
        )
        at = offset
        for size, state in zip(entries[::2], entries[1::2], strict=True):
            if state & 2:  # NBD_STATE_ZERO
                piece = self.model[at : min(at + size, SIZE)]
                assert not any(piece), f"{at} {size}"
            at += size

    @rule()
    def flush(self) -> None:
        device.handle.flush()

    @rule()
    def connect_anew(self) -> None:
        device.handle.shutdown()
        device.connect()

    @rule(really=rarely)
    def kill(self, really: bool) -> None:
        if really:
            device.kill()
            device.serve()

    @rule(really=rarely)
    def commit(self, really: bool) -> None:
        if really:
            with contextlib.suppress(versions.NothingToCommit):
                versions.commit(["m"], "a version", author=AUTHOR)

    @invariant()
    def it_holds_what_the_model_holds(self) -> None:
        """A byte before and after the part too: neighbours are not touched."""
        if hasattr(self, "model"):
            assert device.handle.pread(SIZE, self.at) == self.model

    def teardown(self) -> None:
        if hasattr(self, "model"):
            after = device.handle.pread(512, self.at + SIZE)
            assert after == CONTENT[:512], "the neighbour was written"


@pytest.mark.slow
@pytest.mark.timeout(300 + EXAMPLES // 4)
@pytest.mark.skipif(not available(), reason=MISSING)
@pytest.mark.parametrize("native", [True, False], ids=["native", "python"])
def test_the_device_does_what_the_model_does(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """HORCRUX_EXAMPLES says how many."""
    global device
    if native and build.found() is None:
        pytest.skip("there is no native filter for this nbdkit: horcrux-cli native build")
    for name in ("HORCRUX_ROOT", "HORCRUX_RUN", build.SWITCH):
        monkeypatch.setenv(name, "")  # so that they are put back
    left, batch = EXAMPLES // 2, 1000
    while left:
        now = min(left, batch)
        folder = Path(tempfile.mkdtemp(dir="/dev/shm", prefix="horcrux-"))
        device = Device(folder / "d", now + 5000, native=native)  # shrinking takes parts, too
        try:
            run_state_machine_as_test(
                BlockDevice,
                settings=settings(
                    max_examples=now,
                    stateful_step_count=STEPS,
                    deadline=None,
                    database=None,
                    print_blob=True,
                    phases=(Phase.generate, Phase.shrink),
                    suppress_health_check=list(HealthCheck),
                ),
            )
        finally:
            device.close()
            shutil.rmtree(folder)
        left -= now

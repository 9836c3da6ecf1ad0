"""What the device says of itself, and what each request does."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.servers.nbdkit import PLUGIN, Nbdkit, connected
from tests.volume.support import (
    BLOCK,
    CHUNK,
    IMAGE,
    noise,
)

from .support import (
    HOLE,
    SIZE,
    errno_of,
    nbd,
    needs_nbdkit,
    original,
)

pytestmark = needs_nbdkit


def test_what_the_device_says_of_itself(client: Any) -> None:
    assert client.get_size() == SIZE
    for can in ("flush", "fua", "trim", "zero", "fast_zero", "cache", "multi_conn", "df"):
        assert getattr(client, f"can_{can}")(), can
    assert not client.is_read_only()
    assert not client.is_rotational()
    assert client.can_meta_context("base:allocation")
    sizes = [nbd().SIZE_MINIMUM, nbd().SIZE_PREFERRED, nbd().SIZE_MAXIMUM]
    assert [client.get_block_size(size) for size in sizes] == [1, BLOCK, 32 << 20]


def test_exports_are_listed_and_described(served: Nbdkit) -> None:
    listed = subprocess.run(
        ["nbdinfo", "--json", "--list", served.uri], capture_output=True, text=True, check=True
    )
    (export,) = json.loads(listed.stdout)["exports"]
    assert export["export-name"] == IMAGE
    assert export["description"] == "overlay: a version"
    with connected(served, IMAGE) as handle:
        assert handle.get_size() == SIZE
    with pytest.raises(nbd().Error):
        served.connect("OTHER")
    assert "there is no export 'OTHER' here, only 'AMCC'" in served.said()
    assert "Traceback" not in served.said()


def test_it_tells_its_version_and_its_keys() -> None:
    dumped = subprocess.run(
        ["nbdkit", "--dump-plugin", "python", PLUGIN], capture_output=True, text=True, check=True
    )
    assert "horcrux_version=" in dumped.stdout
    keys = next(x for x in dumped.stdout.splitlines() if x.startswith("horcrux_keys="))
    assert {"repo", "name", "overlay", "cache_size", "timeout"} < set(keys[13:].split())


# ---- reading and writing


def test_the_image_reads_as_it_was(client: Any) -> None:
    assert client.pread(SIZE, 0) == original(0, SIZE)
    chance = random.Random(1)
    for _ in range(50):
        offset = chance.randrange(SIZE)
        length = min(chance.randrange(1, 3 * CHUNK), SIZE - offset)
        assert client.pread(length, offset) == original(offset, length)
    assert errno_of(client.pread, 10, SIZE - 5) == errno.EINVAL


def test_writes_zeros_and_trims_of_any_alignment(client: Any) -> None:
    model = bytearray(original(0, SIZE))
    chance = random.Random(2)
    for turn in range(150):
        offset = chance.randrange(SIZE)
        length = min(chance.choice([1, 512, 4096, 5000, 200_000]), SIZE - offset)
        action = chance.choice(["write", "write", "zero", "trim"])
        if action == "write":
            data = noise(length, turn)
            client.pwrite(data, offset)
            model[offset : offset + length] = data
        elif action == "zero":
            client.zero(length, offset, chance.choice([0, nbd().CMD_FLAG_NO_HOLE]))
            model[offset : offset + length] = bytes(length)
        else:
            client.trim(length, offset)
            model[offset : offset + length] = bytes(length)
    assert client.pread(SIZE, 0) == model
    client.flush()


def test_the_largest_request(client: Any) -> None:
    data = noise(2 << 20) * 16
    assert errno_of(client.pwrite, data + b"x", 0) in (errno.EINVAL, errno.ENOMEM, errno.ENOSPC)
    assert errno_of(client.pwrite, data, SIZE - 10) == errno.ENOSPC


def test_zero_is_refused_where_it_would_not_be_fast(served: Nbdkit, client: Any) -> None:
    fast = nbd().CMD_FLAG_FAST_ZERO
    client.zero(CHUNK, 0, fast)
    client.zero(SIZE - 30 * CHUNK, 30 * CHUNK, fast)  # the odd end of the image is no edge
    for offset, length in ((CHUNK + 1, CHUNK), (2 * CHUNK, 100), (2 * CHUNK + 5, BLOCK)):
        assert errno_of(client.zero, length, offset, fast) == errno.ENOTSUP
    client.pwrite(bytes(BLOCK), 2 * CHUNK)
    client.zero(100, 2 * CHUNK, fast)
    client.zero(100, 5 * CHUNK)
    assert client.pread(101, 5 * CHUNK) == bytes(100) + original(5 * CHUNK + 100, 1)
    assert served.said() == "", "a client that asks whether it is fast is no failure"


def block_status(client: Any, count: int, offset: int, flags: int = 0) -> list[tuple[int, int]]:
    found: list[int] = []

    def take(context: str, at: int, entries: list[int], error: Any) -> None:
        assert (context, at) == ("base:allocation", offset)
        found.extend(entries)

    client.block_status(count, offset, take, flags)
    return list(zip(found[::2], found[1::2], strict=True))


def test_extents_show_holes_zeros_and_data(client: Any) -> None:
    hole = nbd().STATE_HOLE | nbd().STATE_ZERO
    assert block_status(client, SIZE, 0) == [(HOLE, 0), (20 * CHUNK, hole), (1234, 0)]
    client.trim(4 * CHUNK, CHUNK)
    client.zero(100, 6 * CHUNK)
    client.pwrite(b"x", 30 * CHUNK + 5)
    expected = [
        (CHUNK, 0), (4 * CHUNK, hole), (15 * CHUNK, 0), (10 * CHUNK, hole), (BLOCK, 0),
        (10 * CHUNK - BLOCK, hole), (1234, 0),
    ]  # fmt: skip
    assert block_status(client, SIZE, 0) == expected
    one = nbd().CMD_FLAG_REQ_ONE
    assert block_status(client, SIZE, 0, one) == expected[:1]
    assert block_status(client, CHUNK, 100, one) == [(CHUNK - 100, 0)]
    assert block_status(client, 5, CHUNK + 7) == [(5, hole)]


def test_cache_prefetches(tmp_path: Path, url: str, client: Any) -> None:
    client.cache(8 * CHUNK, 100)
    cached = tmp_path / "cache" / "chunks"
    deadline = time.monotonic() + 10
    while len(list(cached.glob("??/[0-9a-f]*"))) < 9:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.rename(tmp_path / "repo", tmp_path / "away")
    assert client.pread(8 * CHUNK, 0) == original(0, 8 * CHUNK)
    os.rename(tmp_path / "away", tmp_path / "repo")

"""What the kernel makes of zeroing, against the plugin itself.

A loop device punches a hole for a request to write zeros, and nbdfuse makes that an NBD trim. So
here a trim has to read as zeros to the byte, which NBD as such does not promise. File systems with
blocks below 4 KiB (mke2fs makes them for small images) zero pieces of our blocks in this way.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from horcrux_nbd import host
from horcrux_nbd.attach.processes import run
from horcrux_nbd.names import Version

from ..cli.support import run as horcrux
from .conftest import needs_fuse

pytestmark = needs_fuse
SIZE = 1 << 20


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[tuple[str, bytearray]]:
    """The device of a volume of random bytes, and the bytes."""
    content = bytearray(os.urandom(SIZE))
    (tmp_path / "image.raw").write_bytes(content)
    horcrux("generate", "-q", "-s", "64K", "A", tmp_path / "image.raw", tmp_path / "repository")
    host.create("v", f"cp://{tmp_path}/repository", Version("A"))
    attachment = host.attach("v", via="fuse")
    yield attachment.device, content
    host.detach("v", force=True)


@pytest.mark.parametrize(
    "command",
    [
        ["fallocate", "--punch-hole", "--offset={}", "--length={}"],
        ["fallocate", "--zero-range", "--offset={}", "--length={}"],
        ["blkdiscard", "--zeroout", "--offset={}", "--length={}"],
    ],
    ids=lambda command: command[1].strip("-"),
)
def test_zeroed_ranges_read_as_zeros(volume: tuple[str, bytearray], command: list[str]) -> None:
    device, expected = volume
    generator = random.Random(1)
    for _ in range(20):
        offset = generator.randrange(SIZE // 512) * 512
        length = min(generator.choice([512, 1024, 3584, 4096, 20480, 70144]), SIZE - offset)
        words = [
            word.format(value) for word, value in zip(command[2:], (offset, length), strict=True)
        ]
        run([*command[:2], *words, device], 30)
        expected[offset : offset + length] = bytes(length)
    run(["blockdev", "--flushbufs", device], 30)
    assert Path(device).read_bytes() == expected

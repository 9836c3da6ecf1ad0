"""Other programs on the device: nbdcopy, qemu-img, qemu-io, fio."""

from __future__ import annotations

import json
import os
import random
import tempfile
from pathlib import Path

import pytest

from tests.servers.nbdkit import Nbdkit, connected
from tests.volume.support import (
    CHUNK,
    IMAGE,
    make_image,
    noise,
)

from .support import (
    SIZE,
    needs,
    needs_nbdkit,
    original,
    run,
    serve,
)

pytestmark = needs_nbdkit


def raw_image(tmp_path: Path) -> Path:
    path = tmp_path / "image.raw"
    path.write_bytes(original(0, SIZE))
    return path


def test_nbdcopy_both_ways(tmp_path: Path, served: Nbdkit) -> None:
    needs("nbdcopy", "libnbd-bin")
    run("nbdcopy", served.uri, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == original(0, SIZE)
    changed = bytearray(original(0, SIZE))
    changed[CHUNK : 9 * CHUNK] = bytes(4 * CHUNK) + noise(4 * CHUNK, "changed")
    changed[25 * CHUNK : 26 * CHUNK] = noise(CHUNK, "in the hole")
    (tmp_path / "in").write_bytes(changed)
    run("nbdcopy", "--flush", "--destination-is-zero", tmp_path / "in", served.uri)
    run("nbdcopy", "--flush", tmp_path / "in", served.uri)
    run("nbdcopy", served.uri, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == changed


def test_qemu_img_reads_converts_and_compares(tmp_path: Path, served: Nbdkit) -> None:
    needs("qemu-img", "qemu-utils")
    uri = f"nbd+unix:///{IMAGE}?socket={served.socket}"
    size = -(-SIZE // 512) * 512
    assert json.loads(run("qemu-img", "info", "--output=json", uri))["virtual-size"] == size
    run("qemu-img", "convert", "-O", "qcow2", uri, tmp_path / "out.qcow2")
    raw = raw_image(tmp_path)
    run("qemu-img", "compare", uri, tmp_path / "out.qcow2")
    os.truncate(raw, size)
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", raw, uri)
    # And onto it, zeros included: -n keeps the device, whose end is no whole sector.
    part = tmp_path / "part.raw"
    part.write_bytes(noise(3 * CHUNK) + bytes(20 * CHUNK) + noise(CHUNK, 1))
    options = f"driver=raw,size={24 * CHUNK},file.driver=nbd,file.server.type=unix"
    target = f"{options},file.server.path={served.socket}"
    run("qemu-img", "convert", "-n", "--target-image-opts", part, target)
    with connected(served) as handle:
        assert handle.pread(24 * CHUNK, 0) == part.read_bytes()


@pytest.mark.parametrize(
    "operations", [2000, pytest.param(100_000, marks=[pytest.mark.long, pytest.mark.timeout(1800)])]
)
def test_blkverify_finds_no_difference_to_a_file(
    tmp_path: Path, served: Nbdkit, operations: int
) -> None:
    """qemu writes alike to us and to a file, and compares whatever it reads of both."""
    needs("qemu-io", "qemu-utils")
    raw = raw_image(tmp_path)
    chance = random.Random(4)
    commands, under_way = [], []  # two writes of a place at once may come in either order
    for _ in range(operations):
        length = chance.choice([512, 4096, 8192, 65536, 3 * 512])
        offset = chance.randrange((SIZE - length) // 512) * 512
        name = chance.choice(["write", "write", "aio_write", "read", "aio_flush", "flush"])
        place = range(offset, offset + length)
        if any(one.start < place.stop and place.start < one.stop for one in under_way):
            commands.append("aio_flush")
            under_way.clear()
        if name == "aio_flush":
            under_way.clear()
        elif name == "aio_write":
            under_way.append(place)
        pattern = f" -P {chance.randrange(256)}" if name.endswith("write") else ""
        commands.append(name if "flush" in name else f"{name}{pattern} {offset} {length}")
    options = (
        f"driver=blkverify,raw.driver=file,raw.filename={raw},test.driver=nbd,"
        f"test.server.type=unix,test.server.path={served.socket}"
    )
    script = "\n".join([*commands, "aio_flush", f"read 0 {SIZE // 512 * 512}", "quit"])
    said = run("qemu-io", "--image-opts", options, input=script)
    assert "mismatch" not in said
    with connected(served) as handle:
        whole = SIZE // 512 * 512
        assert handle.pread(whole, 0) == raw.read_bytes()[:whole]


def test_fio_verifies_with_many_requests_under_way(tmp_path: Path, served: Nbdkit) -> None:
    needs("fio", "fio")
    run(
        "fio", "--name=verify", "--ioengine=nbd", f"--uri={served.uri}", "--rw=randwrite",
        "--bsrange=512-16k", "--bs_unaligned=0", f"--size={40 * CHUNK}", "--io_size=6m",
        "--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--fsync=32", "--iodepth=16",
        "--random_generator=lfsr", "--randseed=7",
        cwd=tmp_path,
    )  # fmt: skip


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_fio_verifies_10_gib(tmp_path: Path) -> None:
    """Every block of a large device is written once, in random order, and read back."""
    needs("fio", "fio")
    size = 10 << 30
    url = make_image(tmp_path / "repo", {0: noise(CHUNK)}, size=size)
    # On a disk: pytest's folder may be in memory.
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="horcrux-") as overlay:
        with serve(tmp_path, url, overlay=Path(overlay, "o")) as server:
            run(
                "fio", "--name=verify", "--ioengine=nbd", f"--uri={server.uri}", "--rw=randwrite",
                "--bssplit=4k/10:16k/20:64k/70", f"--size={size}", "--iodepth=16",
                "--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--fsync=1024",
                "--randseed=7",
                cwd=tmp_path,
            )  # fmt: skip

"""Objects: any plaintext comes back, nothing else ever does, and memory is bounded."""

from __future__ import annotations

import resource
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from horcrux_nbd.errors import Damaged
from horcrux_nbd.repository.objects import (
    HEADER,
    ID_SIZE,
    MAX_LAYERS,
    NULL_ID,
    STORED,
    ZSTD,
    Kind,
    ObjectTooNew,
    decode,
    encode,
    key_id,
    kind_of,
    layers_of,
    max_stored,
    object_id,
    object_key,
)

from .images import content

PROJECT = Path(__file__).resolve().parents[2]
GiB = 1 << 30
KINDS = st.sampled_from(list(Kind))
# Compressible, incompressible, empty.
PLAIN = st.one_of(
    st.binary(max_size=5000),
    st.builds(lambda b, n: b * n, st.binary(max_size=20), st.integers(0, 999)),
)


@given(KINDS, PLAIN)
def test_what_is_encoded_comes_back(kind: Kind, plain: bytes) -> None:
    oid = object_id(kind, plain)
    data = encode(kind, plain)
    assert decode(data, oid, (kind,), len(plain)) == (kind, plain)
    assert kind_of(oid) is kind or (kind is Kind.PATCH and layers_of(oid) == 0)
    assert len(data) <= max_stored(len(plain))


@given(KINDS, KINDS, PLAIN, PLAIN)
def test_ids_tell_kinds_and_contents_apart(a: Kind, b: Kind, x: bytes, y: bytes) -> None:
    assert (object_id(a, x) == object_id(b, y)) == ((a, x) == (b, y))
    assert object_id(a, memoryview(x)) == object_id(a, bytearray(x)) == object_id(a, x)


def test_the_id_is_that_of_the_document() -> None:
    """docs/format.md, "Ids": fixed for ever by this."""
    hashed = "48fc721fbbc172e0925fa27af1671de225ba927134802998b10a1568a18865"  # b3sum of 01
    assert object_id(Kind.CHUNK, b"").hex() == hashed + "01"
    patch = bytes([12, 3, 1, 0]) + b"rest"
    assert object_id(Kind.PATCH, patch)[-1] == 0x32
    assert layers_of(object_id(Kind.PATCH, patch)) == 3
    assert kind_of(object_id(Kind.PATCH, patch)) is Kind.PATCH


def test_what_no_id_tells() -> None:
    assert kind_of(NULL_ID) is None
    assert layers_of(NULL_ID) == 0
    assert kind_of(b"") is None
    assert kind_of(bytes(31) + b"\x06") is None
    assert kind_of(bytes(31) + b"\x11") is None  # a chunk has no layers
    assert kind_of(bytes(31) + b"\x02") is None  # a patch has
    assert kind_of(bytes(31) + bytes([MAX_LAYERS << 4 | 2])) is Kind.PATCH


@given(st.binary(min_size=31, max_size=31), st.sampled_from([1, 0x12, 0xF2, 3, 4]))
def test_keys(hashed: bytes, last: int) -> None:
    oid = hashed + bytes([last])
    key = object_key(oid)
    assert key == f"objects/{oid.hex()[:2]}/{oid.hex()}"
    assert key_id(key) == oid
    for other in (key.upper(), key[:-1], key + "0", key + ".partial", f"x{key}", key[8:]):
        assert key_id(other) is None
    moved = key.replace(key[8:10], "zz", 1)
    assert key_id(moved) is None


@pytest.mark.parametrize("last", ["00", "05", "02", "11", "ff"])
def test_a_key_of_no_kind_is_none(last: str) -> None:
    assert key_id(f"objects/ab/ab{'0' * 60}{last}") is None


# ---- damage


def damaged(data: bytes, oid: bytes, bound: int = 5000, kind: Kind = Kind.CHUNK) -> Damaged:
    with pytest.raises(Damaged) as caught:
        decode(data, oid, (kind,), bound, "cp:///x")
    assert oid.hex() in str(caught.value)
    assert "cp:///x" in str(caught.value)
    return caught.value


PLAINS = {"stored": content("x", 300), "zstd": b"compress me " * 100}


@pytest.fixture(params=sorted(PLAINS))
def sound(request: pytest.FixtureRequest) -> tuple[bytes, bytes]:
    plain = PLAINS[request.param]
    data = encode(Kind.CHUNK, plain)
    assert data[6] == (STORED if request.param == "stored" else ZSTD)
    return data, object_id(Kind.CHUNK, plain)


def test_every_truncation(sound: tuple[bytes, bytes]) -> None:
    data, oid = sound
    for length in range(len(data)):
        damaged(data[:length], oid)
    damaged(data + b"\0", oid)


def test_every_bit(sound: tuple[bytes, bytes]) -> None:
    """A single turned bit anywhere, header included, is found; but for one that means nothing."""
    data, oid = sound
    for bit in range(len(data) * 8):
        bad = bytearray(data)
        bad[bit >> 3] ^= 1 << (bit & 7)
        try:
            kind, plain = decode(bytes(bad), oid, (Kind.CHUNK,), 5000)
        except Damaged:
            continue
        assert object_id(kind, plain) == oid  # zstd has bits that change nothing
        assert bit >= HEADER.size * 8


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_noise(noise: bytes) -> None:
    with pytest.raises(Damaged):
        decode(noise, object_id(Kind.CHUNK, b"x"), tuple(Kind), 1 << 20)


@given(st.binary(max_size=200), st.integers(0, 255), st.integers(0, 9), st.integers(0, 9))
def test_noise_behind_a_header(noise: bytes, version: int, kind: int, codec: int) -> None:
    header = HEADER.pack(b"HRCX", version, kind, codec, 0, 300, len(noise))
    with pytest.raises(Damaged):
        decode(header + noise, object_id(Kind.CHUNK, b"x"), tuple(Kind), 1 << 20)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        (0, b"HRCY", "no Horcrux object"),
        (1, 0, "damaged header"),
        (1, 2, "upgrade"),
        (2, 0, "damaged header"),
        (2, 9, "damaged header"),
        (2, int(Kind.NODE), "is a node where a chunk belongs"),
        (3, 7, "damaged header"),
        (4, 1, "damaged header"),
        (5, 2_000_000_000, "lengths|claims"),
        (5, 0, "lengths"),
        (5, 5001, "claims 5001 bytes where at most 5000"),
        (5, 1999, "two lengths"),
        (6, 5, "truncated or has bytes too many"),
        (6, 4_000_000_000, "lengths"),
    ],
)
def test_every_header_field(field: int, value: object, says: str) -> None:
    plain = b"compress me " * 100
    data = encode(Kind.CHUNK, plain)
    fields = list(HEADER.unpack_from(data))
    fields[field] = value
    error = damaged(HEADER.pack(*fields) + data[HEADER.size :], object_id(Kind.CHUNK, plain))
    assert any(part in str(error) for part in says.split("|"))
    assert isinstance(error, ObjectTooNew) == (value == 2)


def test_another_valid_object_is_not_it() -> None:
    mine, other = b"mine " * 50, b"other" * 50
    damaged(encode(Kind.CHUNK, other), object_id(Kind.CHUNK, mine))
    # The same bytes as another kind: proven by the kind in the hash.
    damaged(encode(Kind.NODE, mine), object_id(Kind.CHUNK, mine))
    with pytest.raises(Damaged):
        decode(encode(Kind.NODE, mine), object_id(Kind.CHUNK, mine), tuple(Kind), 5000)


def frame(size: int, *, claims: int | None = None, checksum: bool = False) -> bytes:
    """A zstd frame of `size` zeros, which says it has `claims` (None: says nothing)."""
    compressor = zstandard.ZstdCompressor(
        write_content_size=claims is not None, write_checksum=checksum
    )
    data = bytearray(compressor.compress(bytes(size)))
    if claims is not None and claims != size:
        at = data.find(struct.pack("<I", size), 4)
        assert at > 0
        data[at : at + 4] = struct.pack("<I", claims)
    return bytes(data)


def claim(payload: bytes, length: int) -> bytes:
    return HEADER.pack(b"HRCX", 1, Kind.CHUNK, ZSTD, 0, length, len(payload)) + payload


def test_frames_that_lie() -> None:
    size = 100_000
    oid = object_id(Kind.CHUNK, bytes(size))
    assert decode(claim(frame(size, claims=size), size), oid, (Kind.CHUNK,), size)
    # A checksum or none, one frame: fine. No length, another length, two frames, a tail: not.
    assert decode(claim(frame(size, claims=size, checksum=True), size), oid, (Kind.CHUNK,), size)
    damaged(claim(frame(size), size), oid, size)
    damaged(claim(frame(size, claims=size - 1), size), oid, size)
    damaged(claim(frame(size, claims=size - 1), size - 1), oid, size)
    damaged(claim(frame(size, claims=size) + frame(0, claims=0), size), oid, size)
    damaged(claim(frame(size, claims=size) + b"x", size), oid, size)
    skippable = struct.pack("<II", 0x184D2A50, 4) + b"skip"
    damaged(claim(skippable + frame(size, claims=size), size), oid, size)


BOMBS = """
import resource, struct, sys
import zstandard
from horcrux_nbd.errors import Damaged
from horcrux_nbd.repository.objects import HEADER, ZSTD, Kind, decode, object_id

def rss():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB

# Frames that really become 1 GiB: one tells so, one tells nothing; made from 1 MiB pieces.
def real(size, tells):
    compressor = zstandard.ZstdCompressor(level=19, write_content_size=tells)
    out = compressor.compressobj(size=size if tells else -1)
    return b"".join([out.compress(bytes(1 << 20)) for _ in range(size >> 20)]) + out.flush()

oid = object_id(Kind.CHUNK, b"x")
bound = 512 << 10
frames = [real(1 << 30, True), real(1 << 30, False)]
# One that claims 10 GiB: single segment, 8-byte length, an empty last block.
frames.append(bytes.fromhex("28b52ffde0") + struct.pack("<Q", 10 << 30) + b"\\1\\0\\0")
# One with the right length and a window of 2 GiB.
frames.append(bytes.fromhex("28b52ffdc0a8") + struct.pack("<Q", 512 << 10) + b"\\1\\0\\0")
decode_errors = 0
before = rss()
for frame in frames:
    for length in (512 << 10, 10, 0xFFFFFFFF, 1 << 30):
        data = HEADER.pack(b"HRCX", 1, Kind.CHUNK, ZSTD, 0, length, len(frame)) + frame
        try:
            decode(data, oid, (Kind.CHUNK,), bound)
        except Damaged:
            decode_errors += 1
print(decode_errors, rss() - before)
"""


def test_bombs_cost_nothing() -> None:
    """1 KiB that claims, or becomes, gigabytes: an error, within 10 MiB of memory."""
    result = subprocess.run(
        [sys.executable, "-c", BOMBS],
        capture_output=True,
        text=True,
        cwd=PROJECT,
        timeout=100,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (4 * GiB, 4 * GiB)),
    )
    errors, grown = map(int, result.stdout.split())
    assert errors == 16
    assert grown < 10 << 10


def test_sizes() -> None:
    assert HEADER.size == 16
    assert len(object_id(Kind.CHUNK, b"")) == ID_SIZE == 32

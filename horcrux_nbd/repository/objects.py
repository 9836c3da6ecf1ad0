"""Objects: immutable bytes named by what is in them (docs/format.md, "Objects").

An object is a kind and a plaintext. Its id is a BLAKE3 hash of both with the kind behind it, so
whoever asks for an id can tell whether the answer is right, whatever store, cache or mirror gave
it, and whoever sees an id, in an index node or in a listing, can tell what it names without
reading it. Stored, it is a 16-byte header and a payload; the header's lengths are checked against
what the caller can take before anything is allocated, so a 1 KiB object that claims to be 10 GiB
costs 1 KiB.
"""

from __future__ import annotations

import enum
import struct
import threading
from typing import Any, Final

import zstandard
from blake3 import blake3

from ..errors import Damaged
from .records import decode_record, encode_record

Buffer = bytes | bytearray | memoryview

MAGIC: Final = b"HRCX"
FORMAT_VERSION: Final = 1
HEADER: Final = struct.Struct("<4sBBBBII")  # magic, version, kind, codec, flags, plain, payload
ID_SIZE: Final = 32
HASH_SIZE: Final = ID_SIZE - 1  # 248 bits of BLAKE3; a collision is 2^124 hashes away
NULL_ID: Final = bytes(ID_SIZE)  # stands for all zeros: a chunk, or a whole subtree
MAX_LAYERS: Final = 15  # patches over each other, what the upper half of an id's last byte holds

# Bytes of a profile's plaintext: 16,384 runs of chunks (profiles.py).
MAX_PROFILE: Final = 8 + 16_384 * 8

STORED: Final = 0
ZSTD: Final = 1

# Level 3 hashes and compresses 256 KiB to 1 MiB chunks at 1.0 to 1.4 GB/s on two threads, as fast
# as level 1 within noise (PEERS.md).
ZSTD_LEVEL: Final = 3
# A payload that saves less than this part is stored as it is: reading it back costs no CPU.
WORTH_COMPRESSING: Final = 0.97


class Kind(enum.IntEnum):
    """What an object is. Part of what its id is made of."""

    CHUNK = 1
    PATCH = 2
    NODE = 3
    COMMIT = 4
    PROFILE = 5  # lies under a ref, not under objects/ (profiles.py)


class ObjectTooNew(Damaged):
    """An object of a format that this release does not know, or one whose header is damaged.

    A repository of a later format is refused when it is opened, so in one that was not refused
    this is damage like any other: a good copy elsewhere may do.
    """


_KIND_BYTE = {kind: bytes([kind]) for kind in Kind}
_KINDS = {int(kind): kind for kind in Kind}
_local = threading.local()


def kind_of(oid: bytes) -> Kind | None:
    """The kind of object that an id names; None for NULL_ID and for what is no id."""
    if len(oid) != ID_SIZE:
        return None
    kind = _KINDS.get(oid[-1] & 15)
    return kind if (oid[-1] >> 4 > 0) == (kind is Kind.PATCH) else None


def layers_of(oid: bytes) -> int:
    """How many patches have to be read for what `oid` names: 0 for all but a patch."""
    return oid[-1] >> 4


def object_key(oid: bytes) -> str:
    """Where a store keeps the object: `objects/ab/abcdef…`."""
    text = oid.hex()
    return f"objects/{text[:2]}/{text}"


def key_id(key: str) -> bytes | None:
    """The id in an object's key; None for a key of something else."""
    parts = key.split("/")
    if len(parts) != 3 or parts[0] != "objects" or len(parts[2]) != 2 * ID_SIZE:
        return None
    try:
        oid = bytes.fromhex(parts[2])
    except ValueError:
        return None
    is_object = kind_of(oid) not in (None, Kind.PROFILE)
    return oid if object_key(oid) == key and is_object else None


class Form:
    """How a repository names its objects and stores them: this one by plain hashes, in the clear.

    An encrypted repository has another (encryption.py). All that reads or writes the objects of a
    repository, in a store or on this host, does so by its form. Safe for several threads.
    """

    encrypted = False
    flags = 0  # of the header
    overhead = 0  # bytes that a payload is longer than what it holds

    def object_id(self, kind: Kind, plain: Buffer) -> bytes:
        """The 32-byte id of an object: 31 bytes of hash, and a byte that tells the kind.

        That byte's upper half is 0, but for a patch: there it is how many patches lie over each
        other, which the second byte of its plaintext says.
        """
        layers = plain[1] & 15 if kind is Kind.PATCH and len(plain) > 1 else 0
        digest = self._hasher(kind).update(plain).digest(length=HASH_SIZE)
        return digest + bytes([layers << 4 | kind])

    def _hasher(self, kind: Kind) -> blake3:
        return blake3(_KIND_BYTE[kind])

    def max_stored(self, max_plain: int) -> int:
        """The most bytes that an object of up to `max_plain` bytes of plaintext takes stored."""
        return HEADER.size + max_plain + self.overhead

    def encode(
        self, kind: Kind, plain: Buffer, oid: bytes | None = None, level: int = ZSTD_LEVEL
    ) -> bytes:
        """The stored form of an object. `oid` is its id, where it is known."""
        compressor = getattr(_local, "compressor", None)
        if compressor is None or _local.level != level:
            compressor = _local.compressor = zstandard.ZstdCompressor(level=level)
            _local.level = level
        payload = compressor.compress(plain)
        codec = ZSTD
        if len(payload) > len(plain) * WORTH_COMPRESSING:
            payload, codec = bytes(plain), STORED
        length = len(payload) + self.overhead
        header = HEADER.pack(MAGIC, FORMAT_VERSION, kind, codec, self.flags, len(plain), length)
        if not self.encrypted:
            return header + payload
        return header + self._seal(oid or self.object_id(kind, plain), header, payload)

    def _seal(self, oid: bytes, header: bytes, payload: bytes) -> bytes:
        return payload

    def _open(self, oid: bytes, header: memoryview, payload: memoryview, what: str) -> Buffer:
        return payload

    def decode(
        self,
        data: bytes,
        oid: bytes,
        kinds: tuple[Kind, ...],
        max_plain: int,
        where: str = "store",
    ) -> tuple[Kind, bytes]:
        """Kind and plaintext of a stored object, proven to be what `oid` names.

        `max_plain` (bytes) bounds what is allocated; `where` is for the message. Raises Damaged for
        anything that is not that object, of one of `kinds`.
        """
        what = f"object {oid.hex()} in {where}"
        kind, codec, plain_length, payload_length = self._check_header(data, what)
        if kind not in kinds:
            raise Damaged(
                f"{what} is a {kind.name.lower()} where a {kinds[0].name.lower()} belongs"
            )
        if plain_length > max_plain:
            raise Damaged(f"{what} claims {plain_length} bytes where at most {max_plain} can be")
        if len(data) - HEADER.size != payload_length:
            raise Damaged(f"{what} is truncated or has bytes too many")
        view = memoryview(data)
        payload = self._open(oid, view[: HEADER.size], view[HEADER.size :], what)
        plain = bytes(payload) if codec == STORED else _decompress(payload, plain_length, what)
        if len(plain) != plain_length or self.object_id(kind, plain) != oid:
            raise Damaged(f"{what} is damaged: its content does not match its id")
        return kind, plain

    def _check_header(self, data: bytes, what: str) -> tuple[Kind, int, int, int]:
        if len(data) < HEADER.size:
            raise Damaged(f"{what} is truncated: {len(data)} bytes are no object")
        magic, version, kind, codec, flags, plain_length, payload_length = HEADER.unpack_from(data)
        if magic != MAGIC:
            raise Damaged(f"{what} is no Horcrux object (its first bytes are {magic.hex()})")
        if version > FORMAT_VERSION:
            raise ObjectTooNew(
                f"{what} is damaged, or of a format ({version}) that needs an upgrade"
            )
        if (
            version != FORMAT_VERSION
            or flags != self.flags
            or codec not in (STORED, ZSTD)
            or kind not in _KINDS
        ):
            raise Damaged(f"{what} has a damaged header")
        # What compression does not shorten is stored as it is: a payload is never the longer one.
        if payload_length > plain_length + self.overhead:
            raise Damaged(f"{what} has a damaged header (lengths)")
        return _KINDS[kind], codec, plain_length, payload_length

    # ---- records that are not objects (records.py)

    def encode_record(self, key: str, members: dict[str, Any]) -> bytes:
        """A record for `key` as it is stored. Raises UsageError where it is too long."""
        return encode_record(members)

    def decode_record(self, key: str, data: bytes, what: str) -> dict[str, Any]:
        """The members of the record at `key`. Raises Damaged, EnvironmentProblem."""
        return decode_record(data, what)


PLAIN: Final = Form()

# Of the plain form, for tests: what knows a repository goes by its form (test_layering.py).
object_id, encode, decode, max_stored = (
    PLAIN.object_id,
    PLAIN.encode,
    PLAIN.decode,
    PLAIN.max_stored,
)


def _decompress(payload: Buffer, plain_length: int, what: str) -> bytes:
    decompressor = getattr(_local, "decompressor", None)
    if decompressor is None:
        decompressor = _local.decompressor = zstandard.ZstdDecompressor()
    try:
        # The frame has a length of its own, which the library would allocate unasked.
        if zstandard.frame_content_size(payload) != plain_length:
            raise Damaged(f"{what} is damaged: two lengths in it differ")
        return bytes(decompressor.decompress(payload, allow_extra_data=False))
    except zstandard.ZstdError as error:
        raise Damaged(f"{what} is damaged: {error}") from None

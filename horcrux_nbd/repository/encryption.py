"""The form of an encrypted repository (docs/format.md, "Encryption"; docs/security.md).

One random master key. From it come, by BLAKE3's key derivation, one key that makes the ids (so
equal chunks still share, and nobody without it can tell which chunk an id names), and one each that
makes the keys of objects and of records. Each object has an AES-256-GCM key of its own, made from
its id: what is sealed twice under one key is the same plaintext, and that with nonces of 96 random
bits, so no number of objects wears the cipher out. Header and id are bound in: an object in
another's place, of another kind or with another length does not open. After it opened, its id is
computed from its plaintext as everywhere.
"""

from __future__ import annotations

import base64
import binascii
import secrets
from typing import Any, Final

from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ..errors import Damaged
from .objects import HEADER, Buffer, Form, Kind
from .records import canonical, decode_record, encode_record, parse, text

FEATURE: Final = "encryption"  # in `features` of horcrux.json: who does not know it is refused
CIPHER: Final = "aes-256-gcm"
MASTER_SIZE: Final = 32
NONCE_SIZE: Final = 12
TAG_SIZE: Final = 16

_CONTEXT = "horcrux-nbd 2026 repository "  # BLAKE3 wants it hard-coded, global and unique


def derive(context: str, secret: bytes) -> bytes:
    """A 32-byte key for one purpose."""
    return blake3(secret, derive_key_context=_CONTEXT + context).digest()


def seal(key: bytes, plain: bytes, bound: bytes) -> bytes:
    """`plain` as nonce, ciphertext and tag; it opens with the same `bound` only."""
    nonce = secrets.token_bytes(NONCE_SIZE)
    return nonce + AESGCM(key).encrypt(nonce, plain, bound)


def unseal(key: bytes, sealed: Buffer, bound: bytes) -> bytes:
    """What was sealed. Raises ValueError."""
    if len(sealed) < NONCE_SIZE + TAG_SIZE:
        raise ValueError("it is too short")
    try:
        return AESGCM(key).decrypt(sealed[:NONCE_SIZE], sealed[NONCE_SIZE:], bound)
    except InvalidTag:
        raise ValueError("it was not sealed with this key, or was changed") from None


class EncryptedForm(Form):
    """How an encrypted repository names and stores its objects. Safe for several threads."""

    encrypted = True
    flags = 1
    overhead = NONCE_SIZE + TAG_SIZE

    def __init__(self, master: bytes) -> None:
        assert len(master) == MASTER_SIZE
        self._ids = derive("object ids", master)
        self._objects = derive("object keys", master)
        self._records = derive("record keys", master)

    def _hasher(self, kind: Kind) -> blake3:
        return blake3(bytes([kind]), key=self._ids)

    def _seal(self, oid: bytes, header: bytes, payload: bytes) -> bytes:
        return seal(self._key(oid), payload, header + oid)

    def _open(self, oid: bytes, header: Buffer, payload: Buffer, what: str) -> Buffer:
        try:
            return unseal(self._key(oid), payload, bytes(header) + oid)
        except ValueError:
            raise Damaged(f"{what} is damaged: it does not decrypt") from None

    def _key(self, oid: bytes) -> bytes:
        return blake3(oid, key=self._objects).digest()

    def encode_record(self, key: str, members: dict[str, Any]) -> bytes:
        sealed = seal(self._record_key(key), canonical(members), key.encode())
        return encode_record({"sealed": base64.b64encode(sealed).decode()})

    def decode_record(self, key: str, data: bytes, what: str) -> dict[str, Any]:
        value = decode_record(data, what)
        try:
            sealed = base64.b64decode(text(value["sealed"]), validate=True)
            return parse(unseal(self._record_key(key), sealed, key.encode()))
        except (KeyError, binascii.Error, ValueError) as error:
            why = "it is not encrypted" if isinstance(error, KeyError) else error
            raise Damaged(
                f"{what} is damaged, or was not written by somebody who has the key ({why}): "
                "restore it from a copy"
            ) from None

    def _record_key(self, key: str) -> bytes:
        return blake3(key.encode(), key=self._records).digest()


def key_check(master: bytes, repository_id: str) -> str:
    """What horcrux.json says of the master key: tells a wrong one, and nothing about the right."""
    return derive("key check", master + repository_id.encode()).hex()[:32]


assert HEADER.size == 16  # what is bound in is header and id, 48 bytes

"""The keys of an encrypted repository: each wraps the one master key (docs/format.md, "Keys").

A key is a record below `keys/`. What opens it is a passphrase (through scrypt) or a key file (32
random bytes). Keys come and go without an object being written anew; the master key stays.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from blake3 import blake3
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from .. import files
from ..chunkstore.base import ChunkStore
from ..errors import Damaged, EnvironmentProblem, KeyNotFound, KeyRequired, NotFound, UsageError
from .commits import now
from .encryption import MASTER_SIZE, seal, unseal
from .records import MAX_RECORD, decode_record, encode_record, integer, text

PREFIX: Final = "keys/"
PASSPHRASE, KEY_FILE, MASTER = "passphrase", "file", "master"
MIN_PASSPHRASE = 8  # characters
MAX_SECRET = 4096  # bytes of a passphrase
MAX_LABEL = 200
MAX_KEYS = 64  # tried; each passphrase costs a third of a second

# 128 MiB and a third of a second for each guess.
SCRYPT_N, SCRYPT_R, SCRYPT_P = 1 << 17, 8, 1
# A record may ask for no more, or who can write to the store could take this host's memory.
MAX_SCRYPT_N, MAX_SCRYPT_R, MAX_SCRYPT_P = 1 << 20, 8, 4

_NAME = re.compile(r"[0-9a-f]{16}")
_KEY_LINE = re.compile(rb"horcrux-key-1 ([0-9a-f]{64})\n?")
_MASTER_LINE = re.compile(rb"horcrux-master-1 ([0-9a-zA-Z]{1,64}) ([0-9a-f]{64})\n?")


@dataclass(frozen=True)
class Secret:
    """What opens a key: a passphrase or the bytes of a key file; or a master key itself."""

    kind: str
    value: bytes
    repository_id: str = ""  # of a master key

    def __repr__(self) -> str:  # a traceback shows no secret
        return f"Secret({self.kind!r})"


@dataclass(frozen=True)
class Slot:
    """One key of a repository: everything about it but what opens it."""

    name: str
    kind: str
    label: str
    created: str
    kdf: dict[str, Any]
    wrapped: bytes

    @property
    def key(self) -> str:
        return PREFIX + self.name


def passphrase(value: str | bytes) -> Secret:
    """Raises UsageError for one that is too short or too long."""
    data = value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value
    if not MIN_PASSPHRASE <= len(data) <= MAX_SECRET:
        raise UsageError(
            f"a passphrase has {MIN_PASSPHRASE} to {MAX_SECRET} characters: choose another, such "
            "as six random words"
        )
    return Secret(PASSPHRASE, data)


def read_passphrase_file(path: str | Path) -> Secret:
    """The passphrase in a file: all of it, but a line end at its end. Raises UsageError."""
    data = _read(path)
    return passphrase(data.removesuffix(b"\n").removesuffix(b"\r"))


def read_key_file(path: str | Path) -> Secret:
    """What `make_key_file` or `export` wrote. Raises UsageError, which shows nothing of it."""
    data = _read(path)
    if match := _KEY_LINE.fullmatch(data):
        return Secret(KEY_FILE, bytes.fromhex(match[1].decode()))
    if match := _MASTER_LINE.fullmatch(data):
        return Secret(MASTER, bytes.fromhex(match[2].decode()), match[1].decode())
    raise UsageError(
        f"{path} is no key file: make one with `horcrux-cli key make FILE`, or give a file with a "
        "passphrase as --passphrase-file"
    )


def _read(path: str | Path) -> bytes:
    try:
        with open(path, "rb") as file:
            if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o002:
                raise UsageError(
                    f"{path} can be written by anybody: chmod 600 it, or make a new one"
                )
            return file.read(MAX_SECRET + 3)
    except OSError as error:
        raise UsageError(f"key {path} cannot be read ({error.strerror}): check the path") from None


def make_key_file(path: str | Path) -> None:
    """A new key of 32 random bytes, for the owner's eyes only. Raises UsageError if it exists."""
    _write(path, b"horcrux-key-1 " + secrets.token_hex(32).encode() + b"\n")


def export_master(path: str | Path, repository_id: str, master: bytes) -> None:
    """Write the master key itself: opens the repository whatever becomes of its keys."""
    line = f"horcrux-master-1 {repository_id} {master.hex()}\n"
    _write(path, line.encode())


def _write(path: str | Path, data: bytes) -> None:
    try:
        files.publish(path, data, exclusive=True, mode=0o600)
    except FileExistsError:
        raise UsageError(f"{path} is there already: choose another name") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({error.strerror})") from None


# ---- in the repository


def make_slot(secret: Secret, master: bytes, repository_id: str, label: str = "") -> Slot:
    """A new key that `secret` opens. Raises UsageError."""
    if len(label) > MAX_LABEL or not label.isprintable():
        raise UsageError(f"a key's label is at most {MAX_LABEL} printable characters")
    name = secrets.token_hex(8)
    salt = secrets.token_hex(16)
    kdf: dict[str, Any] = {"name": "blake3", "salt": salt}
    if secret.kind == PASSPHRASE:
        kdf = {"name": "scrypt", "salt": salt, "n": SCRYPT_N, "r": SCRYPT_R, "p": SCRYPT_P}
    elif secret.kind != KEY_FILE:
        raise UsageError("a master key opens the repository as it is: give a key or a passphrase")
    bound = _bound(repository_id, name)
    return Slot(name, secret.kind, label, now(), kdf, seal(_wrapping(secret, kdf), master, bound))


def _bound(repository_id: str, name: str) -> bytes:
    return f"{repository_id}\n{PREFIX}{name}".encode()


def _wrapping(secret: Secret, kdf: dict[str, Any]) -> bytes:
    """The key that wraps the master key."""
    salt = bytes.fromhex(kdf["salt"])
    if kdf["name"] == "scrypt":
        cost = Scrypt(salt=salt, length=32, n=kdf["n"], r=kdf["r"], p=kdf["p"])
        return cost.derive(secret.value)
    return blake3(salt, key=secret.value).digest()


def encode_slot(slot: Slot) -> bytes:
    """The record of a key as it is stored."""
    return encode_record(
        {
            "created": slot.created,
            "kdf": slot.kdf,
            "key": slot.key,
            "kind": slot.kind,
            "label": slot.label,
            "wrapped": slot.wrapped.hex(),
        }
    )


def decode_slot(data: bytes, what: str) -> Slot:
    """Raises Damaged, EnvironmentProblem."""
    value = decode_record(data, what)
    try:
        kdf, kind, name = value["kdf"], text(value["kind"]), text(value["key"]).removeprefix(PREFIX)
        if not what.endswith(PREFIX + name) or not _NAME.fullmatch(name):
            raise ValueError(f"it belongs at {value['key']!r:.60}")
        wanted = {PASSPHRASE: "scrypt", KEY_FILE: "blake3"}.get(kind)
        if wanted is None or not isinstance(kdf, dict) or text(kdf["name"]) != wanted:
            raise EnvironmentProblem(f"{what} is of a kind that needs a newer horcrux-nbd")
        if len(bytes.fromhex(text(kdf["salt"]))) < 16:
            raise ValueError("salt")
        if kind == PASSPHRASE:
            n, r, p = (integer(kdf[part]) for part in "nrp")
            if not (2 <= n <= MAX_SCRYPT_N and n & (n - 1) == 0):
                raise ValueError("n")
            if not (1 <= r <= MAX_SCRYPT_R and 1 <= p <= MAX_SCRYPT_P):
                raise ValueError("r or p")
        return Slot(
            name,
            kind,
            text(value["label"]),
            text(value["created"]),
            kdf,
            bytes.fromhex(text(value["wrapped"])),
        )
    except (KeyError, ValueError, TypeError) as error:
        raise Damaged(f"{what} is damaged ({error!r}): restore it from a copy") from None


def slot_keys(store: ChunkStore) -> list[str]:
    """The keys of all records of keys."""
    return [PREFIX + name for name in store.children(PREFIX) if _NAME.fullmatch(name)]


def read_slot(store: ChunkStore, key: str) -> Slot:
    """Raises Damaged, KeyNotFound, EnvironmentProblem."""
    return decode_slot(store.get(key, 0, MAX_RECORD + 1), f"{store.url}: {key}")


def read_slots(store: ChunkStore) -> list[Slot]:
    """All keys that are sound, the oldest first."""
    found = []
    for key in slot_keys(store):
        with contextlib.suppress(Damaged, EnvironmentProblem, KeyNotFound):
            found.append(read_slot(store, key))
    return sorted(found, key=lambda slot: slot.created)


def open_slot(slot: Slot, secret: Secret, repository_id: str) -> bytes | None:
    """The master key, if `secret` opens this key."""
    if secret.kind != slot.kind:
        return None
    try:
        master = unseal(_wrapping(secret, slot.kdf), slot.wrapped, _bound(repository_id, slot.name))
    except ValueError:
        return None
    return master if len(master) == MASTER_SIZE else None


def unlock(store: ChunkStore, repository_id: str, secret: Secret) -> tuple[bytes, Slot | None]:
    """The master key, and which key it came from. Raises KeyRequired where none opens."""
    if secret.kind == MASTER:
        if secret.repository_id != repository_id:
            raise KeyRequired(f"this is the master key of another repository than {store.url}")
        return secret.value, None
    for slot in read_slots(store)[:MAX_KEYS]:
        master = open_slot(slot, secret, repository_id)
        if master is not None:
            return master, slot
    word = "passphrase" if secret.kind == PASSPHRASE else "key file"
    raise KeyRequired(
        f"no key of {store.url} opens with this {word}: `horcrux-cli key ls` lists them"
    )


def add_slot(store: ChunkStore, slot: Slot) -> None:
    """Store a key, durably."""
    store.put_exclusive(slot.key, encode_slot(slot))
    store.sync()


def remove_slot(store: ChunkStore, name: str) -> str:
    """Remove the key whose name begins with `name`. Raises NotFound, UsageError for the last one.

    Whoever had the master key, or a copy of the record, can still open the repository.
    """
    keys = slot_keys(store)
    found = [key for key in keys if key.startswith(PREFIX + name)]
    if not found or not name:
        raise NotFound(f"{store.url} has no key {name!r}: `horcrux-cli key ls` lists them")
    if len(found) > 1:
        raise UsageError(f"{name} is ambiguous: write more digits")
    if not any(slot.key != found[0] for slot in read_slots(store)):
        raise UsageError(
            f"{found[0].removeprefix(PREFIX)} is the last sound key: without it nobody can read "
            "the repository; add another one first"
        )
    store.delete(found[0])
    return found[0].removeprefix(PREFIX)

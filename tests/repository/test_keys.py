"""Keys: each wraps the master key, and they come and go without an object being written anew."""

from __future__ import annotations

import os
import stat
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from horcrux_nbd.errors import Damaged, EnvironmentProblem, KeyRequired, NotFound, UsageError
from horcrux_nbd.repository import keys
from horcrux_nbd.repository.keys import Secret
from horcrux_nbd.repository.records import decode_record, encode_record

from .memory_store import MemoryStore

MASTER = bytes(range(32))
ID = "0123456789abcdef"
FILE = Secret(keys.KEY_FILE, bytes(range(1, 33)))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "SCRYPT_N", 1 << 10)


def store_with(*secrets: Secret) -> MemoryStore:
    store = MemoryStore()
    for secret in secrets:
        keys.add_slot(store, keys.make_slot(secret, MASTER, ID, secret.kind))
    return store


def test_a_passphrase_and_a_file_open_it() -> None:
    words = keys.passphrase("correct horse")
    store = store_with(words, FILE)
    for secret in (words, FILE):
        master, slot = keys.unlock(store, ID, secret)
        assert master == MASTER
        assert slot is not None
        assert slot.label == slot.kind == secret.kind
    for wrong in (keys.passphrase("correct house"), Secret(keys.KEY_FILE, bytes(32))):
        with pytest.raises(KeyRequired, match="no key of memory://store opens"):
            keys.unlock(store, ID, wrong)


def test_a_key_is_of_its_repository_and_its_place() -> None:
    """Else somebody who writes to the store could have a host use a key of another repository."""
    store = store_with(FILE)
    with pytest.raises(KeyRequired):
        keys.unlock(store, "another", FILE)
    (slot,) = keys.read_slots(store)
    assert keys.open_slot(slot, FILE, ID) == MASTER
    assert keys.open_slot(replace(slot, name="0" * 16), FILE, ID) is None


def test_what_is_stored_tells_nothing() -> None:
    words = keys.passphrase("correct horse")
    data = b"".join(store_with(words, FILE).objects.values())
    for secret in (MASTER, words.value, FILE.value):
        assert secret not in data
        assert secret.hex().encode() not in data
    assert "correct" not in repr(words)


def test_a_key_is_taken_away_but_never_the_last() -> None:
    words = keys.passphrase("correct horse")
    store = store_with(words, FILE)
    one, other = keys.read_slots(store)
    with pytest.raises(NotFound):
        keys.remove_slot(store, "ffff" if not one.name.startswith("ffff") else "0000")
    assert keys.remove_slot(store, one.name[:10]) == one.name
    with pytest.raises(KeyRequired):
        keys.unlock(store, ID, words if one.kind == keys.PASSPHRASE else FILE)
    with pytest.raises(UsageError, match="last sound key"):
        keys.remove_slot(store, other.name)
    assert keys.unlock(store, ID, FILE if other.kind == keys.KEY_FILE else words)[0] == MASTER


def test_a_damaged_key_does_not_count_and_hides_no_other() -> None:
    store = store_with(keys.passphrase("correct horse"), FILE)
    first = keys.slot_keys(store)[0]
    store.objects[first] = store.objects[first][:-20]
    with pytest.raises(Damaged, match=first):
        keys.read_slot(store, first)
    (slot,) = keys.read_slots(store)
    with pytest.raises(UsageError, match="last sound key"):
        keys.remove_slot(store, slot.name)


@pytest.mark.parametrize(
    ("kdf", "error"),
    [
        ({"n": 1 << 30}, Damaged),  # 1 TiB of memory
        ({"n": 3}, Damaged),
        ({"n": 1 << 17, "r": 1 << 20}, Damaged),
        ({"p": 10**9}, Damaged),
        ({"n": True}, Damaged),
        ({"salt": "00"}, Damaged),
        ({"salt": None}, Damaged),
        ({"name": "argon3"}, EnvironmentProblem),
    ],
)
def test_a_record_cannot_take_this_hosts_memory(
    kdf: dict[str, object], error: type[Exception]
) -> None:
    store = store_with(keys.passphrase("correct horse"))
    (key,) = keys.slot_keys(store)
    value = decode_record(store.objects[key], "it")
    value["kdf"] |= kdf
    store.objects[key] = encode_record(value)
    began = time.monotonic()
    with pytest.raises(error):
        keys.read_slot(store, key)
    with pytest.raises(KeyRequired):
        keys.unlock(store, ID, keys.passphrase("correct horse"))
    assert time.monotonic() - began < 5


@given(st.binary(max_size=300))
def test_noise_is_no_key(noise: bytes) -> None:
    with pytest.raises(Damaged):
        keys.decode_slot(noise, "keys/0123456789abcdef")


def test_key_files(tmp_path: Path) -> None:
    path = tmp_path / "k"
    keys.make_key_file(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    secret = keys.read_key_file(path)
    assert secret.kind == keys.KEY_FILE
    assert len(secret.value) == 32
    with pytest.raises(UsageError, match="is there already"):
        keys.make_key_file(path)
    export = tmp_path / "master"
    keys.export_master(export, ID, MASTER)
    assert keys.read_key_file(export) == Secret(keys.MASTER, MASTER, ID)
    assert keys.unlock(MemoryStore(), ID, keys.read_key_file(export)) == (MASTER, None)
    with pytest.raises(KeyRequired, match="another repository"):
        keys.unlock(MemoryStore(), "other", keys.read_key_file(export))


def test_bad_key_files(tmp_path: Path) -> None:
    path = tmp_path / "k"
    for bad in (b"", b"hunter2-hunter2", b"horcrux-key-1 " + b"0" * 63, b"x" * 100_000):
        path.write_bytes(bad)
        with pytest.raises(UsageError) as error:
            keys.read_key_file(path)
        assert "hunter2" not in str(error.value)  # the message shows nothing of it
    with pytest.raises(UsageError, match="cannot be read"):
        keys.read_key_file(tmp_path / "none")
    path.write_bytes(b"horcrux-key-1 " + b"0" * 64)
    os.chmod(path, 0o666)
    with pytest.raises(UsageError, match="written by anybody"):
        keys.read_key_file(path)


def test_passphrases(tmp_path: Path) -> None:
    path = tmp_path / "p"
    path.write_text("correct horse\n")
    assert keys.read_passphrase_file(path) == keys.passphrase("correct horse")
    for bad in ("short", "x" * 5000):
        with pytest.raises(UsageError, match="a passphrase has"):
            keys.passphrase(bad)
    with pytest.raises(UsageError, match="label"):
        keys.make_slot(FILE, MASTER, ID, "a\nb")

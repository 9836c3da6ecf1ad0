"""The encrypted form: what it hides, what it binds, and that nothing but the right key opens it."""

from __future__ import annotations

import json
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from horcrux_nbd.errors import Damaged
from horcrux_nbd.repository import encryption
from horcrux_nbd.repository.encryption import EncryptedForm, key_check, seal, unseal
from horcrux_nbd.repository.objects import HEADER, PLAIN, ZSTD, Kind

from .images import CHUNK, content

MASTER = bytes(range(32))
FORM = EncryptedForm(MASTER)
OTHER = EncryptedForm(bytes(32))
KEY = "refs/A/heads/main/99999999999999999998"


def stored(
    plain: bytes, kind: Kind = Kind.CHUNK, form: EncryptedForm = FORM
) -> tuple[bytes, bytes]:
    oid = form.object_id(kind, plain)
    return oid, form.encode(kind, plain, oid)


@given(st.sampled_from([Kind.CHUNK, Kind.NODE, Kind.COMMIT]), st.binary(max_size=5000))
def test_what_goes_in_comes_out(kind: Kind, plain: bytes) -> None:
    oid, data = stored(plain, kind)
    assert FORM.decode(data, oid, (kind,), len(plain)) == (kind, plain)
    assert len(data) <= FORM.max_stored(len(plain))


def test_ids_are_keyed_and_equal_chunks_share() -> None:
    plain = content("a")
    ids = {form.object_id(Kind.CHUNK, plain) for form in (FORM, OTHER, PLAIN)}
    assert len(ids) == 3  # who knows the chunk cannot look for it in a repository
    assert EncryptedForm(MASTER).object_id(Kind.CHUNK, plain) in ids
    assert FORM.object_id(Kind.NODE, plain)[:31] != FORM.object_id(Kind.CHUNK, plain)[:31]


@pytest.mark.parametrize("secret", [b"canary" * 700, content("x") + b"canary" * 10])
def test_nothing_of_the_plaintext_is_there(secret: bytes) -> None:
    _, data = stored(secret)
    assert b"canary" not in data
    assert secret[:16] not in data
    assert b"canary" not in FORM.encode_record(KEY, {"why": "canary"})


def test_only_its_key_opens_it() -> None:
    oid, data = stored(content("a"))
    for form in (OTHER, PLAIN):
        with pytest.raises(Damaged):
            form.decode(data, oid, (Kind.CHUNK,), CHUNK)


def test_an_object_in_the_clear_is_refused() -> None:
    """Who can write to the store cannot slip in what he made without the key."""
    plain = content("a")
    oid = FORM.object_id(Kind.CHUNK, plain)  # even with the right id
    with pytest.raises(Damaged, match="header"):
        FORM.decode(PLAIN.encode(Kind.CHUNK, plain), oid, (Kind.CHUNK,), CHUNK)


def test_every_bit_is_bound() -> None:
    """No bit of an object can change: not of its header, its nonce, its payload or its tag."""
    oid, data = stored(b"a" * 200, Kind.COMMIT)
    for bit in range(8 * len(data)):
        bad = bytearray(data)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(Damaged):
            FORM.decode(bytes(bad), oid, tuple(Kind), 1 << 20)


def test_an_object_opens_in_its_own_place_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where an id were not checked afterwards: it and the kind are bound in."""
    oid, data = stored(content("a"))
    other = FORM.object_id(Kind.CHUNK, content("b"))
    with pytest.raises(Damaged, match="does not decrypt"):
        FORM.decode(data, other, (Kind.CHUNK,), CHUNK)
    monkeypatch.setattr(FORM, "_key", lambda oid: bytes(32))  # one key for all
    oid, data = stored(content("a"))
    with pytest.raises(Damaged, match="does not decrypt"):
        FORM.decode(data, other, (Kind.CHUNK,), CHUNK)
    header = bytearray(data)
    header[5] = Kind.NODE
    with pytest.raises(Damaged, match="does not decrypt"):
        FORM.decode(bytes(header), oid, tuple(Kind), CHUNK)


def test_nonces_differ_and_so_do_the_keys_of_objects() -> None:
    a, b = stored(content("a"))[0], stored(content("b"))[0]
    assert FORM._key(a) != FORM._key(b)
    forms = {FORM.encode(Kind.CHUNK, content("a"))[HEADER.size :][:12] for _ in range(1000)}
    assert len(forms) == 1000


def test_a_length_is_checked_before_anything_is_taken() -> None:
    oid, data = stored(bytes(CHUNK))
    with pytest.raises(Damaged, match="claims"):
        FORM.decode(data, oid, (Kind.CHUNK,), CHUNK - 1)
    # Whoever has the key could seal a bomb: the frame's own length is checked too.
    fields = list(HEADER.unpack_from(data))
    fields[5] = 10
    header = HEADER.pack(*fields)
    payload = unseal(FORM._key(oid), data[HEADER.size :], data[: HEADER.size] + oid)
    assert fields[3] == ZSTD
    with pytest.raises(Damaged):
        FORM.decode(header + seal(FORM._key(oid), payload, header + oid), oid, (Kind.CHUNK,), CHUNK)


@settings(max_examples=200)
@given(st.binary(max_size=200))
def test_noise_is_damage(noise: bytes) -> None:
    oid, data = stored(b"x" * 100)
    for bad in (noise, data[: HEADER.size] + noise, data[:-1] + noise):
        if bad == data:
            continue
        with pytest.raises(Damaged):
            FORM.decode(bad, oid, tuple(Kind), 1 << 20)
    with pytest.raises(Damaged):
        FORM.decode_record(KEY, noise, "it")


def test_a_record_is_bound_to_its_key() -> None:
    members = {"why": "push", "number": 1}
    data = FORM.encode_record(KEY, members)
    assert FORM.decode_record(KEY, data, "it") == members
    for key, form in ((KEY[:-1] + "7", FORM), (KEY, OTHER)):
        with pytest.raises(Damaged, match="somebody who has the key"):
            form.decode_record(key, data, "it")


def test_a_record_in_the_clear_is_refused() -> None:
    """Who can write to the store cannot move a branch, as he can in a plain repository."""
    with pytest.raises(Damaged, match="not encrypted"):
        FORM.decode_record(KEY, PLAIN.encode_record(KEY, {"why": "mine"}), "it")
    value = json.loads(FORM.encode_record(KEY, {"why": "push"}))
    value["sealed"] = value["sealed"][:-8] + "AAAAAAA="
    value.pop("check")
    value.pop("version")
    with pytest.raises(Damaged):
        FORM.decode_record(KEY, encryption.encode_record(value), "it")


def test_the_keys_for_each_purpose_differ() -> None:
    keys = {FORM._ids, FORM._objects, FORM._records, MASTER}
    assert len(keys) == 4
    assert key_check(MASTER, "a") != key_check(MASTER, "b") != key_check(bytes(32), "b")


def test_threads_share_a_form() -> None:
    failed: list[BaseException] = []

    def work(seed: str) -> None:
        try:
            for number in range(20):
                plain = content(f"{seed}{number}")
                oid, data = stored(plain)
                assert FORM.decode(data, oid, (Kind.CHUNK,), CHUNK)[1] == plain
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(f"t{n}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed

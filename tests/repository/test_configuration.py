"""horcrux.json of encrypted repositories: made, copied, refused, replaced by somebody."""

from __future__ import annotations

from typing import Any

import pytest

from horcrux_nbd.errors import Damaged, EnvironmentProblem, KeyRequired, UsageError
from horcrux_nbd.repository import keyring, keys
from horcrux_nbd.repository.configuration import CONFIG_KEY, read_config
from horcrux_nbd.repository.copy import copy
from horcrux_nbd.repository.keys import KEY_FILE, Secret
from horcrux_nbd.repository.objects import Kind, key_id
from horcrux_nbd.repository.records import decode_record, encode_record
from horcrux_nbd.repository.removal import Collector
from horcrux_nbd.repository.repair import repair
from horcrux_nbd.repository.repository import Repository
from horcrux_nbd.repository.retention import Rules
from horcrux_nbd.repository.verify import verify

from .images import CHUNK, content, make_commit
from .memory_store import MemoryStore

SECRET = Secret(KEY_FILE, bytes(range(1, 33)))


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyring, "_known", {})


@pytest.fixture
def store() -> MemoryStore:
    store = MemoryStore()
    repository = Repository.create(store, CHUNK, secret=SECRET)
    for number in range(3):
        make_commit(repository, {0: content("a"), 300: content(f"canary {number}")}, image="A")
    return store


def lock() -> None:
    keyring._known.clear()


def change(store: MemoryStore, **members: Any) -> None:
    value = decode_record(store.objects[CONFIG_KEY], "it") | members
    store.objects[CONFIG_KEY] = encode_record(value)


def test_made_and_opened(store: MemoryStore) -> None:
    found = read_config(store)
    assert found.encrypted
    assert Repository.open(store).form.encrypted
    assert len(keys.slot_keys(store)) == 1
    lock()
    with pytest.raises(KeyRequired, match="key unlock"):
        Repository.open(store)
    assert read_config(store) == found  # needs no key
    keyring.remember(found.id, keys.unlock(store, found.id, SECRET)[0])
    assert verify(store, data=True).ok


def test_nothing_is_readable_without_the_key(store: MemoryStore) -> None:
    everything = b"".join(store.objects.values())
    commit = Repository.open(store).refs.head("A", "main")
    assert commit is not None
    assert commit.commit is not None
    for word in (b"canary", b"Test <test", b"main", commit.commit, commit.commit.hex().encode()):
        assert word not in everything
    plain = {content("a")[:32], content("canary 1")[:32]}
    assert not any(piece in everything for piece in plain)


def test_the_wrong_key_is_told(store: MemoryStore) -> None:
    lock()
    keyring.remember(read_config(store).id, bytes(32))
    with pytest.raises(KeyRequired, match="is not its key"):
        Repository.open(store)


def test_it_is_not_replaced_by_a_plain_one(store: MemoryStore) -> None:
    """What would be pushed to it next would be in the clear."""
    change(store, features=[], hash="blake3-248-kind")
    with pytest.raises(Damaged, match="somebody replaced it"):
        Repository.open(store)


def test_an_existing_plain_one_is_not_made_encrypted() -> None:
    store = MemoryStore()
    Repository.create(store)
    with pytest.raises(UsageError, match="not encrypted"):
        Repository.create(store, secret=SECRET)
    assert not keys.slot_keys(store)


@pytest.mark.parametrize(
    ("members", "error"),
    [
        ({"features": ["encryption", "more"]}, EnvironmentProblem),
        ({"features": []}, EnvironmentProblem),
        ({"hash": "blake3-248-kind"}, EnvironmentProblem),
        ({"format": 2}, EnvironmentProblem),
        ({"encryption": {"cipher": "rot13", "check": ""}}, EnvironmentProblem),
        ({"encryption": {"cipher": "", "check": ""}}, Damaged),
        ({"encryption": {"cipher": 1, "check": ""}}, Damaged),
        ({"encryption": None}, Damaged),
        ({"id": "../../x"}, Damaged),
        ({"chunk_size": 3}, Damaged),
    ],
)
def test_what_is_not_understood_is_refused(
    store: MemoryStore, members: dict[str, Any], error: type[Exception]
) -> None:
    change(store, **members)
    with pytest.raises(error):
        Repository.open(store)


def test_two_make_it_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One wins; the other's key, which opens nothing, goes."""
    store = MemoryStore()
    put = store.put_exclusive
    winner: list[Repository] = []

    def late(key: str, data: bytes) -> None:
        if key == CONFIG_KEY and not winner:
            winner.append(Repository.open(store)) if CONFIG_KEY in store.objects else None
            monkeypatch.setattr(store, "put_exclusive", put)
            winner.append(Repository.create(store, secret=Secret(KEY_FILE, bytes(32))))
        put(key, data)

    monkeypatch.setattr(store, "put_exclusive", late)
    loser = Repository.create(store, secret=SECRET)
    assert loser.id == winner[0].id
    (slot,) = keys.read_slots(store)
    assert keys.open_slot(slot, SECRET, loser.id) is None


def test_a_copy_has_the_keys(store: MemoryStore) -> None:
    source = Repository.open(store)
    other = MemoryStore()
    copy(source, other)
    assert keys.slot_keys(other) == keys.slot_keys(store)
    assert verify(other, data=True).ok
    master = keyring.find(source.id)
    assert master is not None
    keys.add_slot(store, keys.make_slot(Secret(KEY_FILE, bytes(32)), master, source.id))
    copy(source, other)
    assert keys.slot_keys(other) == keys.slot_keys(store)
    lock()
    assert keys.unlock(other, source.id, SECRET)[0] == master


def test_verify_and_repair_of_keys_and_objects(store: MemoryStore) -> None:
    mirror = MemoryStore()
    copy(Repository.open(store), mirror)
    (slot,) = keys.slot_keys(store)
    chunk = next(key for key in store.objects if (i := key_id(key)) and i[-1] == Kind.CHUNK)
    record = next(key for key in store.objects if "/heads/" in key)
    for key in (slot, chunk, record, CONFIG_KEY):
        store.objects[key] = store.objects[key][:-9] + bytes(9)
    found = {problem.key for problem in verify(store, data=True).problems}
    assert CONFIG_KEY in found
    store.objects[CONFIG_KEY] = mirror.objects[CONFIG_KEY]
    found = {problem.key for problem in verify(store, data=True).problems}
    assert found == {slot, chunk, record, CONFIG_KEY}  # the last says that no key is left
    store.objects[CONFIG_KEY] = b"{}"
    done = repair(store, [mirror])
    assert done.left.ok, done.left.problems
    assert set(done.mended) == {slot, chunk, record, CONFIG_KEY}
    assert keys.read_slots(store)


def test_gc_of_an_encrypted_repository(store: MemoryStore) -> None:
    collector = Collector(Repository.open(store), pinned={}, author="test")
    done = collector.run(Rules(last=1), None, grace=False)
    assert done.removed_objects > 0
    assert keys.slot_keys(store)
    assert verify(store, data=True).ok

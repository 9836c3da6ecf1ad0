"""Repair: everything that a mirror has sound is mended, and nothing else is touched."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from horcrux_nbd.errors import Damaged
from horcrux_nbd.names import Version
from horcrux_nbd.repository.copy import copy
from horcrux_nbd.repository.objects import Kind, decode, encode, key_id
from horcrux_nbd.repository.repair import Repaired, repair
from horcrux_nbd.repository.repository import Repository
from horcrux_nbd.repository.verify import verify

from .images import content, make_commit, repository_in
from .memory_store import MemoryStore
from .test_copy import fill

Harm = Callable[[bytes], bytes | None]

HARMS: dict[str, Harm] = {
    "flipped": lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:],
    "truncated": lambda data: data[:-2],
    "empty": lambda data: b"",
    "missing": lambda data: None,
}


def worlds() -> tuple[MemoryStore, MemoryStore]:
    store, mirror = MemoryStore(), MemoryStore()
    copy(fill(store), mirror)
    return store, mirror


def harm(store: MemoryStore, key: str, how: Harm) -> None:
    data = how(store.objects[key])
    store.objects.pop(key) if data is None else store.objects.update({key: data})


@pytest.mark.parametrize("how", HARMS)
def test_every_single_damage(how: str) -> None:
    store, mirror = worlds()
    sound = dict(store.objects)
    for key in sound:
        store.objects = dict(sound)
        harm(store, key, HARMS[how])
        if verify(store, data=True).ok:  # a tag that is missing, or the newest record of a branch
            assert how == "missing"
            assert key.startswith("refs/")
            continue
        done = repair(store, [mirror])
        assert done.mended == [key], key
        assert done.left.ok
        assert verify(store, data=True).ok
        assert {k: v for k, v in store.objects.items() if k != key} == {
            k: v for k, v in sound.items() if k != key
        }


def test_all_at_once() -> None:
    """A damaged node hides damaged chunks: it goes on until there is no more."""
    store, mirror = worlds()
    keys = [key for key in store.objects if key_id(key)]
    for key in keys:
        harm(store, key, HARMS["flipped"])
    done = repair(store, [mirror])
    assert done.left.ok
    assert sorted(done.mended) == sorted(keys)


def test_two_mirrors_with_damage_of_their_own() -> None:
    store, mirror = worlds()
    other = MemoryStore()
    other.objects = dict(mirror.objects)
    keys = sorted(key for key in store.objects if key_id(key))
    for at, key in enumerate(keys):
        harm(store, key, HARMS["empty"])
        harm((mirror, other)[at % 2], key, HARMS["flipped"])
    assert repair(store, [mirror, other]).left.ok


def test_what_cannot_be_mended_is_told() -> None:
    store, mirror = worlds()
    version = Repository.open(store).resolve(Version("A"))
    chunk = Repository.open(store).index(version.commit).lookup(1)
    key = next(key for key in store.objects if key_id(key) == chunk)
    for one in (store, mirror):
        harm(one, key, HARMS["flipped"])
    before = dict(store.objects)
    done = repair(store, [mirror])
    assert done.mended == []
    assert [problem.key for problem in done.left.problems] == [key]
    assert done.left.problems[0].affects == (f"A@{version.id.hex()[:12]}",)
    assert store.objects == before
    assert repair(store).left.problems == done.left.problems


def test_other_sources_are_proven() -> None:
    store, _ = worlds()
    sound = dict(store.objects)
    key = next(k for k in sound if (oid := key_id(k)) and oid[-1] == Kind.CHUNK)
    oid = key_id(key)
    assert oid is not None
    plain = decode(sound[key], oid, (Kind.CHUNK,), 1 << 20)[1]
    harm(store, key, HARMS["missing"])
    assert repair(store, [], [lambda oid: None, lambda oid: b"wrong"]).mended == []
    assert repair(store, [], [lambda oid: plain]).mended == [key]
    assert store.objects[key] == encode(Kind.CHUNK, plain)


def test_another_repository_is_no_mirror() -> None:
    store, _ = worlds()
    other = MemoryStore()
    fill(other)
    before = dict(store.objects)
    with pytest.raises(Damaged, match="different repositories"):
        repair(store, [other])
    assert store.objects == before


def test_a_record_of_a_mirror_that_went_its_own_way() -> None:
    """Between neighbours that differ it is another history's."""
    store, mirror = worlds()
    for one, seed in ((store, "here"), (mirror, "there")):
        repository = Repository.open(one)
        for n in range(3):
            make_commit(repository, {1: content(f"{seed} {n}")}, size=1000 << 16)
    key = sorted(k for k in store.objects if k.startswith("refs/A/heads/main/"))[1]
    harm(store, key, HARMS["flipped"])
    done: Repaired = repair(store, [mirror])
    assert done.mended == []
    assert done.left.problems[0].key == key


def test_nothing_to_do() -> None:
    store, mirror = worlds()
    calls = len(store.calls)
    done = repair(store, [mirror])
    assert done.mended == []
    assert done.left.ok
    assert len(store.calls) == calls
    empty = repository_in(MemoryStore())
    assert repair(empty.store).left.ok

"""A listing against a dict, and what is no object."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from horcrux_nbd.chunkstore.base import Stat
from horcrux_nbd.errors import StoreError
from horcrux_nbd.repository.listing import Listing
from horcrux_nbd.repository.objects import Kind, object_id, object_key

from .memory_store import MemoryStore

# Neighbours by design: ids that differ in one byte of three, and real ones.
NEAR = st.builds(
    lambda a, b, c: bytes([a, b]) + bytes(28) + bytes([c, 1]),
    *[st.sampled_from([0, 1, 127, 254, 255])] * 3,
)
IDS = st.one_of(NEAR, st.integers(0, 999).map(lambda n: object_id(Kind.CHUNK, b"%d" % n)))


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(IDS, st.integers(0, 100), max_size=60), st.lists(IDS, max_size=20))
def test_against_a_dict(objects: dict[bytes, int], others: list[bytes]) -> None:
    store = MemoryStore()
    store.objects = {object_key(oid): bytes(size) for oid, size in objects.items()}
    listing = Listing.read(store)
    assert len(listing) == len(objects)
    assert list(listing.ids()) == sorted(objects)
    assert listing.complete
    for oid in [*objects, *others]:
        at = listing.find(oid)
        assert (oid in listing) == (at is not None) == (oid in objects)
        if at is not None:
            assert listing.id(at) == oid
            assert listing.sizes[at] == objects[oid]
    assert listing.marks == bytes(len(objects))


def test_strays() -> None:
    store = MemoryStore()
    good = object_key(object_id(Kind.CHUNK, b"x"))
    strays = ["objects/README", "objects/ab/short", good + ".partial", f"objects/zz/{good[11:]}"]
    store.objects = dict.fromkeys([good, *strays], b"x")
    listing = Listing.read(store)
    assert len(listing) == 1
    assert listing.strays == sorted(strays)


def test_a_limit() -> None:
    store = MemoryStore()
    keys = sorted(object_key(object_id(Kind.CHUNK, b"%d" % n)) for n in range(10))
    store.objects = dict.fromkeys(keys, b"x")
    listing = Listing.read(store, 4)
    assert (len(listing), listing.complete) == (4, False)
    assert (len(Listing.read(store, 10)), Listing.read(store, 10).complete) == (10, True)
    assert Listing().find(object_id(Kind.CHUNK, b"1")) is None


def test_a_store_that_lists_out_of_order() -> None:
    store = MemoryStore()
    keys = sorted(object_key(object_id(Kind.CHUNK, b"%d" % n)) for n in range(3))
    store.list = lambda *_: iter(Stat(key, 1, 0.0) for key in keys[::-1])  # type: ignore[method-assign,assignment]
    with pytest.raises(StoreError, match="out of order"):
        Listing.read(store)

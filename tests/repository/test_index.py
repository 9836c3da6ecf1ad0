"""The index against a dict: any changes, images that grow and shrink, trees of any height."""

from __future__ import annotations

import random
import resource
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from horcrux_nbd.errors import Damaged
from horcrux_nbd.repository.index import (
    FANOUT,
    ID_SIZE,
    MAX_LEVELS,
    NODE_SIZE,
    Index,
    check_node,
    encode_node,
    levels_for,
    table_ids,
    update,
)
from horcrux_nbd.repository.objects import NULL_ID, Kind, object_id

Model = dict[int, bytes]


def chunk_id(number: int) -> bytes:
    return object_id(Kind.CHUNK, b"%d" % number)


class Nodes:
    """Nodes in memory, and which were read and stored."""

    def __init__(self) -> None:
        self.nodes: dict[bytes, bytes] = {}
        self.read: list[bytes] = []
        self.stored: list[int] = []  # levels, in order

    def load(self, oid: bytes) -> bytes:
        self.read.append(oid)
        return self.nodes[oid]

    def store(self, plain: bytes) -> bytes:
        for child in table_ids(plain[8:]):
            assert plain[0] == 0 or child in self.nodes, "a parent before its child"
        self.stored.append(plain[0])
        oid = object_id(Kind.NODE, plain)
        self.nodes[oid] = plain
        return oid

    def index(self, root: bytes, levels: int) -> Index:
        return Index(root, levels, self.load)

    def make(self, model: Model, levels: int) -> Index:
        return self.index(update(None, levels, sorted(model.items()), self.store), levels)


def model_of(index: Index) -> Model:
    return dict(index.entries())


# Chunk numbers near the edges of nodes at every height, and near each other.
def numbers(limit: int) -> st.SearchStrategy[int]:
    edges = [0, 1, 255, 256, 257, 511, 65535, 65536, 65537, FANOUT**3 - 1, FANOUT**3, FANOUT**5]
    near = [n for n in (*edges, limit - 1, limit // 2) if 0 <= n < limit]
    return st.one_of(st.sampled_from(near), st.integers(0, limit - 1))


SIZES = st.sampled_from([1, 2, 255, 256, 257, 1000, 65536, 65537, FANOUT**3 + 5, FANOUT**5 + 1])
IDS = st.integers(0, 5).map(lambda n: chunk_id(n) if n else NULL_ID)  # few, so that nodes repeat


@st.composite
def changes_in(draw: st.DrawFn, limit: int) -> Model:
    return draw(st.dictionaries(numbers(limit), IDS, max_size=30))


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[int, Model]]:
    """Versions of an image: its chunks, and what changes."""
    sizes = draw(st.lists(SIZES, min_size=1, max_size=6))
    return [(size, draw(changes_in(size))) for size in sizes]


@settings(max_examples=150, deadline=None)
@given(histories())
def test_against_a_dict(history: list[tuple[int, Model]]) -> None:
    """Each version is what the dict is, whichever way it was made; so are all diffs."""
    nodes = Nodes()
    model: Model = {}
    tree: Index | None = None
    versions: list[tuple[Index, Model]] = []
    for size, changes in history:
        model = {n: oid for n, oid in model.items() if n < size} | changes
        model = {n: oid for n, oid in model.items() if oid != NULL_ID}
        levels = levels_for(size)
        root = update(tree, levels, iter(sorted(changes.items())), nodes.store, keep=size)
        # Made anew it is the same object: a version has one index, whatever its history.
        assert root == nodes.make(model, levels).root
        assert (root == NULL_ID) == (not model)
        tree = nodes.index(root, levels)
        versions.append((tree, model))
    for tree, model in versions:
        assert list(tree.entries()) == sorted(model.items())
        for number in {*model, 0, 1, 255, 256, 65535}:
            if number < FANOUT**tree.levels:
                assert tree.lookup(number) == model.get(number, NULL_ID)
                assert tree.is_cached(number)
        assert set(tree.nodes()) <= nodes.nodes.keys()
        for other, theirs in versions:
            expected = [
                (n, model.get(n, NULL_ID), theirs.get(n, NULL_ID))
                for n in sorted(model.keys() | theirs.keys())
                if model.get(n) != theirs.get(n)
            ]
            assert list(tree.diff(other)) == expected


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_ranges_of_entries(data: st.DataObject) -> None:
    size = data.draw(SIZES)
    model = {n: oid for n, oid in data.draw(changes_in(size)).items() if oid != NULL_ID}
    tree = Nodes().make(model, levels_for(size))
    start = data.draw(st.one_of(numbers(size), st.sampled_from(sorted(model) or [0])))
    stop = data.draw(st.one_of(numbers(size), st.just(size), st.just(start + 1)))
    expected = [(n, oid) for n, oid in sorted(model.items()) if start <= n < stop]
    assert list(tree.entries(start, stop)) == expected


@settings(max_examples=100, deadline=None)
@given(histories())
def test_nodes_are_those_that_are_reachable(history: list[tuple[int, Model]]) -> None:
    """A copy of exactly these nodes is a whole index: what push and gc build on."""
    nodes = Nodes()
    for size, changes in history:
        tree = nodes.make(changes, levels_for(size))
        listed = list(tree.nodes())
        assert len(listed) == len(set(listed))
        copy = {oid: nodes.nodes[oid] for oid in listed}
        again = Index(tree.root, tree.levels, copy.__getitem__)
        assert model_of(again) == model_of(tree)
        for oid in listed[1:]:  # and not one less; the root is missed at once
            less = {other: plain for other, plain in copy.items() if other != oid}
            with pytest.raises(KeyError):
                model_of(Index(tree.root, tree.levels, less.__getitem__))


def test_levels() -> None:
    cases = {0: 1, 1: 1, 256: 1, 257: 2, 65536: 2, 65537: 3, 2**27: 4, 2**48: 6}
    assert {chunks: levels_for(chunks) for chunks in cases} == cases


# ---- what it costs


def test_a_commit_writes_the_nodes_above_what_changed_from_the_leaves_up() -> None:
    nodes = Nodes()
    model = {n * 7: chunk_id(n) for n in range(40_000)}
    tree = nodes.make(model, 3)
    nodes.stored.clear()
    nodes.read.clear()
    tree = nodes.index(tree.root, 3)
    root = update(tree, 3, [(70_000, chunk_id(1)), (70_001, chunk_id(2))], nodes.store)
    assert nodes.stored == [0, 1, 2]
    assert len(nodes.read) == 3
    assert dict(nodes.index(root, 3).entries()) == model | {
        70_000: chunk_id(1),
        70_001: chunk_id(2),
    }


def test_what_does_not_change_is_not_stored() -> None:
    nodes = Nodes()
    model = {n: chunk_id(n) for n in range(0, 70_000, 97)}
    tree = nodes.make(model, 3)
    nodes.stored.clear()
    assert update(tree, 3, sorted(model.items()), nodes.store) == tree.root
    assert update(tree, 3, [(1, NULL_ID)], nodes.store) == tree.root
    assert nodes.stored == []


def test_a_diff_skips_what_is_equal() -> None:
    nodes = Nodes()
    tree = nodes.make({n: chunk_id(n) for n in range(0, 1 << 24, 4099)}, 3)
    other = nodes.index(update(tree, 3, [(5, chunk_id(5))], nodes.store), 3)
    fresh = nodes.index(tree.root, 3)
    nodes.read.clear()
    assert list(fresh.diff(other)) == [(5, NULL_ID, chunk_id(5))]
    assert len(nodes.read) <= 6


def test_a_lookup_reads_one_node_for_each_level_once() -> None:
    nodes = Nodes()
    tree = nodes.make({n: chunk_id(n) for n in range(0, 1 << 24, 4099)}, 3)
    tree = nodes.index(tree.root, 3)
    nodes.read.clear()
    for _ in range(3):
        for number in (0, 100, 255):
            assert not nodes.read or tree.is_cached(number)
            tree.lookup(number)
    assert len(nodes.read) == 3


def test_changes_are_streamed() -> None:
    """A generator of changes is read as nodes are made: memory is that of one node per level."""
    order: list[str] = []
    nodes = Nodes()

    def store(plain: bytes) -> bytes:
        order.append("node")
        return nodes.store(plain)

    def changes() -> object:
        for number in range(1024):
            order.append("change")
            yield number, chunk_id(number)

    update(None, 2, changes(), store)  # type: ignore[arg-type]
    assert order.index("node") < 300
    assert order.count("node") == 5


def test_64_tib_that_are_sparse() -> None:
    """128 Mi chunks of 512 KiB, a few of them not zeros: neither time nor memory grow with it."""
    chunks = (64 << 40) // (512 << 10)
    nodes = Nodes()
    rng = random.Random(64)
    model = {rng.randrange(chunks): chunk_id(n) for n in range(2000)} | {chunks - 1: chunk_id(7)}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    levels = levels_for(chunks)
    assert levels == 4
    tree = nodes.make(model, levels)
    fresh = nodes.index(tree.root, levels)
    nodes.read.clear()
    assert fresh.lookup(chunks - 1) == chunk_id(7)
    assert len(nodes.read) == 4
    assert list(fresh.entries()) == sorted(model.items())
    changed = nodes.index(update(fresh, levels, [(99, chunk_id(1))], nodes.store), levels)
    assert [n for n, _, _ in fresh.diff(changed)] == [99]
    assert update(None, levels, [], nodes.store) == NULL_ID
    assert list(Index(NULL_ID, levels, nodes.load).entries()) == []
    # Processor time, not a clock: others use this machine. 2,000 leaves take about 1 s.
    assert time.process_time() - began < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


# ---- threads, mistakes and damage


def test_many_threads_see_one_tree() -> None:
    nodes = Nodes()
    model = {n: chunk_id(n) for n in range(0, 200_000, 31)}
    tree = nodes.index(nodes.make(model, 3).root, 3)
    wrong: list[int] = []

    def look(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(3000):
            number = rng.randrange(200_000)
            if tree.lookup(number) != model.get(number, NULL_ID):
                wrong.append(number)

    threads = [threading.Thread(target=look, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []


def test_the_cache_of_nodes_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("horcrux_nbd.repository.index.NODE_CACHE", 8)
    nodes = Nodes()
    model = {n: chunk_id(n) for n in range(0, 100_000, 101)}
    tree = nodes.index(nodes.make(model, 3).root, 3)
    assert model_of(tree) == model
    for number, oid in model.items():
        assert tree.lookup(number) == oid
    assert len(tree._tables) <= 8
    assert len(tree._leaves) <= 8


@pytest.mark.parametrize(
    "changes",
    [
        [(5, chunk_id(1)), (4, chunk_id(1))],
        [(5, chunk_id(1)), (5, chunk_id(2))],
        [(-1, chunk_id(1))],
        [(256, chunk_id(1))],
        [(1, chunk_id(1)), (300, chunk_id(1))],
    ],
)
def test_changes_out_of_order_or_place(changes: list[tuple[int, bytes]]) -> None:
    with pytest.raises(ValueError, match="chunk"):
        update(None, 1, changes, Nodes().store)


def test_changes_behind_the_end_of_the_image() -> None:
    with pytest.raises(ValueError, match="chunk 10 after"):
        update(None, 1, [(10, chunk_id(1))], Nodes().store, keep=10)


def test_damaged_nodes() -> None:
    plain = encode_node(1, bytes(FANOUT * ID_SIZE))
    assert len(plain) == NODE_SIZE
    check_node(plain, 1)
    bad = [b"", plain[:-1], plain + b"\0", b"\2" + plain[1:], plain[:1] + b"\7" + plain[2:]]
    bad += [plain[:at] + b"\1" + plain[at + 1 :] for at in range(2, 8)]  # the reserved bytes
    for node in bad:
        with pytest.raises(Damaged):
            check_node(node, 1)
    for levels in (0, MAX_LEVELS + 1):
        with pytest.raises(Damaged):
            Index(NULL_ID, levels, lambda oid: b"")


def test_a_node_at_the_wrong_height() -> None:
    """A valid leaf where an inner node belongs: a swapped or malicious index, never a loop."""
    nodes = Nodes()
    leaf = nodes.make({0: chunk_id(0)}, 1).root
    for read in (lambda t: t.lookup(0), lambda t: list(t.entries()), lambda t: list(t.nodes())):
        with pytest.raises(Damaged):
            read(Index(leaf, 2, nodes.load))

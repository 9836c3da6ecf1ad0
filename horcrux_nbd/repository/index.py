"""The index: a radix tree from chunk number to object id (docs/format.md, "Index nodes").

A node is a fixed table of 256 ids; the null id stands for an empty subtree, so a sparse petabyte
costs nothing, and equal subtrees are one object. A lookup fetches one node for each level that was
not walked before; a commit writes the nodes above what changed; a diff skips equal ids.
"""

from __future__ import annotations

import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator

from ..errors import Damaged, HorcruxError
from .objects import ID_SIZE, NULL_ID

FANOUT_BITS = 8
FANOUT = 1 << FANOUT_BITS
NODE_HEADER = struct.Struct("<BB6s")  # level (0 is a leaf), log2 of the fan-out, zeros
NODE_SIZE = NODE_HEADER.size + FANOUT * ID_SIZE  # 8,200 bytes of plaintext
MAX_LEVELS = 6  # 2^48 chunks: 16 EiB at 64 KiB

# Decoded nodes that one tree keeps: 4,096 nodes are 32 MiB and reach 1,048,576 chunks. Which
# leaves they are is kept apart, so that a warm look-up costs one step at any height.
NODE_CACHE = 4096

LoadNode = Callable[[bytes], bytes]  # id → verified plaintext of the node
StoreNode = Callable[[bytes], bytes]  # plaintext → id

_EMPTY_TABLE = bytes(FANOUT * ID_SIZE)
_RESERVED = bytes(6)
# A node of a tree, or one that a taller tree has above it: the root, and the level it is at.
_Node = bytes | tuple[bytes, int]


def levels_for(chunks: int) -> int:
    """How many levels a tree over `chunks` chunks has; at least 1."""
    levels = 1
    while FANOUT**levels < chunks:
        levels += 1
    return levels


def encode_node(level: int, table: bytes | bytearray) -> bytes:
    """The plaintext of a node: 256 ids, which name chunks and patches at level 0, else nodes."""
    return NODE_HEADER.pack(level, FANOUT_BITS, _RESERVED) + table


def check_node(plain: bytes, level: int) -> bytes:
    """The table of a node that belongs at `level`. Raises Damaged."""
    if len(plain) != NODE_SIZE or NODE_HEADER.unpack_from(plain) != (level, FANOUT_BITS, _RESERVED):
        raise Damaged(f"an index node does not fit its place (level {level})")
    return plain[NODE_HEADER.size :]


def table_ids(table: bytes) -> Iterator[bytes]:
    """The ids in a node's table that are not null."""
    for at in range(0, len(table), ID_SIZE):
        oid = table[at : at + ID_SIZE]
        if oid != NULL_ID:
            yield oid


class Index:
    """One tree, read through `load`. Safe to use from any number of threads."""

    def __init__(self, root: bytes, levels: int, load: LoadNode) -> None:
        if not 1 <= levels <= MAX_LEVELS:
            raise Damaged(f"an index of {levels} levels cannot be")
        self.root, self.levels = root, levels
        self._load = load
        self._tables: OrderedDict[tuple[int, bytes], bytes] = OrderedDict()
        self._leaves: OrderedDict[int, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def _table(self, oid: bytes, level: int) -> bytes:
        if oid == NULL_ID:
            return _EMPTY_TABLE
        key = (level, oid)
        table = self._tables.get(key)
        if table is None:
            table = check_node(self._load(oid), level)
            with self._lock:
                self._tables[key] = table
                if len(self._tables) > NODE_CACHE:
                    self._tables.popitem(last=False)
        return table

    def _leaf(self, number: int) -> bytes:
        """The table of leaf `number` (which holds chunks number * 256 and on)."""
        table = self._leaves.get(number)
        if table is not None:
            return table
        oid = self.root
        for level in range(self.levels - 1, 0, -1):
            slot = (number >> (FANOUT_BITS * (level - 1))) & (FANOUT - 1)
            at = slot * ID_SIZE
            oid = self._table(oid, level)[at : at + ID_SIZE]
        table = self._table(oid, 0)
        with self._lock:
            self._leaves[number] = table
            if len(self._leaves) > NODE_CACHE:
                self._leaves.popitem(last=False)
        return table

    def lookup(self, chunk: int) -> bytes:
        """The id of chunk number `chunk`, NULL_ID for zeros. May fetch nodes (`load`'s errors)."""
        at = (chunk & (FANOUT - 1)) * ID_SIZE
        return self._leaf(chunk >> FANOUT_BITS)[at : at + ID_SIZE]

    def is_cached(self, chunk: int) -> bool:
        """Whether `lookup(chunk)` would fetch nothing."""
        return (chunk >> FANOUT_BITS) in self._leaves

    def entries(
        self,
        start: int = 0,
        stop: int | None = None,
        missing: Callable[[Exception], None] | None = None,
    ) -> Iterator[tuple[int, bytes]]:
        """(chunk, id) of every chunk in [start, stop) that is not zeros, ascending.

        What `load` raises ends it, unless `missing` takes it: then that subtree is left out.
        """
        end = FANOUT**self.levels if stop is None else stop
        yield from self._walk(self.root, self.levels - 1, 0, start, end, missing)

    def _walk(
        self,
        oid: bytes,
        level: int,
        base: int,
        start: int,
        stop: int,
        missing: Callable[[Exception], None] | None,
    ) -> Iterator[tuple[int, bytes]]:
        if oid == NULL_ID:
            return
        try:
            table = self._table(oid, level)
        except HorcruxError as error:
            if missing is None:
                raise
            missing(error)
            return
        span = FANOUT**level
        first = max(0, (start - base) // span)
        last = min(FANOUT, -(-(stop - base) // span))
        for slot in range(first, last):
            child = table[slot * ID_SIZE : (slot + 1) * ID_SIZE]
            if child == NULL_ID:
                continue
            if level:
                low = base + slot * span
                yield from self._walk(child, level - 1, low, start, stop, missing)
            else:
                yield base + slot, child

    def nodes(self) -> Iterator[bytes]:
        """The ids of all nodes, each parent before its children; equal subtrees once."""
        seen: set[bytes] = set()
        pending = [(self.root, self.levels - 1)]
        while pending:
            oid, level = pending.pop()
            if oid == NULL_ID or oid in seen:
                continue
            seen.add(oid)
            yield oid
            if level:
                table = self._table(oid, level)
                pending.extend(
                    (table[at : at + ID_SIZE], level - 1)
                    for at in range(0, FANOUT * ID_SIZE, ID_SIZE)
                )

    def diff(self, other: Index) -> Iterator[tuple[int, bytes, bytes]]:
        """(chunk, id here, id in `other`) wherever they differ, ascending. Skips equal subtrees."""
        levels = max(self.levels, other.levels)
        yield from self._diff(other, self._lifted(levels), other._lifted(levels), levels - 1, 0)

    def _lifted(self, levels: int) -> _Node:
        """The root as seen from a taller tree: itself in slot 0 of made-up nodes above."""
        return self.root if levels == self.levels else (self.root, self.levels - 1)

    def _child(self, node: _Node, level: int, slot: int) -> _Node:
        if isinstance(node, tuple):
            if slot:
                return NULL_ID
            root, at = node
            return root if at == level - 1 else node
        table = self._table(node, level)
        return table[slot * ID_SIZE : (slot + 1) * ID_SIZE]

    def _diff(
        self, other: Index, mine: _Node, theirs: _Node, level: int, base: int
    ) -> Iterator[tuple[int, bytes, bytes]]:
        if mine == theirs:
            return
        span = FANOUT**level
        for slot in range(FANOUT):
            a, b = self._child(mine, level, slot), other._child(theirs, level, slot)
            if a == b:
                continue
            if level:
                yield from self._diff(other, a, b, level - 1, base + slot * span)
            else:
                assert isinstance(a, bytes)
                assert isinstance(b, bytes)
                yield base + slot, a, b


def update(
    tree: Index | None,
    levels: int,
    changes: Iterable[tuple[int, bytes]],
    store: StoreNode,
    keep: int | None = None,
) -> bytes:
    """The root of `tree` with `changes` made: (chunk, id) pairs, each chunk once and ascending.

    `levels` is the height of the new tree, for which only nodes above changes are written, from
    the leaves up, through `store`; `changes` is read as it is needed, so memory does not grow with
    it. `keep` drops all chunks from that number on (a smaller image). Returns NULL_ID where nothing
    but zeros is left. ValueError for changes out of order or beyond the tree.
    """
    limit = FANOUT**levels if keep is None else min(keep, FANOUT**levels)
    old: _Node = NULL_ID
    if tree is not None:
        old = tree.root if levels < tree.levels else tree._lifted(levels)
        for level in range(tree.levels - 1, levels - 1, -1):  # slot 0 is what a smaller image keeps
            old = tree._child(old, level, 0)
    return _rebuild(tree, old, levels - 1, 0, _Changes(changes, limit), limit, store)


class _Changes:
    """(chunk, id) pairs with the next one in sight."""

    def __init__(self, changes: Iterable[tuple[int, bytes]], limit: int) -> None:
        self._rest = iter(changes)
        self._limit = limit
        self.number = -1  # of the next change; `limit` where none is left
        self.id = NULL_ID
        self.step()

    def step(self) -> None:
        following = next(self._rest, None)
        if following is None:
            self.number, self.id = self._limit, NULL_ID
            return
        if not self.number < following[0] < self._limit:
            raise ValueError(
                f"chunk {following[0]} after {self.number} in an index of {self._limit} chunks"
            )
        self.number, self.id = following


def _rebuild(
    tree: Index | None,
    node: _Node,
    level: int,
    base: int,
    changes: _Changes,
    limit: int,
    store: StoreNode,
) -> bytes:
    """The id of `node` at `level`, whose first chunk is `base`, with its part of `changes` made."""
    span = FANOUT**level
    end = base + span * FANOUT
    untouched = changes.number >= min(end, limit) and (end <= limit or node == NULL_ID)
    if untouched and isinstance(node, bytes):
        return node
    table = bytearray(FANOUT * ID_SIZE)
    before = b""
    if tree is not None and isinstance(node, bytes) and node != NULL_ID:
        before = tree._table(node, level)
        table[:] = before
    for slot in range(FANOUT):
        low = base + slot * span
        at = slice(slot * ID_SIZE, (slot + 1) * ID_SIZE)
        if low >= limit:
            table[at.start :] = bytes(len(table) - at.start)
            break
        if level == 0:
            if changes.number == low:
                table[at] = changes.id
                changes.step()
            continue
        child: _Node = bytes(table[at])
        if tree is not None and isinstance(node, tuple):
            child = tree._child(node, level, slot)
        table[at] = _rebuild(tree, child, level - 1, low, changes, limit, store)
    if table == before:
        assert isinstance(node, bytes)
        return node
    return NULL_ID if table == _EMPTY_TABLE else store(encode_node(level, table))

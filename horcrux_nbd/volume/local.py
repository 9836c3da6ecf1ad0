"""What a volume has on this host of its versions: its own objects, then the cache.

A volume's own objects are commits that were not pushed yet, and the commit that it lies on. They
are never evicted.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..chunkstore import open_store
from ..errors import KeyNotFound, NotFound
from ..repository.change import block_of
from ..repository.commits import MAX_COMMIT, Commit
from ..repository.index import NODE_SIZE, Index
from ..repository.objects import NULL_ID, Form, Kind, kind_of, object_key
from ..repository.patch import BLOCK_BITS, Patch, max_patch_size
from ..repository.repository import Repository
from ..units import MiB
from .cache import Cache
from .packs import PackedStore

OBJECTS = "objects"
PATCH_MEMORY = 64 * MiB  # of decoded patches, for reads of what was committed and not pushed


def open_objects(folder: Path, *, create: bool = False) -> PackedStore:
    """The store of the volume's own objects."""
    root = folder.absolute() / OBJECTS
    return PackedStore(open_store(f"cp://{root}", create=create, check=False), root)


class LocalObjects:
    """Reads of what is on this host, and of nothing else. Safe for several threads."""

    def __init__(self, folder: Path, cache: Cache, chunk_size: int, form: Form) -> None:
        self.store = open_objects(folder)
        self.form = form  # of the repository, which these objects go to one day
        self._own = Repository(self.store, "", chunk_size, form)
        self._cache, self._chunk_size = cache, chunk_size
        self._patches: OrderedDict[bytes, Patch] = OrderedDict()
        self._patch_blocks = 0
        self._lock = threading.Lock()

    def content(self, oid: bytes) -> bytes | None:
        """The chunk that an index entry names, if all of its parts are here."""
        if oid == NULL_ID:
            return bytes(self._chunk_size)
        if kind_of(oid) is not Kind.PATCH:
            return self.part(oid)
        # Under a patch's id the cache has the patched chunk.
        whole = self._cache.content(oid, self._chunk_size)
        if whole is not None:
            return whole
        patch = self.patch(oid)
        below = None if patch is None else self.content(patch.chain[0])
        if patch is None or below is None:
            return None
        content = bytearray(below)
        for number, block in patch.blocks.items():
            content[number << BLOCK_BITS : (number + 1) << BLOCK_BITS] = block
        return bytes(content)

    def patch(self, oid: bytes) -> Patch | None:
        """The patch object `oid`, if it is here."""
        with self._lock:
            known = self._patches.get(oid)
            if known is not None:
                self._patches.move_to_end(oid)
                return known
        plain = self.part(oid)
        if plain is None:
            return None
        patch = Patch.decode(plain, self._chunk_size)
        with self._lock:
            if oid not in self._patches:
                self._patches[oid] = patch
                self._patch_blocks += len(patch.blocks)
                while len(self._patches) > 1 and self._patch_blocks > PATCH_MEMORY >> BLOCK_BITS:
                    _, old = self._patches.popitem(last=False)
                    self._patch_blocks -= len(old.blocks)
        return patch

    def unchanged(self, oid: bytes, blocks: Mapping[int, bytes]) -> set[int]:
        """The numbers of those `blocks` that the chunk behind an index entry has already, as far
        as what is here tells. What it says is proven; what it does not say means nothing.
        """
        rest, same = dict(blocks), set[int]()
        while rest:
            if oid == NULL_ID:
                return same | {number for number, block in rest.items() if not any(block)}
            found = self._cache.same_blocks(oid, rest)  # under a patch's id: the patched chunk
            if found is not None:
                return same | found
            if kind_of(oid) is not Kind.PATCH:
                plain = self.part(oid) or b""
                return same | {n for n, block in rest.items() if block_of(plain, n) == block}
            patch = self.patch(oid)
            if patch is None:
                break
            same.update(n for n, block in rest.items() if patch.blocks.get(n) == block)
            rest = {n: block for n, block in rest.items() if n not in patch.blocks}
            oid = patch.chain[0]
        return same

    def patched_into(self, oid: bytes, offset: int, view: memoryview) -> bool:
        """Fill `view` from `offset` in the chunk that `oid` names, if the patches that are here
        have all of it: then nothing below them is needed. False else; `view` means nothing then.
        """
        wanted = set(range(offset >> BLOCK_BITS, -(-(offset + len(view)) >> BLOCK_BITS)))
        while wanted and kind_of(oid) is Kind.PATCH:
            patch = self.patch(oid)
            if patch is None:
                return False
            for number in wanted & patch.blocks.keys():
                low = max(offset, number << BLOCK_BITS)
                high = min(offset + len(view), (number + 1) << BLOCK_BITS)
                first, stop = low - (number << BLOCK_BITS), high - (number << BLOCK_BITS)
                view[low - offset : high - offset] = patch.blocks[number][first:stop]
            wanted -= patch.blocks.keys()
            oid = patch.chain[0]
        return not wanted

    def part(self, oid: bytes) -> bytes | None:
        """The plaintext of a chunk or patch object, if it is here."""
        if kind_of(oid) is Kind.PATCH:
            plain = self._read(oid, Kind.PATCH, max_patch_size(self._chunk_size))
            return plain if plain is not None else self._cache.read(oid)
        content = self._cache.content(oid, self._chunk_size)
        return content if content is not None else self._read(oid, Kind.CHUNK, self._chunk_size)

    def node(self, oid: bytes) -> bytes | None:
        """The plaintext of an index node, if it is here."""
        node = self._cache.read(oid)
        return node if node is not None else self._read(oid, Kind.NODE, NODE_SIZE)

    def _read(self, oid: bytes, kind: Kind, bound: int) -> bytes | None:
        return _read(self.store, self.form, oid, kind, bound)

    def index(self, commit: Commit, remote: Callable[[bytes], bytes] | None = None) -> Index:
        """The index of a version; a node that is not here comes from `remote`, or is NotFound."""

        def load(oid: bytes) -> bytes:
            node = self.node(oid)
            if node is None:
                if remote is None:
                    raise NotFound(f"index node {oid.hex()} is not on this host")
                node = remote(oid)
                self._cache.insert(oid, node, meta=True)
            return node

        return Index(commit.index, commit.levels, load)

    def sizes(self) -> dict[bytes, int]:
        """The volume's own objects, reachable or not: id → bytes on disk."""
        return self.store.sizes()

    def own_plain(self, oid: bytes) -> bytes:
        """The verified plaintext of one of them. Raises Damaged."""
        return self._own.read_object(oid, tuple(Kind), self._chunk_size)[1]

    def own_stored(self, oid: bytes) -> bytes:
        """One of them as it is stored, proven. Raises Damaged."""
        return self._own.read_stored(oid, tuple(Kind), self._chunk_size)[2]

    def release(self, ids: Set[bytes]) -> None:
        """The store has these now: they are the volume's own no more, and can still be read here
        while there is room for them.
        """
        packed = self.store.sent(ids)

        def move(oid: bytes) -> None:
            kind = kind_of(oid)
            self._cache.insert(oid, self.own_plain(oid), meta=kind is not Kind.CHUNK)
            self.store.delete(object_key(oid))

        with ThreadPoolExecutor(8, thread_name_prefix="release") as pool:
            for _ in pool.map(move, ids - packed):
                pass

    def commit(self, oid: bytes) -> Commit | None:
        """One of the volume's own commits, or one in the cache; None if it is not here."""
        plain = self.commit_plain(oid)
        return None if plain is None else Commit.decode(plain)

    def commit_plain(self, oid: bytes) -> bytes | None:
        """Its plaintext."""
        plain = self._read(oid, Kind.COMMIT, MAX_COMMIT)
        return plain if plain is not None else self._cache.read(oid)

    def commits(self, tip: bytes, stop: str | None = None) -> Iterator[tuple[bytes, Commit]]:
        """The commits from `tip` on, first parents, as far as they are the volume's own, and before
        the one with the id `stop` (hex).
        """
        yield from own_commits(self.store, self.form, tip, stop)

    def close(self) -> None:
        self.store.close()


def remote_node(repository: Repository) -> Callable[[bytes], bytes]:
    """A reader of index nodes from a repository, for `LocalObjects.index`."""
    return lambda oid: repository.read_object(oid, (Kind.NODE,))[1]


def own_commits(
    store: PackedStore, form: Form, tip: bytes, stop: str | None = None
) -> Iterator[tuple[bytes, Commit]]:
    """As `LocalObjects.commits`, of a volume's own objects alone. Raises Damaged."""
    oid: bytes | None = tip
    while oid is not None and oid.hex() != stop:
        plain = _read(store, form, oid, Kind.COMMIT, MAX_COMMIT)
        if plain is None:
            return
        commit = Commit.decode(plain)
        yield oid, commit
        oid = commit.parents[0] if commit.parents else None


def _read(store: PackedStore, form: Form, oid: bytes, kind: Kind, bound: int) -> bytes | None:
    try:
        data = store.get(object_key(oid), 0, form.max_stored(bound) + 1)
    except KeyNotFound:
        return None
    return form.decode(data, oid, (kind,), bound, store.url)[1]

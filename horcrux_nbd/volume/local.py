"""What a volume has on this host of its versions: its own objects, then the cache.

A volume's own objects are commits that were not pushed yet, and the commit that it lies on. They
are never evicted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ..chunkstore import open_store
from ..chunkstore.base import ChunkStore
from ..errors import Damaged, KeyNotFound, NotFound
from ..repository.commits import Commit
from ..repository.index import NODE_SIZE, Index
from ..repository.objects import NULL_ID, Kind, decode, key_id, kind_of, max_stored, object_key
from ..repository.patch import BLOCK_BITS, Patch, max_patch_size
from ..repository.repository import Repository
from .cache import Cache

OBJECTS = "objects"


def open_objects(folder: Path, *, create: bool = False) -> ChunkStore:
    """The store of the volume's own objects."""
    return open_store(f"cp://{folder.absolute()}/{OBJECTS}", create=create, check=False)


class LocalObjects:
    """Reads of what is on this host, and of nothing else. Safe for several threads."""

    def __init__(self, folder: Path, cache: Cache, chunk_size: int) -> None:
        self.store = open_objects(folder)
        self._own = Repository(self.store, "", chunk_size)
        self._cache, self._chunk_size = cache, chunk_size

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
        plain = self.part(oid)
        return None if plain is None else Patch.decode(plain, self._chunk_size)

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
        try:
            data = self.store.get(object_key(oid), 0, max_stored(bound) + 1)
        except KeyNotFound:
            return None
        return decode(data, oid, (kind,), bound, self.store.url)[1]

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
        found = ((key_id(entry.key), entry.size) for entry in self.store.list("objects/"))
        return {oid: size for oid, size in found if oid is not None}

    def own_plain(self, oid: bytes) -> bytes:
        """The verified plaintext of one of them. Raises Damaged."""
        return self._own.read_object(oid, tuple(Kind), self._chunk_size)[1]

    def release(self, ids: Iterable[bytes]) -> None:
        """The store has these now: they move from the volume's own into the cache."""
        for oid in ids:
            kind = kind_of(oid)
            if kind is not Kind.COMMIT:
                self._cache.insert(oid, self.own_plain(oid), meta=kind is not Kind.CHUNK)
            self.store.delete(object_key(oid))

    def commits(self, tip: bytes) -> Iterator[tuple[bytes, Commit]]:
        """The commits from `tip` on, first parents, as far as they are the volume's own."""
        oid: bytes | None = tip
        while oid is not None:
            try:
                commit = self._own.read_commit(oid)
            except Damaged:
                if self.store.exists(object_key(oid)):
                    raise
                return
            yield oid, commit
            oid = commit.parents[0] if commit.parents else None

    def close(self) -> None:
        self.store.close()


def remote_node(repository: Repository) -> Callable[[bytes], bytes]:
    """A reader of index nodes from a repository, for `LocalObjects.index`."""
    return lambda oid: repository.read_object(oid, (Kind.NODE,))[1]

"""A repository: the objects and refs that Horcrux keeps in one chunk store.

Reading needs no lock and no server: a reader that sees a ref sees everything below it, because
writers go from the leaves up (docs/format.md, "Order of writing").
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..chunkstore.base import ChunkStore
from ..errors import (
    Damaged,
    KeyExists,
    KeyNotFound,
    NotFound,
    StoreError,
    UsageError,
)
from ..names import Version, looks_like_id
from .commits import DEFAULT_CHUNK, MAX_COMMIT, Commit, check_chunk_size, now
from .configuration import (
    CONFIG_KEY,
    FORMAT,
    HASH,
    copy_keys,
    first_key,
    form_of,
    read_config,
)
from .index import NODE_SIZE, Index
from .objects import (
    ID_SIZE,
    MAX_PROFILE,
    PLAIN,
    Form,
    Kind,
    key_id,
    kind_of,
    object_key,
)
from .patch import max_patch_size, resolve
from .records import MAX_RECORD, encode_record
from .refs import Refs, suggest

if TYPE_CHECKING:
    from .keys import Secret

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resolved:
    """A version that exists: what was asked for, the commit's id, and the commit."""

    version: Version
    id: bytes
    commit: Commit
    form: Form = PLAIN  # of its repository


class Repository:
    """An open repository. Safe to use from any number of threads."""

    def __init__(self, store: ChunkStore, id: str, chunk_size: int, form: Form = PLAIN) -> None:
        self.store = store
        self.form = form  # how objects and records are named and stored
        self.id = id  # tells repositories apart, whatever their URL; a copy keeps it
        self.chunk_size = chunk_size  # for new images, bytes
        self.refs = Refs(store, form)
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._pool_of = 0

    @property
    def url(self) -> str:
        return self.store.url

    # ---- open and make

    @classmethod
    def open(cls, store: ChunkStore) -> Repository:
        """The repository in `store`; an encrypted one by the key that this host has (keyring.py).

        Raises NotFound where there is none, KeyRequired, Damaged, StoreError.
        """
        config = read_config(store)
        return cls(store, config.id, config.chunk_size, form_of(store, config))

    @classmethod
    def create(
        cls,
        store: ChunkStore,
        chunk_size: int = DEFAULT_CHUNK,
        copy_of: Repository | None = None,
        secret: Secret | None = None,
    ) -> Repository:
        """Make a repository in `store`, or open the one that is there already.

        `copy_of` another it has the same configuration, and is the same one: its id and its keys
        too. With a `secret` it is encrypted, and that opens it; UsageError where it is there and is
        not encrypted.
        """
        check_chunk_size(chunk_size)
        store.prepare()
        try:
            there = cls.open(store)
        except NotFound:
            pass
        else:
            if secret is not None and not there.form.encrypted:
                raise UsageError(
                    f"{store.url} is there already and is not encrypted: choose an empty place for "
                    "an encrypted one"
                )
            return there
        if next(store.list(limit=1), None) is not None:
            names = set(store.children(""))
            if CONFIG_KEY in names:  # made by somebody else since we looked
                return cls.open(store)
            names -= {"probe", "keys"}  # what an interrupted `create` leaves
            if names:
                raise StoreError(
                    f"{store.url} holds something else already ({min(names)}): choose "
                    "an empty place, or a folder (a prefix) below it"
                )
        check_exclusive_create(store)
        config: dict[str, Any] = {
            "chunk_size": chunk_size,
            "created": now(),
            "features": [],
            "format": FORMAT,
            "hash": HASH,
            "id": secrets.token_hex(16),
        }
        made = None
        if secret is not None and copy_of is None:
            made = first_key(store, config, secret)
        data = encode_record(config, indent=2)
        if copy_of is not None:
            data = copy_of.store.get(CONFIG_KEY, 0, MAX_RECORD + 1)
            copy_keys(copy_of, store)
        try:
            store.put_exclusive(CONFIG_KEY, data)
        except KeyExists:  # somebody made it at the same moment
            log.info("%s was made by somebody else just now", store.url)
            if made is not None:
                store.delete(made)
        return cls.open(store)

    # ---- objects

    def max_plain(self, kinds: Sequence[Kind], chunk_size: int) -> int:
        """The most plaintext that an object of `kinds` can have, in bytes."""
        bounds = {
            Kind.CHUNK: chunk_size,
            Kind.PATCH: max_patch_size(chunk_size),
            Kind.NODE: NODE_SIZE,
            Kind.COMMIT: MAX_COMMIT,
            Kind.PROFILE: MAX_PROFILE,
        }
        return max(bounds[kind] for kind in kinds)

    def read_object(
        self, oid: bytes, kinds: tuple[Kind, ...], chunk_size: int = 0
    ) -> tuple[Kind, bytes]:
        """Kind and verified plaintext of one object from the store.

        `chunk_size` bounds chunks and patches. Raises Damaged, which names the object, also for
        one that is missing; StoreUnavailable and others as `ChunkStore.get` does. Where the store
        has mirrors, a damaged object comes from one that has it sound.
        """
        return self.read_stored(oid, kinds, chunk_size)[:2]

    def read_stored(
        self, oid: bytes, kinds: tuple[Kind, ...], chunk_size: int = 0
    ) -> tuple[Kind, bytes, bytes]:
        """As `read_object`, and the object as it is stored."""
        if kind_of(oid) not in kinds:
            raise Damaged(f"{oid.hex()} is named where a {kinds[0].name.lower()} belongs")
        bound = self.max_plain(kinds, chunk_size)
        try:
            # One byte more than can be: a longer object shows, and costs no more memory.
            most = self.form.max_stored(bound) + 1
            data = self.store.get(object_key(oid), 0, most)
        except KeyNotFound:
            raise Damaged(
                f"object {oid.hex()} is missing in {self.url}: `horcrux-cli verify` lists what is"
            ) from None
        try:
            return *self.form.decode(data, oid, kinds, bound, self.url), data
        except Damaged as error:
            for store, copy in self.store.copies(object_key(oid), most):
                with contextlib.suppress(Damaged):
                    sound = *self.form.decode(copy, oid, kinds, bound, store.url), copy
                    log.warning(
                        "%s: %s has it sound; `horcrux-cli repair` mends it", error, store.url
                    )
                    return sound
            raise

    def read_chunk(
        self,
        oid: bytes,
        chunk_size: int,
        have: Callable[[bytes], bytes | None] | None = None,
        keep: Callable[[bytes, bytes, int], None] | None = None,
    ) -> bytes:
        """The bytes of the chunk that an index entry names, patches applied.

        `have` is asked for the plaintext of each part before the store is, and `keep` gets the
        id, plaintext and stored size (bytes) of each part that the store gave.
        """

        def read(part: bytes) -> tuple[Kind, bytes]:
            kind = kind_of(part)
            plain = have(part) if have is not None else None
            if plain is not None and kind is not None:
                return kind, plain
            kind, plain, stored = self.read_stored(part, (Kind.CHUNK, Kind.PATCH), chunk_size)
            if keep is not None:
                keep(part, plain, len(stored))
            return kind, plain

        def fetch(ids: Sequence[bytes]) -> Mapping[bytes, tuple[Kind, bytes]]:
            if len(ids) == 1:
                return {ids[0]: read(ids[0])}
            return dict(zip(ids, self._threads().map(read, ids), strict=True))

        return resolve(oid, chunk_size, fetch)

    def _threads(self) -> ThreadPoolExecutor:
        """Threads for the parts of patched chunks, of this process: nbdkit forks."""
        with self._lock:
            if self._pool is None or self._pool_of != os.getpid():
                self._pool = ThreadPoolExecutor(self.store.concurrency, thread_name_prefix="part")
                self._pool_of = os.getpid()
            return self._pool

    def write_object(self, kind: Kind, plain: bytes) -> bytes:
        """Store one object, whether it is there or not; its id."""
        oid = self.form.object_id(kind, plain)
        self.store.put(object_key(oid), self.form.encode(kind, plain, oid))
        return oid

    def read_commit(self, oid: bytes) -> Commit:
        """One commit. Raises Damaged."""
        return Commit.decode(self.read_object(oid, (Kind.COMMIT,))[1])

    def has_commit(self, oid: bytes) -> bool:
        """Whether a version was pushed here, as far as its key says."""
        return self.store.exists(object_key(oid))

    def index(self, commit: Commit) -> Index:
        """The index of a version, read from the store as it is walked."""
        return Index(
            commit.index, commit.levels, lambda oid: self.read_object(oid, (Kind.NODE,))[1]
        )

    # ---- versions

    def resolve(self, version: Version) -> Resolved:
        """The commit that `IMAGE@REF` names: a branch, else a tag, else the beginning of an id.

        Raises NotFound, which names what there is, or UsageError for an id that several share.
        """
        name, steps = version.base_and_steps
        oid = self._base(version.image, name)
        if oid is None:
            self.refs.require_image(version.image)
            gone = self.refs.head(version.image, name)
            if gone is not None:
                raise NotFound(
                    f"branch {name!r} of {version.image} was deleted by {gone.author} at "
                    f"{gone.time} ({gone.why})"
                )
            known = self.refs.known(version.image)
            raise NotFound(f"{version.image} has no version {name!r}{suggest(name, known)}")
        commit = self.read_commit(oid)
        for step in range(steps):
            if not commit.parents:
                raise NotFound(
                    f"{version}: {version.image}@{name} has only {step} "
                    f"version{'' if step == 1 else 's'} before it"
                )
            child, oid = oid, commit.parents[0]
            try:
                commit = self.read_commit(oid)
            except Damaged:
                if not self.refs.is_shallow(version.image, child):
                    raise
                raise NotFound(
                    f"{version}: what was before {version.image}@{child.hex()[:12]} was removed"
                ) from None
        return Resolved(version, oid, commit, self.form)

    def _base(self, image: str, name: str) -> bytes | None:
        head = self.refs.head(image, name)
        if head is not None and head.commit is not None:
            return head.commit
        try:
            tag = self.refs.tag(image, name)
        except StoreError:
            # A mirror has no such tag, and the store that may have it is away. A commit is the same
            # in both.
            found = self._by_id(image, name) if looks_like_id(name) else None
            if found is None:
                raise
            return found
        if tag is not None:
            return tag.commit
        return self._by_id(image, name) if looks_like_id(name) else None

    def _by_id(self, image: str, digits: str) -> bytes | None:
        if len(digits) == 2 * ID_SIZE:
            oid = bytes.fromhex(digits)
            is_there = kind_of(oid) is Kind.COMMIT and self.store.exists(object_key(oid))
            return oid if is_there and self.read_commit(oid).image == image else None
        found = []
        for entry in self.store.list(f"objects/{digits[:2]}/{digits}"):
            candidate = key_id(entry.key)
            if candidate is None or kind_of(candidate) is not Kind.COMMIT:
                continue
            if self.read_commit(candidate).image == image:
                found.append(candidate)
        if len(found) > 1:
            several = ", ".join(oid.hex()[: len(digits) + 4] for oid in found[:4])
            raise UsageError(f"id {digits} of {image} is ambiguous ({several}): write more digits")
        return found[0] if found else None


def check_exclusive_create(store: ChunkStore) -> None:
    """Prove that `store` honours exclusive create; raises StoreError where it does not.

    Some S3 servers take `If-None-Match: *` and overwrite all the same: two writers would both
    believe to have moved a branch. So it is tried out on a key of its own.
    """
    key = f"probe/{secrets.token_hex(8)}"
    store.put_exclusive(key, b"first")
    try:
        try:
            store.put_exclusive(key, b"second")
        except KeyExists:
            if store.get(key) == b"first":
                return
        raise StoreError(
            f"{store.url} ignores exclusive create (If-None-Match): versions pushed there by two "
            "people at once would be lost. Use it read-only, or a store that honours it"
        )
    finally:
        store.delete(key)

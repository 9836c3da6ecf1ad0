"""Writing many objects: hashed, compressed and stored in parallel, only those that are missing.

Order is what makes a repository safe: chunks and patches, then index nodes from the leaves up,
then the commit, then the ref. `ObjectWriter.barrier` stands between these steps: when it returns,
everything submitted before is in the store, durably.

That an object is there says nothing of what it names, unless a ref reaches it: an interrupted push
leaves any part behind. So every object is looked for by itself.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from ..errors import Busy, KeyNotFound, UsageError
from ..units import MiB, format_size
from .commits import Commit
from .index import Index, update
from .listing import Listing
from .objects import HEADER, NULL_ID, Kind, object_key
from .refs import BranchRecord
from .repository import Repository
from .sweeps import Sweeps

T = TypeVar("T")

# One LIST answers for a thousand keys: above this many objects it is cheaper than asking for each.
LIST_FROM = 1000
# Objects listed at most: 148 MB of memory. Those of a larger repository are asked for one by one.
MAX_LISTED = 4_000_000
# Plaintext that may wait in memory at once, for chunks of any size.
MEMORY = 256 * MiB


@dataclass
class Written:
    """What a writer did. Bytes are as stored, headers included."""

    objects: int = 0
    bytes: int = 0
    known_objects: int = 0


class ObjectWriter:
    """Stores objects in one repository with a pool of threads. Use it in a `with` block.

    The first failure ends it: `submit` and `barrier` raise it from then on.
    """

    def __init__(
        self, repository: Repository, expected: int = 0, known: Iterable[bytes] = ()
    ) -> None:
        """`expected` objects or so will come; `known` ids are in the store for sure."""
        self.repository = repository
        self.written = Written()
        self._sweeps = Sweeps(repository.store)  # before the first look at an object
        self._given = frozenset(known)
        self._used: set[bytes] = set()  # stored by us, or found
        self._listing = Listing()
        self._listing.complete = False
        self._condition = threading.Condition()
        self._under_way = self._bytes_under_way = 0
        self._error: BaseException | None = None
        self.workers = max(os.cpu_count() or 1, repository.store.concurrency)
        if expected >= LIST_FROM:
            self._listing = Listing.read(repository.store, MAX_LISTED)
        self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="write")

    def submit(self, kind: Kind, plain: bytes) -> Future[bytes]:
        """Store an object in the background; the future gives its id.

        An all-zero chunk is never stored: its id is NULL_ID. Waits while too much is under way.
        """
        return self._submit(len(plain), lambda: self.write(kind, plain))

    def submit_as(self, oid: bytes, kind: Kind, plain: bytes) -> None:
        """Store an object whose id is known in the background."""
        self._submit(len(plain), lambda: self.write(kind, plain, oid))

    def run(self, length: int, work: Callable[[], object]) -> None:
        """Do `work`, which holds `length` bytes and writes what it likes, in the pool."""
        self._submit(length, work)

    def _submit(self, length: int, work: Callable[[], T]) -> Future[T]:
        with self._condition:
            self._condition.wait_for(lambda: self._error or self._has_room(length))
            self._raise_error()
            self._under_way += 1
            self._bytes_under_way += length
        future = self._pool.submit(work)
        future.add_done_callback(lambda done: self._done(done, length))
        return future

    def _has_room(self, length: int) -> bool:
        return self._under_way == 0 or (
            self._under_way < 2 * self.workers and self._bytes_under_way + length <= MEMORY
        )

    def _done(self, future: Future[T], length: int) -> None:
        with self._condition:
            self._under_way -= 1
            self._bytes_under_way -= length
            if not future.cancelled() and self._error is None:
                self._error = future.exception()
            self._condition.notify_all()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def write(self, kind: Kind, plain: bytes, oid: bytes | None = None) -> bytes:
        """Store an object here and now unless it is there; its id."""
        if kind is Kind.CHUNK and not any_bytes(plain):
            return NULL_ID
        form = self.repository.form
        oid = oid or form.object_id(kind, plain)
        self._store(oid, len(plain), lambda: form.encode(kind, plain, oid))
        return oid

    def write_stored(self, oid: bytes, data: bytes) -> None:
        """Store an object in its stored form, which has been proven, here and now unless it is
        there.
        """
        self._store(oid, HEADER.unpack_from(data)[5], lambda: data)

    def _store(self, oid: bytes, length: int, make: Callable[[], bytes]) -> None:
        """`length` is that of the plaintext."""
        with self._condition:
            fresh = oid not in self._used
            self._used.add(oid)  # a second writer of the same bytes need not store them too
        try:
            if not fresh or self._is_there(oid, length):
                with self._condition:
                    self.written.known_objects += 1
                return
            data = make()
            self.repository.store.put(object_key(oid), data)
        except BaseException:
            with self._condition:
                self._used.discard(oid)
            raise
        with self._condition:
            self.written.objects += 1
            self.written.bytes += len(data)

    def _is_there(self, oid: bytes, length: int) -> bool:
        """Whether the store has the object. One whose size cannot be is stored anew."""
        if oid in self._given:
            return True
        at = self._listing.find(oid)
        if at is not None:
            size = self._listing.sizes[at]
        elif self._listing.complete:
            return False
        else:
            try:
                size = self.repository.store.stat(object_key(oid)).size
            except KeyNotFound:
                return False
        return HEADER.size < size <= self.repository.form.max_stored(length)

    def drain(self) -> None:
        """Wait until all that was submitted is in the store. Raises the first error."""
        with self._condition:
            self._condition.wait_for(lambda: self._error or self._under_way == 0)
            self._raise_error()

    def barrier(self) -> None:
        """`drain`, and make it durable."""
        self.drain()
        self.repository.store.sync()

    def confirm(self) -> None:
        """Make sure that no removal took what this writer relies on. Right before a ref moves.

        Costs one LIST of `gc/`, and one of all objects after a day or a removal. Raises Busy.
        """
        while self._sweeps.must_look_again():
            sweeps = Sweeps(self.repository.store)
            listing = Listing.read(self.repository.store)
            missing = sum(oid not in listing for oid in self._used)
            if missing:
                raise Busy(
                    f"{self.repository.url}: {missing} objects were removed while this ran: run "
                    "it again, which sends only what is missing"
                )
            self._sweeps = sweeps

    def __enter__(self) -> ObjectWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


def any_bytes(data: bytes) -> bool:
    """Whether `data` has a byte that is not zero."""
    # Comparing bytes with bytes runs at 8.3 GB/s, any loop or memoryview far below (PEERS.md).
    zeros = _zeros.get(len(data))
    if zeros is None:
        zeros = _zeros[len(data)] = bytes(len(data))
    return bytes(data) != zeros


_zeros: dict[int, bytes] = {}


def write_index(
    writer: ObjectWriter,
    tree: Index | None,
    levels: int,
    changes: Iterable[tuple[int, bytes]],
    keep: int | None = None,
) -> bytes:
    """Write the nodes of `tree` with `changes` made; the new root (see `index.update`).

    Leaves go out in parallel; a node above them when all that was submitted before is stored.
    """

    def store(plain: bytes) -> bytes:
        oid = writer.repository.form.object_id(Kind.NODE, plain)
        if plain[0] > 0:
            writer.drain()
        writer.submit_as(oid, Kind.NODE, plain)
        return oid

    return update(tree, levels, changes, store, keep)


def publish_commit(
    writer: ObjectWriter,
    commit: Commit,
    branch: str,
    expected: bytes | None,
    why: str,
) -> BranchRecord:
    """Store the commit, then move the branch to it. All below it must have been submitted.

    Raises BranchMoved where the branch does not point to `expected`; Busy during a removal.
    """
    writer.barrier()
    oid = writer.write(Kind.COMMIT, commit.encode())
    writer.barrier()
    writer.confirm()
    return writer.repository.refs.move(
        commit.image, branch, oid, expected, author=commit.author, why=why
    )


def check_same_chunks(old: Commit, chunk_size: int) -> None:
    """Raises UsageError where a new version would have chunks of another size than the old."""
    if old.chunk_size != chunk_size:
        raise UsageError(
            f"image {old.image} has chunks of {format_size(old.chunk_size)}, not "
            f"{format_size(chunk_size)}: leave the chunk size out, or choose another image name"
        )

"""Writing many objects: hashed, compressed and stored in parallel, only those that are missing.

Order is what makes a repository safe: chunks and patches, then index nodes from the leaves up,
then the commit, then the ref. `ObjectWriter.barrier` stands between these steps: when it returns,
everything submitted before is in the store, durably.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from ..errors import UsageError
from ..units import MiB
from .commits import Commit
from .index import Index, update
from .objects import NULL_ID, Kind, encode, key_id, object_id, object_key
from .refs import BranchRecord
from .repository import Repository

# One LIST answers for a thousand keys: above this many objects it is cheaper than asking for each.
LIST_FROM = 1000
# Ids held in memory at most (about 100 bytes each); a larger repository is asked object by object.
MAX_KNOWN = 4_000_000
# Plaintext that may wait in memory at once, for chunks of any size.
MEMORY = 256 * MiB


@dataclass
class Written:
    """What a writer did. Bytes are as stored, headers included."""

    objects: int = 0
    bytes: int = 0
    known_objects: int = 0


class ObjectWriter:
    """Stores objects in one repository with a pool of threads. Use it in a `with` block."""

    def __init__(
        self, repository: Repository, expected: int = 0, known: Iterable[bytes] = ()
    ) -> None:
        """`expected` objects or so will come; `known` ids are in the store for sure."""
        self.repository = repository
        self.written = Written()
        self._known = set(known)
        self._complete = False  # whether `_known` is all that the store has
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self._futures: set[Future[bytes]] = set()
        workers = max(os.cpu_count() or 1, repository.store.concurrency)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="write")
        self._workers = workers
        self._slots = threading.BoundedSemaphore(2 * workers)
        if expected >= LIST_FROM:
            self._learn()

    def _learn(self) -> None:
        """Ask the store for the ids it has, all at once."""
        for count, entry in enumerate(self.repository.store.list("objects/")):
            if count >= MAX_KNOWN:
                return
            oid = key_id(entry.key)
            if oid is not None:
                self._known.add(oid)
        self._complete = True

    def submit(self, kind: Kind, make: Callable[[], bytes]) -> Future[bytes]:
        """Store the object whose plaintext `make` returns, in the background; gives its id.

        `make` runs in the pool as well, so that reading is parallel too. An all-zero chunk is
        never stored: its id is NULL_ID. Waits while too much is under way; raises the first error
        of what was submitted before.
        """
        self._slots.acquire()
        if self._error is not None:
            self._slots.release()
            raise self._error
        future = self._pool.submit(self._write, kind, make)
        with self._lock:
            self._futures.add(future)
        future.add_done_callback(self._done)
        return future

    def _done(self, future: Future[bytes]) -> None:
        self._slots.release()
        if future.cancelled():
            return
        error = future.exception()
        with self._lock:
            self._futures.discard(future)
            self._error = self._error or error

    def _write(self, kind: Kind, make: Callable[[], bytes]) -> bytes:
        plain = make()
        if kind is Kind.CHUNK and not any_bytes(plain):
            return NULL_ID
        return self.write(kind, plain)

    def write(self, kind: Kind, plain: bytes) -> bytes:
        """Store an object here and now unless it is there; its id."""
        oid = object_id(kind, plain)
        with self._lock:
            fresh = oid not in self._known
            self._known.add(oid)  # a second writer of the same bytes need not store them too
        key = object_key(oid)
        if fresh and (self._complete or not self.repository.store.exists(key)):
            data = encode(kind, plain)
            self.repository.store.put(key, data)
            with self._lock:
                self.written.objects += 1
                self.written.bytes += len(data)
        else:
            with self._lock:
                self.written.known_objects += 1
        return oid

    def barrier(self) -> None:
        """Wait until all that was submitted is stored, and durable. Raises the first error."""
        with self._lock:
            pending = set(self._futures)
        wait(pending, return_when=FIRST_EXCEPTION)
        if self._error is not None:
            raise self._error
        self.repository.store.sync()

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
    changes: list[tuple[int, bytes]],
    keep: int | None = None,
) -> bytes:
    """Write the nodes of `tree` with `changes` made; the new root (see `index.update`)."""
    return update(tree, levels, changes, lambda plain: writer.write(Kind.NODE, plain), keep)


def publish_commit(
    writer: ObjectWriter,
    commit: Commit,
    branch: str,
    expected: bytes | None,
    why: str,
) -> BranchRecord:
    """Store the commit, then move the branch to it. All below it must have been submitted.

    Raises BranchMoved where the branch does not point to `expected`.
    """
    writer.barrier()
    oid = writer.write(Kind.COMMIT, commit.encode())
    writer.barrier()
    return writer.repository.refs.move(
        commit.image, branch, oid, expected, author=commit.author, why=why
    )


def check_same_chunks(old: Commit, chunk_size: int) -> None:
    """Raises UsageError where a new version would have chunks of another size than the old."""
    if old.chunk_size != chunk_size:
        raise UsageError(
            f"image {old.image} has chunks of {old.chunk_size} bytes, not {chunk_size}: leave the "
            "chunk size out, or choose another image name"
        )

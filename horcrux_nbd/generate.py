"""Generate: a disk image becomes a version in a repository, only new chunks stored."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from .chunkstore.base import ChunkStore
from .errors import NotFound
from .names import DEFAULT_BRANCH, check_name
from .progress import Progress
from .repository.change import ChangeWriter, differing_blocks
from .repository.commits import DEFAULT_CHUNK, Commit, now
from .repository.index import Index
from .repository.objects import NULL_ID, Kind
from .repository.patch import Patch
from .repository.refs import BranchRecord
from .repository.repository import Repository
from .repository.writer import (
    ObjectWriter,
    Written,
    check_same_chunks,
    publish_commit,
    write_index,
)
from .source import Source

if TYPE_CHECKING:
    from .repository.keys import Secret


@dataclass(frozen=True)
class Generated:
    """What `generate` made. `problems` are files that changed while they were read."""

    id: bytes
    commit: Commit
    record: BranchRecord
    written: Written
    read_bytes: int
    problems: list[str]


def chunk_numbers(source: Source, chunk_size: int) -> Iterator[int]:
    """The chunks that may hold data, ascending, each once."""
    done = 0
    for offset, length in source.extents():
        if length:
            first, stop = offset // chunk_size, -(-(offset + length) // chunk_size)
            yield from range(max(first, done), stop)
            done = max(done, stop)


def generate(
    source: Source,
    store: ChunkStore,
    image: str,
    *,
    chunk_size: int | None = None,
    branch: str = DEFAULT_BRANCH,
    author: str,
    message: str,
    old_chunk: Callable[[int], bytes] | None = None,
    secret: Secret | None = None,
    progress: Progress | None = None,
) -> Generated:
    """Make `source` the next version of `image` on `branch`; makes the repository if need be.

    `chunk_size` in bytes: by default the image's own, the repository's, or 512 KiB. Interrupted at
    any moment it leaves the image as it was; run again, it stores only what is missing.
    `old_chunk` reads a chunk of the version on the branch: with it only the blocks that changed are
    stored, at the price of reading each changed chunk. With a `secret` a repository that is made
    is encrypted, and that opens it. Raises
    BranchMoved where somebody else made a version meanwhile; StoreError; OSError from the source.
    """
    check_name("image", image)
    check_name("branch", branch)
    progress = progress or Progress()
    repository = Repository.create(store, chunk_size or DEFAULT_CHUNK, secret=secret)
    head = repository.refs.head(image, branch)
    parent = head.commit if head else None
    old = repository.read_commit(parent) if parent else None
    # Not any that is listed: a first record that could not be stored may leave its folder behind.
    if old is None and head is None and repository.refs.heads(image):
        raise NotFound(f"image {image} has no branch {branch!r}: make it from a version first")
    if old is not None and chunk_size is not None:
        check_same_chunks(old, chunk_size)
    size = old.chunk_size if old else chunk_size or repository.chunk_size
    tree = repository.index(old) if old else None

    numbers = list(chunk_numbers(source, size))
    progress.start(f"generate {image}", len(numbers) * size)
    changes: dict[int, bytes] = {}
    lock = threading.Lock()

    # What the last version has is there; a first version may find much of itself from a run that
    # was interrupted, which one listing tells.
    known = (oid for _, oid in tree.entries()) if tree is not None else ()
    with ObjectWriter(repository, len(numbers) if old is None else 0, known) as writer:
        change = ChangeWriter(writer, partial(_patch, repository, size), size)

        def work(number: int) -> None:
            content = source.read(number * size, size)
            below = tree.lookup(number) if tree is not None and old_chunk is not None else NULL_ID
            if old_chunk is None or below in (
                NULL_ID,
                repository.form.object_id(Kind.CHUNK, content),
            ):
                oid = writer.write(Kind.CHUNK, content)
            else:
                before = old_chunk(number)
                blocks = differing_blocks(before, content)
                oid = change.store(below, blocks, lambda: before)[0] if blocks else below
            with lock:
                changes[number] = oid
            progress.advance(size)

        for number in numbers:
            writer.run(size, partial(work, number))
        writer.barrier()
        commit = Commit(
            image=image,
            size=source.size,
            chunk_size=size,
            index=NULL_ID,
            parents=(parent,) if parent else (),
            author=author,
            time=now(),
            message=message,
            filesystem=source.filesystem,
        )
        root = write_index(writer, tree, commit.levels, _changes(tree, changes), keep=commit.chunks)
        commit = replace(commit, index=root)
        record = publish_commit(writer, commit, branch, parent, why=f"generate: {message}"[:200])
        assert record.commit is not None
        return Generated(
            record.commit, commit, record, writer.written, len(numbers) * size, source.problems()
        )


def _patch(repository: Repository, chunk_size: int, oid: bytes) -> Patch | None:
    return Patch.decode(repository.read_object(oid, (Kind.PATCH,), chunk_size)[1], chunk_size)


def _changes(tree: Index | None, found: dict[int, bytes]) -> list[tuple[int, bytes]]:
    """What `found`, the whole new image, changes in `tree`: ascending (chunk, id)."""
    old = tree.entries() if tree is not None else iter(())
    gone = ((number, NULL_ID) for number, _ in old if number not in found)
    return sorted(itertools.chain(found.items(), gone))

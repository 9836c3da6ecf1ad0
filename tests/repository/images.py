"""Images for the tests of a repository: made from a dict of chunks, checked against one."""

from __future__ import annotations

from collections.abc import Mapping

from blake3 import blake3

from horcrux_nbd.chunkstore.base import ChunkStore
from horcrux_nbd.repository.commits import Commit
from horcrux_nbd.repository.objects import NULL_ID, Kind
from horcrux_nbd.repository.patch import BLOCK_SIZE, Patch
from horcrux_nbd.repository.repository import Repository
from horcrux_nbd.repository.writer import ObjectWriter, publish_commit, write_index

CHUNK = 64 << 10  # the smallest
TIME = "2026-01-02T03:04:05.678901Z"


def content(seed: str, size: int = CHUNK) -> bytes:
    """`size` bytes that a seed stands for; they do not compress."""
    return blake3(seed.encode()).digest(length=size)


def block(seed: str) -> bytes:
    return content(seed, BLOCK_SIZE)


def make_commit(
    repository: Repository,
    chunks: Mapping[int, bytes],
    *,
    image: str = "A",
    branch: str = "main",
    size: int | None = None,
    chunk_size: int = CHUNK,
    message: str = "",
) -> bytes:
    """Put a version on a branch: `chunks` maps numbers to plaintext, or to the id of a patch."""
    head = repository.refs.head(image, branch)
    parent = head.commit if head else None
    if size is None:
        size = (max(chunks, default=0) + 1) * chunk_size
    commit = Commit(
        image=image,
        size=size,
        chunk_size=chunk_size,
        index=NULL_ID,
        parents=(parent,) if parent else (),
        author="Test <test@example.org>",
        time=TIME,
        message=message,
    )
    with ObjectWriter(repository) as writer:
        ids = {
            number: plain if len(plain) == 32 else writer.submit(Kind.CHUNK, plain).result()
            for number, plain in sorted(chunks.items())
        }
        changes = [(number, oid) for number, oid in ids.items() if oid != NULL_ID]
        root = write_index(writer, None, commit.levels, changes)
        commit = Commit(**{**commit.__dict__, "index": root})
        record = publish_commit(writer, commit, branch, parent, why=message or "test")
    assert record.commit is not None
    return record.commit


def make_patch(
    repository: Repository,
    chain: tuple[bytes, ...],
    blocks: Mapping[int, bytes],
    chunk_size: int = CHUNK,
) -> bytes:
    """Store a patch; its id."""
    oid = repository.write_object(Kind.PATCH, Patch(chain, blocks).encode(chunk_size))
    repository.store.sync()
    return oid


def repository_in(store: ChunkStore) -> Repository:
    return Repository.create(store, CHUNK)

"""Profiles: what a workload reads first of a version, and in which order (docs/format.md).

A profile is one key, `refs/<image>/profiles/<commit>-<id>`: an object's stored form, whose id its
name has. So one LIST tells which versions have one, one GET brings it, and it is proven like any
object. It promises nothing and nothing needs it: who finds none, or a damaged one, goes on without.
"""

from __future__ import annotations

import contextlib
import re
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from ..errors import Damaged, KeyNotFound, NotFound
from ..names import check_name
from .commits import MAX_CHUNK, MIN_CHUNK, Commit
from .objects import MAX_PROFILE, Kind, kind_of
from .repository import Repository

HEADER = struct.Struct("<BBHI")  # version, log2 of the chunk size, 0, number of runs
RUN = struct.Struct("<Q")  # first chunk in the lower 48 bits, how many follow it in the upper 16
VERSION = 1
# 128 KiB of runs could name 2^30 chunks, which would take this host's memory and time.
MOST_CHUNKS = 1 << 20
MOST_RUNS = (MAX_PROFILE - HEADER.size) // RUN.size
_CHUNK_BITS = 48
_LONGEST = 1 << 16  # chunks in a run
# A version without a profile takes that of the nearest one before it: most chunks of two versions
# that lie so near each other are the same.
GENERATIONS = 64
_NAME = re.compile(r"([0-9a-f]{64})-([0-9a-f]{64})")


@dataclass(frozen=True)
class Profile:
    """Chunks by their numbers, in the order in which they were first read."""

    chunk_size: int
    chunks: tuple[int, ...]

    def encode(self) -> bytes:
        """The plaintext. What does not fit any more, far behind the start, is left out."""
        pairs = list(runs(self.chunks[:MOST_CHUNKS]))[:MOST_RUNS]
        head = HEADER.pack(VERSION, self.chunk_size.bit_length() - 1, 0, len(pairs))
        return head + b"".join(RUN.pack(first | count - 1 << _CHUNK_BITS) for first, count in pairs)

    @classmethod
    def decode(cls, plain: bytes) -> Profile:
        """Raises Damaged."""
        try:
            version, bits, zero, count = HEADER.unpack_from(plain)
        except struct.error:
            raise Damaged("a profile is cut short: record it again") from None
        known = version == VERSION and MIN_CHUNK <= 1 << min(bits, 63) <= MAX_CHUNK
        if not known or zero or len(plain) != HEADER.size + count * RUN.size:
            raise Damaged("a profile is damaged, or newer than this program: record it again")
        chunks: dict[int, None] = {}
        found = [run for (run,) in RUN.iter_unpack(plain[HEADER.size :])]
        if sum((run >> _CHUNK_BITS) + 1 for run in found) > MOST_CHUNKS:
            raise Damaged(f"a profile names more than {MOST_CHUNKS} chunks: record it again")
        for run in found:
            first = run & (1 << _CHUNK_BITS) - 1
            chunks.update(dict.fromkeys(range(first, first + (run >> _CHUNK_BITS) + 1)))
        return cls(1 << bits, tuple(chunks))


def runs(chunks: Iterable[int]) -> Iterator[tuple[int, int]]:
    """(first, count) of chunks that follow each other."""
    first = count = -1
    for chunk in chunks:
        if count > 0 and chunk == first + count and count < _LONGEST:
            count += 1
            continue
        if count > 0:
            yield first, count
        first, count = chunk, 1
    if count > 0:
        yield first, count


@dataclass(frozen=True)
class Found:
    """A profile in a repository: its key, the version that it is of, its id. Bytes as stored."""

    key: str
    commit: bytes
    id: bytes
    size: int
    time: float  # seconds since 1970


def prefix(image: str) -> str:
    """Where the profiles of an image are."""
    return f"refs/{check_name('image', image)}/profiles/"


def listed(repository: Repository, image: str) -> list[Found]:
    """The profiles of an image. Raises StoreError."""
    start = prefix(image)
    found = []
    for entry in repository.store.list(start):
        match = _NAME.fullmatch(entry.key[len(start) :])
        if match is None:
            continue
        commit, oid = (bytes.fromhex(digits) for digits in match.groups())
        if kind_of(commit) is Kind.COMMIT and kind_of(oid) is Kind.PROFILE:
            found.append(Found(entry.key, commit, oid, entry.size, entry.mtime))
    return found


def read(repository: Repository, found: Found) -> Profile:
    """One profile. Raises Damaged, KeyNotFound."""
    return Profile.decode(prove(repository, stored(repository, found), found.id))


def stored(repository: Repository, found: Found) -> bytes:
    """One profile as it is stored, unproven. Raises KeyNotFound."""
    return repository.store.get(found.key, 0, repository.form.max_stored(MAX_PROFILE) + 1)


def prove(repository: Repository, data: bytes, oid: bytes) -> bytes:
    """The plaintext of a stored profile. Raises Damaged."""
    return repository.form.decode(data, oid, (Kind.PROFILE,), MAX_PROFILE, repository.url)[1]


def find(
    repository: Repository,
    image: str,
    commit_id: bytes,
    read_commit: Callable[[bytes], Commit],
) -> tuple[bytes, Profile] | None:
    """The profile of a version, or of the nearest one before it, and whose it is; None without.

    `read_commit` reads commits, those too that the repository does not have. Raises StoreError.
    """
    there: dict[bytes, list[Found]] = {}
    for one in listed(repository, image):
        there.setdefault(one.commit, []).append(one)
    for _ in range(GENERATIONS if there else 0):
        for one in sorted(there.get(commit_id, ()), key=lambda one: one.time, reverse=True):
            with contextlib.suppress(Damaged, KeyNotFound):
                return one.commit, read(repository, one)
        try:
            parents = read_commit(commit_id).parents
        except (Damaged, NotFound, KeyNotFound):  # it was removed
            return None
        if not parents:
            return None
        commit_id = parents[0]
    return None


def save(repository: Repository, image: str, commit_id: bytes, profile: Profile) -> str:
    """Store the profile of a version in place of those that it has; its key. Raises StoreError."""
    plain = profile.encode()
    oid = repository.form.object_id(Kind.PROFILE, plain)
    key = f"{prefix(image)}{commit_id.hex()}-{oid.hex()}"
    repository.store.put(key, repository.form.encode(Kind.PROFILE, plain, oid))
    repository.store.sync()
    for one in listed(repository, image):
        if one.commit == commit_id and one.key != key:
            repository.store.delete(one.key)
    return key


def remove(repository: Repository, image: str, commit_id: bytes) -> int:
    """Remove the profiles of a version; how many there were."""
    found = [one for one in listed(repository, image) if one.commit == commit_id]
    for one in found:
        repository.store.delete(one.key)
    return len(found)


def of_key(key: str) -> tuple[str, bytes] | None:
    """(image, id) of a profile's key; None for a key of something else."""
    parts = key.split("/")
    if len(parts) != 4 or parts[0] != "refs" or parts[2] != "profiles":
        return None
    match = _NAME.fullmatch(parts[3])
    return None if match is None else (parts[1], bytes.fromhex(match.group(2)))

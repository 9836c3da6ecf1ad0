"""Verify: is everything there that the refs of a repository promise, and is it what it was?

Goes down from the refs: records, commits, index nodes and patches are read and proven; that chunks
are there, with sizes that can be, is told from one LIST. With `data` every object is read and
proven. Refs are read before the LIST, so a push that goes on meanwhile looks like no damage.

Memory: 37 bytes for each object in the store, and 120 for each index node.
"""

from __future__ import annotations

import itertools
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from ..chunkstore.base import ChunkStore
from ..errors import Damaged, EnvironmentProblem, KeyNotFound, NotFound
from ..names import Version
from ..progress import Progress
from ..units import MiB
from . import profiles
from .affected import affected, read_table, version_name
from .commits import DEFAULT_CHUNK, MAX_CHUNK, MAX_COMMIT, Commit
from .configuration import CONFIG_KEY
from .index import MAX_LEVELS, NODE_SIZE, table_ids
from .listing import Listing
from .objects import (
    HEADER,
    NULL_ID,
    PLAIN,
    Form,
    Kind,
    kind_of,
    object_key,
)
from .patch import Patch, check_chunk, max_patch_size
from .refs import BranchRecord
from .repository import Repository

MAX_PROBLEMS = 1000  # told one by one; beyond, they are counted
MAX_TOLD = 100_000  # objects counted once each; beyond, each time that something names them
MAX_AFFECTED = 20  # versions named for one problem; beyond, they are counted
MEMORY = 256 * MiB  # of objects read at once

# Marks of a listing: the log2 of the chunk size (16 to 26), and what is known of the object.
_BITS, _REFERENCED, _PROVEN = 31, 32, 64

# What one object or ref can have; a newer format of a single one is a problem like damage.
Bad = Damaged | EnvironmentProblem
_BAD = (Damaged, EnvironmentProblem)

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Problem:
    """Something that is missing, damaged or contradicts itself."""

    key: str  # in the store: of an object, a ref, or horcrux.json
    what: str  # one line
    affects: tuple[str, ...] = ()  # versions that cannot be read whole: IMAGE@short-id, or a ref
    more: int = 0  # versions beyond those


@dataclass
class Report:
    """What was found. Bytes are as stored."""

    images: int = 0
    versions: int = 0
    nodes: int = 0
    patches: int = 0
    chunks: int = 0
    bytes: int = 0  # of all objects that the versions need
    read_objects: int = 0
    read_bytes: int = 0
    unreferenced: int | None = None  # objects that no ref reaches; None if only a part was verified
    unreferenced_bytes: int = 0
    strays: list[str] = field(default_factory=list)  # keys under objects/ that name none
    problems: list[Problem] = field(default_factory=list)
    more_problems: int = 0

    @property
    def ok(self) -> bool:
        return not self.problems


def verify(
    store: ChunkStore,
    *,
    image: str | None = None,
    version: Version | None = None,
    data: bool = False,
    form: Form = PLAIN,
    progress: Progress | None = None,
) -> Report:
    """Verify the repository in `store`: all of it, one `image`, or one `version` (no ancestors).

    `form` is its form where horcrux.json does not tell (a mirror has it). Damage never raises: it
    is in the report. Raises NotFound where there is no repository, image or version,
    EnvironmentProblem for a newer format, StoreError for trouble with the store.
    """
    return _Verifier(store, data, form, progress or Progress()).run(image, version)


class _Verifier:
    def __init__(self, store: ChunkStore, data: bool, form: Form, progress: Progress) -> None:
        self._store, self._data, self._progress = store, data, progress
        self._report = Report()
        self._repository = Repository(store, "", DEFAULT_CHUNK, form)
        self._listing = Listing()
        self._commits: dict[bytes, Commit] = {}
        self._bad: dict[bytes, str] = {}  # of the problems that are told one by one
        self._told: set[bytes] = set()  # that are counted, or told already
        self._patches = array("Q")  # places of patches that are still to be read
        self._chains = array("Q")  # hash of each patch's chain, by its place in the listing
        self._links = array("Q")  # place of a patch, of the one below, the chain that it must have

    def run(self, image: str | None, version: Version | None) -> Report:
        whole = image is None and version is None
        self._open()
        workers = max(2, self._store.concurrency)
        self._window = 2 * workers
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="verify")
        try:
            if version is None:
                self._read_commits(self._read_refs(image))
            else:
                self._read_version(version)
            # Large chunks: fewer at once.
            largest = max((c.chunk_size for c in self._commits.values()), default=DEFAULT_CHUNK)
            self._window = max(2, min(self._window, MEMORY // (2 * largest)))
            self._listing = Listing.read(self._store)
            for oid in self._commits:
                self._mark(oid, 0, MAX_COMMIT, proven=True)
            self._read_trees()
            self._read_patches()
            if self._data:
                self._read_objects(whole)
                for commit in self._commits.values():
                    self._check_end(commit)
            self._tell_objects()
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._count(whole)
        return self._report

    def _problem(self, key: str, what: str, affects: Iterable[str] = ()) -> None:
        if len(self._report.problems) >= MAX_PROBLEMS:
            self._report.more_problems += 1
            return
        named = list(affects)
        self._report.problems.append(
            Problem(
                key,
                what,
                tuple(named[:MAX_AFFECTED]),
                max(0, len(named) - MAX_AFFECTED),
            )
        )

    def _bad_object(self, oid: bytes, what: str) -> None:
        """A problem of an object; which versions it affects is looked up at the end."""
        if oid in self._bad or oid in self._told:
            return
        if len(self._bad) < MAX_PROBLEMS:
            self._bad[oid] = what
            return
        self._report.more_problems += 1
        if len(self._told) < MAX_TOLD:
            self._told.add(oid)

    def _each(self, work: Callable[[T], R], items: Iterable[T]) -> Iterator[tuple[T, R | Bad]]:
        """`work` for each of `items` in parallel, in order; damage is a result."""
        waiting: deque[tuple[T, Future[R]]] = deque()

        def oldest() -> tuple[T, R | Bad]:
            item, future = waiting.popleft()
            try:
                return item, future.result()
            except _BAD as error:
                return item, error

        for item in items:
            waiting.append((item, self._pool.submit(work, item)))
            if len(waiting) >= self._window:
                yield oldest()
        while waiting:
            yield oldest()

    # ---- refs and commits

    def _open(self) -> None:
        try:
            self._repository = Repository.open(self._store)
        except Damaged as error:
            self._problem(CONFIG_KEY, str(error))
        except NotFound:
            if not self._repository.refs.images():
                raise
            self._problem(CONFIG_KEY, f"{self._store.url}: {CONFIG_KEY} is missing")
        if self._repository.form.encrypted:
            self._check_keys()

    def _check_keys(self) -> None:
        """Whoever has none of the keys of an encrypted repository is locked out."""
        from .keys import read_slot, slot_keys

        sound = 0
        for key in slot_keys(self._store):
            try:
                read_slot(self._store, key)
                sound += 1
            except _BAD as error:
                self._problem(key, str(error))
        if not sound:
            self._problem(
                CONFIG_KEY,
                f"{self._store.url}: no sound key is left: who has unlocked it adds one with "
                "`horcrux-cli key add`",
            )

    def _read_version(self, version: Version) -> None:
        self._report.images = 1
        try:
            found = self._repository.resolve(version)
        except _BAD as error:
            self._problem(f"refs/{version.image}", str(error), [str(version)])
            return
        self._commits[found.id] = found.commit

    def _read_refs(self, image: str | None) -> dict[bytes, list[str]]:
        """The commits that heads and tags name, and by which names."""
        refs = self._repository.refs
        if image is not None:
            refs.require_image(image)
        images = refs.images() if image is None else [image]
        self._report.images = len(images)
        self._progress.start("reading refs")
        roots: dict[bytes, list[str]] = {}
        for name in images:
            for branch in refs.branches(name):
                head = self._read_branch(name, branch)
                if head is not None:
                    roots.setdefault(head, []).append(f"{name}@{branch}")
            for tag in refs.tags(name):
                try:
                    record = refs.tag(name, tag)
                except _BAD as error:
                    self._problem(f"refs/{name}/tags/{tag}", str(error), [f"{name}@{tag}"])
                    continue
                if record is not None:
                    roots.setdefault(record.commit, []).append(f"{name}@{tag}")
            self._read_profiles(name)
        return roots

    def _read_profiles(self, image: str) -> None:
        found = profiles.listed(self._repository, image)
        for one, result in self._each(partial(profiles.read, self._repository), found):
            if isinstance(result, _BAD):
                self._problem(one.key, f"{self._store.url}: profile {one.key}: {result}")

    def _read_branch(self, image: str, branch: str) -> bytes | None:
        """The commit that a branch names now. Older records need none: it may have been reset."""
        refs = self._repository.refs
        keys = refs.record_keys(image, branch)
        newest: BranchRecord | None = None
        for at, (key, record) in enumerate(self._each(refs.read_record, keys)):
            if not isinstance(record, BranchRecord):
                self._problem(key, str(record), [f"{image}@{branch}"] if at == 0 else [])
            elif at == 0:
                newest = record
        for newer, older in itertools.pairwise(keys):
            if int(older[-20:]) - int(newer[-20:]) != 1:
                self._problem(newer, f"the record before {newer} is missing")
        return newest.commit if newest else None

    def _read_commits(self, roots: dict[bytes, list[str]]) -> None:
        """Read the commits and all their ancestors."""
        seen = set(roots)
        generation = sorted(seen)
        unread: dict[bytes, str] = {}
        while generation:
            following: list[bytes] = []
            for oid, commit in self._each(self._repository.read_commit, generation):
                if not isinstance(commit, Commit):
                    unread[oid] = str(commit)
                    continue
                self._commits[oid] = commit
                following += [parent for parent in commit.parents if parent not in seen]
                seen.update(commit.parents)
            generation = following
        for oid, what in unread.items():
            children = [
                version_name(commit.image, child)
                for child, commit in self._commits.items()
                if oid in commit.parents
                and not self._repository.refs.is_shallow(commit.image, child)
            ]
            self._told.add(oid)
            if children or oid in roots:
                self._problem(object_key(oid), what, roots.get(oid, []) + children)

    # ---- index nodes and patches

    def _mark(self, oid: bytes, bits: int, max_plain: int, proven: bool = False) -> int | None:
        """Note that the versions need an object. Its place, if it is there and is new."""
        at = self._listing.find(oid)
        if at is None:
            self._bad_object(oid, f"object {oid.hex()} is missing in {self._store.url}")
            return None
        mark = self._listing.marks[at]
        if mark & _REFERENCED:
            if bits and mark & _BITS != bits:
                self._bad_object(oid, f"object {oid.hex()} is named by versions of two chunk sizes")
            return None
        self._listing.marks[at] = bits | _REFERENCED | (_PROVEN if proven else 0)
        size = self._listing.sizes[at]
        if not HEADER.size < size <= self._repository.form.max_stored(max_plain):
            self._bad_object(oid, f"object {oid.hex()} has {size} bytes, which cannot be")
            return None
        return at

    def _read_trees(self) -> None:
        """Read every node once, level by level, those of all versions together."""
        self._progress.start("reading the index")
        roots: dict[tuple[int, int], set[bytes]] = {}
        for commit in self._commits.values():
            if commit.index != NULL_ID:
                key = (commit.chunk_size.bit_length() - 1, commit.levels - 1)
                roots.setdefault(key, set()).add(commit.index)
        for bits in sorted({bits for bits, _ in roots}):
            children: set[bytes] = set()
            for level in range(MAX_LEVELS - 1, -1, -1):
                nodes = sorted(children | roots.get((bits, level), set()))
                children = set()
                for oid, table in self._each(partial(read_table, self._repository, level), nodes):
                    if not isinstance(table, bytes):
                        self._bad_object(oid, str(table))
                        continue
                    self._mark(oid, 0, NODE_SIZE, proven=True)
                    self._report.nodes += 1
                    self._progress.advance(NODE_SIZE)
                    if level:
                        children.update(table_ids(table))
                    else:
                        self._mark_chunks(oid, table, bits)

    def _mark_chunks(self, leaf: bytes, table: bytes, bits: int) -> None:
        largest_chunk, largest_patch = 1 << bits, max_patch_size(1 << bits)
        for oid in table_ids(table):
            kind = kind_of(oid)
            if kind is Kind.CHUNK:
                self._mark(oid, bits, largest_chunk)
            elif kind is Kind.PATCH:
                at = self._mark(oid, bits, largest_patch)
                if at is not None:
                    self._patches.append(at)
            else:
                self._bad_object(leaf, f"index node {leaf.hex()} names {oid.hex()} as a chunk")

    def _read_patches(self) -> None:
        """Read every patch, and what its chain names, until there is nothing new."""
        self._progress.start("reading patches")
        if self._patches:
            self._chains = array("Q", bytes(8 * len(self._listing)))
        while self._patches:
            places, self._patches = self._patches, array("Q")
            for at, patch in self._each(self._read_patch, places):
                if not isinstance(patch, Patch):
                    self._bad_object(self._listing.id(at), str(patch))
                    continue
                self._report.patches += 1
                self._listing.marks[at] |= _PROVEN
                bits = self._listing.marks[at] & _BITS
                self._chains[at] = _hash(patch.chain)
                for below in patch.chain:
                    if kind_of(below) is Kind.PATCH:
                        new = self._mark(below, bits, max_patch_size(1 << bits))
                        if new is not None:
                            self._patches.append(new)
                    elif below != NULL_ID:
                        self._mark(below, bits, 1 << bits)
                nearest = self._listing.find(patch.chain[0])
                if len(patch.chain) > 1 and nearest is not None:
                    self._links.extend((at, nearest, _hash(patch.chain[1:])))
        for at, below, chain in zip(*[iter(self._links)] * 3, strict=True):
            if self._chains[below] not in (0, chain):
                oid = self._listing.id(at)
                self._bad_object(oid, f"patch {oid.hex()} names another chain than the one below")

    def _read_patch(self, at: int) -> Patch:
        chunk_size = 1 << (self._listing.marks[at] & _BITS)
        plain = self._repository.read_object(self._listing.id(at), (Kind.PATCH,), chunk_size)[1]
        self._progress.advance(len(plain))
        try:
            return Patch.decode(plain, chunk_size)
        except Damaged as error:
            raise Damaged(f"{error}: object {self._listing.id(at).hex()}") from None

    # ---- every object, and the end of each image

    def _count(self, whole: bool) -> None:
        report, listing = self._report, self._listing
        report.versions, report.strays = len(self._commits), listing.strays
        report.unreferenced = 0 if whole else None
        for at, (mark, size) in enumerate(zip(listing.marks, listing.sizes, strict=True)):
            if mark & _REFERENCED:
                report.bytes += size
                report.chunks += kind_of(listing.id(at)) is Kind.CHUNK
            elif report.unreferenced is not None:
                report.unreferenced += 1
                report.unreferenced_bytes += size
            if mark & _PROVEN:
                report.read_objects += 1
                report.read_bytes += size

    def _read_objects(self, whole: bool) -> None:
        """Read what was not read so far; of an unreferenced object a later push might make use."""
        wanted = _REFERENCED | _PROVEN
        places = array(
            "Q",
            (
                at
                for at, mark in enumerate(self._listing.marks)
                if mark & wanted == _REFERENCED or (whole and not mark)
            ),
        )
        total = sum(self._listing.sizes[at] for at in places)
        self._progress.start("reading objects", total)
        for at, result in self._each(self._read_object, places):
            if result is None:
                self._listing.marks[at] |= _PROVEN
            else:
                self._bad_object(self._listing.id(at), str(result))
            self._progress.advance(self._listing.sizes[at])

    def _read_object(self, at: int) -> None:
        oid, bits = self._listing.id(at), self._listing.marks[at] & _BITS
        kind = kind_of(oid)
        assert kind is not None
        chunk_size = 1 << bits if bits else MAX_CHUNK
        bound = self._repository.max_plain((kind,), chunk_size)
        form = self._repository.form
        try:
            data = self._store.get(object_key(oid), 0, form.max_stored(bound) + 1)
        except KeyNotFound:
            if bits:
                raise Damaged(f"object {oid.hex()} is missing in {self._store.url}") from None
            return  # an unreferenced one, removed since it was listed
        plain = form.decode(data, oid, (kind,), bound, self._store.url)[1]
        if bits and kind is Kind.CHUNK:
            check_chunk(plain, oid, chunk_size)

    def _check_end(self, commit: Commit) -> None:
        """Behind the end of an image there are zeros, or they would show when it grows."""
        try:
            index = self._repository.index(commit)
            beyond = next(index.entries(commit.chunks), None)
            if beyond is not None:
                self._bad_object(
                    commit.index, f"{commit.image}: the index names a chunk behind the end"
                )
            rest = commit.size % commit.chunk_size
            last = index.lookup(commit.chunks - 1) if rest else NULL_ID
            if last != NULL_ID and any(self._repository.read_chunk(last, commit.chunk_size)[rest:]):
                self._bad_object(last, f"object {last.hex()} has data behind the end of the image")
        except Damaged:
            return  # told already, by what is damaged

    def _tell_objects(self) -> None:
        if not self._bad:
            return
        self._progress.start("looking for the versions that this affects")
        versions = affected(self._repository, self._commits, self._bad.keys())
        for oid, what in self._bad.items():
            names = [version_name(self._commits[c].image, c) for c in versions[oid]]
            self._problem(object_key(oid), what, names)


def _hash(chain: tuple[bytes, ...]) -> int:
    return hash(chain) & (1 << 64) - 1 | 1

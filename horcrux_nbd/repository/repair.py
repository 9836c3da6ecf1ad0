"""Repair: what `verify` finds missing or damaged is written anew from where it is sound.

Objects can come from anywhere, as their ids prove them. Refs come from a mirror of the same
repository only, and where their neighbours agree with it. Nothing is ever deleted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from ..chunkstore.base import ChunkStore
from ..errors import Damaged, EnvironmentProblem, HorcruxError, KeyNotFound, NotFound, StoreError
from ..progress import Progress
from . import profiles
from .commits import MAX_CHUNK
from .configuration import CONFIG_KEY
from .objects import PLAIN, Form, Kind, key_id, kind_of, object_key
from .records import MAX_RECORD, decode_record
from .refs import BranchRecord, Refs
from .repository import Repository
from .verify import Problem, Report, verify

# What may hold the plaintext of an object: None where it does not. What it gives is proven.
Source = Callable[[bytes], bytes | None]
_TOP = 10**20 - 1


@dataclass
class Repaired:
    """What was mended, by key, and what `verify` says afterwards."""

    mended: list[str] = field(default_factory=list)
    left: Report = field(default_factory=Report)


def repair(
    store: ChunkStore,
    mirrors: Sequence[ChunkStore] = (),
    sources: Sequence[Source] = (),
    *,
    progress: Progress | None = None,
) -> Repaired:
    """Mend the repository in `store` from copies of it and from `sources` of objects.

    A damaged node hides what is damaged below it, so it is verified (with all data) until nothing
    more can be mended. Raises Damaged where a mirror is of another repository, NotFound,
    StoreError.
    """
    return _Repair(store, mirrors, sources, progress or Progress()).run()


class _Repair:
    def __init__(
        self,
        store: ChunkStore,
        mirrors: Sequence[ChunkStore],
        sources: Sequence[Source],
        progress: Progress,
    ) -> None:
        self._store, self._progress = store, progress
        self._mirrors = [Repository.open(mirror) for mirror in mirrors]
        self._sources = [*sources, *map(_of_mirror, self._mirrors)]
        self._done = Repaired()
        self._form: Form = PLAIN

    def run(self) -> Repaired:
        self._check_mirrors()
        while True:
            report = verify(self._store, data=True, form=self._form, progress=self._progress)
            before = len(self._done.mended)
            for problem in report.problems:
                self._mend(problem)
            if len(self._done.mended) == before:
                self._done.left = report
                return self._done
            self._store.sync()

    def _check_mirrors(self) -> None:
        """Those of another repository would be a disaster; a damaged configuration names none."""
        ids = {mirror.id: mirror.url for mirror in self._mirrors}
        for mirror in self._mirrors:
            self._form = mirror.form
        with contextlib.suppress(Damaged, NotFound):
            own = Repository.open(self._store)
            self._form = own.form
            ids.setdefault(own.id, own.url)
        if len(ids) > 1:
            raise Damaged(
                f"{' and '.join(ids.values())} are different repositories: nothing was changed"
            )

    def _mend(self, problem: Problem) -> None:
        oid = key_id(problem.key)
        if oid is not None:
            self._mend_object(oid)
        elif problem.key == CONFIG_KEY:
            self._mend_with(problem.key, decode_record)
        elif problem.key.startswith("keys/"):
            from .keys import decode_slot

            self._mend_with(problem.key, decode_slot)
        elif "/heads/" in problem.key:
            self._mend_branch(problem.key)
        elif "/tags/" in problem.key:
            self._mend_tag(problem.key)
        elif (profile := profiles.of_key(problem.key)) is not None:
            self._mend_profile(problem.key, *profile)

    def _mend_object(self, oid: bytes) -> None:
        kind, key = kind_of(oid), object_key(oid)
        if kind is None or key in self._done.mended:
            return
        for source in self._sources:
            plain = source(oid)
            if plain is not None and self._form.object_id(kind, plain) == oid:
                self._put(key, self._form.encode(kind, plain, oid))
                return

    def _put(self, key: str, data: bytes) -> None:
        self._store.put(key, data)
        self._done.mended.append(key)
        self._progress.note(f"mended {key}")

    def _mend_with(self, key: str, check: Callable[[bytes, str], object]) -> None:
        for mirror in self._mirrors:
            try:
                data = mirror.store.get(key, 0, MAX_RECORD + 1)
                check(data, key)
            except (KeyNotFound, Damaged, EnvironmentProblem):
                continue
            if key not in self._done.mended:
                self._put(key, data)
            return

    def _mend_tag(self, key: str) -> None:
        _, image, _, name = key.split("/")
        for mirror in self._mirrors:
            with contextlib.suppress(Damaged, EnvironmentProblem):
                if mirror.refs.tag(image, name) is not None:
                    self._mend_with(key, lambda data, what: None)
                    return

    def _mend_profile(self, key: str, image: str, oid: bytes) -> None:
        for mirror in self._mirrors:
            for one in profiles.listed(mirror, image):
                with contextlib.suppress(Damaged, KeyNotFound):
                    if one.key == key:
                        data = profiles.stored(mirror, one)
                        profiles.prove(mirror, data, oid)
                        self._put(key, data)
                        return

    def _mend_branch(self, key: str) -> None:
        """The record `key`, and those missing before it, as a mirror has them."""
        _, image, _, branch, _ = key.split("/")
        here = Refs(self._store, self._form)
        keys = here.record_keys(image, branch)
        for mirror in self._mirrors:
            for wanted in [key, *_gap(key, keys)]:
                if _record(here, wanted) is not None or wanted in self._done.mended:
                    continue
                theirs = _record(mirror.refs, wanted)
                if theirs is not None and self._agree(here, mirror.refs, wanted):
                    self._put(wanted, mirror.store.get(wanted, 0, MAX_RECORD + 1))

    def _agree(self, here: Refs, there: Refs, key: str) -> bool:
        """Whether the records next to this one are the same in both, as far as both have them."""
        prefix, number = key[:-20], int(key[-20:])
        for near in (number - 1, number + 1):
            mine = _record(here, f"{prefix}{near:020d}")
            theirs = _record(there, f"{prefix}{near:020d}")
            if mine is not None and theirs is not None and mine != theirs:
                return False
        return True


def _gap(key: str, keys: Sequence[str]) -> Iterator[str]:
    """The keys that are missing between a record and the next older one. (Keys count down.)"""
    older = [int(other[-20:]) for other in keys if other > key]
    if older:
        for number in range(min(older) - 1, int(key[-20:]), -1):
            yield f"{key[:-20]}{number:020d}"


def _record(refs: Refs, key: str) -> BranchRecord | None:
    try:
        return refs.read_record(key)
    except (KeyNotFound, Damaged, EnvironmentProblem):
        return None


def _of_mirror(mirror: Repository) -> Source:
    def read(oid: bytes) -> bytes | None:
        kind = kind_of(oid)
        assert isinstance(kind, Kind)
        try:
            return mirror.read_object(oid, (kind,), MAX_CHUNK)[1]
        except Damaged:  # not there, or damaged there too
            return None

    return read


def quiet(source: Source) -> Source:
    """A source that does not have what it cannot read: one broken cache is no reason to stop."""

    def read(oid: bytes) -> bytes | None:
        with contextlib.suppress(StoreError, HorcruxError, OSError):
            return source(oid)
        return None

    return read

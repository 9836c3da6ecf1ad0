"""Damage in a repository: every kind of object and ref, with a mirror and without."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

from horcrux_nbd.chunkstore import open_mirrored, open_store
from horcrux_nbd.chunkstore.base import ChunkStore
from horcrux_nbd.errors import Damaged, EnvironmentProblem, HorcruxError
from horcrux_nbd.names import parse_version
from horcrux_nbd.repository.objects import NULL_ID, Kind, key_id, kind_of
from horcrux_nbd.repository.repair import repair
from horcrux_nbd.repository.repository import Repository
from horcrux_nbd.repository.verify import verify

from ..repository.images import CHUNK, block, content, make_commit, make_patch, repository_in
from .damage import World, WrongBytes

LIMIT = 1.0  # seconds for a store that is away; none is


class RepositoryWorld(World):
    """Two images, versions with an index of two levels, patches with whole and open chains."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.url, self.mirror = f"cp://{folder}/store", f"cp://{folder}/mirror"
        with open_store(self.url, create=True) as store:
            self._make(store)
        shutil.copytree(folder / "store", folder / "mirror")
        self.truth = self._read(self.url, (), self._versions)
        self.entries = {
            p.relative_to(folder / "store").as_posix(): p.read_bytes()
            for p in (folder / "store").rglob("*")
            if p.is_file()
        }

    def _make(self, store: ChunkStore) -> None:
        repository = repository_in(store)
        base = repository.write_object(Kind.CHUNK, content("base"))
        soft = repository.write_object(Kind.CHUNK, b"compresses well " * (CHUNK // 16))
        one = make_patch(repository, (base,), {0: block("1")})
        two = make_patch(repository, (one, base), {1: block("2")})
        three = make_patch(repository, (two,), {2: block("3")})
        over_zeros = make_patch(repository, (NULL_ID,), {15: block("z")})
        wide = {n * 300: content(f"w{n}") for n in range(3)}
        size = 1000 * CHUNK
        versions = [
            make_commit(repository, {**wide, 0: base, 7: soft}, size=size, message="one"),
            make_commit(repository, {**wide, 0: two, 5: over_zeros}, size=size, message="two"),
            make_commit(repository, {**wide, 0: three, 300: content("x")}, size=size),
            make_commit(repository, {**wide, 0: content("flat")}, size=size, message="four"),
        ]
        make_commit(repository, {0: content("b"), 1: content("w1"), 2: soft}, image="B")
        repository.refs.make_tag("A", "v1", versions[0], author="", message="")
        repository.refs.make_tag("A", "v2", versions[1], author="", message="")
        repository.refs.move("A", "side", versions[2], None, author="", why="")
        repository.refs.move("A", "gone", versions[0], None, author="", why="")
        repository.refs.move("A", "gone", None, versions[0], author="", why="")
        self._versions = ["A@main", "A@side", "A@v1", "A@v2", "B@main", *(
            f"A@{oid.hex()}" for oid in versions
        )]  # fmt: skip

    def files(self) -> dict[str, list[Path]]:
        found: dict[str, list[Path]] = {}
        for name in sorted(self.entries):
            path = self.folder / "store" / name
            found.setdefault(_kind(name), []).append(path)
        return found

    def _read(
        self, url: str, mirrors: tuple[str, ...], versions: list[str]
    ) -> dict[str, dict[int, bytes] | Exception]:
        """Of each version its chunks, or the error that reading it gives."""
        found: dict[str, dict[int, bytes] | Exception] = {}
        with open_mirrored(url, mirrors, limit=LIMIT) as store:
            for version in versions:
                try:
                    repository = Repository.open(store)
                    resolved = repository.resolve(parse_version(version))
                    chunks = {-1: resolved.id}
                    for number, oid in repository.index(resolved.commit).entries():
                        chunks[number] = repository.read_chunk(oid, resolved.commit.chunk_size)
                    found[version] = chunks
                except HorcruxError as error:
                    found[version] = error
        return found

    def check(self, rng: random.Random, kind: str, path: Path, data: bytes, way: str) -> str:
        key = path.relative_to(self.folder / "store").as_posix()
        failed = self._compare(self._read(self.url, (), self._versions))
        if key_id(key) is not None:
            healed = self._read(self.url, (self.mirror,), self._versions)
            if self._compare(healed):
                raise WrongBytes(f"not healed by the mirror: {healed}")
        with open_store(self.url, limit=LIMIT) as store:
            try:
                report = verify(store, data=True)
            except EnvironmentProblem as error:  # a later format, by the look of it
                self._must_be_config(key, error)
                return "refused"
            if report.ok:
                if failed:
                    raise WrongBytes(f"{failed} cannot be read, and verify finds nothing")
                return "harmless"
            if key not in {problem.key for problem in report.problems}:
                raise WrongBytes(f"verify names {[p.key for p in report.problems]}")
            with open_store(self.mirror, limit=LIMIT) as mirror:
                left = repair(store, [mirror]).left
            if not left.ok:
                raise WrongBytes(f"not mended: {left.problems}")
            if not verify(store, data=True).ok:
                raise WrongBytes("the second verify is not clean")
        if self._compare(self._read(self.url, (), self._versions)):
            raise WrongBytes("mended, and still not readable")
        return "an error, mended" if failed else "named, mended"

    def _must_be_config(self, key: str, error: Exception) -> None:
        if key != "horcrux.json":
            raise WrongBytes(f"verify raises {error}")

    def _compare(self, found: dict[str, dict[int, bytes] | Exception]) -> list[str]:
        """The versions that give an error; nothing may be wrong."""
        for version, chunks in found.items():
            if isinstance(chunks, Exception):
                if not isinstance(chunks, Damaged | EnvironmentProblem):
                    raise WrongBytes(f"{version}: {type(chunks).__name__}: {chunks}")
            elif chunks != self.truth[version]:
                raise WrongBytes(f"{version} reads as something else")
        return [version for version, chunks in found.items() if isinstance(chunks, Exception)]


def _kind(key: str) -> str:
    oid = key_id(key)
    if oid is not None:
        kind = kind_of(oid)
        assert kind is not None
        return kind.name.lower()
    parts = key.split("/")
    return parts[2] if parts[0] == "refs" else parts[0]

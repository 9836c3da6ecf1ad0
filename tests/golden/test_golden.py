"""The golden repository of format 1: this release opens it, and writes the same.

It was made by the first release (make.py) and is never made again. Whoever breaks a test here has
changed the format: docs/format.md, section 12, says how that is done.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from horcrux_nbd.chunkstore import ChunkStore, open_store
from horcrux_nbd.errors import Damaged
from horcrux_nbd.names import parse_version
from horcrux_nbd.repository.objects import (
    ID_SIZE,
    NULL_ID,
    STORED,
    ZSTD,
    Kind,
    key_id,
    kind_of,
    layers_of,
)
from horcrux_nbd.repository.patch import Patch
from horcrux_nbd.repository.repository import Repository
from horcrux_nbd.repository.verify import verify
from horcrux_nbd.repository.writer import ObjectWriter, publish_commit, write_index

from ..repository.memory_store import MemoryStore
from ..repository.second_reader import Reader
from .make import make

GOLDEN = Path(__file__).parent / "v1"
VERSIONS: dict[str, dict[str, Any]] = json.loads(GOLDEN.with_suffix(".json").read_text())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy, so that nothing ever changes the original."""
    return Path(shutil.copytree(GOLDEN, tmp_path / "golden"))


@pytest.fixture
def store(folder: Path) -> Iterator[ChunkStore]:
    with open_store(str(folder)) as store:
        yield store


@pytest.fixture
def repository(store: ChunkStore) -> Repository:
    return Repository.open(store)


def test_it_opens_and_is_sound(store: ChunkStore, repository: Repository) -> None:
    assert repository.chunk_size == 64 << 10
    report = verify(store, data=True)
    assert report.problems == []
    assert report.unreferenced == 0
    assert report.versions == len(VERSIONS)
    assert report.images == 6


@pytest.mark.parametrize("commit", sorted(VERSIONS))
def test_every_byte_of_every_version(repository: Repository, commit: str) -> None:
    expected = VERSIONS[commit]
    found = repository.resolve(parse_version(f"{expected['image']}@{commit}")).commit
    assert found.size == expected["size"]
    chunks = {}
    for number, oid in repository.index(found).entries():
        plain = repository.read_chunk(oid, found.chunk_size)
        chunks[str(number)] = hashlib.sha256(plain).hexdigest()
    assert chunks == expected["chunks"]


def test_the_second_reader_reads_it_too() -> None:
    reader = Reader(GOLDEN)
    for commit, expected in VERSIONS.items():
        value = reader.commit(bytes.fromhex(commit))
        assert value["size"] == expected["size"]
        chunks = {
            str(number): hashlib.sha256(reader.chunk(oid, value["chunk_size"])).hexdigest()
            for number, oid in reader.entries(value)
        }
        assert chunks == expected["chunks"]


def test_refs(repository: Repository) -> None:
    refs = repository.refs
    assert refs.images() == ["AMCC", "cut", "deep", "empty", "huge.64TiB", "wide"]
    assert refs.branches("AMCC") == ["again", "gone", "main", "side"]
    assert sorted(refs.heads("AMCC")) == ["again", "main", "side"]
    assert refs.tags("AMCC") == ["release-1.0", "v1"]
    assert [r.why for r in refs.records("AMCC", "again")] == [
        "branch: made again", "branch: deleted", "branch: again"
    ]  # fmt: skip
    assert [r.number for r in refs.records("AMCC", "main")] == [5, 4, 3, 2, 1]
    texts = ["AMCC", "AMCC@main~4", "AMCC@v1", "AMCC@main~2", "AMCC@side", "AMCC@again"]
    messages = [repository.resolve(parse_version(text)).commit.message for text in texts]
    assert messages == [
        "merged and grown", "first version", "first version",
        "Übergröße: « chains »\n\nand a second line", "on another branch", "patches",
    ]  # fmt: skip
    tagged = repository.resolve(parse_version("AMCC@release-1.0")).commit
    assert tagged.tags == {"ticket": "4711", "wer": "Jürgen 😀"}
    assert len(repository.resolve(parse_version("AMCC")).commit.parents) == 2


def test_it_has_one_of_everything(store: ChunkStore, repository: Repository) -> None:
    """So that the tests above mean something."""
    ids = [oid for entry in store.list("objects/") if (oid := key_id(entry.key))]
    assert {kind_of(oid) for oid in ids} == set(Kind) - {Kind.PROFILE}
    assert {layers_of(oid) for oid in ids} == set(range(16))
    codecs = {store.get(entry.key)[6] for entry in store.list("objects/")}
    assert codecs == {STORED, ZSTD}
    patches = []
    for oid in ids:
        if kind_of(oid) is Kind.PATCH:
            for chunk_size in (64 << 10, 512 << 10, 64 << 20):
                with contextlib.suppress(Damaged):
                    plain = repository.read_object(oid, (Kind.PATCH,), chunk_size)[1]
                    patches.append(Patch.decode(plain, chunk_size))
    assert any(p.open_end for p in patches)
    assert any(p.chain[-1] == NULL_ID and len(p.chain) == 15 for p in patches)
    assert any(p.chain[-1] == NULL_ID and len(p.chain) == 1 for p in patches)
    commits = [repository.read_commit(oid) for oid in ids if kind_of(oid) is Kind.COMMIT]
    assert {c.levels for c in commits} == {1, 2, 3, 4, 6}
    assert {c.chunk_size for c in commits} >= {64 << 10, 64 << 20}
    assert any(c.size == 64 << 40 for c in commits)
    assert any(c.index == NULL_ID for c in commits)
    assert any(c.size % c.chunk_size for c in commits)
    size = sum(path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file())
    assert size < 200 << 10


def test_made_again_it_has_the_same_objects(store: ChunkStore) -> None:
    """The writer of this release makes the ids that the first one made, of everything."""
    again = MemoryStore()
    assert make(again) == VERSIONS
    golden = {entry.key for entry in store.list("objects/")}
    assert {key for key in again.objects if key.startswith("objects/")} == golden
    names = {entry.key for entry in store.list()}
    assert again.objects.keys() == names


def test_a_version_can_be_added(store: ChunkStore, repository: Repository) -> None:
    head = repository.resolve(parse_version("AMCC"))
    tree = repository.index(head.commit)
    with ObjectWriter(repository) as writer:
        new = writer.write(Kind.CHUNK, b"x" * head.commit.chunk_size)
        root = write_index(writer, tree, head.commit.levels, [(5, new)])
        assert len(root) == ID_SIZE
        commit = type(head.commit)(
            **{**head.commit.__dict__, "index": root, "parents": (head.id,), "message": "added"}
        )
        publish_commit(writer, commit, "main", head.id, "test")
    found = repository.resolve(parse_version("AMCC"))
    assert found.commit.message == "added"
    assert list(tree.diff(repository.index(found.commit))) == [(5, NULL_ID, new)]
    assert verify(store, data=True).ok

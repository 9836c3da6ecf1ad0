"""docs/format.md is enough: a reader written from it alone reads what the writer wrote."""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from horcrux_nbd.chunkstore import ChunkStore, open_store
from horcrux_nbd.repository.objects import NULL_ID, Kind
from horcrux_nbd.repository.patch import BLOCK_SIZE

from . import second_reader
from .images import CHUNK, block, content, make_commit, make_patch, repository_in
from .second_reader import Reader, Wrong


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ChunkStore]:
    with open_store(str(tmp_path / "repository"), create=True) as store:
        yield store


def test_it_imports_nothing_of_ours() -> None:
    tree = ast.parse(Path(second_reader.__file__).read_text())
    names = {
        (node.module or "." if isinstance(node, ast.ImportFrom) else alias.name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    allowed = {"__future__", "json", "os", "re", "struct", "sys", "pathlib", "typing"}
    allowed |= {"base64", "hashlib"}
    assert names == allowed | {"zstandard", "blake3", "cryptography"}


@pytest.mark.parametrize("chunk_size", [CHUNK, 4 * CHUNK])
def test_it_reads_what_the_writer_wrote(store: ChunkStore, tmp_path: Path, chunk_size: int) -> None:
    """Random images with patches of every shape, through every way to name a version."""
    repository = repository_in(store)
    rng = random.Random(chunk_size)
    size = 300 * chunk_size - 12345
    image = bytearray(size)
    entries: dict[int, bytes] = {}
    versions: list[tuple[bytes, bytes]] = []
    for turn in range(4):
        for number in rng.sample(range(299), 6):
            at = number * chunk_size
            old = entries.get(number, NULL_ID)
            if turn and rng.random() < 0.6:
                blocks = {rng.randrange(chunk_size // BLOCK_SIZE): block(str(turn))}
                entries[number] = make_patch(repository, (old,), blocks, chunk_size)
                for n, data in blocks.items():
                    image[at + n * BLOCK_SIZE : at + (n + 1) * BLOCK_SIZE] = data
            else:
                plain = content(f"{turn} {number}", chunk_size)
                entries[number] = repository.write_object(Kind.CHUNK, plain)
                image[at : at + chunk_size] = plain
        oid = make_commit(
            repository, entries, size=size, chunk_size=chunk_size, message=f"ä {turn}"
        )
        versions.append((oid, bytes(image)))
    repository.refs.make_tag("A", "v1", versions[1][0], author="", message="")
    reader = Reader(tmp_path / "repository")
    output = tmp_path / "out.raw"
    refs = ["main", "v1", versions[2][0].hex(), versions[0][0].hex()[:16]]
    for ref, (oid, expected) in zip(refs, [versions[i] for i in (3, 1, 2, 0)], strict=True):
        assert reader.resolve("A", ref) == oid
        reader.extract(oid, output)
        assert output.read_bytes() == expected
    assert [bytes.fromhex(p) for p in reader.commit(versions[3][0])["parents"]] == [versions[2][0]]


def test_its_command(store: ChunkStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_commit(repository_in(store), {1: content("x")})
    output = tmp_path / "out.raw"
    arguments = ["reader", str(tmp_path / "repository"), "A@main", str(output)]
    monkeypatch.setattr("sys.argv", arguments)
    second_reader.main()
    assert output.read_bytes() == bytes(CHUNK) + content("x")


def test_it_sees_damage(store: ChunkStore, tmp_path: Path) -> None:
    make_commit(repository_in(store), {0: content("x")})

    def extract() -> None:
        reader = Reader(tmp_path / "repository")
        reader.extract(reader.resolve("A"), tmp_path / "out.raw")

    for path in (tmp_path / "repository").rglob("*"):
        if path.is_dir():
            continue
        sound = path.read_bytes()
        path.write_bytes(sound[:20] + bytes([sound[20] ^ 1]) + sound[21:])
        with pytest.raises((Wrong, ValueError, KeyError)):
            extract()
        path.write_bytes(sound)

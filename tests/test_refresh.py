"""Refresh: tonight's version of a directory, in which only what changed is new."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest

from horcrux_nbd.chunkstore import open_store
from horcrux_nbd.generate import Generated, generate
from horcrux_nbd.names import Version
from horcrux_nbd.refresh import LastVersion
from horcrux_nbd.repository.verify import verify
from horcrux_nbd.source import open_source

KiB = 1024


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """64 MiB of pages like a database's: a few large files and many small ones."""
    folder = tmp_path / "data"
    chance = random.Random(1)
    for number in range(4):
        (folder / f"base/{number}").mkdir(parents=True)
        (folder / f"base/{number}/table").write_bytes(chance.randbytes(16 << 20))
        for small in range(50):
            (folder / f"base/{number}/{small}").write_bytes(chance.randbytes(3000))
    return folder


def make(directory: Path, url: str, *, onto: bool = False) -> Generated:
    with open_store(url, create=True) as store:
        if not onto:
            with open_source(directory, label="DB") as source:
                return generate(source, store, "DB", author="t", message="first")
        with (
            LastVersion(url, Version("DB")) as last,
            open_source(directory, label="DB", previous=last.layout()) as source,
        ):
            return generate(source, store, "DB", author="t", message="next", old_chunk=last.chunk)


def content(url: str, version: str, target: Path) -> Path:
    """The files of a version, by e2fsprogs' own reader."""
    from horcrux_nbd.names import parse_version

    raw = target.with_suffix(".raw")
    with LastVersion(url, parse_version(version)) as last:
        size = last._commit.chunk_size
        with raw.open("wb") as file:
            for number in range(last._commit.chunks):
                file.seek(number * size)
                file.write(last.chunk(number))
    target.mkdir()
    subprocess.run(["debugfs", "-R", f"rdump / {target}", raw], check=True, capture_output=True)
    raw.unlink()
    return target


def same(a: Path, b: Path) -> bool:
    return not subprocess.run(["diff", "-r", a, b], check=False, capture_output=True).stdout


def test_a_refresh_stores_what_changed_and_little_more(directory: Path, tmp_path: Path) -> None:
    url = f"cp://{tmp_path}/repo"
    first = make(directory, url)
    chance = random.Random(2)
    changed = 0
    for number in range(4):  # one page in a hundred, anywhere
        with (directory / f"base/{number}/table").open("r+b") as file:
            for page in chance.sample(range(2048), 20):
                file.seek(page * 8 * KiB)
                file.write(chance.randbytes(8 * KiB))
                changed += 8 * KiB
    (directory / "base/1/7").unlink()
    (directory / "base/2/new").write_bytes(chance.randbytes(100 * KiB))
    with (directory / "base/3/table").open("ab") as file:
        file.write(chance.randbytes(64 * KiB))
    changed += 164 * KiB
    second = make(directory, url, onto=True)
    assert second.commit.parents == (first.id,)
    assert second.written.bytes < 1.5 * changed, (second.written, changed)
    assert same(directory, content(url, "DB@main", tmp_path / "second"))
    assert not same(directory, content(url, "DB@main~1", tmp_path / "first"))
    with open_store(url) as store:
        assert verify(store, data=True).problems == []


def test_a_refresh_of_nothing_stores_nothing(directory: Path, tmp_path: Path) -> None:
    url = f"cp://{tmp_path}/repo"
    first = make(directory, url)
    second = make(directory, url, onto=True)
    assert second.commit.index == first.commit.index
    assert second.written.objects == 1  # the commit


def test_refreshes_go_on_from_one_another(directory: Path, tmp_path: Path) -> None:
    """Patches over patches: a hundredth of the pages each night, merged into one patch a chunk."""
    url = f"cp://{tmp_path}/repo"
    make(directory, url)
    chance = random.Random(3)
    for _ in range(12):
        with (directory / "base/0/table").open("r+b") as file:
            for page in chance.sample(range(2048), 20):
                file.seek(page * 8 * KiB)
                file.write(chance.randbytes(8 * KiB))
        make(directory, url, onto=True)
    assert same(directory, content(url, "DB", tmp_path / "last"))


def test_what_moved_is_not_new(directory: Path, tmp_path: Path) -> None:
    """Renamed folders and files, some of them changed too."""
    url = f"cp://{tmp_path}/repo"
    make(directory, url)
    (directory / "base").rename(directory / "moved")
    (directory / "moved/3").rename(directory / "elsewhere")
    chance = random.Random(2)
    changed = 0
    for table in directory.glob("*/*/table"):
        with table.open("r+b") as file:
            for page in chance.sample(range(2048), 20):
                file.seek(page * 8 * KiB)
                file.write(chance.randbytes(8 * KiB))
                changed += 8 * KiB
    second = make(directory, url, onto=True)
    assert second.written.bytes < 2 * changed, (second.written, changed)
    assert same(directory, content(url, "DB@main", tmp_path / "second"))

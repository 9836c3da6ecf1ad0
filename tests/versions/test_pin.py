"""Pinned versions: all of them here, whatever the cache evicts and whether the store is there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from horcrux_nbd import paths, versions
from horcrux_nbd.cli.main import main
from horcrux_nbd.errors import StoreError, UsageError
from horcrux_nbd.versions.session import Session
from horcrux_nbd.volume import pins
from horcrux_nbd.volume.cache import Cache
from tests.versions.support import BLOCK, Disk, clear_cache, small_repository
from tests.volume.support import CHUNK, IMAGE, make_image, noise


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk("v", small_repository(tmp_path / "repo", chunks=16))
    disk.write((3 * CHUNK, noise(BLOCK, 1)))
    disk.commit()
    disk.push()
    clear_cache()
    yield disk
    shutil.rmtree(paths.cache(), ignore_errors=True)


def pin(name: str = "v", **bounds: int) -> versions.Pinned:
    with Session(name) as session:
        if bounds:
            session.cache.limit = bounds["limit"]
        commit = session.commit(session.base)
        return versions.pin(session.repository, session.cache, session.base, commit, session.local)


def test_a_pinned_version_needs_no_store(disk: Disk, tmp_path: Path) -> None:
    done = pin()
    assert (done.bytes, done.fetched) == (16 * CHUNK, 16 * CHUNK)
    assert pin().fetched == 0
    (tmp_path / "repo").rename(tmp_path / "away")
    clear_cache()  # which leaves what is pinned
    disk.check()
    # Let go of, it can be evicted like anything else.
    assert pins.remove(paths.cache(), done.id)
    clear_cache()
    with pytest.raises(StoreError):
        disk.content()


def test_what_others_read_does_not_evict_it(disk: Disk, tmp_path: Path) -> None:
    pin()
    other = Disk("w", make_image(tmp_path / "other", noise(40 * CHUNK, 2), image="B"), image="B")
    cache = Cache(paths.cache(), 24 * CHUNK)
    assert cache.size() > cache.limit
    cache.trim(cache.limit, 0.9)
    cache.close()
    (tmp_path / "repo").rename(tmp_path / "away")
    disk.check()
    other.check()


def test_one_that_was_broken_off_goes_on(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    from horcrux_nbd.repository.repository import Repository

    original, calls = Repository.read_chunk, []

    def breaks(*args: object, **options: object) -> bytes:
        calls.append(1)
        if len(calls) > 5:
            raise StoreError("the line is cut")
        return original(*args, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Repository, "read_chunk", breaks)
        with pytest.raises(StoreError, match="cut"):
            pin()
    assert 0 < pin().fetched <= 11 * CHUNK


def test_a_cache_that_is_too_small_says_so(disk: Disk) -> None:
    with pytest.raises(UsageError, match=r"needs 1\.0 MiB of the cache, whose limit is 1\.0 MiB"):
        pin(limit=16 * CHUNK)
    assert pins.load(paths.cache()) == []
    pin(limit=20 * CHUNK)
    other = Disk("w", make_image(Path(disk.url[5:]), noise(16 * CHUNK, 3)))
    with pytest.raises(UsageError, match=r"beside 1\.0 MiB of other pins"):
        pin("w", limit=20 * CHUNK)
    other.check()


def test_a_commit_that_was_never_pushed_can_be_pinned(disk: Disk, tmp_path: Path) -> None:
    disk.write((0, noise(CHUNK, 4)), (5 * CHUNK, noise(BLOCK, 5)))
    disk.commit()
    pin()
    (tmp_path / "repo").rename(tmp_path / "away")
    clear_cache()
    disk.check()


def test_the_command(disk: Disk, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*words: str, code: int = 0) -> str:
        assert main(words) == code
        out, err = capsys.readouterr()
        return out if code == 0 else err

    assert "of which 1.0 MiB were fetched" in run("pin", "-q", "v")
    assert "yes" in run("pin")
    oid = disk.state.base
    assert f'"id": "{oid}"' in run("pin", "--json")
    assert "is not pinned" in run("pin", "-d", IMAGE, "main~1", code=3)
    run("pin", "-d", oid[:8])
    assert oid[:8] not in run("pin")
    assert "see `horcrux-cli pin`" in run("pin", "-d", code=2)

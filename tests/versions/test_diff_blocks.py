"""What differs in blocks, against a comparison of all bytes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from horcrux_nbd.chunkstore import open_store
from horcrux_nbd.errors import UsageError
from horcrux_nbd.names import Version
from horcrux_nbd.repository.repository import Repository
from horcrux_nbd.units import KiB
from horcrux_nbd.versions.diff_blocks import Side, differing, stat, stored_side, volume_side
from horcrux_nbd.versions.session import Session, opened_cache
from tests.versions.support import BLOCK, Disk, clear_cache, small_repository
from tests.volume.support import IMAGE, make_image, noise

CHUNK = 64 * KiB


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk("v", small_repository(tmp_path / "repo"))


def stored(url: str, ref: str, stack: list[object]) -> Side:
    store = open_store(url)
    repository = Repository.open(store)
    cache = opened_cache()
    found = repository.resolve(Version(IMAGE, ref))
    stack += [store, cache]
    return stored_side(ref, found.commit, repository, cache.__enter__())


def blocks(extents: object) -> set[int]:
    return {
        number
        for one in extents  # type: ignore[attr-defined]
        for number in range(one.start // BLOCK, -(-(one.start + one.length) // BLOCK))
    }


def really(old: bytes, new: bytes) -> set[int]:
    size = max(len(old), len(new))
    old, new = old.ljust(size, b"\0"), new.ljust(size, b"\0")
    return {
        at // BLOCK for at in range(0, size, BLOCK) if old[at : at + BLOCK] != new[at : at + BLOCK]
    }


def test_against_all_bytes(disk: Disk) -> None:
    chance = random.Random(4)
    contents = [bytes(disk.model)]
    for number in range(4):
        for _ in range(5):
            offset = chance.randrange(len(disk.model) - 9000)
            disk.write((offset, noise(chance.randrange(1, 9000), (number, offset))))
        disk.commit(f"{number}")
        contents.append(bytes(disk.model))
    disk.write((100, b"not committed"))
    disk.push()
    clear_cache()
    kept: list[object] = []
    sides = [stored(disk.url, f"main~{back}", kept) for back in range(4, -1, -1)]
    with volume_side("v") as volume:
        everything = [*zip(sides, contents, strict=True), (volume, bytes(disk.model))]
        for old, before in everything:
            for new, after in everything:
                exact = blocks(differing(old, new, exact=True))
                assert exact == really(before, after)
                assert blocks(differing(old, new)) >= exact
    for side in sides:
        side.__exit__(None, None, None)


def test_an_overlay_is_known_to_the_block_and_nothing_is_fetched(
    disk: Disk, tmp_path: Path
) -> None:
    disk.write((CHUNK + BLOCK, noise(2 * BLOCK, 1)))
    clear_cache()
    with Session("v", lock=False) as session:  # the index is all that is needed
        list(session.local.index(session.commit(session.base), _no_remote(session)).entries())
    (tmp_path / "repo").rename(tmp_path / "away")
    with Session("v", lock=False) as session, volume_side("v") as new:
        from horcrux_nbd.versions.diff_blocks import version_side

        with version_side("base", session.base, session) as old:
            found = stat(old, new)
    assert (found.chunks, found.bytes, found.exact) == (1, 2 * BLOCK, False)


def _no_remote(session: Session) -> object:
    from horcrux_nbd.volume.local import remote_node

    return remote_node(session.remote)


def test_the_end_of_an_image_of_an_odd_size(tmp_path: Path) -> None:
    url = make_image(tmp_path / "repo", noise(3 * CHUNK + 700))
    disk = Disk("v", url)
    disk.write((3 * CHUNK, noise(700, 2)))
    disk.commit()
    disk.push()
    kept: list[object] = []
    old, new = stored(url, "main~1", kept), stored(url, "main", kept)
    (only,) = differing(old, new, exact=True)
    assert (only.start, only.length) == (3 * CHUNK, 700)
    assert stat(old, new).bytes == 700


def test_sizes_that_differ(tmp_path: Path) -> None:
    first, second = noise(4 * CHUNK), noise(4 * CHUNK) + noise(CHUNK, 2)
    make_image(tmp_path / "repo", first)
    url = make_image(tmp_path / "repo", second)
    kept: list[object] = []
    old, new = stored(url, "main~1", kept), stored(url, "main", kept)
    assert blocks(differing(old, new, exact=True)) == really(first, second)
    assert stat(old, new).sizes == (4 * CHUNK, 5 * CHUNK)


def test_chunks_of_another_size(disk: Disk, tmp_path: Path) -> None:
    url = make_image(tmp_path / "other", noise(8 * CHUNK), chunk_size=2 * CHUNK)
    kept: list[object] = []
    old, new = stored(disk.url, "main", kept), stored(url, "main", kept)
    with pytest.raises(UsageError, match=r"chunks of 64 KiB.*128 KiB"):
        list(differing(old, new))

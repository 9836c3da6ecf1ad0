"""Which blocks differ, against the bytes of both sides."""

from __future__ import annotations

import contextlib
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from horcrux_nbd import paths
from horcrux_nbd.cli.files import open_place
from horcrux_nbd.contents import Content, Differences, open_volume
from horcrux_nbd.contents import differences as module
from horcrux_nbd.units import KiB
from tests.versions.support import BLOCK, Disk
from tests.volume.support import make_image, noise

CHUNK = 64 * KiB
SIZE = 40 * CHUNK + 3 * BLOCK + 512  # no multiple of anything


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    """A volume of an image of which half is zeros."""
    content = noise(SIZE // 2, 1) + bytes(SIZE - SIZE // 2)
    return Disk("v", make_image(tmp_path / "repository", content, chunk_size=CHUNK))


def truth(old: Content, new: Content) -> set[int]:
    """Numbers of the blocks that differ."""
    a, b = old.read(0, old.size), new.read(0, new.size)
    return {at // BLOCK for at in range(0, SIZE, BLOCK) if a[at : at + BLOCK] != b[at : at + BLOCK]}


def told(old: Content, new: Content, *, exact: bool = True) -> set[int]:
    """The same by `Differences`, asked in pieces of any size."""
    differences = Differences(old, new, exact=exact)
    found: set[int] = set()
    chance, at = random.Random(1), 0
    while at < SIZE:
        length = min(chance.choice((1, 512, BLOCK, 5 * BLOCK, 3 * CHUNK)), SIZE - at)
        done = at
        for start, stop in differences(at, length):
            assert done <= start < stop <= at + length
            found.update(range(start // BLOCK, -(-stop // BLOCK)))
            done = stop
        at += length
    return found


@contextlib.contextmanager
def sides(old: str | None, new: str | None) -> Iterator[tuple[Content, Content]]:
    """Versions of the volume; None for what it holds now."""
    with contextlib.ExitStack() as stack:
        yield tuple(  # type: ignore[misc]
            stack.enter_context(open_volume("v") if ref is None else open_place("v", ref))
            for ref in (old, new)
        )


def scatter(disk: Disk, seed: int, count: int = 25) -> None:
    """Writes here and there, some of the bytes that were there, zeros, and a whole chunk."""
    chance = random.Random(seed)
    for _ in range(count):
        at = chance.randrange(SIZE - 3 * BLOCK)
        length = chance.choice((1, 100, BLOCK, 2 * BLOCK))
        if chance.random() < 0.2:
            disk.write((at, bytes(disk.model[at : at + length])))
        else:
            disk.write((at, noise(length, seed)))
    disk.zero(chance.randrange(SIZE // 4) // BLOCK * BLOCK, 6 * BLOCK)
    disk.write((chance.randrange(20) * CHUNK, noise(CHUNK, seed)))


def test_equal_sides(disk: Disk) -> None:
    with sides("HEAD", None) as both:
        assert told(*both) == set()


@pytest.mark.parametrize("seed", range(3))
def test_between_any_two_of_versions_and_the_volume(disk: Disk, seed: int) -> None:
    scatter(disk, seed)
    disk.commit("one")
    scatter(disk, seed + 100, 3)
    disk.commit("two")
    scatter(disk, seed + 200)
    refs = ("HEAD~2", "HEAD~1", "HEAD", None)
    for old in refs:
        for new in refs:
            with sides(old, new) as both:
                expected = truth(*both)
                assert told(*both) == expected
                assert told(*both, exact=False) >= expected


def test_patches_need_no_chunk(disk: Disk) -> None:
    """With an empty cache: two versions that differ in a few blocks are told from the patches."""
    disk.write((5 * CHUNK + 100, b"changed"), (9 * CHUNK, noise(BLOCK, 7)))
    disk.commit("one")
    disk.push()
    shutil.rmtree(paths.cache())
    with sides("HEAD~1", "HEAD") as (old, new):
        assert told(old, new) == {5 * CHUNK // BLOCK, 9 * CHUNK // BLOCK}
        assert old.base.figures.fetched_chunks + new.base.figures.fetched_chunks == 0


def test_limits(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond them more blocks count, and never fewer."""
    scatter(disk, 1)
    disk.commit("one")
    scatter(disk, 2)
    monkeypatch.setattr(module, "FETCH_LIMIT", 2 * CHUNK)
    monkeypatch.setattr(module, "READ_LIMIT", 2 * CHUNK)
    with sides("HEAD~1", None) as both:
        assert told(*both) > truth(*both)


def test_a_large_trim_over_nothing(disk: Disk) -> None:
    disk.zero(SIZE // 2 // CHUNK * CHUNK + 2 * CHUNK, 15 * CHUNK)
    disk.zero(2 * CHUNK, 3 * CHUNK)
    with sides("HEAD", None) as both:
        assert told(*both) == truth(*both) == set(range(2 * CHUNK // BLOCK, 5 * CHUNK // BLOCK))


def test_chunks_of_another_size_differ_everywhere(disk: Disk, tmp_path: Path) -> None:
    Disk("w", make_image(tmp_path / "other", bytes(disk.model), chunk_size=2 * CHUNK))
    with open_volume("v") as old, open_volume("w") as new:
        assert list(Differences(old, new)(10, 20)) == [(10, 30)]

"""Fetch and pull."""

from __future__ import annotations

from pathlib import Path

import pytest

from horcrux_nbd import versions
from horcrux_nbd.chunkstore import open_store
from horcrux_nbd.errors import NotFound, UsageError
from horcrux_nbd.repository.repository import Repository
from horcrux_nbd.versions import Changes, HasChanges
from tests.versions.support import BLOCK, Disk, clear_cache, small_repository, version_content
from tests.volume.support import IMAGE, noise


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Disk, Disk]:
    """Two people who work on one image."""
    url = small_repository(tmp_path / "repo")
    return Disk("mine", url), Disk("theirs", url)


def work(disk: Disk, *messages: str, push: bool = True) -> None:
    for message in messages:
        disk.write((0, noise(BLOCK, message)))
        disk.commit(message)
    if push:
        disk.push()


def test_nothing_new(pair: tuple[Disk, Disk]) -> None:
    mine, _ = pair
    fetched = versions.fetch("mine")
    assert (fetched.new, fetched.own, fetched.diverged) == ((), (), False)
    assert fetched.fork is not None
    assert fetched.fork.hex() == mine.state.base
    assert versions.pull("mine")[1] is None


def test_pull_goes_forward(pair: tuple[Disk, Disk]) -> None:
    mine, theirs = pair
    work(theirs, "one", "two", "three")
    clear_cache()
    fetched = versions.fetch("mine")
    assert [commit.message for _, commit in fetched.new] == ["three", "two", "one"]
    mine.check()  # a fetch changes nothing
    assert versions.position("mine").behind == 3
    _, moved = versions.pull("mine")
    assert moved is not None
    mine.model[:] = theirs.model
    mine.check()
    assert versions.position("mine").behind == 0
    # And on from there.
    work(mine, "four")
    assert version_content(mine.url) == mine.model


def test_pull_drops_no_changes(pair: tuple[Disk, Disk]) -> None:
    mine, theirs = pair
    work(theirs, "one")
    mine.write((50000, b"precious"))
    with pytest.raises(HasChanges):
        versions.pull("mine")
    mine.check()
    versions.pull("mine", changes=Changes.STASH)
    mine.model[:] = theirs.model
    mine.check()
    assert len(versions.stashes("mine")) == 1


def test_what_diverged_is_told(pair: tuple[Disk, Disk]) -> None:
    mine, theirs = pair
    base = mine.state.base
    work(theirs, "theirs one", "theirs two")
    work(mine, "mine", push=False)
    fetched = versions.fetch("mine")
    assert fetched.diverged
    assert (len(fetched.new), len(fetched.own)) == (2, 1)
    assert fetched.fork is not None
    assert fetched.fork.hex() == base
    with pytest.raises(versions.Diverged) as caught:
        versions.pull("mine")
    said = str(caught.value)
    for part in (
        "have diverged since " + base[:12],
        "1 version of its own ('mine')",
        "2 versions (the newest by Test <test@example.org>, 'theirs two')",
        "push mine --branch NAME",
        "reset mine origin/main",
    ):
        assert part in said
    mine.check()
    position = versions.position("mine")
    assert (position.ahead, position.behind) == (1, 2)
    # Both ways out that it names.
    mine.push(branch="mine")
    assert version_content(mine.url, "mine") == mine.model
    versions.checkout("mine", "main")
    mine.model[:] = theirs.model
    mine.check()


def test_reset_to_theirs(pair: tuple[Disk, Disk]) -> None:
    mine, theirs = pair
    work(theirs, "theirs")
    work(mine, "mine", push=False)
    moved = versions.reset("mine", "origin/main")
    assert len(moved.kept) == 1
    mine.model[:] = theirs.model
    mine.check()
    work(mine, "on top")
    assert version_content(mine.url, "main~1") == theirs.model


def test_a_push_after_a_fetch_of_what_diverged_still_refuses(pair: tuple[Disk, Disk]) -> None:
    mine, theirs = pair
    work(theirs, "theirs")
    work(mine, "mine", push=False)
    versions.fetch("mine")
    with pytest.raises(versions.Diverged, match="is not below the versions of volume mine"):
        mine.push()
    assert version_content(mine.url) == theirs.model


def test_what_follows_no_branch(pair: tuple[Disk, Disk]) -> None:
    mine, _ = pair
    versions.checkout("mine", mine.state.base)
    with pytest.raises(UsageError, match="follows no branch"):
        versions.fetch("mine")


def test_a_branch_that_was_deleted(pair: tuple[Disk, Disk]) -> None:
    mine, theirs = pair
    theirs.push(branch="mian")
    with open_store(mine.url) as store:
        refs = Repository.open(store).refs
        refs.move(IMAGE, "main", None, bytes.fromhex(mine.state.base), author="Eve", why="clean up")
    with pytest.raises(NotFound, match=r"Eve deleted branch 'main'.*did you mean mian"):
        versions.fetch("mine")
    mine.check()

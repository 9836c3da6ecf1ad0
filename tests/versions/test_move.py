"""Checkout, reset, revert and stash of volumes that nobody serves."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from horcrux_nbd import host, versions
from horcrux_nbd.errors import Busy, HorcruxError, NotFound, UsageError
from horcrux_nbd.repository.objects import Kind
from horcrux_nbd.units import KiB
from horcrux_nbd.versions import Changes, HasChanges, reflog
from tests.versions.support import (
    AUTHOR,
    BLOCK,
    Disk,
    clear_cache,
    run_until_killed,
    small_repository,
    version_content,
)
from tests.volume.support import make_image, noise

CHUNK = 64 * KiB


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    """A volume whose branch has three versions: `first`, `second`, `third`."""
    disk = Disk("v", small_repository(tmp_path / "repo"))
    disk.contents = [bytes(disk.model)]  # type: ignore[attr-defined]
    for number, message in enumerate(("second", "third")):
        disk.write((number * CHUNK, noise(BLOCK, message)))
        disk.commit(message)
        disk.contents.append(bytes(disk.model))  # type: ignore[attr-defined]
    disk.push()
    return disk


def holds(disk: Disk, number: int) -> None:
    """The volume holds version `number` (0: the first) of its image."""
    disk.model[:] = disk.contents[number]  # type: ignore[attr-defined]
    disk.check()


# ---- checkout


def test_back_and_forward(disk: Disk) -> None:
    moved = versions.checkout("v", "main~2")
    assert moved.ref == moved.after.hex()
    holds(disk, 0)
    assert disk.own() == {moved.after: Kind.COMMIT}
    moved = versions.checkout("v", "main")
    assert moved.ref == "main"
    holds(disk, 2)
    versions.checkout("v", "HEAD^")
    holds(disk, 1)
    assert [move.action for move in reflog.read(disk.folder)][:3] == ["checkout"] * 3


def test_nothing_is_fetched(disk: Disk) -> None:
    """Also an image of a petabyte is checked out at once."""
    size = 1 << 50
    url = make_image(Path(disk.url.removeprefix("cp://")).parent / "r", noise(CHUNK), size=size)
    big = Disk.__new__(Disk)
    big.name, big.url = "big", url
    from horcrux_nbd.names import Version

    host.create("big", url, Version("AMCC"))
    volume = big.open()
    volume.write(size // 2, memoryview(bytearray(noise(CHUNK))))
    volume.close()
    versions.commit(["big"], "far away", author=AUTHOR)
    clear_cache()
    moved = versions.checkout("big", "HEAD~1")
    assert moved.commit.size == size


def test_changes_are_not_dropped_unless_told(disk: Disk) -> None:
    disk.write((5000, b"precious"))
    with pytest.raises(HasChanges, match=re.escape("4.0 KiB of changes")) as caught:
        versions.checkout("v", "main~1")
    assert "--stash" in str(caught.value)
    assert "--discard" in str(caught.value)
    disk.check()
    moved = versions.checkout("v", "main~1", changes=Changes.DISCARD)
    assert moved.dropped == BLOCK
    holds(disk, 1)


def test_changes_in_the_stash_come_back(disk: Disk) -> None:
    disk.write((5000, b"precious"))
    changed = bytes(disk.model)
    moved = versions.checkout("v", "main~1", changes=Changes.STASH)
    assert moved.stashed == BLOCK
    holds(disk, 1)
    third = versions.stashes("v")[0].base[:12]
    with pytest.raises(UsageError, match=f"fit onto {third} only"):
        versions.stash_pop("v")
    versions.checkout("v", "main")
    holds(disk, 2)
    versions.stash_pop("v")
    disk.model[:] = changed
    disk.check()
    assert versions.stashes("v") == ()
    disk.commit("with what was in the stash")
    disk.push()
    assert version_content(disk.url) == changed


def test_commits_that_were_never_pushed_are_found_again(disk: Disk) -> None:
    disk.write((0, b"mine"))
    mine = disk.commit("mine")
    content = bytes(disk.model)
    versions.checkout("v", "origin/main")
    holds(disk, 2)
    # The volume's own branch still has it, as in git.
    assert versions.position("v").left == ("main",)
    versions.checkout("v", "main")
    disk.model[:] = content
    disk.check()
    assert disk.state.base == mine.id.hex()
    assert disk.push().commits == 1
    assert version_content(disk.url) == content


def test_commits_on_no_branch_are_kept(disk: Disk) -> None:
    versions.checkout("v", "main~1")
    holds(disk, 1)
    disk.write((0, b"loose"))
    loose = disk.commit("loose")
    content = bytes(disk.model)
    moved = versions.checkout("v", "main")
    assert moved.kept == (loose.id,)
    assert versions.position("v").kept == 1
    with pytest.raises(HorcruxError, match="1 version that never went"):
        host.remove("v")
    versions.checkout("v", loose.id.hex()[:10])
    disk.model[:] = content
    disk.check()
    versions.checkout("v", "main")
    count, size = versions.expire("v")
    assert count == 1
    assert size > BLOCK
    with pytest.raises(NotFound):
        versions.checkout("v", loose.id.hex())
    assert disk.own().keys() == {bytes.fromhex(disk.state.base)}


def test_a_version_of_another_size(tmp_path: Path, disk: Disk) -> None:
    """It is a device of another size from then on, since nobody has it open."""
    larger = noise(10 * CHUNK + 700, "larger")
    make_image(Path(disk.url.removeprefix("cp://")), larger)
    moved = versions.checkout("v", "origin/main")
    assert moved.commit.size == len(larger) == disk.state.size
    assert disk.content() == larger
    versions.checkout("v", "origin/main~1")
    holds(disk, 2)


@pytest.mark.parametrize(
    ("ref", "said"),
    [
        ("mian", r"no version 'mian': did you mean main\?"),
        ("nonsense", "no version 'nonsense'"),
        ("HEAD~9", "has only 2 versions before it"),
        ("a b", "is no ref"),
        ("main~x", "is no ref"),
        ("../main", "is no ref"),
        ("ffff", "no version 'ffff'"),
    ],
)
def test_a_version_that_there_is_not(disk: Disk, ref: str, said: str) -> None:
    with pytest.raises(HorcruxError, match=said) as caught:
        versions.checkout("v", ref)
    assert caught.value.exit_code in (2, 3)
    holds(disk, 2)


def test_an_ambiguous_id(disk: Disk) -> None:
    from horcrux_nbd.chunkstore import open_store
    from horcrux_nbd.repository.commits import now
    from horcrux_nbd.repository.repository import Repository
    from horcrux_nbd.versions.session import Session

    # Commits until two ids begin alike.
    with open_store(disk.url) as store, Session("v") as session:
        repository = Repository.open(store)
        from dataclasses import replace

        base = session.commit(session.base)
        seen: dict[str, bytes] = {}
        for number in range(5000):
            made = replace(base, message=f"{number} {now()}")
            digits = repository.form.object_id(Kind.COMMIT, made.encode()).hex()[:4]
            if digits in seen:
                repository.write_object(Kind.COMMIT, seen[digits])
                repository.write_object(Kind.COMMIT, made.encode())
                break
            seen[digits] = made.encode()
    with pytest.raises(UsageError, match=f"id {digits} of AMCC is ambiguous.*write more digits"):
        versions.checkout("v", digits)


@pytest.mark.parametrize(
    ("target", "number", "when"),
    [
        ("horcrux_nbd.volume.layer:Layer.create", 1, "after"),
        ("horcrux_nbd.volume.state:VolumeState.save", 1, "before"),
        ("horcrux_nbd.volume.state:VolumeState.save", 1, "after"),
        ("horcrux_nbd.volume.state:sweep_layers", 2, "after"),
        ("horcrux_nbd.versions.move:sweep", 1, "before"),
    ],
)
def test_killed_at_any_step_a_volume_is_here_or_there(
    disk: Disk, target: str, number: int, when: str
) -> None:
    disk.write((5000, b"precious"))
    before = bytes(disk.model)
    run_until_killed(
        target, number, when, "versions.checkout('v', 'main~1', changes=versions.Changes.STASH)"
    )
    if disk.content() != before:
        disk.model[:] = disk.contents[1]  # type: ignore[attr-defined]
    disk.check()
    if versions.stashes("v"):
        versions.checkout("v", "main", changes=Changes.DISCARD)
        versions.stash_pop("v")
    disk.model[:] = before
    disk.check()


# ---- reset and revert


def test_reset_undoes_a_commit(disk: Disk) -> None:
    disk.write((0, b"wrong"))
    wrong = disk.commit("wrong")
    moved = versions.reset("v", "HEAD~1")
    assert (moved.ref, moved.kept) == ("main", (wrong.id,))
    holds(disk, 2)
    assert disk.push().record is None
    versions.reset("v", wrong.id.hex())
    assert disk.content()[:5] == b"wrong"
    assert disk.push().commits == 1
    assert versions.position("v").kept == 0
    assert disk.state.kept == ()


def test_revert_makes_a_version_on_top(disk: Disk) -> None:
    moved = versions.revert("v", author=AUTHOR)
    assert moved.commit.message.startswith("Revert ")
    assert "(third)" in moved.commit.message
    holds(disk, 1)
    pushed = disk.push()
    assert (pushed.commits, pushed.objects) == (1, 1)  # its content is in the repository
    assert version_content(disk.url) == disk.model
    assert version_content(disk.url, "main~1") == disk.contents[2]  # type: ignore[attr-defined]


def test_revert_to_an_older_version(disk: Disk) -> None:
    moved = versions.revert("v", to="main~2", author=AUTHOR, message="as it was")
    assert moved.commit.message == "as it was"
    holds(disk, 0)
    with pytest.raises(versions.NothingToCommit, match="has the content of"):
        versions.revert("v", to="main~3", author=AUTHOR)


def test_revert_of_versions_that_were_never_pushed(disk: Disk) -> None:
    disk.write((0, noise(CHUNK, "mine")))
    disk.commit("mine")
    content = bytes(disk.model)
    disk.zero(0, CHUNK)
    disk.commit("zeros")
    versions.revert("v", author=AUTHOR)
    disk.model[:] = content
    disk.check()
    assert disk.push().commits == 3
    assert version_content(disk.url) == content


def test_only_the_newest_can_be_undone(disk: Disk) -> None:
    with pytest.raises(UsageError, match=r"only the newest.*--to REF"):
        versions.revert("v", "main~1", author=AUTHOR)
    versions.revert("v", "main", author=AUTHOR)
    holds(disk, 1)


# ---- stash


def test_stash_push_and_pop(disk: Disk) -> None:
    disk.write((5000, b"one"))
    first = bytes(disk.model)
    versions.stash("v", "one")
    holds(disk, 2)
    disk.write((9000, b"two"))
    second = bytes(disk.model)
    versions.stash("v", "two")
    holds(disk, 2)
    assert [one.message for one in versions.stashes("v")] == ["two", "one"]
    versions.stash_pop("v", 1)
    disk.model[:] = first
    disk.check()
    with pytest.raises(HasChanges, match="of changes already"):
        versions.stash_pop("v")
    disk.commit("one")
    with pytest.raises(UsageError, match="fit onto"):
        versions.stash_pop("v")
    versions.reset("v", "HEAD~1")
    versions.stash_pop("v")
    disk.model[:] = second
    disk.check()


def test_stash_drop(disk: Disk) -> None:
    disk.write((5000, b"one"))
    versions.stash("v", "one")
    versions.stash_drop("v")
    assert versions.stashes("v") == ()
    holds(disk, 2)
    with pytest.raises(NotFound, match="has no stash 0"):
        versions.stash_pop("v")


def test_stash_without_changes(disk: Disk) -> None:
    with pytest.raises(UsageError, match="has no changes"):
        versions.stash("v")


def test_a_stash_keeps_the_commit_that_it_lies_on(disk: Disk) -> None:
    disk.write((0, b"mine"))
    mine = disk.commit("mine")
    disk.write((5000, b"and more"))
    content = bytes(disk.model)
    versions.checkout("v", "origin/main", changes=Changes.STASH)
    versions.expire("v")
    versions.checkout("v", mine.id.hex())
    versions.stash_pop("v")
    disk.model[:] = content
    disk.check()
    with pytest.raises(Busy, match=r"4\.0 KiB of changes"):
        versions.checkout("v", "main~1")

"""Branches and tags."""

from __future__ import annotations

from pathlib import Path

import pytest

from horcrux_nbd import versions
from horcrux_nbd.chunkstore import open_store
from horcrux_nbd.errors import Busy, NotFound, UsageError
from horcrux_nbd.repository.repository import Repository
from horcrux_nbd.versions.session import opened_cache
from tests.versions.support import AUTHOR, BLOCK, Disk, small_repository, version_content
from tests.volume.support import CHUNK, IMAGE, make_image, noise


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk("v", small_repository(tmp_path / "repo"))


def delete(disk: Disk, name: str, *, force: bool = False) -> None:
    with open_store(disk.url) as store, opened_cache() as cache:
        repository = Repository.open(store)
        versions.delete_branch(repository, cache, IMAGE, name, author="Eve", force=force)


def make(disk: Disk, name: str) -> None:
    with open_store(disk.url) as store:
        repository = Repository.open(store)
        base = bytes.fromhex(disk.state.base)
        versions.make_branch(repository, IMAGE, name, base, author=AUTHOR)


def test_make_and_delete(disk: Disk) -> None:
    make(disk, "prices")
    assert version_content(disk.url, "prices") == disk.model
    with pytest.raises(UsageError, match="exists already"):
        make(disk, "prices")
    delete(disk, "prices")
    with pytest.raises(NotFound, match="deleted by Eve"):
        version_content(disk.url, "prices")
    make(disk, "prices")  # and again
    assert version_content(disk.url, "prices") == disk.model


def test_versions_that_are_nowhere_else_are_not_dropped(disk: Disk) -> None:
    disk.write((0, b"x"))
    disk.commit()
    disk.push(branch="prices")
    with pytest.raises(Busy, match=r"on no other branch.*-D deletes"):
        delete(disk, "prices")
    versions.tag_volumes(["v"], "keep", author=AUTHOR)
    delete(disk, "prices")  # the tag has it now
    assert version_content(disk.url, "keep") == disk.model


def test_forced(disk: Disk) -> None:
    disk.write((0, b"x"))
    disk.commit()
    disk.push(branch="prices")
    delete(disk, "prices", force=True)
    assert version_content(disk.url, disk.state.base) == disk.model  # until gc


def test_a_branch_that_there_is_not(disk: Disk) -> None:
    with pytest.raises(NotFound, match="no branch 'mian': did you mean main"):
        delete(disk, "mian")


def test_a_tag_is_of_what_was_pushed(disk: Disk) -> None:
    disk.write((0, b"x"))
    disk.commit()
    with pytest.raises(UsageError, match="never pushed"):
        versions.tag_volumes(["v"], "v3", author=AUTHOR)
    disk.push()
    versions.tag_volumes(["v"], "v3", author=AUTHOR)
    assert version_content(disk.url, "v3") == disk.model
    disk.write((0, b"y"))
    disk.commit()
    disk.push()
    with pytest.raises(UsageError, match="tag 'v3' of AMCC is"):
        versions.tag_volumes(["v"], "v3", author=AUTHOR)


def test_a_tag_names_a_set_that_was_committed_together(tmp_path: Path) -> None:
    db = Disk("db", small_repository(tmp_path / "db"))
    files = Disk(
        "files", make_image(tmp_path / "f", noise(4 * CHUNK), image="FILES"), image="FILES"
    )
    for disk in (db, files):
        disk.write((0, noise(BLOCK, disk.name)))
    versions.commit(["db", "files"], "release 7", author=AUTHOR)
    db.push()
    with pytest.raises(UsageError, match="volume files lies on a version that was never pushed"):
        versions.tag_volumes(["db", "files"], "release-7", author=AUTHOR)
    files.push()
    for _ in range(2):  # again: what a run that was broken off left is no obstacle
        made = versions.tag_volumes(["db", "files"], "release-7", author=AUTHOR)
    for disk, other in ((db, "FILES@release-7"), (files, f"{IMAGE}@release-7")):
        with open_store(disk.url) as store:
            tag = Repository.open(store).refs.tag(disk.image, "release-7")
        assert tag is not None
        assert (tag.commit, tag.message) == (made[disk.name], f"together with {other}")
        assert version_content(disk.url, "release-7", disk.image) == disk.model


def test_a_tag_of_a_set_is_made_for_all_or_none(tmp_path: Path) -> None:
    url = small_repository(tmp_path / "db")
    db = Disk("db", url)
    files = Disk(
        "files", make_image(tmp_path / "f", noise(4 * CHUNK), image="FILES"), image="FILES"
    )
    versions.tag_volumes(["files"], "v1", author=AUTHOR)
    for disk in (db, files):
        disk.write((0, noise(BLOCK, disk.name)))
        disk.commit()
        disk.push()
    with pytest.raises(UsageError, match=r"tag 'v1' of FILES is .* already"):
        versions.tag_volumes(["db", "files"], "v1", author=AUTHOR)
    with open_store(url) as store:
        assert Repository.open(store).refs.tag(IMAGE, "v1") is None
    Disk("second", url)
    with pytest.raises(UsageError, match="db and second are both of image"):
        versions.check_free(["db", "second"], "v2")
    with pytest.raises(UsageError, match="has a branch 'main'"):
        versions.check_free(["db"], "main")

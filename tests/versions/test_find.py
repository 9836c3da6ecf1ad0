"""What REF means for a volume."""

from __future__ import annotations

from pathlib import Path

import pytest

from horcrux_nbd import versions
from horcrux_nbd.chunkstore import open_store
from horcrux_nbd.repository.repository import Repository
from horcrux_nbd.versions.find import find
from horcrux_nbd.versions.session import Session
from tests.versions.support import AUTHOR, Disk, small_repository
from tests.volume.support import IMAGE


@pytest.fixture
def ids(tmp_path: Path) -> dict[str, bytes]:
    """A volume with `pushed` on main and `mine` on top; the tag v3 is the first version."""
    disk = Disk("v", small_repository(tmp_path / "repo"))
    first = bytes.fromhex(disk.state.base)
    with open_store(disk.url) as store:
        Repository.open(store).refs.make_tag(IMAGE, "v3", first, author=AUTHOR, message="")
    disk.write((0, b"x"))
    pushed = disk.commit("pushed").id
    disk.push()
    disk.write((0, b"y"))
    return {"first": first, "pushed": pushed, "mine": disk.commit("mine").id}


@pytest.mark.parametrize(
    ("ref", "name", "branch"),
    [
        ("HEAD", "mine", None),
        ("@", "mine", None),
        ("HEAD~1", "pushed", None),
        ("HEAD^^", "first", None),
        ("@~2", "first", None),
        ("main", "mine", "main"),
        ("main~1", "pushed", None),
        ("main~", "pushed", None),
        ("origin/main", "pushed", None),
        ("origin/main~1", "first", None),
        ("v3", "first", None),
        (f"{IMAGE}@main", "mine", "main"),
        (f"{IMAGE}@v3", "first", None),
    ],
)
def test_refs(ids: dict[str, bytes], ref: str, name: str, branch: str | None) -> None:
    with Session("v") as session:
        found = find(session, ref)
    assert (found.id, found.branch) == (ids[name], branch)
    # What the repository has of its line.
    assert found.upstream == ids["pushed" if name == "mine" else name].hex()


def test_ids(ids: dict[str, bytes]) -> None:
    with Session("v") as session:
        for oid in ids.values():
            assert find(session, oid.hex()).id == oid
            assert find(session, oid.hex()[:12]).id == oid
            assert find(session, oid.hex()[:12] + "~0").id == oid


def test_own_commits_are_found_without_the_store(ids: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "repo").rename(tmp_path / "away")
    with Session("v") as session:
        for ref in ("HEAD", "main", ids["mine"].hex()[:8], "HEAD~1"):
            assert find(session, ref).id in (ids["mine"], ids["pushed"])


def test_a_branch_that_was_left(ids: dict[str, bytes]) -> None:
    versions.checkout("v", "v3")
    with Session("v") as session:
        assert find(session, "main").id == ids["mine"]
        assert find(session, "HEAD").id == ids["first"]
        assert find(session, "origin/main").id == ids["pushed"]
        assert find(session, ids["mine"].hex()[:8]).upstream == ids["pushed"].hex()

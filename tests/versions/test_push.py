"""Pushes: what travels, what breaks them off, and what happens when many push at once."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from horcrux_nbd import host, versions
from horcrux_nbd.chunkstore import open_mirrored, open_store
from horcrux_nbd.chunkstore.base import ChunkStore
from horcrux_nbd.chunkstore.wrapper import WrapperStore
from horcrux_nbd.errors import HorcruxError, NotFound, StoreError, StoreRefused, UsageError
from horcrux_nbd.names import Version
from horcrux_nbd.progress import Progress
from horcrux_nbd.repository.objects import object_key
from horcrux_nbd.repository.refs import BranchMoved, BranchRecord
from horcrux_nbd.repository.repository import Repository
from horcrux_nbd.repository.verify import verify
from horcrux_nbd.units import KiB
from horcrux_nbd.versions import session as sessions
from tests.servers.moto_s3 import S3Server
from tests.versions.support import (
    AUTHOR,
    BLOCK,
    Disk,
    run_until_killed,
    small_repository,
    version_content,
)
from tests.volume.support import IMAGE, make_image, noise

CHUNK = 64 * KiB
PUSH = f"versions.push('v', author={AUTHOR!r})"


@pytest.fixture
def url(tmp_path: Path) -> str:
    return small_repository(tmp_path / "repo")


@pytest.fixture
def disk(url: str) -> Disk:
    return Disk("v", url)


def head(url: str, branch: str = "main") -> BranchRecord | None:
    with open_store(url) as store:
        return Repository.open(store).refs.head(IMAGE, branch)


def sound(url: str) -> None:
    """Everything that the refs promise is there."""
    with open_store(url) as store:
        report = verify(store, data=True)
    assert report.ok, report.problems


# ---- what travels


def test_only_what_is_new_travels(disk: Disk) -> None:
    disk.write((CHUNK, noise(BLOCK, 1)))
    disk.commit("fix prices")
    own = disk.own()
    pushed = disk.push()
    assert (pushed.commits, pushed.objects) == (1, 3)  # a patch, a node, a commit
    assert pushed.bytes < BLOCK + 10 * KiB
    record = head(disk.url)
    assert record is not None
    assert (record.author, record.why, record.commit) == (AUTHOR, "push: fix prices", pushed.tip)
    # All but the commit that the volume lies on is the cache's from now on.
    assert len(own) == 4
    assert disk.own().keys() == {pushed.tip}
    disk.check()
    assert version_content(disk.url) == disk.model
    sound(disk.url)


def test_several_commits_go_in_one_push(disk: Disk) -> None:
    contents = [bytes(disk.model)]
    for number in range(4):
        disk.write((number * BLOCK, noise(BLOCK, number)))
        disk.commit(f"number {number}")
        contents.append(bytes(disk.model))
    assert disk.push().commits == 4
    for back, content in enumerate(reversed(contents)):
        assert version_content(disk.url, f"main~{back}") == content
    sound(disk.url)


def test_nothing_to_push(disk: Disk) -> None:
    pushed = disk.push()
    assert pushed.record is None
    assert pushed.branch == "main"
    # Also where others moved the branch meanwhile: there is nothing of ours to lose.
    other = Disk("w", disk.url)
    other.write((0, b"x"))
    other.commit()
    other.push()
    assert disk.push().record is None


def test_changes_that_are_not_committed_stay(disk: Disk) -> None:
    disk.write((0, noise(BLOCK, 1)))
    disk.commit()
    disk.write((BLOCK, noise(BLOCK, 2)))
    disk.push()
    disk.check()
    assert version_content(disk.url) != disk.model
    disk.commit()
    disk.push()
    assert version_content(disk.url) == disk.model


def test_what_the_store_has_already_is_not_sent(disk: Disk) -> None:
    """Another volume pushed the same chunks to another branch."""
    other = Disk("w", disk.url)
    for one in (disk, other):
        one.write((0, noise(CHUNK, "same")))
        one.commit()
    disk.push(branch="first")
    pushed = other.push(branch="second")
    assert pushed.objects == 1  # its commit, which says who and when
    assert pushed.known_objects == 2


class Counter(Progress):
    def __init__(self) -> None:
        self.total = self.done = 0

    def start(self, what: str, total: int | None = None) -> None:
        self.total = total or 0

    def advance(self, count: int) -> None:
        self.done += count


def test_progress_tells_all_bytes(disk: Disk) -> None:
    disk.write((0, noise(3 * CHUNK, 1)))
    disk.commit()
    counter = Counter()
    pushed = disk.push(progress=counter)
    assert counter.total == counter.done == pushed.bytes


# ---- branches


def test_a_new_branch_is_followed(disk: Disk) -> None:
    disk.write((0, b"x"))
    made = disk.commit()
    before = head(disk.url)
    assert disk.push(branch="prices").branch == "prices"
    assert head(disk.url) == before
    disk.write((0, b"y"))
    disk.commit()
    assert disk.push().branch == "prices"
    record = head(disk.url, "prices")
    assert record is not None
    assert record.number == 2
    assert version_content(disk.url, "prices~1") == version_content(disk.url, made.id.hex())


def test_a_branch_without_a_new_version(disk: Disk) -> None:
    pushed = disk.push(branch="as-it-is")
    assert pushed.commits == 0
    assert version_content(disk.url, "as-it-is") == disk.model


def test_a_branch_that_exists_is_not_taken(disk: Disk) -> None:
    other = Disk("w", disk.url)
    other.write((0, b"x"))
    other.commit()
    other.push(branch="prices")
    disk.write((0, b"y"))
    disk.commit()
    with pytest.raises(UsageError, match="branch 'prices' of AMCC exists already"):
        disk.push(branch="prices")
    with pytest.raises(UsageError, match="cannot name a branch"):
        disk.push(branch="../x")


@pytest.mark.parametrize("ref", ["v3", "main~1", "ID"])
def test_what_follows_no_branch_has_to_name_one(url: str, ref: str) -> None:
    first = Disk("w", url)
    first.write((0, b"x"))
    made = first.commit()
    first.push()
    with open_store(url) as store:
        Repository.open(store).refs.make_tag(IMAGE, "v3", made.id, author="a", message="")
    disk = Disk("v", url, ref=made.id.hex() if ref == "ID" else ref)
    disk.write((0, b"z"))
    disk.commit()
    with pytest.raises(UsageError, match="horcrux-cli push v --branch NAME"):
        disk.push()
    disk.push(branch="mine")
    assert version_content(url, "mine") == disk.model


def test_a_branch_that_moved_says_who_moved_it(disk: Disk) -> None:
    other = Disk("w", disk.url)
    for one in (disk, other):
        one.write((0, noise(10, one.name)))
        one.commit(f"by {one.name}")
    pushed = versions.push("w", author="Eve <eve@example.org>")
    with pytest.raises(BranchMoved) as caught:
        disk.push()
    said = str(caught.value)
    assert "Eve <eve@example.org>" in said
    assert "by w" in said
    assert pushed.tip.hex()[:12] in said
    assert caught.value.exit_code == 5
    # Nothing is lost: it goes to another branch.
    disk.check()
    disk.push(branch="mine")
    assert version_content(disk.url, "mine") == disk.model
    assert version_content(disk.url) == other.model


def test_a_branch_that_was_deleted(disk: Disk) -> None:
    disk.write((0, b"x"))
    disk.commit()
    with open_store(disk.url) as store:
        refs = Repository.open(store).refs
        record = refs.head(IMAGE, "main")
        assert record is not None
        refs.move(IMAGE, "main", None, record.commit, author="Eve", why="clean up")
    with pytest.raises(BranchMoved, match="deleted by Eve"):
        disk.push()
    disk.push(branch="rescued")
    assert version_content(disk.url, "rescued") == disk.model


STORES = ["cp", "scp", "s3", pytest.param("ceph", marks=pytest.mark.long)]


@pytest.fixture
def url_of(store_kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """A small repository in each kind of store that really runs."""
    if store_kind == "cp":
        there = f"cp://{tmp_path / 'repo'}"
    elif store_kind == "scp":
        there = request.getfixturevalue("ssh").url(tmp_path / "repo")
    else:
        server: S3Server = request.getfixturevalue("s3" if store_kind == "s3" else "ceph_server")
        if store_kind == "ceph":
            server.enter(request.getfixturevalue("monkeypatch"))
        there = server.url(server.make_bucket(), "repo")
    return make_image(there, noise(8 * CHUNK, "all"), chunk_size=CHUNK)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("store_kind", STORES)
def test_of_twenty_pushes_at_once_each_number_has_one_winner(url_of: str) -> None:
    url = url_of
    disks = [Disk(f"v{number}", url) for number in range(20)]
    for number, disk in enumerate(disks):
        disk.write((number * BLOCK, noise(BLOCK, number)))
        disk.commit(f"by {disk.name}")
    start = threading.Barrier(len(disks))
    won: list[Disk] = []
    lost: list[Disk] = []
    failed: list[BaseException] = []

    def race(disk: Disk) -> None:
        start.wait(60)
        try:
            disk.push()
            won.append(disk)
        except BranchMoved:
            lost.append(disk)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=race, args=[disk]) for disk in disks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(200)
    assert not failed
    assert (len(won), len(lost)) == (1, 19)
    record = head(url)
    assert record is not None
    assert record.number == 2
    assert version_content(url) == won[0].model
    # Nothing of the others is lost.
    for disk in lost[:3]:
        disk.push(branch=disk.name)
        assert version_content(url, disk.name) == disk.model
    sound(url)


# ---- going back


def test_a_push_never_drops_versions_of_the_branch(disk: Disk) -> None:
    """A volume that was reset below the branch, with a new version on top."""
    base = disk.state.base
    disk.write((0, b"x"))
    published = disk.commit("published")
    disk.push()
    versions.reset("v", "HEAD~1")
    disk.model[:] = disk.content()
    assert disk.state.base == base
    disk.write((0, b"y"))
    mine = disk.commit("instead")
    with pytest.raises(versions.Diverged, match=r"--branch NAME.*--force"):
        disk.push()
    assert head(disk.url).commit == published.id  # type: ignore[union-attr]
    disk.push(force=True)
    record = head(disk.url)
    assert record is not None
    assert record.commit == mine.id
    assert version_content(disk.url) == disk.model
    # What the branch had is in its records, for whoever wants it back.
    assert version_content(disk.url, published.id.hex())[:1] == b"x"


def test_force_still_refuses_what_was_not_seen(disk: Disk) -> None:
    disk.write((0, b"x"))
    disk.commit()
    other = Disk("w", disk.url)
    other.write((0, b"y"))
    other.commit()
    other.push()
    with pytest.raises(BranchMoved):
        disk.push(force=True)
    versions.fetch("v")
    with pytest.raises(versions.Diverged):
        disk.push()
    disk.push(force=True)
    assert version_content(disk.url) == disk.model


# ---- broken off


def objects(url: str) -> set[str]:
    with open_store(url) as store:
        return {entry.key for entry in store.list("objects/")}


@pytest.mark.parametrize(
    ("target", "number", "when"),
    [
        ("horcrux_nbd.repository.writer:ObjectWriter.barrier", 1, "before"),
        ("horcrux_nbd.repository.writer:ObjectWriter.barrier", 1, "after"),
        ("horcrux_nbd.repository.writer:ObjectWriter.barrier", 2, "after"),
        ("horcrux_nbd.repository.writer:ObjectWriter.confirm", 1, "before"),
        ("horcrux_nbd.repository.refs:Refs.move", 1, "before"),
        ("horcrux_nbd.repository.refs:Refs.move", 1, "after"),
        ("horcrux_nbd.volume.state:VolumeState.save", 1, "before"),
        ("horcrux_nbd.volume.state:VolumeState.save", 1, "after"),
        ("horcrux_nbd.volume.local:LocalObjects.release", 1, "before"),
        ("horcrux_nbd.volume.packs:PackedStore.sent", 1, "after"),
        ("horcrux_nbd.versions.push:sweep", 1, "before"),
    ],
)
def test_killed_at_any_step_a_push_goes_on(disk: Disk, target: str, number: int, when: str) -> None:
    disk.write((0, noise(2 * CHUNK, 1)), (5 * CHUNK, noise(BLOCK, 2)))
    tip = disk.commit("one").id
    before = objects(disk.url)
    needed = {object_key(oid) for oid in disk.own()} - before
    run_until_killed(target, number, when, PUSH)
    disk.check()
    record = head(disk.url)
    assert record is not None
    sent = objects(disk.url) - before
    assert sent <= needed
    if record.commit == tip:
        assert sent == needed
    sound(disk.url)  # whatever is there, the refs are whole
    # What comes next, on top or not, finds what was sent.
    disk.write((BLOCK, noise(BLOCK, 3)))
    again = disk.push()
    assert again.objects == len(needed - sent)
    assert head(disk.url).commit == tip  # type: ignore[union-attr]
    disk.commit("two")
    disk.push()
    assert version_content(disk.url) == disk.model
    assert disk.own().keys() == {bytes.fromhex(disk.state.base)}
    sound(disk.url)


def test_a_push_that_did_not_hear_that_it_won_with_more_on_top(disk: Disk) -> None:
    disk.write((0, b"x"))
    disk.commit("one")
    run_until_killed("horcrux_nbd.repository.refs:Refs.move", 1, "after", PUSH)
    disk.write((0, b"y"))
    disk.commit("two")
    assert disk.push().record is not None
    assert version_content(disk.url) == disk.model


class Vanishing(WrapperStore):
    """A store that is gone after some puts."""

    left = 3

    def put(self, key: str, data: bytes) -> None:
        if Vanishing.left == 0:
            raise StoreError(f"{self.url}: no connection")
        Vanishing.left -= 1
        self.store.put(key, data)


def test_a_store_that_vanishes_in_mid_push(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    disk.write((0, noise(6 * CHUNK, 1)))
    disk.commit()
    own = disk.own()
    needed = {object_key(oid) for oid in own} - objects(disk.url)

    def opened(url: str, mirrors: Sequence[str], **options: object) -> ChunkStore:
        return Vanishing(open_mirrored(url, mirrors, **options))  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(sessions, "open_mirrored", opened)
        with pytest.raises(StoreError, match="no connection"):
            disk.push()
    assert disk.own() == own
    disk.check()
    sound(disk.url)
    # All that had arrived is not sent again.
    arrived = needed & objects(disk.url)
    assert len(arrived) == 3
    assert disk.push().objects == len(needed - arrived)
    assert version_content(disk.url) == disk.model


@pytest.fixture
def read_only(disk: Disk) -> Iterator[Disk]:
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount the repository read-only: run as root (sudo)")
    path = disk.url.removeprefix("cp://")
    subprocess.run(["mount", "--bind", path, path], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", path], check=True)
        yield disk
    finally:
        subprocess.run(["umount", path], check=True)


def test_a_repository_that_was_made_read_only(read_only: Disk) -> None:
    disk = read_only
    disk.write((0, b"x"))
    disk.commit()
    own = disk.own()
    with pytest.raises(StoreRefused, match="Read-only file system"):
        disk.push()
    assert disk.own() == own
    disk.check()


def test_another_repository_at_the_same_place(disk: Disk, tmp_path: Path) -> None:
    disk.write((0, b"x"))
    disk.commit()
    (tmp_path / "repo").rename(tmp_path / "mine")
    small_repository(tmp_path / "repo")
    with pytest.raises(UsageError, match="is another repository now"):
        disk.push()


def test_a_base_that_was_removed_from_the_repository(disk: Disk) -> None:
    """A new branch may not be made over what is gone."""
    disk.write((0, b"x"))
    disk.commit()
    upstream = disk.state.upstream
    assert upstream is not None
    path = Path(disk.url.removeprefix("cp://")) / object_key(bytes.fromhex(upstream))
    path.unlink()
    with pytest.raises(NotFound, match=f"lie on {upstream[:12]}"):
        disk.push(branch="new")
    assert head(disk.url, "new") is None


def test_removing_a_volume_keeps_versions_that_were_never_pushed(disk: Disk) -> None:
    disk.write((0, b"x"))
    disk.commit()
    with pytest.raises(HorcruxError, match="1 version that never went to its repository"):
        host.remove("v")
    disk.push()
    host.remove("v")
    with pytest.raises(NotFound):
        host.create("v", disk.url, Version(IMAGE, "nonsense"))


def test_a_volume_is_not_removed_while_it_is_pushed(disk: Disk) -> None:
    with sessions.Session("v"), pytest.raises(HorcruxError, match="in use by process"):
        host.remove("v")

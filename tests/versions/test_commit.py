"""Commits of volumes that nobody serves: what they hold, what they cost, what breaks them off."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from horcrux_nbd import host, versions
from horcrux_nbd.chunkstore import open_store
from horcrux_nbd.errors import Busy, HorcruxError, NotFound, StoreFull, UsageError
from horcrux_nbd.names import Version
from horcrux_nbd.repository.objects import NULL_ID, Kind, kind_of, layers_of
from horcrux_nbd.repository.repository import Repository
from horcrux_nbd.units import KiB, MiB
from horcrux_nbd.versions.session import Session
from horcrux_nbd.volume import pack
from horcrux_nbd.volume.local import remote_node
from tests.versions.support import (
    AUTHOR,
    BLOCK,
    Disk,
    clear_cache,
    run_until_killed,
    small_repository,
    version_content,
)
from tests.volume.support import IMAGE, make_image, noise

CHUNK = 64 * KiB
COMMIT = f"versions.commit(['v'], 'crashed', author={AUTHOR!r})"


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk("v", small_repository(tmp_path / "repo"))


def entries(disk: Disk) -> dict[int, bytes]:
    """Chunk number → id in the version that a volume lies on."""
    with Session(disk.name) as session:
        commit = session.commit(session.base)
        return dict(session.local.index(commit, remote_node(session.remote)).entries())


# ---- what a commit holds


@pytest.mark.parametrize(
    ("chunk_size", "size"),
    [
        (64 * KiB, 10 * 64 * KiB),
        (64 * KiB, 9 * 64 * KiB + 5 * BLOCK + 700),
        (512 * KiB, 3 * 512 * KiB + 512),
        (4 * MiB, 2 * 4 * MiB + 12345),
    ],
)
def test_every_version_reads_as_the_volume_was(tmp_path: Path, chunk_size: int, size: int) -> None:
    """Random writes, zeroes, commits, pushes, cold caches: against a model, on a host that has
    nothing.
    """
    chance = random.Random(size)
    start = {0: noise(size // 2), size - 5000: noise(5000, 1)}
    disk = Disk("v", make_image(tmp_path / "repo", start, size=size, chunk_size=chunk_size))
    expected: dict[bytes, bytes] = {}
    for round in range(8 if chunk_size < MiB else 3):
        for _ in range(chance.randrange(1, 5)):
            offset = chance.randrange(size)
            length = min(chance.choice([1, 700, BLOCK, 3 * BLOCK, chunk_size]), size - offset)
            if chance.random() < 0.3:
                disk.zero(offset, length)
            else:
                disk.write((offset, noise(length, (round, offset))))
        if chance.random() < 0.3:
            clear_cache()
        made = disk.commit(f"round {round}")
        expected[made.id] = bytes(disk.model)
        disk.check()
        if chance.random() < 0.4:
            disk.push()
            disk.check()
    disk.push()
    for oid, content in expected.items():
        assert version_content(disk.url, oid.hex()) == content


def test_a_page_costs_a_patch_of_a_page(disk: Disk) -> None:
    disk.write((3 * CHUNK + BLOCK, noise(BLOCK, 1)))
    made = disk.commit()
    assert (made.packed.patches, made.packed.chunks) == (1, 0)
    assert made.packed.changed_bytes == BLOCK
    # The patch, the index node, and nothing else.
    assert made.objects == 2
    assert made.bytes < BLOCK + 9 * KiB


def test_a_chunk_that_changed_much_is_stored_whole(disk: Disk) -> None:
    disk.content()  # so that it is here
    disk.write((0, noise(CHUNK // 2, 1)))
    made = disk.commit()
    assert (made.packed.patches, made.packed.chunks) == (0, 1)
    assert kind_of(entries(disk)[0]) is Kind.CHUNK


def test_a_chunk_of_zeros_is_not_stored(disk: Disk) -> None:
    disk.zero(CHUNK, 2 * CHUNK)
    disk.commit()
    assert entries(disk).get(1, NULL_ID) == NULL_ID
    assert entries(disk).get(2, NULL_ID) == NULL_ID
    assert entries(disk).keys() == {0, 3, 4, 5, 6, 7}
    disk.check()


def test_zeroing_what_is_zero_is_no_change(tmp_path: Path) -> None:
    """A trim of a huge hole looks at nothing in it."""
    size = 1 << 50
    disk = Disk.__new__(Disk)
    disk.name, disk.url, disk.image = (
        "v",
        make_image(tmp_path / "r", noise(CHUNK), size=size),
        IMAGE,
    )
    host.create("v", disk.url, Version(IMAGE))
    volume = disk.open()
    volume.zero(CHUNK, size - CHUNK)
    volume.close()
    with pytest.raises(versions.NothingToCommit):
        disk.commit()


def test_the_same_bytes_again_are_no_change(disk: Disk) -> None:
    disk.content()
    disk.write((BLOCK, bytes(disk.model[BLOCK : 3 * BLOCK])))
    with pytest.raises(versions.NothingToCommit, match="v has no changes"):
        disk.commit()
    disk.check()
    # Of several blocks only the one that differs counts.
    disk.write((0, bytes(disk.model[:BLOCK]) + noise(BLOCK, 1)))
    assert disk.commit().packed.changed_bytes == BLOCK


def test_a_whole_chunk_with_the_same_bytes_is_no_change_though_it_is_not_here(disk: Disk) -> None:
    clear_cache()
    disk.write((0, bytes(disk.model[:CHUNK])))
    with pytest.raises(versions.NothingToCommit):
        disk.commit()


def test_the_same_bytes_as_in_a_patch_are_no_change_though_the_chunk_is_not_here(
    disk: Disk,
) -> None:
    disk.write((0, noise(BLOCK, 1)))
    disk.commit()
    clear_cache()
    disk.write((0, noise(BLOCK, 1)))
    with pytest.raises(versions.NothingToCommit):
        disk.commit()


def test_author_tags_and_message_are_kept(disk: Disk) -> None:
    disk.write((0, b"x"))
    made = disk.commit("fix prices", tags={"ticket": "4711"})
    assert (made.commit.author, made.commit.message) == (AUTHOR, "fix prices")
    assert made.commit.tags == {"ticket": "4711"}
    assert made.commit.new["changed"] == BLOCK
    assert made.commit.new["bytes"] == made.bytes


def test_an_empty_commit_is_made_only_when_asked_for(disk: Disk) -> None:
    with pytest.raises(versions.NothingToCommit):
        disk.commit()
    before = disk.state.base
    made = disk.commit(allow_empty=True)
    assert made.commit.parents == (bytes.fromhex(before),)
    assert made.objects == 0
    disk.check()


# ---- without the store, without the cache


def away(disk: Disk) -> Path:
    """Take the store away."""
    path = Path(disk.url.removeprefix("cp://"))
    return path.rename(path.with_name("away"))


def test_a_commit_needs_no_store(disk: Disk) -> None:
    clear_cache()
    with Session("v") as session:  # as a served volume does by itself, see test_served.py
        index = session.local.index(session.commit(session.base), remote_node(session.remote))
        assert len(list(index.entries())) == 8
    away(disk)
    disk.write((0, noise(BLOCK, 1)), (5 * CHUNK, noise(2 * CHUNK, 2)))
    disk.commit("one")
    disk.write((BLOCK, noise(BLOCK, 3)))
    disk.commit("two")
    # What was committed here is read here; what never was here is not to be had.
    volume = disk.open()
    data = bytearray(2 * BLOCK)
    volume.read_into(0, memoryview(data))
    assert bytes(data) == disk.model[: 2 * BLOCK]
    volume.read_into(5 * CHUNK + 100, memoryview(data))
    assert bytes(data) == disk.model[5 * CHUNK + 100 : 5 * CHUNK + 100 + len(data)]
    with pytest.raises(HorcruxError):
        volume.read_into(2 * CHUNK, memoryview(data))
    volume.close()


def test_a_commit_that_needs_the_index_and_cannot_have_it_leaves_all_as_it_was(
    disk: Disk,
) -> None:
    clear_cache()
    moved = away(disk)
    disk.write((0, noise(BLOCK, 1)))
    with pytest.raises(HorcruxError, match=r"repo"):
        disk.commit()
    assert disk.state.pending is None
    moved.rename(moved.with_name("repo"))
    assert disk.commit().packed.changed_bytes == BLOCK
    disk.check()


def test_twenty_commits_of_one_page_with_nothing_here(disk: Disk) -> None:
    """Chains of links grow while nothing below is here, and are cut where they have to be."""
    contents = []
    layers = []
    for number in range(20):
        disk.write((CHUNK + BLOCK * (number % 3), noise(BLOCK, number)))
        disk.commit(f"commit {number}")
        disk.push()
        clear_cache()
        contents.append(bytes(disk.model))
        layers.append(layers_of(entries(disk)[1]))
        clear_cache()
    assert layers[:15] == list(range(1, 16))
    assert max(layers) == 15
    assert layers[15:] == [0, 1, 2, 3, 4]
    for back, content in enumerate(reversed(contents)):
        assert version_content(disk.url, f"main~{back}") == content


def test_twenty_commits_of_one_page_make_no_long_chain_where_they_are_here(disk: Disk) -> None:
    contents = []
    for number in range(20):
        disk.write((CHUNK + BLOCK * (number % 3), noise(BLOCK, ("new", number))))
        disk.commit(f"commit {number}")
        contents.append(bytes(disk.model))
        assert layers_of(entries(disk)[1]) <= 3
    disk.push()
    for back, content in list(enumerate(reversed(contents)))[::4]:
        assert version_content(disk.url, f"main~{back}") == content


def test_a_chunk_that_changes_a_little_each_time_costs_little_each_time(tmp_path: Path) -> None:
    """Not all of its changes again with each commit."""
    size = 512 * KiB
    disk = Disk("v", make_image(tmp_path / "repo", noise(size), chunk_size=size))
    stored = 0
    for number in range(24):
        disk.write((BLOCK * (5 * number % 127), noise(BLOCK, ("new", number))))
        stored += disk.commit(f"commit {number}").bytes - 9 * KiB  # the index node
        assert layers_of(entries(disk).get(0, NULL_ID)) <= 8
    assert stored < 24 * BLOCK * 4  # 24 * 25 / 2 blocks if each had all before it
    disk.push()
    assert version_content(disk.url) == disk.model


# ---- several volumes at one moment


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Disk, Disk]:
    return Disk("v", small_repository(tmp_path / "a")), Disk("w", small_repository(tmp_path / "b"))


def test_a_set_has_a_group_in_common(pair: tuple[Disk, Disk]) -> None:
    v, w = pair
    for disk in pair:
        disk.write((0, noise(100, disk.name)))
    made = versions.commit(["w", "v"], "both", author=AUTHOR)
    assert made.keys() == {"v", "w"}
    assert made["v"].commit.tags["group"] == made["w"].commit.tags["group"]
    assert made["v"].commit.time == made["w"].commit.time
    v.check()
    w.check()


def test_of_a_set_only_what_changed_gets_a_version(pair: tuple[Disk, Disk]) -> None:
    v, w = pair
    v.write((0, b"x"))
    assert versions.commit(["v", "w"], "one of two", author=AUTHOR).keys() == {"v"}
    assert w.state.pending is None
    with pytest.raises(versions.NothingToCommit, match="v, w have no changes"):
        versions.commit(["v", "w"], "none", author=AUTHOR)


def test_a_set_is_committed_whole_or_not_at_all(
    pair: tuple[Disk, Disk], monkeypatch: pytest.MonkeyPatch
) -> None:
    for disk in pair:
        disk.write((0, noise(100, disk.name)))
    bases = [disk.state.base for disk in pair]
    whole = pack.Packer.pack

    def fails_for_w(self: pack.Packer, progress: object) -> pack.Packed:
        if "/w/" in str(self._layers[0].folder):
            raise StoreFull("no room")
        return whole(self, progress)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(pack.Packer, "pack", fails_for_w)
        with pytest.raises(StoreFull):
            versions.commit(["v", "w"], "both", author=AUTHOR)
    assert [disk.state.base for disk in pair] == bases
    for disk in pair:
        assert disk.state.pending is None
        assert len(disk.own()) == 1  # what was packed of v is gone again
        disk.check()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_set_that_was_broken_off_before_all_were_frozen_is_undone(
    pair: tuple[Disk, Disk], when: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed around the first freeze, which leaves at most one of two frozen."""
    for disk in pair:
        disk.write((0, noise(100, disk.name)))
    run_until_killed(
        "horcrux_nbd.volume.sealing:freeze",
        1,
        when,
        # One thread, so that the second freeze has not begun.
        "import concurrent.futures as f; "
        "sys.modules['horcrux_nbd.versions.commit'].ThreadPoolExecutor = "
        "lambda n: f.ThreadPoolExecutor(1); "
        f"versions.commit(['v', 'w'], 'crashed', author={AUTHOR!r})",
    )
    for disk in pair:
        disk.check()
    made = versions.commit(["v", "w"], "again", author=AUTHOR)
    assert {one.commit.message for one in made.values()} == {"again"}
    for disk in pair:
        assert len(list(_messages(disk))) == 2
        disk.check()


def test_a_set_that_was_broken_off_after_the_freeze_is_completed(pair: tuple[Disk, Disk]) -> None:
    for disk in pair:
        disk.write((0, noise(100, disk.name)))
    run_until_killed(
        "horcrux_nbd.volume.sealing:seal",
        1,
        "after",
        f"versions.commit(['v', 'w'], 'crashed', author={AUTHOR!r})",
    )
    # One has its version, the other is frozen; the next command on it finishes the set.
    v, w = pair
    with pytest.raises(versions.NothingToCommit):
        v.commit()
    assert w.commit("other").commit.message == "crashed"
    assert next(_messages(v)) == next(_messages(w)) == "crashed"


def _messages(disk: Disk) -> Iterator[str]:
    with Session(disk.name) as session:
        oid: bytes | None = session.base
        while oid is not None:
            commit = session.commit(oid)
            yield commit.message
            oid = commit.parents[0] if commit.parents else None


# ---- hooks and refusals


def test_hooks_run_around_the_freeze(disk: Disk) -> None:
    disk.write((0, b"x"))
    said: list[str] = []
    disk.commit(
        before=lambda: said.append(f"before {disk.state.pending}"),
        after=lambda: said.append(f"after {disk.state.pending is not None}"),
    )
    assert said == ["before None", "after True"]


def test_a_hook_that_fails_commits_nothing(disk: Disk) -> None:
    disk.write((0, b"x"))

    def fails() -> None:
        raise HorcruxError("the command before the freeze failed (exit status 3)")

    with pytest.raises(HorcruxError, match="exit status 3"):
        disk.commit(before=fails)
    assert disk.state.pending is None
    assert len(disk.state.layers) == 1
    disk.check()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"message": "x" * (1 << 20)}, "shorten"),
        ({"message": "\udcff"}, "UTF-8"),
        ({"tags": {"group": "mine"}}, "'group' cannot be"),
        ({"tags": {"": "x"}}, "cannot be"),
    ],
)
def test_what_no_commit_can_hold_is_refused_before_the_freeze(
    disk: Disk, options: dict[str, object], said: str
) -> None:
    disk.write((0, b"x"))
    with pytest.raises(UsageError, match=said):
        disk.commit(**{"message": "m", **options})  # type: ignore[arg-type]
    assert len(disk.state.layers) == 1
    disk.check()


def test_a_read_only_volume_has_nothing_to_commit(tmp_path: Path) -> None:
    url = small_repository(tmp_path / "repo")
    host.create("v", url, Version(IMAGE), read_only=True)
    with pytest.raises(UsageError, match="read-only"):
        versions.commit(["v"], "m", author=AUTHOR)


def test_an_unknown_volume_is_named(disk: Disk) -> None:
    with pytest.raises(NotFound, match="there is v"):
        versions.commit(["x"], "m", author=AUTHOR)


def test_one_command_on_the_versions_of_a_volume_at_a_time(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "LOCK_WAIT", 0.1)
    with Session("v"), pytest.raises(Busy, match=f"in use by process {os.getpid()}"):
        disk.commit()


# ---- crashes


STEPS = [
    ("horcrux_nbd.volume.sealing:Fresh.make", 1, "after"),
    ("horcrux_nbd.volume.sealing:freeze", 1, "before"),
    ("horcrux_nbd.volume.state:VolumeState.save", 1, "before"),
    ("horcrux_nbd.volume.state:VolumeState.save", 1, "after"),
    ("horcrux_nbd.volume.sealing:freeze", 1, "after"),
    ("horcrux_nbd.volume.pack:ChangeWriter.store", 2, "before"),
    ("horcrux_nbd.volume.pack:ChangeWriter.store", 3, "after"),
    ("horcrux_nbd.versions.commit:write_index", 1, "before"),
    ("horcrux_nbd.versions.commit:write_index", 1, "after"),
    ("horcrux_nbd.repository.writer:ObjectWriter.barrier", 1, "after"),
    ("horcrux_nbd.volume.packs:encode_pack", 1, "before"),
    ("horcrux_nbd.volume.packs:PackedStore._publish", 1, "after"),
    ("horcrux_nbd.volume.sealing:seal", 1, "before"),
    ("horcrux_nbd.volume.state:VolumeState.save", 2, "before"),
    ("horcrux_nbd.volume.state:VolumeState.save", 2, "after"),
    ("horcrux_nbd.volume.sealing:seal", 1, "after"),
]


@pytest.mark.parametrize(("target", "number", "when"), STEPS)
def test_killed_at_any_step_nothing_is_lost_and_the_next_command_goes_on(
    disk: Disk, target: str, number: int, when: str
) -> None:
    for at in range(5):
        disk.write((at * CHUNK + 3000, noise(5000, at)))
    before = disk.state.base
    run_until_killed(target, number, when, COMMIT)
    disk.check()
    disk.write((6 * CHUNK, noise(BLOCK, "later")))
    was_begun = disk.state.pending is not None
    was_made = disk.state.base != before
    made = disk.commit("the next")
    messages = list(_messages(disk))
    if was_begun or was_made:
        # As it was at the freeze, and what came later on top of it.
        assert messages[:2] == ["the next", "crashed"]
        assert made.packed.changed_bytes == BLOCK
    else:
        assert messages[0] == "the next"
        assert messages[1] != "crashed"
    disk.check()
    disk.push()
    assert version_content(disk.url) == disk.model
    disk.check()


def test_a_push_finishes_a_commit_that_was_broken_off(disk: Disk) -> None:
    disk.write((0, noise(BLOCK, 1)))
    run_until_killed("horcrux_nbd.volume.sealing:freeze", 1, "after", COMMIT)
    assert disk.push().commits == 1
    assert version_content(disk.url) == disk.model


# ---- a full disk


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a small tmpfs: run as root (sudo)")
    root = tmp_path / "small"
    root.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16M", "tmpfs", root], check=True)
    try:
        monkeypatch.setenv("HORCRUX_ROOT", str(root / "root"))
        yield Disk("v", make_image(tmp_path / "repo", noise(CHUNK), size=64 * CHUNK))
    finally:
        subprocess.run(["umount", root], check=True)


def test_a_full_disk_refuses_the_commit_and_loses_nothing(small_disk: Disk) -> None:
    disk = small_disk
    disk.write((0, noise(2 * MiB, 1)))
    before = disk.state
    filler = disk.folder.parents[2] / "filler"
    room = shutil.disk_usage(disk.folder).free
    filler.write_bytes(bytes(room - 1 * MiB))
    with pytest.raises(StoreFull, match="No space left") as caught:
        disk.commit()
    assert caught.value.exit_code == 8
    assert disk.state.base == before.base
    assert disk.state.pending is None
    assert len(disk.own()) == 1  # what was stored before it was full is gone again
    disk.check()
    filler.unlink()
    made = disk.commit()
    assert made.packed.changed_bytes == 2 * MiB
    disk.check()
    disk.push()
    assert version_content(disk.url) == disk.model


def test_layers_of_commits_that_failed_are_committed_together(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each failed commit leaves a layer; the newest wins where several have a block."""
    for number in range(3):
        disk.write((number * BLOCK, noise(3 * BLOCK, number)))
        disk.zero((number + 5) * BLOCK, BLOCK)
        with monkeypatch.context() as patch:
            patch.setattr(pack.ChangeWriter, "store", _full)
            with pytest.raises(StoreFull):
                disk.commit()
        disk.check()
    assert len(disk.state.layers) == 4
    disk.commit()
    assert len(disk.state.layers) == 1
    disk.check()
    disk.push()
    assert version_content(disk.url) == disk.model


def _full(*_: object) -> None:
    raise StoreFull("no room")


def test_the_repository_of_a_volume_has_nothing_of_a_commit_before_the_push(disk: Disk) -> None:
    with open_store(disk.url) as store:
        before = [entry.key for entry in store.list()]
    disk.write((0, noise(BLOCK, 1)))
    disk.commit()
    with open_store(disk.url) as store:
        assert [entry.key for entry in store.list()] == before
        assert Repository.open(store).resolve(Version(IMAGE)).id.hex() == disk.state.upstream


def test_small_patches_wait_until_the_chain_is_full(tmp_path: Path) -> None:
    """A page in each commit: what was pushed before is not pushed again, but once in eight."""
    size = 512 * KiB
    disk = Disk("v", make_image(tmp_path / "repo", noise(2 * size), chunk_size=size))
    disk.content()
    layers, pushed = [], []
    for number in range(10):
        disk.write((number * 8 * BLOCK, noise(BLOCK, f"page {number}")))
        disk.commit(f"{number}")
        pushed.append(disk.push().bytes)
        layers.append(layers_of(entries(disk)[0]))
    assert layers == [1, 2, 3, 4, 5, 6, 7, 8, 1, 2]
    overhead = 10 * KiB  # the index node, the commit, ids
    assert max(pushed[:8]) < BLOCK + overhead
    assert 9 * BLOCK < pushed[8] < 9 * BLOCK + overhead
    assert version_content(disk.url) == disk.model

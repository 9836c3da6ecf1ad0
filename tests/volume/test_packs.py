"""Small objects in one file: what a pack holds, who sees it when, and what is left of one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from horcrux_nbd.chunkstore import open_store
from horcrux_nbd.errors import Damaged, KeyNotFound, NoSpace, StoreFull
from horcrux_nbd.repository.index import FANOUT, encode_node
from horcrux_nbd.repository.objects import NULL_ID, Kind, encode, object_id, object_key
from horcrux_nbd.volume import packs
from horcrux_nbd.volume.packs import PackedStore
from tests.volume.support import noise


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "objects"


def open_packed(root: Path) -> PackedStore:
    return PackedStore(open_store(f"cp://{root}", create=True), root)


def node(number: int) -> tuple[bytes, bytes]:
    """A small object: its id and stored form."""
    table = object_id(Kind.CHUNK, noise(64, number)) + NULL_ID * (FANOUT - 1)
    plain = encode_node(0, table)
    return object_id(Kind.NODE, plain), encode(Kind.NODE, plain)


def put(store: PackedStore, *numbers: int) -> None:
    for number in numbers:
        oid, data = node(number)
        store.put(object_key(oid), data)


def names(root: Path) -> list[str]:
    return sorted(path.suffix for path in (root / packs.FOLDER).iterdir())


def has(store: PackedStore, number: int) -> bool:
    oid, data = node(number)
    try:
        return store.get(object_key(oid)) == data
    except KeyNotFound:
        return False


def test_what_is_put_is_one_file_and_others_see_it_after_the_sync(root: Path) -> None:
    with open_packed(root) as writer, open_packed(root) as reader:
        put(writer, *range(100))
        assert has(writer, 7)
        assert not has(reader, 7)
        assert not (root / packs.FOLDER).exists()
        writer.sync()
        assert names(root) == [".pack"]
        assert all(has(store, number) for store in (writer, reader) for number in range(100))
        assert reader.sizes() == writer.sizes() == {n[0]: len(n[1]) for n in map(node, range(100))}
        keys = [entry.key for entry in reader.list("objects/")]
        assert keys == sorted(object_key(node(number)[0]) for number in range(100))
        assert reader.stat(keys[0]).size == len(reader.get(keys[0]))
        assert reader.get(keys[0], 2, 5) == reader.get(keys[0])[2:7]


def test_a_reader_sees_each_new_pack(root: Path) -> None:
    """Many within one step of the file system's clock."""
    with open_packed(root) as writer, open_packed(root) as reader:
        for number in range(50):
            put(writer, number)
            writer.sync()
            assert has(reader, number)


def test_a_reader_sees_a_pack_that_the_time_of_the_folder_does_not_show(root: Path) -> None:
    """On a file system whose times are whole seconds; tests/torture/forgetful.py is one."""
    writer, reader = open_packed(root), open_packed(root)
    put(writer, 1)
    writer.sync()
    long_ago = 1_000_000_000
    os.utime(root / packs.FOLDER, ns=(long_ago, long_ago))
    assert has(reader, 1)
    put(writer, 2)
    writer.sync()
    os.utime(root / packs.FOLDER, ns=(long_ago, long_ago))
    assert has(reader, 2)


def test_large_objects_and_commits_are_files(root: Path) -> None:
    chunk = noise(1 << 16, 1)
    key = object_key(object_id(Kind.CHUNK, chunk))
    with open_packed(root) as store:
        store.put(key, encode(Kind.CHUNK, chunk))
        put(store, 1)
        store.sync()
        assert (root / key).exists()
        assert {entry.key for entry in store.list()} == {key, object_key(node(1)[0])}


def test_a_pack_is_bounded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packs, "PACK_SIZE", 3 * len(node(0)[1]))
    with open_packed(root) as store:
        put(store, *range(10))
        store.sync()
        assert len(names(root)) == 4
        assert all(has(store, number) for number in range(10))


def test_a_pack_goes_when_all_in_it_is_deleted(root: Path) -> None:
    with open_packed(root) as store:
        put(store, 1, 2)
        store.sync()
        store.delete(object_key(node(1)[0]))
        assert (has(store, 1), has(store, 2)) == (False, True)
        assert store.sizes().keys() == {node(2)[0]}
        store.delete(object_key(node(2)[0]))
        assert names(root) == []


def test_what_was_put_and_deleted_is_never_written(root: Path) -> None:
    with open_packed(root) as store:
        put(store, 1)
        store.delete(object_key(node(1)[0]))
        store.sync()
        assert store.sizes() == {}
        assert not (root / packs.FOLDER).exists()


def test_what_was_sent_is_no_longer_the_volumes_own_and_can_be_read(root: Path) -> None:
    with open_packed(root) as store, open_packed(root) as server:
        put(store, 1, 2)
        store.sync()
        put(store, 3)
        store.sync()
        assert has(server, 1)
        # A pack of which something was not sent stays as it is.
        assert store.sent({node(1)[0], node(3)[0]}) == {node(3)[0]}
        assert names(root) == [".pack", ".sent"]
        for one in (store, server):
            assert one.sizes().keys() == {node(1)[0], node(2)[0]}
            assert all(has(one, number) for number in (1, 2, 3))
            with pytest.raises(KeyNotFound):
                one.stat(object_key(node(3)[0]))


def test_of_what_was_sent_the_newest_is_kept(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packs, "KEEP_SENT", 0)
    with open_packed(root) as store:
        put(store, 1)
        store.sync()
        store.sent({node(1)[0]})
        assert not has(store, 1)
        monkeypatch.setattr(packs, "KEEP_SENT", 1 << 20)
        put(store, 2)
        store.sync()
        store.sent({node(2)[0]})
        assert has(store, 2)


@pytest.mark.parametrize("at", [-1, -packs.END.size, -packs.END.size - 1, 10])
def test_damage_is_found(root: Path, at: int) -> None:
    with open_packed(root) as store:
        put(store, 1)
        store.sync()
    (path,) = (root / packs.FOLDER).iterdir()
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    with open_packed(root) as store:
        if at > 0:  # in an object: its reader finds it by the id
            assert not has(store, 1)
        else:
            with pytest.raises(Damaged, match=path.name):
                store.sizes()


def test_a_cut_off_pack_is_damaged(root: Path) -> None:
    with open_packed(root) as store:
        put(store, 1)
        store.sync()
    (path,) = (root / packs.FOLDER).iterdir()
    path.write_bytes(path.read_bytes()[:10])
    with open_packed(root) as store, pytest.raises(Damaged, match="restore the volume's folder"):
        store.sizes()


def test_what_killed_writers_left_goes(root: Path) -> None:
    with open_packed(root) as store:
        store.sweep()  # there is nothing yet
        put(store, 1)
        store.sync()
        (root / packs.FOLDER / ".tmp-0123").write_bytes(b"half")
        assert has(store, 1)
        store.sweep()
        assert names(root) == [".pack"]


def damage(root: Path, suffix: str) -> Path:
    (path,) = (root / packs.FOLDER).glob(f"*{suffix}")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return path


def test_a_damaged_pack_that_was_sent_is_done_without(root: Path) -> None:
    """The repository has what was in it."""
    with open_packed(root) as store:
        put(store, 1, 2)
        store.sync()
        store.sent({node(1)[0], node(2)[0]})
        put(store, 3)
        store.sync()
    damage(root, ".sent")
    with open_packed(root) as store:
        assert not has(store, 1)
        assert has(store, 3)
        assert set(store.sizes()) == {node(3)[0]}
    assert names(root) == [".pack"]


def test_of_a_damaged_pack_of_its_own_nobody_says_that_nothing_is_missing(root: Path) -> None:
    """A push that took it for all there is would send a version without its index."""
    with open_packed(root) as store:
        put(store, 1)
        store.sync()
        put(store, 2)
        store.sync()
        damage(root, sorted((root / packs.FOLDER).iterdir())[0].name)
    with open_packed(root) as store:
        lost, there = (1, 2) if not _reads(store, 1) else (2, 1)
        assert has(store, there)
        for ask in (
            lambda: store.get(object_key(node(lost)[0])),
            lambda: store.stat(object_key(node(lost)[0])),
            lambda: list(store.list("objects/")),
            store.sizes,
        ):
            with pytest.raises(Damaged, match="restore the volume"):
                ask()


def _reads(store: PackedStore, number: int) -> bool:
    try:
        return has(store, number)
    except Damaged:
        return False


def test_a_sync_that_found_no_room_can_be_tried_again(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kw: object) -> None:
        raise NoSpace("full")

    with open_packed(root) as store, open_packed(root) as other:
        put(store, 1)
        with monkeypatch.context() as patched:
            patched.setattr(packs.files, "publish", full)
            with pytest.raises(StoreFull):
                store.sync()
        put(store, 2)
        store.sync()
        assert has(other, 1)
        assert has(other, 2)

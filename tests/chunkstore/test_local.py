"""What is special about a local folder."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import pytest

from horcrux_nbd.chunkstore import open_store
from horcrux_nbd.chunkstore.local import LocalStore
from horcrux_nbd.chunkstore.url import parse_store_url
from horcrux_nbd.errors import (
    KeyNotFound,
    StoreError,
    StoreFull,
    StoreMissing,
    StoreRefused,
    StoreUnavailable,
)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    made = LocalStore(parse_store_url(str(tmp_path / "store")))
    made.prepare()
    return made


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


def test_objects_are_plain_files(store: LocalStore, root: Path) -> None:
    store.put("objects/ab/cd", b"1")
    store.sync()
    assert (root / "objects/ab/cd").read_bytes() == b"1"
    (root / "objects/ab/ef").write_bytes(b"2")  # as rsync does it
    assert store.get("objects/ab/ef") == b"2"


def test_a_ref_never_precedes_its_objects(store: LocalStore, root: Path) -> None:
    """An exclusive put is there at once, and all that was put before it."""
    store.put("objects/ab/cd", b"1")
    store.put_exclusive("refs/x/heads/main/9", b"2")
    assert (root / "objects/ab/cd").read_bytes() == b"1"


def test_a_put_leaves_nothing_beside_it(store: LocalStore, root: Path) -> None:
    store.put("a/b", b"1")
    store.put("a/b", b"2")
    store.put_exclusive("a/c", b"3")
    with pytest.raises(StoreError):
        store.put_exclusive("a/c", b"4")
    assert sorted(os.listdir(root / "a")) == ["b", "c"]


def test_fifos_and_sockets_do_not_hang(store: LocalStore, root: Path) -> None:
    os.mkfifo(root / "fifo")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(root / "socket"))
        for key in ("fifo", "socket"):
            with pytest.raises(KeyNotFound):
                store.get(key)
            with pytest.raises(KeyNotFound):
                store.stat(key)
        assert list(store.list()) == []
        assert store.children("") == []


def test_symlinks_are_followed(store: LocalStore, root: Path, tmp_path: Path) -> None:
    """`objects` may be on another disk."""
    other = tmp_path / "other"
    other.mkdir()
    (root / "objects").symlink_to(other)
    (root / "nowhere").symlink_to(tmp_path / "nothing")
    store.put("objects/a", b"1")
    assert store.get("objects/a") == b"1"
    assert [stat.key for stat in store.list()] == ["objects/a"]
    assert store.children("") == ["objects"]


def test_a_folder_that_went_away(store: LocalStore, root: Path) -> None:
    """A pulled disk is not a store in which every object is missing."""
    store.put("a/b", b"1")
    store.sync()
    root.rename(root.with_name("elsewhere"))
    for operation in (
        lambda: store.get("a/b"),
        lambda: store.stat("a/b"),
        lambda: store.put("a/b", b"1"),
        lambda: store.delete("a/b"),
        lambda: store.children("a/"),
        lambda: list(store.list("a/")),
    ):
        with pytest.raises(StoreMissing, match="there is no folder"):
            operation()
    assert not root.exists()


def test_the_root_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for create in (False, True):
        with pytest.raises(StoreError, match=r"not a folder|File exists|Not a directory"):
            open_store(str(tmp_path / "file"), create=create)


@pytest.mark.parametrize(("there", "new"), [("a", "a/b"), ("c/d", "c")])
def test_an_object_in_the_way(store: LocalStore, there: str, new: str) -> None:
    store.put(there, b"1")
    store.sync()
    store.put(new, b"2")
    with pytest.raises(StoreError, match="could not be made durable"):
        store.sync()
    assert store.get(there) == b"1"


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (errno.ENOSPC, StoreFull),
        (errno.EDQUOT, StoreFull),
        (errno.EACCES, StoreRefused),
        (errno.EROFS, StoreRefused),
        (errno.EIO, StoreUnavailable),
        (errno.ESTALE, StoreUnavailable),
        (errno.ENOTCONN, StoreUnavailable),
        (errno.EMLINK, StoreError),
    ],
)
def test_what_the_system_refuses(
    store: LocalStore,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    error: type[StoreError],
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    store.put("a", b"1")
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fail)
        with pytest.raises(StoreError) as caught:
            store.put("a", b"2")
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    assert store.get("a") == b"1"
    assert [stat.key for stat in store.list()] == ["a"]


def test_a_put_is_synced_before_it_shows(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("fsync", "fdatasync", "rename", "link"):
        real = getattr(os, name)

        def spy(*arguments: object, real: object = real, name: str = name) -> object:
            calls.append(name)
            return real(*arguments)  # type: ignore[operator]

        monkeypatch.setattr(os, name, spy)
    store.put("a", b"1")
    assert calls == []
    store.sync()
    store.put_exclusive("b", b"1")
    assert calls == ["fdatasync", "rename", "fsync", "fsync", "link", "fsync"]

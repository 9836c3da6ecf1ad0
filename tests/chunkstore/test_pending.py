"""A batch of puts: seen by who put them, durable before they have a name, never half there."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from horcrux_nbd.chunkstore import open_store, parse_store_url, pending
from horcrux_nbd.chunkstore.local import LocalStore
from horcrux_nbd.errors import KeyExists, KeyNotFound, StoreError, StoreFull

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(root: Path) -> Iterator[LocalStore]:
    store = LocalStore(parse_store_url(str(root)))
    store.prepare()
    yield store
    store.close()


def names(root: Path) -> list[str]:
    """Files below `root` that have their name."""
    found = (str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    return sorted(name for name in found if not name.startswith(pending.FOLDER))


def waiting(root: Path) -> int:
    return len(list((root / pending.FOLDER).iterdir()))


def test_who_put_it_sees_it_and_nobody_else_does(store: LocalStore, root: Path) -> None:
    store.put("a/c", b"old")
    store.sync()
    store.put("a/b", b"0123456789")
    store.put("a/c", b"newer")
    store.put("b", b"")
    assert store.get("a/b", 2, 3) == b"234"
    assert store.get("a/b", 20) == b""
    assert store.get("a/c") == b"newer"
    assert store.stat("a/b").size == 10
    assert store.exists("b")
    assert store.children("") == ["a", "b"]
    assert store.children("a/") == ["b", "c"]
    assert [(s.key, s.size) for s in store.list()] == [("a/b", 10), ("a/c", 5), ("b", 0)]
    assert [s.key for s in store.list(limit=2)] == ["a/b", "a/c"]
    assert [s.key for s in store.list("a/", after="a/b")] == ["a/c"]
    assert list(store.list(limit=0)) == []
    with open_store(str(root)) as other:
        assert [s.key for s in other.list()] == ["a/c"]
        assert other.get("a/c") == b"old"
        store.sync()
        assert [s.key for s in other.list()] == ["a/b", "a/c", "b"]
        assert other.get("a/c") == b"newer"
    assert waiting(root) == 0


def test_data_is_durable_before_the_first_name(
    store: LocalStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    lock = threading.Lock()
    for name in ("fsync", "fdatasync", "rename"):

        def spy(*arguments: object, name: str = name, real: object = getattr(os, name)) -> None:
            with lock:
                calls.append(name)
            real(*arguments)  # type: ignore[operator]

        monkeypatch.setattr(os, name, spy)
    for number in range(20):
        store.put(f"{number % 3}/{number}", bytes([number]))
    assert calls == []
    store.sync()
    made = calls.count("fsync") - 3  # of the root, when the folders were made
    assert made >= 3
    assert calls == ["fdatasync"] * 20 + ["fsync"] * made + ["rename"] * 20 + ["fsync"] * 3
    assert len(names(root)) == 20


def test_an_exclusive_put_comes_after_what_was_put_before(store: LocalStore, root: Path) -> None:
    """So a ref never names objects that a power cut can take."""
    store.put("objects/1", b"1")
    store.put_exclusive("refs/1", b"1")
    assert names(root) == ["objects/1", "refs/1"]
    store.put("refs/2", b"mine")
    with pytest.raises(KeyExists):
        store.put_exclusive("refs/2", b"other")
    assert store.get("refs/2") == b"mine"


def test_the_last_put_counts(store: LocalStore, root: Path) -> None:
    for number in range(5):
        store.put("a", b"%d" % number)
    assert waiting(root) == 1
    store.sync()
    assert store.get("a") == b"4"


def test_delete(store: LocalStore, root: Path) -> None:
    store.put("a", b"1")
    store.sync()
    store.put("a", b"2")
    store.put("b", b"2")
    store.delete("a")
    store.delete("b")
    assert list(store.list()) == []
    with pytest.raises(KeyNotFound):
        store.get("a")
    store.sync()
    assert names(root) == []
    assert waiting(root) == 0


@pytest.mark.parametrize("bound", ["MAX_FILES", "MAX_BYTES"])
def test_what_is_pending_is_bounded(
    store: LocalStore, root: Path, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    monkeypatch.setattr(pending, bound, 10)
    most = 0
    for number in range(100):
        store.put(f"a/{number}", b"x")
        most = max(most, waiting(root))
    assert most < 10
    assert len(names(root)) >= 90


def test_close_syncs(root: Path) -> None:
    with open_store(str(root), create=True) as store:
        store.put("a", b"1")
    assert names(root) == ["a"]


def test_many_threads(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pending, "MAX_FILES", 7)

    def work(who: int) -> None:
        for number in range(40):
            key = f"{who % 3}/{who}-{number}"
            store.put(key, key.encode())
            assert store.get(key) == key.encode()
            assert store.stat(key).size == len(key)
            assert key in [s.key for s in store.list(f"{who % 3}/")]

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))
    assert len(list(store.list())) == 320


def test_a_killed_writer_leaves_no_name(root: Path) -> None:
    code = """
import sys
from horcrux_nbd.chunkstore import open_store
store = open_store(sys.argv[1], create=True)
for number in range(20):
    store.put(f"objects/{number}", bytes(100000))
print("ready", flush=True)
sys.stdin.read()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=PROJECT,
    )
    assert process.stdin
    assert process.stdout
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    process.stdin.close()
    process.stdout.close()
    assert names(root) == []
    left = sorted((root / pending.FOLDER).iterdir())
    assert len(left) == 20
    for path in left[:5]:
        os.utime(path, (0, path.stat().st_mtime - pending.STALE - 60))
    with open_store(str(root), create=True) as store:  # prepares it, which sweeps
        assert list(store.list()) == []
    assert sorted((root / pending.FOLDER).iterdir()) == left[5:]


@pytest.mark.parametrize(("number", "kind"), [(errno.EIO, StoreError), (errno.ENOSPC, StoreError)])
def test_a_sync_that_fails_is_never_forgotten(
    root: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[StoreError]
) -> None:
    """A second fsync after a failed one says that all is well (fsyncgate, 2018)."""
    store = LocalStore(parse_store_url(str(root)))
    store.prepare()
    store.put("a", b"1")
    with monkeypatch.context() as patch:

        def fail(fd: int) -> None:
            raise OSError(number, os.strerror(number))

        patch.setattr(os, "fdatasync", fail)
        with pytest.raises(kind, match="could not be made durable"):
            store.sync()
    for operation in (
        store.sync,
        lambda: store.put("b", b"1"),
        lambda: store.put_exclusive("refs/a", b"1"),
    ):
        with pytest.raises(StoreError, match="could not be made durable") as caught:
            operation()
        assert type(caught.value) is StoreError  # not StoreUnavailable: nobody may try again
    store.close()
    assert names(root) == []
    assert waiting(root) == 0
    with open_store(str(root)) as again:
        again.put("a", b"1")
    assert names(root) == ["a"]


def test_a_full_disk_refuses_one_put_and_loses_nothing(
    store: LocalStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put("a", b"1")
    with monkeypatch.context() as patch:

        def fail(*arguments: object) -> None:
            raise OSError(errno.ENOSPC, "full")

        patch.setattr(os, "pwrite", fail)
        with pytest.raises(StoreFull):
            store.put("b", b"1")
    store.sync()
    assert names(root) == ["a"]
    assert waiting(root) == 0

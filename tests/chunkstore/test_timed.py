from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from horcrux_nbd.chunkstore import open_store
from horcrux_nbd.chunkstore import timed as module
from horcrux_nbd.chunkstore.base import ChunkStore
from horcrux_nbd.chunkstore.timed import TimedStore, is_far
from horcrux_nbd.chunkstore.wrapper import T, WrapperStore
from horcrux_nbd.errors import KeyNotFound, StoreUnavailable


class Hangs(WrapperStore):
    """Does nothing until `go` is set."""

    def __init__(self, store: ChunkStore) -> None:
        super().__init__(store)
        self.go = threading.Event()

    def _do(self, what: str, operation: Callable[[], T]) -> T:
        assert self.go.wait(30)
        return operation()


@pytest.fixture
def hangs(tmp_path: Path) -> Iterator[Hangs]:
    with open_store(f"cp://{tmp_path}/store", create=True) as store:
        store.put("a", b"1")
        made = Hangs(store)
        yield made
        made.go.set()


def test_what_hangs_is_given_up_and_what_comes_back_works(hangs: Hangs) -> None:
    store = TimedStore(hangs, 0.1)
    for ask in (lambda: store.get("a"), lambda: store.stat("a"), store.check):
        began = time.monotonic()
        with pytest.raises(StoreUnavailable, match=r"no answer in 0\.1 s"):
            ask()
        assert time.monotonic() - began < 2
    hangs.go.set()
    assert store.get("a") == b"1"
    with pytest.raises(KeyNotFound):
        store.get("b")
    store.put("b", b"2")
    store.sync()
    assert [entry.key for entry in store.list()] == ["a", "b"]


def test_not_everybody_is_sent_after_those_that_hang(
    hangs: Hangs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_LEFT", 2)
    store = TimedStore(hangs, 0.05)
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match="no answer"):
            store.get("a")
    threads = threading.active_count()
    with pytest.raises(StoreUnavailable, match="2 operations hang"):
        store.get("a")
    assert threading.active_count() == threads
    hangs.go.set()
    deadline = time.monotonic() + 10
    while store._left:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert store.get("a") == b"1"


def test_long_listings_come_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAGE", 3)
    with open_store(f"cp://{tmp_path}/store", create=True) as near:
        store = TimedStore(near, 10)
        for count in range(8):
            assert len(list(store.list())) == count
            store.put(f"k{count}", b"")
        assert [entry.key for entry in store.list("", "k2", 4)] == ["k3", "k4", "k5", "k6"]


MOUNTS = """\
22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw
30 22 0:26 / /mnt/nas rw,relatime shared:2 - nfs4 nas:/export rw,vers=4.2
31 30 254:2 / /mnt/nas/local rw,relatime - xfs /dev/vdb rw
32 22 0:40 / /srv/a\\040b rw - fuse.sshfs me@host: rw
33 22 0:41 / /srv/disk rw - fuseblk /dev/sdb1 rw
34 22 0:42 / /over rw - cifs //x/y rw
35 22 254:3 / /over rw - ext4 /dev/vdc rw
"""


@pytest.mark.parametrize(
    ("path", "far"),
    [
        ("/", False), ("/mnt", False), ("/mnt/nas", True), ("/mnt/nas/x/y", True),
        ("/mnt/nasty", False), ("/mnt/nas/local/x", False), ("/srv/a b/x", True),
        ("/srv/disk/x", False), ("/over/x", False),
    ],
)  # fmt: skip
def test_which_mounts_are_far(tmp_path: Path, path: str, far: bool) -> None:
    info = tmp_path / "mountinfo"
    info.write_text(MOUNTS)
    assert is_far(path, info) is far


def test_folders_of_this_host_have_no_threads(tmp_path: Path) -> None:
    with open_store(f"cp://{tmp_path}/store", create=True) as store:
        assert isinstance(store, WrapperStore)
        assert not isinstance(store.store, TimedStore)

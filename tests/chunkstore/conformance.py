"""Every sentence of the contract in horcrux_nbd/chunkstore/base.py, for any kind of store.

test_conformance.py runs the class over each kind. A kind says how to make a place of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import signal
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from horcrux_nbd.chunkstore import ChunkStore, open_store, parse_store_url
from horcrux_nbd.errors import KeyExists, KeyNotFound, StoreMissing, UsageError

KiB, MiB = 1 << 10, 1 << 20
TEN = b"0123456789"
PROJECT = Path(__file__).resolve().parents[2]


class Place(ABC):
    """Somewhere for one test's store."""

    url: str
    missing_url: str  # of the same kind, where nothing is

    @abstractmethod
    def plant(self, name: str, data: bytes) -> None:
        """Put a file or object there past Horcrux, under any name."""


def pattern(size: int) -> bytes:
    """`size` bytes that are the same nowhere twice, so that a piece in the wrong place shows."""
    block = b"".join(hashlib.sha256(i.to_bytes(8, "big")).digest() for i in range(1024))
    repeats = -(-size // len(block))
    return b"".join(i.to_bytes(8, "big") + block[8:] if i else block for i in range(repeats))[:size]


def python(code: str, *arguments: str) -> subprocess.Popen[bytes]:
    """A process of its own that runs `code`; it speaks through its standard output."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        cwd=PROJECT,
    )


GOOD_KEYS = [
    "a", "0", "_", "-", "A.b-c_d", "a/b", "a/b/c/d/e/f/g/h/i/j", "x" * 255,
    f"{'x' * 255}/{'y' * 255}", "objects/ab/" + "ab" * 32,
    "refs/AMCC/heads/main/99999999999999999998", "a..b", "-rf",
]  # fmt: skip
BAD_KEYS = [
    "", "/", "/a", "a/", "a//b", ".", "..", "../a", "a/..", "a/../b", "./a", ".a", "a/.b", ".tmp-x",
    "a b", " a", "a\n", "a\x00", "a\\b", "a:b", "a*", "a?x", "a#x", "a%2e", "~a", "$HOME", "`a`",
    "ü", "a\u2044b", "\u202ea", "x" * 256, "a/" * 500 + "b", "a\ud800",
]  # fmt: skip
RANGES = [
    (0, None), (0, 0), (0, 1), (0, 9), (0, 10), (0, 11), (0, 10_000), (1, None), (3, 4), (9, None),
    (9, 1), (9, 2), (10, None), (10, 0), (10, 1), (11, None), (11, 5), (10_000, 1), (1 << 40, 1),
]  # fmt: skip


class Conformance:
    """The cases. A subclass gives the fixture `place`."""

    @pytest.fixture
    def store(self, place: Place) -> Iterator[ChunkStore]:
        with open_store(place.url, create=True, limit=30) as store:
            yield store

    # ---- put and get ----------------------------------------------------------------------------

    def test_get_gives_what_was_put(self, store: ChunkStore) -> None:
        block = 255 * KiB  # of OpenSSH's SFTP; 32 KiB is every server's
        for size in (0, 1, 4095, 32 * KiB, 32 * KiB + 1, block, block + 1, MiB, 4 * MiB + 1):
            data = pattern(size)
            store.put("a/b", data)
            assert store.get("a/b") == data
            assert store.get("a/b") == data  # with what the first get taught about sizes

    def test_a_large_object(self, store: ChunkStore) -> None:
        data = pattern(16 * MiB)
        store.put("large", data)
        assert store.get("large") == data
        assert store.get("large", 5 * MiB - 3, 7 * MiB) == data[5 * MiB - 3 : 12 * MiB - 3]
        assert store.stat("large").size == len(data)

    def test_small_ones_before_and_after_a_large_one(self, store: ChunkStore) -> None:
        objects = {f"k{n}": pattern(n) for n in (10, 3 * MiB, 20, 700 * KiB, 0, 30)}
        for key, data in objects.items():
            store.put(key, data)
        for key in [*objects, *reversed(objects)]:
            assert store.get(key) == objects[key]

    def test_every_byte_value(self, store: ChunkStore) -> None:
        data = bytes(range(256)) * 3 + b"\r\n\x00\x1a"
        store.put("bytes", data)
        assert store.get("bytes") == data

    @pytest.mark.parametrize("sizes", [(100, 10), (0, 100)])
    def test_put_replaces(self, store: ChunkStore, sizes: tuple[int, int]) -> None:
        store.put("a", b"1" * sizes[0])
        store.put("a", b"2" * sizes[1])
        assert store.get("a") == b"2" * sizes[1]
        assert store.stat("a").size == sizes[1]

    def test_get_of_nothing(self, store: ChunkStore) -> None:
        store.put("a/b", b"1")
        for key in ("b", "a/c", "z/z/z"):
            with pytest.raises(KeyNotFound) as caught:
                store.get(key)
            assert caught.value.key == key
            assert caught.value.url == store.url

    def test_a_folder_of_keys_is_no_object(self, store: ChunkStore) -> None:
        store.put("a/b/c", b"1")
        for key in ("a", "a/b"):
            with pytest.raises(KeyNotFound):
                store.get(key)
            with pytest.raises(KeyNotFound):
                store.stat(key)
            store.delete(key)
        assert store.get("a/b/c") == b"1"

    def test_nothing_is_below_an_object(self, store: ChunkStore) -> None:
        store.put("a", b"1")
        with pytest.raises(KeyNotFound):
            store.get("a/b")
        with pytest.raises(KeyNotFound):
            store.stat("a/b")
        store.delete("a/b")
        assert not store.exists("a/b")
        assert list(store.list("a/")) == []

    # ---- ranges ---------------------------------------------------------------------------------

    def test_range(self, store: ChunkStore) -> None:
        store.put("a/ten", TEN)
        for offset, length in RANGES:
            expected = TEN[offset:] if length is None else TEN[offset : offset + length]
            assert store.get("a/ten", offset, length) == expected, (offset, length)

    def test_range_of_an_empty_object(self, store: ChunkStore) -> None:
        store.put("empty", b"")
        for offset, length in RANGES:
            assert store.get("empty", offset, length) == b"", (offset, length)

    def test_range_of_nothing(self, store: ChunkStore) -> None:
        for offset, length in RANGES:
            with pytest.raises(KeyNotFound):
                store.get("nothing", offset, length)

    def test_ranges_across_blocks_of_a_transfer(self, store: ChunkStore) -> None:
        data = pattern(2 * MiB + 5)
        store.put("a", data)
        for offset in (0, 1, 32 * KiB - 1, 255 * KiB, MiB, 2 * MiB + 4):
            for length in (1, 32 * KiB, 255 * KiB + 1, MiB, None):
                end = None if length is None else offset + length
                assert store.get("a", offset, length) == data[offset:end]

    def test_negative_range(self, store: ChunkStore) -> None:
        store.put("a", TEN)
        for offset, length in ((-1, None), (0, -1), (-5, 5), (-1, -1)):
            with pytest.raises(ValueError, match="negative"):
                store.get("a", offset, length)

    # ---- exclusive put --------------------------------------------------------------------------

    @pytest.mark.parametrize("size", [0, 1, 300 * KiB])
    def test_exclusive_put_of_a_free_key(self, store: ChunkStore, size: int) -> None:
        data = pattern(size)
        store.put_exclusive("refs/a/1", data)
        assert store.get("refs/a/1") == data

    def test_exclusive_put_of_a_taken_key(self, store: ChunkStore) -> None:
        for first in (b"", b"first"):
            key = f"refs/{len(first)}"
            store.put_exclusive(key, first)
            for second in (b"", b"first", b"second"):
                with pytest.raises(KeyExists) as caught:
                    store.put_exclusive(key, second)
                assert caught.value.key == key
                assert store.get(key) == first
        assert [stat.key for stat in store.list()] == ["refs/0", "refs/5"]

    def test_exclusive_put_of_a_key_that_was_put(self, store: ChunkStore) -> None:
        store.put("a", b"1")
        with pytest.raises(KeyExists):
            store.put_exclusive("a", b"2")
        assert store.get("a") == b"1"

    def test_exclusive_put_after_delete(self, store: ChunkStore) -> None:
        store.put_exclusive("a", b"1")
        store.delete("a")
        store.put_exclusive("a", b"2")
        assert store.get("a") == b"2"

    def test_put_replaces_what_was_put_exclusively(self, store: ChunkStore) -> None:
        store.put_exclusive("a", b"1")
        store.put("a", b"2")
        assert store.get("a") == b"2"

    def test_of_twenty_threads_one_wins(self, store: ChunkStore) -> None:
        for turn in range(5):
            key = f"refs/new-{turn}/1"  # a folder that none of them finds there
            start = threading.Barrier(20)

            def race(who: int, key: str = key, start: threading.Barrier = start) -> int | None:
                start.wait(20)
                try:
                    store.put_exclusive(key, b"%d" % who)
                except KeyExists:
                    return None
                return who

            with ThreadPoolExecutor(20) as threads:
                winners = [who for who in threads.map(race, range(20)) if who is not None]
            assert len(winners) == 1
            assert store.get(key) == b"%d" % winners[0]

    def test_of_several_processes_one_wins(self, store: ChunkStore, place: Place) -> None:
        code = """
import sys
from horcrux_nbd.chunkstore import open_store
from horcrux_nbd.errors import KeyExists
store = open_store(sys.argv[1])
store.put(f"ready/{sys.argv[2]}", b"")
store.sync()
while len(store.children("ready/")) < 4:
    pass
for turn in range(15):
    try:
        store.put_exclusive(f"refs/{turn}", sys.argv[2].encode())
        print(turn, flush=True)
    except KeyExists:
        pass
"""
        processes = [python(code, place.url, str(who)) for who in range(4)]
        won: dict[str, list[str]] = {}
        for who, process in enumerate(processes):
            output, _ = process.communicate(timeout=60)
            assert process.returncode == 0
            for turn in output.decode().split():
                won.setdefault(turn, []).append(str(who))
        assert sorted(won, key=int) == [str(turn) for turn in range(15)]
        for turn, winners in won.items():
            assert len(winners) == 1
            assert store.get(f"refs/{turn}") == winners[0].encode()

    # ---- stat, exists, delete -------------------------------------------------------------------

    def test_stat(self, store: ChunkStore) -> None:
        before = time.time()
        store.put("a/b", TEN)
        stat = store.stat("a/b")
        assert (stat.key, stat.size) == ("a/b", 10)
        # Whole seconds on some stores; the store's clock is this machine's here.
        assert before - 2 <= stat.mtime <= time.time() + 2
        (listed,) = store.list()
        assert (listed.key, listed.size) == ("a/b", 10)
        # HEAD of S3 gives whole seconds, its listing may give more (radosgw).
        assert abs(listed.mtime - stat.mtime) <= 1

    def test_stat_of_nothing(self, store: ChunkStore) -> None:
        with pytest.raises(KeyNotFound):
            store.stat("a/b")

    def test_exists(self, store: ChunkStore) -> None:
        store.put("a/b", b"")
        assert store.exists("a/b")
        for key in ("a", "a/c", "b", "a/b/c"):
            assert not store.exists(key)

    def test_delete(self, store: ChunkStore) -> None:
        store.put("a/b", b"1")
        store.put("a/c", b"2")
        store.delete("a/b")
        assert not store.exists("a/b")
        assert [stat.key for stat in store.list()] == ["a/c"]

    def test_delete_of_nothing(self, store: ChunkStore) -> None:
        store.put("a/b", b"1")
        store.delete("a/b")
        store.delete("a/b")
        store.delete("x/y/z")

    def test_delete_of_the_last_in_a_folder(self, store: ChunkStore) -> None:
        store.put("a/b/c", b"1")
        store.delete("a/b/c")
        assert list(store.list()) == []
        store.put("a/b/c", b"2")
        assert store.get("a/b/c") == b"2"

    # ---- children -------------------------------------------------------------------------------

    def test_children(self, store: ChunkStore) -> None:
        for key in ("a/x", "a/y/z", "a/y/w", "a/b-c", "b", "a-b/x"):
            store.put(key, b"")
        assert store.children("a/") == ["b-c", "x", "y"]
        assert store.children("a/y/") == ["w", "z"]
        assert store.children("") == ["a", "a-b", "b"]

    def test_children_of_nothing(self, store: ChunkStore) -> None:
        assert store.children("") == []
        assert store.children("a/b/") == []

    def test_children_of_no_folder(self, store: ChunkStore) -> None:
        for prefix in ("a", "/", "a//", "../", "./", " "):
            with pytest.raises(UsageError):
                store.children(prefix)

    # ---- list -----------------------------------------------------------------------------------

    # In byte order: "-" and "." come before "/", digits and capitals after it.
    KEYS = (
        "A", "a-b", "a.b", "a/-", "a/b/c", "a/b/d", "a/b0", "a0", "aB", "a_", "ab/c", "b", "b0/x",
    )  # fmt: skip

    @pytest.fixture
    def keys(self, store: ChunkStore) -> list[str]:
        # Put in another order than that of the bytes.
        for key in sorted(self.KEYS, key=lambda key: hashlib.sha256(key.encode()).digest()):
            store.put(key, key.encode())
        return list(self.KEYS)

    def listed(self, store: ChunkStore, *arguments: object) -> list[str]:
        return [stat.key for stat in store.list(*arguments)]  # type: ignore[arg-type]

    def test_list_is_in_byte_order(self, store: ChunkStore, keys: list[str]) -> None:
        assert keys == sorted(keys)
        assert self.listed(store) == keys
        assert [stat.size for stat in store.list()] == [len(key) for key in keys]

    def test_list_of_a_prefix(self, store: ChunkStore, keys: list[str]) -> None:
        for prefix in ("a", "a/", "a/b", "a/b/", "a/b/c", "a/b/cc", "ab", "b", "x", "x/y/", "A"):
            expected = [key for key in keys if key.startswith(prefix)]
            assert self.listed(store, prefix) == expected, prefix

    def test_list_after(self, store: ChunkStore, keys: list[str]) -> None:
        for after in (*keys, "a", "a/", "a/b", "a/b/", "a/b/cc", "a/b/z", "a1", "z", "0"):
            assert self.listed(store, "", after) == [key for key in keys if key > after], after

    def test_list_limit(self, store: ChunkStore, keys: list[str]) -> None:
        for limit in (0, 1, 2, 12, 13, 14, 5000):
            assert self.listed(store, "", "", limit) == keys[:limit], limit

    def test_list_prefix_after_and_limit(self, store: ChunkStore, keys: list[str]) -> None:
        assert self.listed(store, "a/", "a/-", 2) == ["a/b/c", "a/b/d"]
        assert self.listed(store, "a/", "A", 2) == ["a/-", "a/b/c"]
        assert self.listed(store, "a/", "a0") == []

    def test_list_of_nothing(self, store: ChunkStore) -> None:
        assert self.listed(store) == []
        assert self.listed(store, "a") == []
        assert self.listed(store, "a/b/") == []

    def test_list_of_no_prefix(self, store: ChunkStore) -> None:
        for prefix in ("/", "/a", "a//", "../", ".", "a b", "ü", "a\n"):
            with pytest.raises(UsageError):
                list(store.list(prefix))

    def test_list_of_more_than_a_page(self, store: ChunkStore, place: Place) -> None:
        names = [f"objects/{i % 3}/{i:05}" for i in range(1150)]
        with ThreadPoolExecutor(16) as threads:
            list(threads.map(lambda name: place.plant(name, b"x"), names))
        names.sort()
        assert self.listed(store) == names
        assert self.listed(store, "", names[1003]) == names[1004:]
        assert self.listed(store, "", "", 1050) == names[:1050]
        assert self.listed(store, "objects/1/", names[500]) == [
            name for name in names if name.startswith("objects/1/") and name > names[500]
        ]
        assert store.children("objects/2/") == [n[-5:] for n in names if n.startswith("objects/2")]

    def test_list_while_things_come_and_go(self, store: ChunkStore) -> None:
        stay = [f"s/{i:03}" for i in range(40)]
        for key in stay:
            store.put(key, b"")
        listing = store.list()
        seen = [next(listing).key]
        store.put("s/zzz", b"")
        store.delete("s/039")
        seen += [stat.key for stat in listing]
        assert len(seen) == len(set(seen))
        assert set(stay[:-1]) <= set(seen) <= {*stay, "s/zzz"}

    def test_foreign_names_do_not_show(self, store: ChunkStore, place: Place) -> None:
        store.put("a/b", b"1")
        for name in (
            ".hidden",
            "a/.tmp-0123456789abcdef",
            "a/x y",
            "ümlaut",
            "a/q?",
            "a/.d/e",
            "c d/e",
        ):
            place.plant(name, b"2")
        assert self.listed(store) == ["a/b"]
        assert store.children("") == ["a"]
        assert store.children("a/") == ["b"]

    # ---- keys -----------------------------------------------------------------------------------

    def test_good_keys(self, store: ChunkStore) -> None:
        for key in GOOD_KEYS:
            store.put(key, b"1")
            with pytest.raises(KeyExists):
                store.put_exclusive(key, b"2")
            assert store.get(key) == b"1"
            assert store.stat(key).key == key
            assert self.listed(store) == [key]
            store.delete(key)
            assert not store.exists(key)

    def test_bad_keys(self, store: ChunkStore) -> None:
        for key in BAD_KEYS:
            for operation in (
                lambda key=key: store.get(key),
                lambda key=key: store.put(key, b"1"),
                lambda key=key: store.put_exclusive(key, b"1"),
                lambda key=key: store.stat(key),
                lambda key=key: store.exists(key),
                lambda key=key: store.delete(key),
            ):
                with pytest.raises(UsageError):
                    operation()
        assert self.listed(store) == []

    # ---- several at once ------------------------------------------------------------------------

    def test_many_threads(self, store: ChunkStore) -> None:
        def work(number: int) -> None:
            key, data = f"t/{number % 7}/{number}", pattern(number * 997)
            store.put(key, data)
            assert store.get(key) == data
            assert store.get(key, 10, 10) == data[10:20]
            assert store.stat(key).size == len(data)
            if number % 2:
                store.delete(key)

        with ThreadPoolExecutor(24) as threads:
            list(threads.map(work, range(96)))
        assert len(self.listed(store, "t/")) == 48

    def test_a_reader_sees_the_old_bytes_or_the_new(self, store: ChunkStore) -> None:
        versions = [bytes([n]) * (200 * KiB + n) for n in range(8)]
        store.put("a", versions[0])
        done = threading.Event()

        def write() -> None:
            for data in versions[1:]:
                store.put("a", data)
            done.set()

        with ThreadPoolExecutor(4) as threads:
            writing = threads.submit(write)
            while not done.is_set() and not writing.done():
                assert store.get("a") in versions
            writing.result(60)
        assert store.get("a") == versions[-1]

    def test_another_store_object_sees_it(self, store: ChunkStore, place: Place) -> None:
        with open_store(place.url) as other:
            store.put("a", b"1")
            store.sync()
            assert other.get("a") == b"1"
            other.put("a", b"2")
            other.put("b", b"3")
            other.sync()
            assert store.get("a") == b"2"
            assert self.listed(store) == ["a", "b"]

    def test_a_killed_writer_leaves_nothing_partial(self, store: ChunkStore, place: Place) -> None:
        code = """
import sys
from horcrux_nbd.chunkstore import open_store
store = open_store(sys.argv[1])
data = bytes(range(256)) * (1 << 17)
sys.stdout.write("ready\\n"); sys.stdout.flush()
store.put("a/big", data)
store.put_exclusive("a/second", data)
"""
        data = bytes(range(256)) * (1 << 17)  # 32 MiB
        killed = 0
        for delay in (0.0, 0.03, 0.1, 0.2):
            process = python(code, place.url)
            assert process.stdout
            assert process.stdout.readline() == b"ready\n"
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(delay)  # not for an event: the point is to hit any moment
            killed += process.poll() is None
            process.send_signal(signal.SIGKILL)
            process.wait(10)
            process.stdout.close()
            for stat in store.list():
                assert stat.key in ("a/big", "a/second")
                assert stat.size == len(data)
                assert store.get(stat.key) == data
                store.delete(stat.key)
        assert killed  # else nothing was tested
        store.put("a/big", b"1")
        assert self.listed(store) == ["a/big"]

    # ---- the place ------------------------------------------------------------------------------

    def test_url_opens_the_same_store(self, store: ChunkStore) -> None:
        store.put("a", b"1")
        store.sync()
        assert str(parse_store_url(store.url)) == store.url
        with open_store(store.url) as other:
            assert other.url == store.url
            assert other.get("a") == b"1"

    def test_prepare_again(self, store: ChunkStore) -> None:
        store.put("a", b"1")
        store.prepare()
        store.check()
        assert store.get("a") == b"1"

    def test_a_missing_place(self, place: Place) -> None:
        with pytest.raises(StoreMissing) as caught:
            open_store(place.missing_url)
        assert "\n" not in str(caught.value)
        with open_store(place.missing_url, check=False, limit=5) as store:
            for operation in (
                lambda: store.get("a"),
                lambda: store.put("a/b", b"1"),
                lambda: store.put_exclusive("a", b"1"),
                lambda: store.stat("a"),
                lambda: store.children(""),
                lambda: list(store.list()),
            ):
                with pytest.raises(StoreMissing):
                    operation()

    def test_concurrency_is_as_asked(self, place: Place) -> None:
        with open_store(place.url, create=True, concurrency=3) as store:
            assert store.concurrency == 3
            with ThreadPoolExecutor(12) as threads:
                list(threads.map(lambda n: store.put(f"a/{n}", b"1"), range(36)))
            assert len(self.listed(store)) == 36
        with open_store(place.url) as store:
            assert store.concurrency >= 1

    def test_close(self, place: Place) -> None:
        before = threading.active_count()
        with open_store(place.url, create=True) as store:
            store.put("a", b"1")
        end = time.monotonic() + 5
        while threading.active_count() > before and time.monotonic() < end:
            time.sleep(0.01)
        assert threading.active_count() <= before

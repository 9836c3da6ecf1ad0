"""The plugin in a real nbdkit, asked by libnbd, qemu, fio and nbdcopy."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from horcrux_nbd.volume import state as states

from .servers import nbdkit as servers
from .servers.fixtures import ssh, sshd_server  # noqa: F401 - fixtures
from .servers.nbdkit import PLUGIN, Nbdkit, connected, traced
from .servers.proxy import proxy
from .servers.sshd import Sshd
from .volume.support import (
    BLOCK,
    CHUNK,
    IMAGE,
    chunk_ids,
    make_image,
    make_volume,
    noise,
    object_file,
)

pytestmark = pytest.mark.skipif(not servers.available(), reason=servers.MISSING)

# 40 chunks and a bit that is no multiple of anything; data in the first half and at the end.
SIZE = 40 * CHUNK + 1234
DATA = {0: noise(20 * CHUNK), 40 * CHUNK: noise(1234, "end")}
HOLE = 20 * CHUNK


def original(offset: int, length: int) -> bytes:
    image = DATA[0] + bytes(20 * CHUNK) + DATA[40 * CHUNK]
    return image[offset : offset + length]


@pytest.fixture
def url(tmp_path: Path) -> str:
    return make_image(tmp_path / "repo", DATA, size=SIZE)


def serve(tmp_path: Path, url: str, **keys: object) -> Nbdkit:
    """An nbdkit over `url`, not started, with overlay and cache in the test's folder."""
    options = keys.pop("options", ())
    env = keys.pop("env", None)
    all_keys = {
        "repo": url, "name": IMAGE, "overlay": tmp_path / "overlay", "cache": tmp_path / "cache",
        **keys,
    }  # fmt: skip
    given = {key: value for key, value in all_keys.items() if value is not None}
    return Nbdkit(env=env, options=options, **given)  # type: ignore[arg-type]


@pytest.fixture
def served(tmp_path: Path, url: str) -> Iterator[Nbdkit]:
    with serve(tmp_path, url) as server:
        yield server


@pytest.fixture
def client(served: Nbdkit) -> Iterator[Any]:
    with connected(served) as handle:
        yield handle


def nbd() -> Any:
    return servers.libnbd()


def errno_of(call: Any, *args: Any) -> int:
    """The errno that a request of libnbd fails with."""
    with pytest.raises(nbd().Error) as caught:
        call(*args)
    return int(caught.value.errnum)


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


# ---- what is negotiated


def test_what_the_device_says_of_itself(client: Any) -> None:
    assert client.get_size() == SIZE
    for can in ("flush", "fua", "trim", "zero", "fast_zero", "cache", "multi_conn", "df"):
        assert getattr(client, f"can_{can}")(), can
    assert not client.is_read_only()
    assert not client.is_rotational()
    assert client.can_meta_context("base:allocation")
    sizes = [nbd().SIZE_MINIMUM, nbd().SIZE_PREFERRED, nbd().SIZE_MAXIMUM]
    assert [client.get_block_size(size) for size in sizes] == [1, BLOCK, 32 << 20]


def test_exports_are_listed_and_described(served: Nbdkit) -> None:
    listed = subprocess.run(
        ["nbdinfo", "--json", "--list", served.uri], capture_output=True, text=True, check=True
    )
    (export,) = json.loads(listed.stdout)["exports"]
    assert export["export-name"] == IMAGE
    assert export["description"] == "overlay: a version"
    with connected(served, IMAGE) as handle:
        assert handle.get_size() == SIZE
    with pytest.raises(nbd().Error):
        served.connect("OTHER")
    assert "there is no export 'OTHER' here, only 'AMCC'" in served.said()
    assert "Traceback" not in served.said()


def test_it_tells_its_version_and_its_keys() -> None:
    dumped = subprocess.run(
        ["nbdkit", "--dump-plugin", "python", PLUGIN], capture_output=True, text=True, check=True
    )
    assert "horcrux_version=" in dumped.stdout
    keys = next(x for x in dumped.stdout.splitlines() if x.startswith("horcrux_keys="))
    assert {"repo", "name", "overlay", "cache_size", "timeout"} < set(keys[13:].split())


# ---- reading and writing


def test_the_image_reads_as_it_was(client: Any) -> None:
    assert client.pread(SIZE, 0) == original(0, SIZE)
    chance = random.Random(1)
    for _ in range(50):
        offset = chance.randrange(SIZE)
        length = min(chance.randrange(1, 3 * CHUNK), SIZE - offset)
        assert client.pread(length, offset) == original(offset, length)
    assert errno_of(client.pread, 10, SIZE - 5) == errno.EINVAL


def test_writes_zeros_and_trims_of_any_alignment(client: Any) -> None:
    model = bytearray(original(0, SIZE))
    chance = random.Random(2)
    for turn in range(150):
        offset = chance.randrange(SIZE)
        length = min(chance.choice([1, 512, 4096, 5000, 200_000]), SIZE - offset)
        action = chance.choice(["write", "write", "zero", "trim"])
        if action == "write":
            data = noise(length, turn)
            client.pwrite(data, offset)
            model[offset : offset + length] = data
        elif action == "zero":
            client.zero(length, offset, chance.choice([0, nbd().CMD_FLAG_NO_HOLE]))
            model[offset : offset + length] = bytes(length)
        else:
            client.trim(length, offset)
            model[offset : offset + length] = bytes(length)
    assert client.pread(SIZE, 0) == model
    client.flush()


def test_the_largest_request(client: Any) -> None:
    data = noise(2 << 20) * 16
    assert errno_of(client.pwrite, data + b"x", 0) in (errno.EINVAL, errno.ENOMEM, errno.ENOSPC)
    assert errno_of(client.pwrite, data, SIZE - 10) == errno.ENOSPC


def test_zero_is_refused_where_it_would_not_be_fast(served: Nbdkit, client: Any) -> None:
    fast = nbd().CMD_FLAG_FAST_ZERO
    client.zero(CHUNK, 0, fast)
    client.zero(SIZE - 30 * CHUNK, 30 * CHUNK, fast)  # the odd end of the image is no edge
    for offset, length in ((CHUNK + 1, CHUNK), (2 * CHUNK, 100), (2 * CHUNK + 5, BLOCK)):
        assert errno_of(client.zero, length, offset, fast) == errno.ENOTSUP
    client.pwrite(bytes(BLOCK), 2 * CHUNK)
    client.zero(100, 2 * CHUNK, fast)
    client.zero(100, 5 * CHUNK)
    assert client.pread(101, 5 * CHUNK) == bytes(100) + original(5 * CHUNK + 100, 1)
    assert served.said() == "", "a client that asks whether it is fast is no failure"


def block_status(client: Any, count: int, offset: int, flags: int = 0) -> list[tuple[int, int]]:
    found: list[int] = []

    def take(context: str, at: int, entries: list[int], error: Any) -> None:
        assert (context, at) == ("base:allocation", offset)
        found.extend(entries)

    client.block_status(count, offset, take, flags)
    return list(zip(found[::2], found[1::2], strict=True))


def test_extents_show_holes_zeros_and_data(client: Any) -> None:
    hole = nbd().STATE_HOLE | nbd().STATE_ZERO
    assert block_status(client, SIZE, 0) == [(HOLE, 0), (20 * CHUNK, hole), (1234, 0)]
    client.trim(4 * CHUNK, CHUNK)
    client.zero(100, 6 * CHUNK)
    client.pwrite(b"x", 30 * CHUNK + 5)
    expected = [
        (CHUNK, 0), (4 * CHUNK, hole), (15 * CHUNK, 0), (10 * CHUNK, hole), (BLOCK, 0),
        (10 * CHUNK - BLOCK, hole), (1234, 0),
    ]  # fmt: skip
    assert block_status(client, SIZE, 0) == expected
    one = nbd().CMD_FLAG_REQ_ONE
    assert block_status(client, SIZE, 0, one) == expected[:1]
    assert block_status(client, CHUNK, 100, one) == [(CHUNK - 100, 0)]
    assert block_status(client, 5, CHUNK + 7) == [(5, hole)]


def test_cache_prefetches(tmp_path: Path, url: str, client: Any) -> None:
    client.cache(8 * CHUNK, 100)
    cached = tmp_path / "cache" / "chunks"
    deadline = time.monotonic() + 10
    while len(list(cached.glob("??/[0-9a-f]*"))) < 9:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.rename(tmp_path / "repo", tmp_path / "away")
    assert client.pread(8 * CHUNK, 0) == original(0, 8 * CHUNK)
    os.rename(tmp_path / "away", tmp_path / "repo")


# ---- what is durable


def test_a_flush_on_any_connection_covers_the_writes_of_all(tmp_path: Path, url: str) -> None:
    with serve(tmp_path, url) as server:
        handles = [server.connect() for _ in range(4)]
        for number, handle in enumerate(handles):
            handle.pwrite(noise(5000, number), number * CHUNK + 100)
            for other in handles:
                assert other.pread(5000, number * CHUNK + 100) == noise(5000, number)
        handles[3].flush()
        server.kill()
        server.start()
        with connected(server) as handle:
            for number in range(4):
                assert handle.pread(5000, number * CHUNK + 100) == noise(5000, number)


def test_fua_is_durable_by_itself(tmp_path: Path, url: str) -> None:
    fua = nbd().CMD_FLAG_FUA
    with serve(tmp_path, url) as server:
        handle = server.connect()
        handle.pwrite(noise(5000), 100, fua)
        handle.trim(CHUNK, 2 * CHUNK, fua)
        handle.zero(CHUNK, 4 * CHUNK, fua)
        handle.zero(10, 6 * CHUNK, fua)
        server.kill()
        server.start()
        with connected(server) as again:
            assert again.pread(5000, 100) == noise(5000)
            assert again.pread(CHUNK, 2 * CHUNK) == bytes(CHUNK)
            assert again.pread(CHUNK, 4 * CHUNK) == bytes(CHUNK)
            assert again.pread(11, 6 * CHUNK) == bytes(10) + original(6 * CHUNK + 10, 1)


def test_an_orderly_end_keeps_everything(tmp_path: Path, url: str) -> None:
    with serve(tmp_path, url) as server:
        with connected(server) as handle:
            handle.pwrite(noise(5000), 100)
        assert server.stop() == 0
        assert server.said() == ""
        server.start()
        with connected(server) as handle:
            assert handle.pread(5000, 100) == noise(5000)


def test_fua_and_an_orderly_end_reach_the_disk(tmp_path: Path, url: str) -> None:
    """What was only acknowledged survives the death of the process, so the disk is asked here."""
    fua = nbd().CMD_FLAG_FUA
    with serve(tmp_path, url) as server:
        handle = server.connect()
        with traced(server) as synced:
            handle.pwrite(noise(BLOCK), 0)
        assert not {"data-000000", "map"} & set(synced)
        for request in (
            lambda: handle.pwrite(noise(BLOCK), BLOCK, fua),
            lambda: handle.pwrite(noise(BLOCK), 0, fua),
            lambda: handle.trim(BLOCK, 0, fua),
            lambda: handle.zero(BLOCK, BLOCK, fua),
        ):
            with traced(server) as synced:
                request()
            assert synced, "FUA without a sync"
        handle.pwrite(noise(BLOCK), 2 * BLOCK)
        with traced(server) as synced:
            handle.shutdown()
            assert server.stop() == 0
        assert synced == ["data-000000", "map"]


class Oracle:
    """What each sector of 512 bytes may be after a crash: what was flushed last, or later.

    After the death of the process alone, what was acknowledged counts as flushed. One thread
    writes a sector, so its versions have an order. Version 0 is the image's own content, and ZERO
    stands for zeros. RELIABILITY.md, "Oracle".
    """

    ZERO = -1

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._versions: dict[int, list[int]] = {}  # allowed, oldest first
        self._done: dict[int, int] = {}  # how many of these are acknowledged
        self._next = 0

    def new_version(self) -> int:
        with self._lock:
            self._next += 1
            return self._next

    @staticmethod
    def content(sector: int, version: int) -> bytes:
        if version == Oracle.ZERO:
            return bytes(512)
        return struct.pack("<QQ", sector, version) * 32 if version else original(sector * 512, 512)

    def begins(self, sectors: range, version: int) -> None:
        with self._lock:
            for sector in sectors:
                self._versions.setdefault(sector, [0]).append(version)

    def acknowledged(self, sectors: range) -> None:
        with self._lock:
            for sector in sectors:
                self._done[sector] = len(self._versions[sector]) - 1

    def flush_begins(self) -> dict[int, int]:
        with self._lock:
            return {s: self._versions[s][done] for s, done in self._done.items() if done}

    def flushed(self, snapshot: dict[int, int]) -> None:
        with self._lock:
            for sector, version in snapshot.items():
                versions = self._versions[sector]
                if version in versions:  # else a later flush was acknowledged before
                    at = versions.index(version)
                    del versions[:at]
                    self._done[sector] = max(0, self._done[sector] - at)

    def check(self, read: Any) -> list[str]:
        """What is wrong; from here on each sector is what it was found to be."""
        wrong = []
        self._done.clear()
        for sector in sorted(self._versions):
            found = bytes(read(512, sector * 512))
            versions = self._versions[sector]
            fitting = [v for v in versions if self.content(sector, v) == found]
            if not fitting:
                wrong.append(f"sector {sector} is none of {versions}: {found[:16].hex()}")
            self._versions[sector] = fitting[-1:] or [0]
        return wrong


class Load(threading.Thread):
    """Writes, zeros, trims and flushes over one connection until the server is gone.

    Half of the sectors are dealt out in pairs, so that threads share blocks; the rest in long runs.
    """

    def __init__(self, server: Nbdkit, oracle: Oracle, number: int, of: int, seed: str) -> None:
        super().__init__(daemon=True)
        self._handle, self._oracle = server.connect(), oracle
        self._number, self._of, self._chance = number, of, random.Random(seed)
        self.requests = 0
        self.failed: BaseException | None = None

    def _sectors(self) -> range:
        half = SIZE // 512 // 2
        if self._chance.random() < 0.5:
            pairs = half // 2 // self._of
            first = (self._chance.randrange(pairs) * self._of + self._number) * 2
            return range(first, first + self._chance.choice([1, 2]))
        run = half // self._of
        first = self._chance.randrange(run)
        begin = half + self._number * run + first
        return range(begin, begin + min(self._chance.choice([1, 8, 64, 400]), run - first))

    def run(self) -> None:
        try:
            while True:
                self._request()
                self.requests += 1
        except nbd().Error:  # killed
            return
        except BaseException as error:
            self.failed = error

    def _request(self) -> None:
        kind = self._chance.random()
        if kind < 0.1:
            snapshot = self._oracle.flush_begins()
            self._handle.flush()
            self._oracle.flushed(snapshot)
            return
        sectors = self._sectors()
        offset, length = sectors.start * 512, len(sectors) * 512
        fua = nbd().CMD_FLAG_FUA if self._chance.random() < 0.05 else 0
        version = Oracle.ZERO if kind < 0.25 else self._oracle.new_version()
        self._oracle.begins(sectors, version)
        if version == Oracle.ZERO:
            self._handle.zero(length, offset, fua)
        else:
            data = b"".join(Oracle.content(sector, version) for sector in sectors)
            self._handle.pwrite(data, offset, fua)
        self._oracle.acknowledged(sectors)
        if fua:
            self._oracle.flushed(dict.fromkeys(sectors, version))


def kill_under_load(server: Nbdkit, oracle: Oracle, turn: str, threads: int = 4) -> int:
    """Load, SIGKILL at a random moment, restart, compare with the oracle; requests answered."""
    chance = random.Random(turn)
    loads = [Load(server, oracle, n, threads, f"{turn} {n}") for n in range(threads)]
    for load in loads:
        load.start()
    time.sleep(chance.uniform(0, 0.12))
    server.kill()
    for load in loads:
        load.join(20)
        assert not load.is_alive()
        assert load.failed is None, load.failed
    # The kernel lives, so all that was acknowledged has to be there, as if it had been flushed.
    oracle.flushed(oracle.flush_begins())
    server.start()
    with connected(server) as handle:
        assert oracle.check(handle.pread) == [], f"turn {turn}"
    return sum(load.requests for load in loads)


@pytest.mark.slow
def test_killed_under_load_again_and_again(
    tmp_path: Path, url: str, pytestconfig: pytest.Config
) -> None:
    """HORCRUX_KILLS and HORCRUX_SEED say how often and repeat what was found."""
    kills = int(os.environ.get("HORCRUX_KILLS", "20"))
    seed = os.environ.get("HORCRUX_SEED") or str(random.SystemRandom().randrange(1 << 32))
    print(f"repeat with HORCRUX_SEED={seed}")
    oracle, requests = Oracle(), 0
    with serve(tmp_path, url) as server:
        for kill in range(kills):
            requests += kill_under_load(server, oracle, f"{seed} {kill}")
    assert requests > kills * 5, "hardly any load"


def test_a_client_that_leaves_with_requests_under_way_loses_nothing(
    tmp_path: Path, url: str
) -> None:
    """nbdkit 1.32.5 aborts then, in its own code; what was flushed is there after a restart."""
    with serve(tmp_path, url) as server:
        with connected(server) as handle:
            handle.pwrite(noise(CHUNK), 0)
            handle.flush()
        for turn in range(5):
            leaving = server.connect()
            buffers = [nbd().Buffer.from_bytearray(bytearray(noise(CHUNK, n))) for n in range(32)]
            for number, buffer in enumerate(buffers):
                leaving.aio_pwrite(buffer, (5 + number % 8) * CHUNK)
                leaving.aio_pread(nbd().Buffer(CHUNK), number * CHUNK)
            leaving.poll(1)
            del leaving
            assert server.process is not None
            try:
                server.process.wait(0.3)
            except subprocess.TimeoutExpired:
                server.kill()
            server.start()
            with connected(server) as handle:
                assert handle.pread(CHUNK, 0) == noise(CHUNK), f"turn {turn}"
                for number in range(5, 13):
                    handle.pread(CHUNK, number * CHUNK)


# ---- who is served what


def test_a_read_only_export_refuses_writes(tmp_path: Path, url: str) -> None:
    with serve(tmp_path, url, overlay=None, readonly="true") as server:
        with connected(server) as handle:
            assert handle.is_read_only()
            assert handle.pread(SIZE, 0) == original(0, SIZE)
            assert errno_of(handle.pwrite, b"x", 0) == errno.EPERM
            assert errno_of(handle.zero, 10, 0) == errno.EPERM
            handle.flush()
    with serve(tmp_path, url) as server, connected(server) as handle:
        handle.pwrite(b"written", 0)
    with serve(tmp_path, url, readonly="yes") as server, connected(server) as handle:
        assert handle.is_read_only()
        assert handle.pread(7, 0) == b"written"
        assert errno_of(handle.pwrite, b"x", 0) == errno.EPERM
    with serve(tmp_path, url, options=("--readonly",)) as server, connected(server) as handle:
        assert handle.is_read_only()


def test_a_branch_that_moves_on_leaves_the_volume_where_it_was(tmp_path: Path, url: str) -> None:
    with serve(tmp_path, url) as server:
        make_image(tmp_path / "repo", noise(SIZE, "next"), size=SIZE)
        with connected(server) as handle:
            assert handle.pread(SIZE, 0) == original(0, SIZE)
    with serve(tmp_path, url) as server, connected(server) as handle:
        assert handle.pread(SIZE, 0) == original(0, SIZE)
    with serve(tmp_path, url, overlay=tmp_path / "new") as server, connected(server) as handle:
        assert handle.pread(SIZE, 0) == noise(SIZE, "next")
    with serve(tmp_path, url, overlay=tmp_path / "old", ref="main~1") as server:
        with connected(server) as handle:
            assert handle.pread(SIZE, 0) == original(0, SIZE)


def test_a_volume_that_was_made_is_served_by_folder_and_by_name(
    tmp_path: Path, url: str, horcrux_host: Path
) -> None:
    by_name = horcrux_host / "root" / "volumes" / "mine"
    by_name.parent.mkdir(parents=True)
    for folder, key in ((tmp_path / "v", f"{tmp_path}/v"), (by_name, "mine")):
        make_volume(folder, url)
        keys = {"repo": None, "name": None, "overlay": None, "volume": key}
        with serve(tmp_path, url, **keys) as server, connected(server) as handle:
            assert handle.pread(100, 0) == original(0, 100)


def test_served_with_the_store_away_as_long_as_it_is_local(tmp_path: Path, url: str) -> None:
    with serve(tmp_path, url) as server, connected(server) as handle:
        handle.pread(2 * CHUNK, 0)
        handle.pwrite(noise(CHUNK), 3 * CHUNK)
    os.rename(tmp_path / "repo", tmp_path / "away")
    with serve(tmp_path, url) as server, connected(server) as handle:
        assert handle.pread(2 * CHUNK, 0) == original(0, 2 * CHUNK)
        assert handle.pread(CHUNK, 3 * CHUNK) == noise(CHUNK)


def test_in_the_background_with_relative_paths(tmp_path: Path, url: str) -> None:
    """nbdkit forks and goes to / before the volume is used."""
    socket, pid_file = tmp_path / "s", tmp_path / "pid"
    keys = [f"repo={url}", f"name={IMAGE}", "overlay=over/lay", "cache=cac/he"]
    started = subprocess.run(
        ["nbdkit", "--unix", socket, "--pidfile", pid_file, "python", PLUGIN, *keys],
        cwd=tmp_path, capture_output=True, text=True, check=True, timeout=30,
    )  # fmt: skip
    assert started.stderr == ""
    pid = int(pid_file.read_text())
    try:
        handle = nbd().NBD()
        handle.connect_unix(str(socket))
        assert handle.pread(SIZE, 0) == original(0, SIZE)
        handle.pwrite(noise(100), 5)
        handle.flush()
        assert (tmp_path / "over" / "lay" / "volume.json").exists()
        assert list((tmp_path / "cac" / "he" / "chunks").glob("??/*"))
        assert states.lock_of(tmp_path / "over" / "lay", "x").held_by_somebody() == pid
        second = Nbdkit(repo=url, name=IMAGE, overlay=tmp_path / "over" / "lay")
        assert f"is in use by process {pid}: stop it first" in second.refused()
        handle.shutdown()  # nbdkit ends when the last client is gone
    finally:
        os.kill(pid, 15)
        deadline = time.monotonic() + 20
        while Path(f"/proc/{pid}").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_nothing_but_files_is_open_when_it_forks(tmp_path: Path, url: str) -> None:
    """A connection or a thread of before would be dead after the fork."""
    with serve(tmp_path, url) as server:
        tasks = os.listdir(f"/proc/{server.pid}/task")
        opened = [
            os.readlink(f"/proc/{server.pid}/fd/{fd}")
            for fd in os.listdir(f"/proc/{server.pid}/fd")
        ]
        assert len(tasks) == 1
        assert sum(name.startswith("socket:") for name in opened) == 1, "the one it listens on"


# ---- requests that cannot be served: one line each

REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "unknown key": ({"nme": "x"}, "unknown key 'nme': the keys are volume, repo, name, ref"),
    "nothing": (
        {"repo": None, "name": None, "overlay": None},
        "say what to serve: repo= and name= (and overlay=), or volume=",
    ),
    "no name": ({"name": None}, "is no volume yet: repo= and name= say what to make it from"),
    "no overlay": ({"overlay": None}, "overlay= names the folder for what is written"),
    "empty": ({"name": ""}, "name= is empty"),
    "image name": ({"name": "../x"}, "'../x' cannot name an image: use 1 to 100 of"),
    "ref": ({"ref": "a b"}, "'a b' is no ref"),
    "flag": ({"readonly": "perhaps"}, "readonly=perhaps: say true or false"),
    "size": ({"cache_size": "many"}, "cache_size 'many' is no size"),
    "timeout": ({"timeout": "soon"}, "timeout=soon: give seconds, 1 to 86400"),
    "log": ({"log": "loud"}, "log=loud: say debug, error, info, warning"),
    "volume and repo": ({"volume": "v"}, "volume= already says it all: leave out name="),
    "volume": (
        {"repo": None, "name": None, "overlay": None, "volume": "/nowhere"},
        "/nowhere is no volume",
    ),
    "volume name": (
        {"repo": None, "name": None, "overlay": None, "volume": ".."},
        "'..' cannot name a volume",
    ),
    "scheme": ({"repo": "ftp://x/y"}, "ftp"),
    "no folder": ({"repo": "cp:///nowhere/at/all"}, "there is no folder /nowhere/at/all"),
    "no such image": ({"name": "AMCD"}, "AMCC"),
    "no such version": ({"ref": "mian"}, "AMCC has no version 'mian'"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_a_wrong_request_is_one_clear_line(tmp_path: Path, url: str, what: str) -> None:
    keys, expected = REFUSED[what]
    said = lines(serve(tmp_path, url, **keys).refused())
    assert len(said) == 1, said
    assert expected in said[0]
    assert not (tmp_path / "overlay").exists() or not list((tmp_path / "overlay").iterdir())


def test_a_key_that_is_given_twice(tmp_path: Path, url: str) -> None:
    (said,) = lines(Nbdkit("name=AMCC", repo=url, name="AMCD").refused())
    assert "name= is given twice" in said


def test_a_folder_that_is_no_repository(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (said,) = lines(serve(tmp_path, f"cp://{tmp_path}/empty").refused())
    assert "holds no Horcrux repository" in said


def test_a_folder_with_something_else_in_it(tmp_path: Path, url: str) -> None:
    (tmp_path / "overlay").mkdir()
    (tmp_path / "overlay" / "letters").write_text("dear")
    (said,) = lines(serve(tmp_path, url).refused())
    assert "is not empty and no volume ('letters' is in it)" in said
    assert [p.name for p in (tmp_path / "overlay").iterdir() if p.name != "lock"] == ["letters"]


def test_a_second_server_is_refused(served: Nbdkit, tmp_path: Path, url: str) -> None:
    (said,) = lines(serve(tmp_path, url).refused())
    assert f"is in use by process {served.pid}: stop it first" in said
    with connected(served) as handle:
        assert handle.pread(10, 0) == original(0, 10)


def test_an_overlay_of_something_else_is_refused(tmp_path: Path, url: str) -> None:
    with serve(tmp_path, url):
        pass
    make_image(tmp_path / "repo", b"other", image="OTHER")
    (said,) = lines(serve(tmp_path, url, name="OTHER").refused())
    assert "belongs to AMCC@main, not to OTHER@main" in said
    another = make_image(tmp_path / "repo2", DATA, size=SIZE)
    (said,) = lines(serve(tmp_path, another).refused())
    assert "belongs to another repository" in said
    shutil.copytree(tmp_path / "repo", tmp_path / "copy")
    with serve(tmp_path, f"cp://{tmp_path}/copy") as server, connected(server) as handle:
        assert handle.pread(10, 0) == original(0, 10), "a copy is the same repository"


def test_damaged_state_is_refused_and_left_alone(tmp_path: Path, url: str) -> None:
    with serve(tmp_path, url) as server, connected(server) as handle:
        for turn in range(3):
            handle.pwrite(noise(CHUNK), turn * CHUNK)
            handle.flush()
    (log,) = (tmp_path / "overlay" / "overlay").glob("*/map")
    for path in (log, tmp_path / "overlay" / "volume.json"):
        whole = path.read_bytes()
        path.write_bytes(whole[:60] + b"\xff" + whole[61:])
        damaged = path.read_bytes()
        (said,) = lines(serve(tmp_path, url).refused())
        assert str(path) in said
        assert "damaged" in said
        assert path.read_bytes() == damaged
        path.write_bytes(whole)
    with serve(tmp_path, url) as server, connected(server) as handle:
        assert handle.pread(CHUNK, CHUNK) == noise(CHUNK)


def test_a_python_without_our_packages_is_told_what_to_do(tmp_path: Path) -> None:
    alone = tmp_path / "horcrux_nbd" / "plugin.py"
    alone.parent.mkdir()
    shutil.copy(PLUGIN, alone)
    done = subprocess.run(
        ["nbdkit", "--foreground", "--unix", tmp_path / "s", "python", alone, "repo=cp:///x"],
        capture_output=True, text=True, check=False, timeout=30,
    )  # fmt: skip
    assert done.returncode != 0
    (said,) = lines(done.stderr)
    assert "cannot load Horcrux's packages" in said
    assert "/usr/bin/python3 -m venv" in said


# ---- what goes wrong later


def test_a_damaged_object_is_one_line_and_the_rest_is_readable(tmp_path: Path, url: str) -> None:
    ids = chunk_ids(url)
    bad = object_file(url, ids[3])
    whole = bad.read_bytes()
    bad.write_bytes(whole[:1000] + bytes(100) + whole[1100:])
    with serve(tmp_path, url, log="error") as server, connected(server) as handle:
        assert errno_of(handle.pread, 100, 3 * CHUNK) == errno.EIO
        (said,) = lines(server.said())
        assert ids[3].hex() in said
        assert "damaged" in said
        for chunk in (*range(3), *range(4, 20)):
            assert handle.pread(CHUNK, chunk * CHUNK) == original(chunk * CHUNK, CHUNK)
        assert errno_of(handle.pwrite, b"x", 3 * CHUNK + 1) == errno.EIO
        handle.pwrite(noise(BLOCK), 3 * CHUNK)
        assert handle.pread(BLOCK, 3 * CHUNK) == noise(BLOCK)
        bad.write_bytes(whole)
        assert handle.pread(100, 4 * CHUNK - 100) == original(4 * CHUNK - 100, 100)


def test_a_store_that_is_away_is_waited_for_and_comes_back(tmp_path: Path, url: str) -> None:
    with serve(tmp_path, url, timeout=2, log="error") as server, connected(server) as handle:
        handle.pread(CHUNK, 0)
        os.rename(tmp_path / "repo", tmp_path / "away")
        began = time.monotonic()
        assert errno_of(handle.pread, CHUNK, 5 * CHUNK) == errno.EIO
        assert time.monotonic() - began < 10
        assert "Traceback" not in server.said()
        assert handle.pread(CHUNK, 0) == original(0, CHUNK)
        handle.pwrite(noise(CHUNK), 7 * CHUNK)
        handle.flush()
        os.rename(tmp_path / "away", tmp_path / "repo")
        assert handle.pread(CHUNK, 5 * CHUNK) == original(5 * CHUNK, CHUNK)


def test_a_store_that_hangs(tmp_path: Path, url: str, ssh: Sshd) -> None:  # noqa: F811
    """A dead network: connections stay open and carry nothing."""
    with proxy(ssh.port) as network:
        ssh.trust(network.port)
        remote = ssh.url(tmp_path / "repo", network.port)
        with serve(tmp_path, remote, timeout=4, log="error") as server:
            handle, other = server.connect(), server.connect()
            assert handle.pread(CHUNK, 0) == original(0, CHUNK)
            network.stall()
            failing = threading.Thread(
                target=lambda: found.append(errno_of(handle.pread, CHUNK, 9 * CHUNK))
            )
            found: list[int] = []
            began = time.monotonic()
            failing.start()
            other.pwrite(noise(CHUNK), 2 * CHUNK)
            other.flush()
            assert other.pread(CHUNK, 0) == original(0, CHUNK)
            assert other.pread(CHUNK, 2 * CHUNK) == noise(CHUNK)
            assert other.pread(BLOCK, HOLE) == bytes(BLOCK)
            assert failing.is_alive(), "what is here is served while others wait"
            failing.join(20)
            assert found == [errno.EIO]
            assert time.monotonic() - began < 15
            network.resume()
            deadline = time.monotonic() + 20
            while True:  # it may take one more limit until the dead connection is given up
                try:
                    assert handle.pread(CHUNK, 9 * CHUNK) == original(9 * CHUNK, CHUNK)
                    break
                except nbd().Error:
                    assert time.monotonic() < deadline
            network.stall()
            handle.cache(10 * CHUNK, 10 * CHUNK)
            other.pwrite(noise(CHUNK, 1), 2 * CHUNK)
            for each in (handle, other):
                each.shutdown()
            assert server.stop(20) == 0, "it ends, and flushes before"
            network.resume()
            server.start()
            with connected(server) as again:
                assert again.pread(CHUNK, 2 * CHUNK) == noise(CHUNK, 1)


def test_a_full_disk_is_told_and_nothing_is_lost(tmp_path: Path, url: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root: run the tests as root")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "horcrux-test", disk], check=True)
    try:
        with serve(tmp_path, url, overlay=disk / "o") as server, connected(server) as handle:
            written = 0

            def fill() -> None:
                nonlocal written
                while True:
                    handle.pwrite(noise(CHUNK, written), written * CHUNK)
                    written += 1

            assert errno_of(fill) == errno.ENOSPC
            assert 10 < written < 40
            handle.flush()
            for number in range(written):
                assert handle.pread(CHUNK, number * CHUNK) == noise(CHUNK, number)
            handle.trim(10 * CHUNK, 0)
            handle.pwrite(noise(CHUNK, "again"), 39 * CHUNK)
            handle.flush()
            server.kill()
            server.start()
            with connected(server) as again:
                assert again.pread(10 * CHUNK, 0) == bytes(10 * CHUNK)
                assert again.pread(CHUNK, 39 * CHUNK) == noise(CHUNK, "again")
                for number in range(10, written):
                    assert again.pread(CHUNK, number * CHUNK) == noise(CHUNK, number)
    finally:
        subprocess.run(["umount", disk], check=True)


# ---- other programs


def run(*command: str | Path, **options: Any) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{command[0]}: {done.stdout[-1000:]} {done.stderr[-2000:]}"
    return done.stdout


def needs(program: str, package: str) -> None:
    if not shutil.which(program):
        pytest.skip(f"needs {program}: apt-get install {package}")


def raw_image(tmp_path: Path) -> Path:
    path = tmp_path / "image.raw"
    path.write_bytes(original(0, SIZE))
    return path


def test_nbdcopy_both_ways(tmp_path: Path, served: Nbdkit) -> None:
    needs("nbdcopy", "libnbd-bin")
    run("nbdcopy", served.uri, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == original(0, SIZE)
    changed = bytearray(original(0, SIZE))
    changed[CHUNK : 9 * CHUNK] = bytes(4 * CHUNK) + noise(4 * CHUNK, "changed")
    changed[25 * CHUNK : 26 * CHUNK] = noise(CHUNK, "in the hole")
    (tmp_path / "in").write_bytes(changed)
    run("nbdcopy", "--flush", "--destination-is-zero", tmp_path / "in", served.uri)
    run("nbdcopy", "--flush", tmp_path / "in", served.uri)
    run("nbdcopy", served.uri, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == changed


def test_qemu_img_reads_converts_and_compares(tmp_path: Path, served: Nbdkit) -> None:
    needs("qemu-img", "qemu-utils")
    uri = f"nbd+unix:///{IMAGE}?socket={served.socket}"
    size = -(-SIZE // 512) * 512
    assert json.loads(run("qemu-img", "info", "--output=json", uri))["virtual-size"] == size
    run("qemu-img", "convert", "-O", "qcow2", uri, tmp_path / "out.qcow2")
    raw = raw_image(tmp_path)
    run("qemu-img", "compare", uri, tmp_path / "out.qcow2")
    os.truncate(raw, size)
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", raw, uri)
    # And onto it, zeros included: -n keeps the device, whose end is no whole sector.
    part = tmp_path / "part.raw"
    part.write_bytes(noise(3 * CHUNK) + bytes(20 * CHUNK) + noise(CHUNK, 1))
    options = f"driver=raw,size={24 * CHUNK},file.driver=nbd,file.server.type=unix"
    target = f"{options},file.server.path={served.socket}"
    run("qemu-img", "convert", "-n", "--target-image-opts", part, target)
    with connected(served) as handle:
        assert handle.pread(24 * CHUNK, 0) == part.read_bytes()


def test_blkverify_finds_no_difference_to_a_file(tmp_path: Path, served: Nbdkit) -> None:
    """qemu writes alike to us and to a file, and compares whatever it reads of both."""
    needs("qemu-io", "qemu-utils")
    raw = raw_image(tmp_path)
    chance = random.Random(4)
    commands = []
    for _ in range(400):
        length = chance.choice([512, 4096, 8192, 65536, 3 * 512])
        offset = chance.randrange((SIZE - length) // 512) * 512
        commands.append(
            chance.choice(
                [f"write -P {chance.randrange(256)} {offset} {length}"] * 2
                + [f"aio_write -P {chance.randrange(256)} {offset} {length}"]
                + [f"read {offset} {length}", "aio_flush", "flush"]
            )
        )
    options = (
        f"driver=blkverify,raw.driver=file,raw.filename={raw},test.driver=nbd,"
        f"test.server.type=unix,test.server.path={served.socket}"
    )
    script = "\n".join([*commands, "aio_flush", f"read 0 {SIZE // 512 * 512}", "quit"])
    said = run("qemu-io", "--image-opts", options, input=script)
    assert "mismatch" not in said
    with connected(served) as handle:
        whole = SIZE // 512 * 512
        assert handle.pread(whole, 0) == raw.read_bytes()[:whole]


def test_fio_verifies_with_many_requests_under_way(tmp_path: Path, served: Nbdkit) -> None:
    needs("fio", "fio")
    run(
        "fio", "--name=verify", "--ioengine=nbd", f"--uri={served.uri}", "--rw=randwrite",
        "--bsrange=512-16k", "--bs_unaligned=0", f"--size={40 * CHUNK}", "--io_size=6m",
        "--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--fsync=32", "--iodepth=16",
        "--random_generator=lfsr", "--randseed=7",
        cwd=tmp_path,
    )  # fmt: skip


# ---- an image of 64 TiB


def rss(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(x for x in status.splitlines() if x.startswith("VmHWM:")).split()[1]) * 1024


@pytest.mark.slow
def test_64_tib_cost_what_is_in_them(tmp_path: Path) -> None:
    """Open, walk and trim the whole; the figures themselves are in the README."""
    size = (64 << 40) + 512
    pieces = {at << 40: noise(1000, at) for at in range(0, 64, 7)}
    url = make_image(tmp_path / "repo", pieces, size=size)
    with serve(tmp_path, url) as server, connected(server) as handle:
        assert handle.get_size() == size
        for at, data in pieces.items():
            assert handle.pread(1000, at) == data
        chance = random.Random(5)
        for _ in range(1500):  # more groups than are looked at one by one
            handle.pwrite(b"x" * BLOCK, chance.randrange(size // BLOCK) * BLOCK)
        handle.flush()
        mapped = run("nbdinfo", "--map", server.uri)
        assert len(mapped.splitlines()) > 1500
        step = (1 << 32) - BLOCK  # a request has 32 bits for its length
        for at in range(0, size, step):
            handle.trim(min(step, size - at), at)
        handle.flush()
        assert "hole,zero" in run("nbdinfo", "--map", "--totals", server.uri)
        assert rss(server.pid) < 150 << 20
        overlay = tmp_path / "overlay"
        assert int(run("du", "-s", "-B1", overlay).split()[0]) < 4 << 20
        server.kill()
        server.start()
        with connected(server) as again:
            assert again.pread(BLOCK, 7 << 40) == bytes(BLOCK)


def test_the_debug_log_has_tracebacks_and_others_have_none(tmp_path: Path, url: str) -> None:
    object_file(url, chunk_ids(url)[3]).unlink()
    for level, expected in (("debug", True), ("warning", False)):
        with serve(tmp_path, url, log=level) as server, connected(server) as handle:
            assert errno_of(handle.pread, 100, 3 * CHUNK) == errno.EIO
            assert ("Traceback" in server.said()) == expected
            assert "is missing" in server.said()

"""A store that is away, slow, or answers with errors, under a real server and real clients.

What is here goes on. What only the store has waits up to the stated limit, then it is EIO. When the
store is back all is well again within 30 s, by itself; and a volume can be left within 60 s,
whatever the store does. The usual run has a limit of 2 s and outages of 3 s; --long has the real
ones: 60 s, and 10 minutes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from horcrux_nbd import host
from horcrux_nbd.chunkstore import open_store
from horcrux_nbd.generate import generate
from horcrux_nbd.names import Version
from horcrux_nbd.source import open_source
from horcrux_nbd.units import KiB

from ..attach.conftest import needs_fuse, needs_root
from ..servers.answering import Answering, answering
from ..servers.moto_s3 import S3Server
from ..servers.nbdkit import MISSING, Nbdkit, available, libnbd
from ..servers.proxy import Network, proxy
from ..servers.sshd import Sshd
from ..volume.support import CHUNK, IMAGE, BytesSource, noise

pytestmark = pytest.mark.skipif(not available(), reason=MISSING)

PROJECT = Path(__file__).resolve().parents[2]
CHUNKS = 40
SIZE = CHUNKS * CHUNK
CONTENT = noise(SIZE, "image")
RECOVERY = 30.0  # seconds, promised
LEAVE = 60.0  # seconds, promised
HERE = 2.0  # seconds for what is on this host: milliseconds, and a machine that is busy


@dataclass
class Store:
    """A repository somewhere, and what can be done to the way there."""

    url: str
    network: Network
    http: Answering | None = None


@contextlib.contextmanager
def store_of(kind: str, folder: Path, request: pytest.FixtureRequest) -> Iterator[Store]:
    with contextlib.ExitStack() as stack:
        if kind == "scp":
            server: Sshd = request.getfixturevalue("ssh")
            network = stack.enter_context(proxy(server.port))
            server.trust(network.port)
            store = Store(server.url(folder / "store", network.port), network)
        else:
            s3: S3Server = request.getfixturevalue("s3")
            http = stack.enter_context(answering(s3.port))
            network = stack.enter_context(proxy(http.port))
            store = Store(s3.url(s3.make_bucket(), "x", network.port), network, http)
        yield store


@contextlib.contextmanager
def away(store: Store, how: str) -> Iterator[None]:
    """The store is away for the length of a block."""
    if how == "dead peer":
        store.network.stall()
    elif how == "refuses":
        store.network.refuse()
    else:
        assert store.http is not None
        store.http.status = int(how)
    yield
    if how == "dead peer":
        store.network.resume()
    elif how == "refuses":
        store.network.accept()
    else:
        assert store.http is not None
        store.http.status = 0


_more = pytest.mark.long
OUTAGES = [
    ("scp", "dead peer"),
    ("s3", "refuses"),
    ("s3", "403"),
    ("s3", "503"),
    pytest.param("scp", "refuses", marks=_more),
    pytest.param("s3", "dead peer", marks=_more),
    pytest.param("s3", "404", marks=_more),
    pytest.param("s3", "429", marks=_more),
    pytest.param("s3", "500", marks=_more),
]
AT_ONCE = {"403", "404"}  # the store has answered: waiting would not help


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and the result or the errno that a request failed with."""
    nbd = libnbd()
    assert nbd is not None
    began = time.monotonic()
    try:
        result = call()
    except nbd.Error as error:
        result = error.errnum
    return time.monotonic() - began, result


@contextlib.contextmanager
def served(store: Store, folder: Path, limit: float, chunk_size: int = CHUNK) -> Iterator[Nbdkit]:
    with open_store(store.url, create=True) as opened, BytesSource(SIZE, {0: CONTENT}) as source:
        generate(source, opened, IMAGE, chunk_size=chunk_size, author="test", message="outage")
    with Nbdkit(
        repo=store.url, name=IMAGE, overlay=folder / "v", cache=folder / "cache", timeout=limit,
        log="error", options=("--threads", "16"),
    ) as server:  # fmt: skip
        yield server


def outage(store: Store, how: str, folder: Path, limit: float, length: float) -> dict[str, float]:
    """One outage of `length` seconds; what was measured, in seconds."""
    told: dict[str, float] = {}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(served(store, folder, limit))
        handles = [server.connect() for _ in range(5)]  # a handle does one thing at a time
        mine, *others = handles
        pool = stack.enter_context(ThreadPoolExecutor(8))
        assert mine.pread(CHUNK, 0) == CONTENT[:CHUNK]
        began = time.monotonic()
        waits: list[Future[tuple[float, Any]]] = []
        with away(store, how):
            # Chunks far from each other, and two readers of one.
            for reader, chunk in zip(others, (10, 20, 20, 30), strict=True):
                waits.append(pool.submit(timed, partial(reader.pread, 4096, chunk * CHUNK)))
            slowest = 0.0
            turn = 0
            while time.monotonic() - began < length:
                turn += 1
                piece = noise(8192, turn)
                for call in (
                    partial(mine.pread, CHUNK, 0),
                    partial(mine.pwrite, piece, 2 * CHUNK),
                    mine.flush,
                    partial(mine.pread, 8192, 2 * CHUNK),
                ):
                    seconds, result = timed(call)
                    slowest = max(slowest, seconds)
                    assert not isinstance(result, int) or result == 0, errno.errorcode[result]
                assert result == piece
                if all(wait.done() for wait in waits) and length - limit > 3:
                    # New ones wait anew, as long as it takes.
                    chunk = 11 + turn % 8
                    ask = partial(others[1].pread, 4096, chunk * CHUNK)
                    waits.append(pool.submit(timed, ask))
                time.sleep(0.02)  # paces the load; nothing is waited for
            told["here, slowest"] = slowest
            assert slowest < HERE
            seconds_of = []
            for wait in waits:
                if time.monotonic() - began < limit * 1.5 or wait.done() or how in AT_ONCE:
                    seconds, result = wait.result(limit * 1.3 + 10)
                    assert result == errno.EIO, result
                    seconds_of.append(seconds)
                    if how in AT_ONCE:
                        assert seconds < HERE
                    else:
                        assert 0.2 * limit < seconds < 1.25 * limit + 2.5, seconds
            assert seconds_of
            told["EIO after, at most"] = max(seconds_of)
        back = time.monotonic()
        while (result := timed(lambda: mine.pread(4096, 35 * CHUNK))[1]) == errno.EIO:
            assert time.monotonic() - back < RECOVERY
        assert result == CONTENT[35 * CHUNK : 35 * CHUNK + 4096]
        told["back after"] = time.monotonic() - back
        for wait in waits:
            wait.result(limit * 2)
        for chunk in (10, 20, 30, 38):
            assert mine.pread(CHUNK, chunk * CHUNK) == CONTENT[chunk * CHUNK : (chunk + 1) * CHUNK]
        # And once more, to leave while it is away and somebody waits for it.
        last = noise(CHUNK, "last")
        with away(store, how):
            mine.pwrite(last, 3 * CHUNK)
            waiting = pool.submit(_read_and_leave, others[0], 5 * CHUNK)
            for handle in (mine, *others[1:]):
                handle.shutdown()
            began = time.monotonic()
            server.stop(LEAVE)
            told["left in"] = time.monotonic() - began
            waiting.result(10)
        server.start()
        again = server.connect()
        assert again.pread(CHUNK, 3 * CHUNK) == last
        again.shutdown()
    return told


def _read_and_leave(handle: Any, offset: int) -> None:
    timed(partial(handle.pread, 4096, offset))
    nbd = libnbd()
    assert nbd is not None
    with contextlib.suppress(nbd.Error):
        handle.shutdown()


def show(what: str, told: dict[str, float]) -> None:
    print(what, ", ".join(f"{name} {seconds:.2f} s" for name, seconds in told.items()))


@pytest.mark.parametrize(("kind", "how"), OUTAGES)
def test_away(kind: str, how: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    with store_of(kind, tmp_path, request) as store:
        show(f"{kind} {how}:", outage(store, how, tmp_path, 2, 1 if how in AT_ONCE else 3))


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("kind", "how"), [("scp", "dead peer"), ("s3", "refuses"), ("s3", "503")])
def test_away_for_ten_minutes(
    kind: str, how: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    with store_of(kind, tmp_path, request) as store:
        show(f"{kind} {how}, 10 minutes:", outage(store, how, tmp_path, 60, 600))


@pytest.mark.parametrize("kind", ["scp", "s3"])
def test_back_in_time_nobody_notices(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Away for less than the limit: readers get their bytes, only later."""
    with store_of(kind, tmp_path, request) as store, served(store, tmp_path, 20) as server:
        handle = server.connect()
        for how in ("refuses", "dead peer"):
            back = threading.Timer(1.0, _come_back(store, how))
            with contextlib.ExitStack() as stack:
                stack.enter_context(away(store, how))
                back.start()
                chunk = 10 if how == "refuses" else 20
                seconds, result = timed(lambda chunk=chunk: handle.pread(4096, chunk * CHUNK))
                back.join()
            assert result == CONTENT[chunk * CHUNK : chunk * CHUNK + 4096]
            assert seconds < 20
        handle.shutdown()


def _come_back(store: Store, how: str) -> Callable[[], None]:
    return store.network.accept if how == "refuses" else store.network.resume


@pytest.mark.parametrize("kind", ["scp", "s3"])
def test_cut_in_the_middle_of_each_object(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Not one wrong byte, and no error, as long as it comes through in the end."""
    with store_of(kind, tmp_path, request) as store, served(store, tmp_path, 20) as server:
        handle = server.connect()
        for chunk in range(0, CHUNKS, 2):
            store.network.cut_after(1000 + chunk * 1500)
            got = handle.pread(CHUNK, chunk * CHUNK)
            assert got == CONTENT[chunk * CHUNK : (chunk + 1) * CHUNK]
        store.network.cut_after(None)
        handle.shutdown()


@pytest.mark.parametrize("kind", ["scp", "s3"])
def test_slow(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Bytes that do arrive are no outage, however few: an object takes longer than the limit."""
    large = 512 * KiB
    with (
        store_of(kind, tmp_path, request) as store,
        served(store, tmp_path, 2, large) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        handle, other = server.connect(), server.connect()
        assert handle.pread(4096, 0) == CONTENT[:4096]
        store.network.rate = 150_000
        slow = pool.submit(timed, lambda: handle.pread(4096, 3 * large))
        seconds, result = timed(lambda: other.pread(4096, 0))
        assert result == CONTENT[:4096]
        assert seconds < HERE
        seconds, result = slow.result(60)
        store.network.rate = 1e9
        assert result == CONTENT[3 * large : 3 * large + 4096], result
        assert seconds > 2
        for one in (handle, other):
            one.shutdown()


@needs_root
def test_a_folder_on_a_mount_that_hangs(tmp_path: Path) -> None:
    """As on a dead NFS server: system calls there sleep for ever, and the volume does not."""
    mounted = tmp_path / "mnt"
    mounted.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.torture.forgetful", mounted],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=PROJECT,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "mounted\n"
        url = f"cp://{mounted}/store"
        with open_store(url, create=True) as opened, BytesSource(SIZE, {0: CONTENT}) as source:
            generate(source, opened, IMAGE, chunk_size=CHUNK, author="test", message="far")
        with Nbdkit(
            repo=url, name=IMAGE, overlay=tmp_path / "v", cache=tmp_path / "c", timeout=2,
            log="error",
        ) as server:  # fmt: skip
            handle, other = server.connect(), server.connect()
            assert handle.pread(CHUNK, 0) == CONTENT[:CHUNK]
            with ThreadPoolExecutor(1) as pool:
                process.send_signal(signal.SIGSTOP)
                waiting = pool.submit(timed, partial(handle.pread, 4096, 20 * CHUNK))
                seconds, result = timed(partial(other.pread, 4096, 0))
                assert result == CONTENT[:4096]
                assert seconds < HERE
                other.pwrite(CONTENT[:4096], 8192)
                other.flush()
                seconds, result = waiting.result(30)
                print(f"EIO after {seconds:.1f} s")
                assert result == errno.EIO
                assert seconds < 2 * 1.25 + 2.5
                process.send_signal(signal.SIGCONT)
                assert handle.pread(CHUNK, 20 * CHUNK) == CONTENT[20 * CHUNK : 21 * CHUNK]
                process.send_signal(signal.SIGSTOP)
                other.pwrite(b"last", 9000)
                waiting = pool.submit(_read_and_leave, handle, 30 * CHUNK)
                other.shutdown()
                began = time.monotonic()
                server.stop(LEAVE)
                print(f"left in {time.monotonic() - began:.1f} s")
                waiting.result(10)
                process.send_signal(signal.SIGCONT)
            server.start()
            again = server.connect()
            assert again.pread(4, 9000) == b"last"
            again.shutdown()
    finally:
        process.send_signal(signal.SIGCONT)
        process.communicate(input="", timeout=30)


@needs_fuse
def test_unmount_while_the_store_is_away(
    tmp_path: Path, request: pytest.FixtureRequest, horcrux_host: Path
) -> None:
    """A mounted file system: what is here is read and written, and it is unmounted in 60 s."""
    files = tmp_path / "files"
    files.mkdir()
    for number in range(8):
        (files / f"file{number}").write_bytes(noise(1 << 20, number))
    target = tmp_path / "mnt"
    target.mkdir()
    with store_of("scp", tmp_path, request) as store:
        with open_store(store.url, create=True) as opened, open_source(files) as source:
            generate(source, opened, IMAGE, chunk_size=CHUNK, author="test", message="files")
        host.create("v", store.url, Version(IMAGE))
        host.mount("v", target, options={"timeout": "5"})
        try:
            (target / "file0").read_bytes()
            (target / "made").write_bytes(noise(1 << 20, "before"))
            os.sync()
            with away(store, "dead peer"):
                (target / "made").write_bytes(noise(1 << 20, "during"))
                reader = subprocess.Popen(
                    ["cat", target / "file5"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
                )
                assert (target / "file0").read_bytes() == noise(1 << 20, 0)
                assert reader.wait(30) != 0  # EIO, and no process that hangs for ever
                began = time.monotonic()
                host.umount("v")
                print(f"unmounted in {time.monotonic() - began:.1f} s")
                assert time.monotonic() - began < LEAVE
            host.mount("v", target)
            for number in range(8):
                assert (target / f"file{number}").read_bytes() == noise(1 << 20, number)
            assert (target / "made").read_bytes() == noise(1 << 20, "during")
        finally:
            store.network.resume()
            with contextlib.suppress(Exception):
                host.umount("v", force=True)

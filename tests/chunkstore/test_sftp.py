"""What is special about SFTP: round trips, a bad network, other servers, full disks."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from horcrux_nbd.chunkstore import ChunkStore, Stat, open_store, parse_store_url, sftp_wire
from horcrux_nbd.chunkstore import ssh as ssh_module
from horcrux_nbd.chunkstore.sftp import SftpStore
from horcrux_nbd.errors import (
    KeyExists,
    StoreError,
    StoreFull,
    StoreMissing,
    StoreRefused,
    StoreUnavailable,
)

from ..servers.other_sftp import other_sftp
from ..servers.proxy import Network, proxy
from ..servers.sshd import Sshd, find_sftp_server, sshd

KiB, MiB = 1 << 10, 1 << 20


@pytest.fixture
def network(ssh: Sshd) -> Iterator[Network]:
    with proxy(ssh.port) as network:
        ssh.trust(network.port)
        yield network


@pytest.fixture
def store(ssh: Sshd, network: Network, tmp_path: Path) -> Iterator[ChunkStore]:
    with open_store(ssh.url(tmp_path / "store", network.port), create=True, limit=8) as store:
        yield store


@pytest.fixture
def impatient(ssh: Sshd, network: Network, tmp_path: Path) -> Iterator[ChunkStore]:
    """A store that gives up after 4 seconds."""
    with open_store(ssh.url(tmp_path / "store", network.port), create=True, limit=4) as store:
        yield store


def round_trips(network: Network, operation: object, rtt: float = 0.1) -> float:
    network.delay = rtt / 2
    began = time.monotonic()
    operation()  # type: ignore[operator]
    took = time.monotonic() - began
    network.delay = 0
    return took / rtt


def test_round_trips(store: ChunkStore, network: Network) -> None:
    store.put("a/b", b"x" * 500 * KiB)
    store.get("a/b")  # teaches how large objects are
    for limit, operation in (
        (2, lambda: store.get("a/b")),
        (2, lambda: store.get("a/b", 1000, 5000)),
        (3, lambda: store.put("a/b", b"x" * 500 * KiB)),
        (3, lambda: store.put_exclusive(f"a/{secrets.token_hex(8)}", b"x")),
        (1, lambda: store.stat("a/b")),
        (1, lambda: store.delete("a/c")),
        (2, lambda: store.children("a/")),
    ):
        # The best of some, as the machine may be busy and a sync takes its time.
        assert any(round_trips(network, operation) < limit + 0.9 for _ in range(5))


def test_listing_many_folders_takes_few_round_trips(
    store: ChunkStore, network: Network, tmp_path: Path
) -> None:
    for i in range(60):
        (tmp_path / f"store/objects/{i:02x}").mkdir(parents=True)
        (tmp_path / f"store/objects/{i:02x}/x").write_bytes(b"")

    def listing() -> list[Stat]:
        return list(store.list("objects/"))

    assert len(listing()) == 60
    # 2 for `objects`, and 2 for each 32 below it.
    assert any(round_trips(network, listing) < 8 for _ in range(3))


def test_a_cut_connection_is_made_again(store: ChunkStore, network: Network) -> None:
    store.put("a", b"1")
    for _ in range(3):
        network.cut()
        assert store.get("a") == b"1"


def test_a_connection_cut_in_the_middle_of_an_object(store: ChunkStore, network: Network) -> None:
    data = os.urandom(3 * MiB)
    store.put("a", data)
    accepted = network.accepted
    for count in (100, 100 * KiB, 2 * MiB):
        network.cut()
        network.cut_after(count)
        assert store.get("a") == data
    assert network.accepted >= accepted + 5


def test_a_put_that_is_cut_leaves_the_old_object(
    store: ChunkStore, network: Network, tmp_path: Path
) -> None:
    old, new = os.urandom(MiB), os.urandom(MiB)
    store.put("a", old)
    raw = store.store  # type: ignore[attr-defined]
    network.rate = 2e6
    cutter = threading.Timer(0.2, network.cut)
    cutter.start()
    with pytest.raises(StoreUnavailable):
        raw.put("a", new)
    cutter.join()
    network.rate = 0
    assert (tmp_path / "store/a").read_bytes() == old
    store.put("a", new)
    assert store.get("a") == new
    assert [stat.key for stat in store.list()] == ["a"]


def test_a_dead_peer(impatient: ChunkStore, network: Network) -> None:
    """It answers nothing and closes nothing: the worst that a network does."""
    impatient.put("a", b"1")
    network.stall()
    began = time.monotonic()
    with pytest.raises(StoreUnavailable, match=r"no answer|no SSH connection"):
        impatient.get("a")
    assert 0.9 < time.monotonic() - began < 8  # a busy machine is given time
    network.resume()
    assert impatient.get("a") == b"1"


def test_a_dead_peer_and_many_readers(impatient: ChunkStore, network: Network) -> None:
    """More of them than places: their limits do not add up."""
    impatient.put("a", b"1")
    network.stall()

    def wait(_: int) -> float:
        began = time.monotonic()
        with pytest.raises(StoreUnavailable):
            impatient.get("a")
        return time.monotonic() - began

    with ThreadPoolExecutor(40) as threads:
        assert max(threads.map(wait, range(40))) < 6.5  # limit=4, and some for a busy machine
    network.resume()
    assert impatient.get("a") == b"1"


def test_a_dead_peer_while_writing(impatient: ChunkStore, network: Network) -> None:
    """What waits to be sent fills every buffer, so it is the write that must end."""
    network.stall()
    began = time.monotonic()
    with pytest.raises(StoreUnavailable):
        impatient.put("a", bytes(32 * MiB))
    assert time.monotonic() - began < 12
    network.resume()
    impatient.put("a", b"1")


def test_readers_that_wait_go_on_when_the_server_is_back(
    store: ChunkStore, network: Network
) -> None:
    store.put("a", b"1")
    network.refuse()
    with ThreadPoolExecutor(8) as threads:
        futures = [threads.submit(store.get, "a") for _ in range(8)]
        accepted = network.accepted
        while network.accepted < accepted + 3:
            time.sleep(0.01)
        network.accept()
        assert [future.result(20) for future in futures] == [b"1"] * 8


def test_sessions_are_used_again_and_shared(ssh: Sshd, network: Network, tmp_path: Path) -> None:
    with open_store(ssh.url(tmp_path / "s", network.port), create=True, concurrency=16) as store:
        store.put("a", b"x" * 100 * KiB)
        for _ in range(20):
            store.get("a")
        assert network.accepted == 1
        with ThreadPoolExecutor(32) as threads:
            assert all(threads.map(lambda _: store.get("a"), range(200)))
        assert network.accepted == 2  # 16 sessions, 8 on each connection


def test_another_server_in_its_place_is_refused(
    ssh: Sshd, store: ChunkStore, network: Network, tmp_path: Path
) -> None:
    """Each new connection checks the host key, not only the first one."""
    store.put("a", b"1")
    with sshd(tmp_path / "other") as other:
        network.target = other.port
        network.cut()
        with pytest.raises(StoreRefused, match="has changed"):
            store.get("a")
        network.target = ssh.port
        assert store.get("a") == b"1"


@pytest.mark.parametrize(
    "missing", ["fsync@openssh.com", "posix-rename@openssh.com", "hardlink@openssh.com"]
)
def test_a_server_without_an_extension(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    """sftp-server's -P takes a request away, as other servers never had it."""
    name = missing.partition("@")[0]
    with sshd(tmp_path / "sshd", sftp=f"internal-sftp -P {name}") as server:
        monkeypatch.setenv("HORCRUX_SSH_CONFIG", str(server.config))
        with open_store(server.url(tmp_path / "s"), create=True) as store:
            store.put("a/b", b"1")
            assert store.get("a/b") == b"1"
            store.put_exclusive("a/c", b"2")
            with pytest.raises(KeyExists):
                store.put_exclusive("a/c", b"3")
            if name == "posix-rename":
                store.put("a/b", b"1")
                with pytest.raises(StoreError, match="no way to replace it"):
                    store.put("a/b", b"2")
                assert store.get("a/b") == b"1"
                assert [stat.key for stat in store.list()] == ["a/b", "a/c"]


def test_no_sftp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with sshd(tmp_path / "sshd", sftp="/bin/false") as server:
        monkeypatch.setenv("HORCRUX_SSH_CONFIG", str(server.config))
        with pytest.raises(StoreError) as caught:
            open_store(server.url(tmp_path), limit=20)
        assert "the server closed the connection" in str(caught.value)


def test_a_shell_that_greets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with sshd(tmp_path / "sshd", sftp="/bin/echo Welcome to this server") as server:
        monkeypatch.setenv("HORCRUX_SSH_CONFIG", str(server.config))
        with pytest.raises(StoreError, match="does its shell print something") as caught:
            open_store(server.url(tmp_path), limit=20)
        assert "\n" not in str(caught.value)


def test_few_sessions_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with sshd(tmp_path / "sshd", extra="MaxSessions 2") as server:
        monkeypatch.setenv("HORCRUX_SSH_CONFIG", str(server.config))
        with open_store(server.url(tmp_path / "s"), create=True, concurrency=8) as store:
            with ThreadPoolExecutor(8) as threads:
                list(threads.map(lambda i: store.put(f"a/{i}", b"1"), range(40)))
            assert len(list(store.list())) == 40
            (line,) = store.store._pool._lines  # type: ignore[attr-defined]
            assert line.most == 2  # found out once, not with each put


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small tmpfs")
def test_a_full_disk(ssh: Sshd, tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder], check=True)
    try:
        with open_store(ssh.url(folder)) as store:
            store.put("a", b"1" * 100 * KiB)
            with pytest.raises(StoreFull, match="no space left for b"):
                store.put("b", bytes(2 * MiB))
            assert store.get("a") == b"1" * 100 * KiB
            assert os.listdir(folder) == ["a"]  # what was half written is gone
            store.put("c", b"1")
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_permission_denied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Root may do everything, so the server itself is told to write nothing.
    with sshd(tmp_path / "sshd", sftp="internal-sftp -R") as server:
        monkeypatch.setenv("HORCRUX_SSH_CONFIG", str(server.config))
        (tmp_path / "s").mkdir()
        with open_store(server.url(tmp_path / "s")) as store:
            with pytest.raises(StoreRefused, match="permission denied: check owner and mode"):
                store.put("a", b"1")


def test_an_object_in_the_way(store: ChunkStore) -> None:
    store.put("a", b"1")
    with pytest.raises(StoreError, match="cannot store a/b"):
        store.put("a/b", b"2")
    store.put("c/d", b"1")
    with pytest.raises(StoreError, match="cannot store c"):
        store.put("c", b"2")


def test_symlinks_are_followed(store: ChunkStore, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "store/objects").symlink_to(tmp_path / "other")
    (tmp_path / "store/nowhere").symlink_to(tmp_path / "nothing")
    store.put("objects/a", b"1")
    assert store.get("objects/a") == b"1"
    assert [stat.key for stat in store.list()] == ["objects/a"]
    assert store.children("") == ["objects"]


def test_a_folder_that_went_away(store: ChunkStore, tmp_path: Path) -> None:
    store.put("a/b", b"1")
    (tmp_path / "store").rename(tmp_path / "elsewhere")
    for operation in (
        lambda: store.get("a/b"),
        lambda: store.stat("a/b"),
        lambda: store.put("a/b", b"1"),
        lambda: store.delete("a/b"),
        lambda: store.children("a/"),
    ):
        with pytest.raises(StoreMissing, match="has no folder"):
            operation()


@pytest.mark.skipif(not find_sftp_server(), reason="needs sftp-server (openssh-sftp-server)")
def test_a_put_is_synced_before_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's own log says in which order it did things."""
    log, root = tmp_path / "log", tmp_path / "s"
    command = f"{find_sftp_server()} -e -l DEBUG3 2>>{log}"
    with sshd(tmp_path / "sshd", sftp=command) as server:
        monkeypatch.setenv("HORCRUX_SSH_CONFIG", str(server.config))
        with open_store(server.url(root), create=True) as store:
            store.put("a", b"1")
            store.put_exclusive("b", b"1")
    found = re.findall(r'^(fsync "[^"]*"|posix-rename|rename)', log.read_text(), re.MULTILINE)
    steps = [re.sub(r"\.tmp-\w+", ".tmp", step) for step in found]
    data, folder = f'fsync "{root}/.tmp"', f'fsync "{root}"'
    assert steps[-6:] == [data, "posix-rename", folder, data, "rename", folder]


def test_a_stopped_process_does_not_hang_on_close(ssh: Sshd, tmp_path: Path) -> None:
    code = """
import sys
from horcrux_nbd.chunkstore import open_store
store = open_store(sys.argv[1], create=True)
store.put("a", b"1")
print("done", flush=True)
"""  # no close, as after an error
    process = subprocess.run(
        [sys.executable, "-c", code, ssh.url(tmp_path / "s")],
        timeout=30, capture_output=True, check=True,
    )  # fmt: skip
    assert process.stdout == b"done\n"
    assert process.stderr == b""


def test_a_stopped_server_process(ssh: Sshd, impatient: ChunkStore) -> None:
    """SIGSTOP on the server's side: the kernel still takes our bytes."""
    impatient.put("a", b"1")
    children = [
        int(pid)
        for pid in subprocess.run(
            ["pgrep", "-f", "sshd.*notty"], capture_output=True, text=True, check=False
        ).stdout.split()
    ]
    mine = [pid for pid in children if _connected_to(pid, ssh)]
    assert mine
    for pid in mine:
        os.kill(pid, signal.SIGSTOP)
    try:
        assert impatient.get("a") == b"1"  # on a new connection
    finally:
        for pid in mine:
            os.kill(pid, signal.SIGCONT)


def _connected_to(pid: int, ssh: Sshd) -> bool:
    """Whether process `pid` descends from the sshd of `ssh`."""
    for _ in range(5):
        try:
            if str(ssh.folder) in Path(f"/proc/{pid}/cmdline").read_text():
                return True
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return False
        pid = int(fields[1])
        if pid <= 1:
            return False
    return False


def test_a_session_left_in_the_middle_is_not_used_again(ssh: Sshd, tmp_path: Path) -> None:
    pool = SftpStore(parse_store_url(ssh.url(tmp_path)))._pool
    with contextlib.suppress(RuntimeError), pool.session() as first:
        first.request(sftp_wire.STAT, sftp_wire.text(b"/"))
        raise RuntimeError
    with pool.session() as second:
        assert second is not first
    with pool.session() as third:
        assert third is second
    connection = pool._free[0].connection
    assert isinstance(connection.transport.packetizer, ssh_module._BoundedPacketizer)
    assert sum(line.sessions for line in pool._lines) == 1
    pool.close()


def test_another_make_of_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No sync, no limits, no full disk told, 32 KiB at once, and reads answered in part."""
    with other_sftp(tmp_path / "server") as server:
        monkeypatch.setenv("HORCRUX_SSH_CONFIG", str(server.config))
        with open_store(server.url(tmp_path / "s"), create=True) as store:
            data = os.urandom(100_001)
            store.put("a/b", data)
            assert store.get("a/b") == data
            assert store.get("a/b", 31_000, 5_000) == data[31_000:36_000]
            store.put_exclusive("a/c", b"1")
            with pytest.raises(KeyExists):
                store.put_exclusive("a/c", b"2")
            assert store.get("a/c") == b"1"
            store.put("a/b", data)  # it cannot replace, but there is nothing to be replaced
            with pytest.raises(StoreError, match="no way to replace it"):
                store.put("a/b", data[::-1])
            assert store.get("a/b") == data
            assert [stat.key for stat in store.list()] == ["a/b", "a/c"]
            assert store.children("") == ["a"]
            store.delete("a/b")
            store.delete("a/b")
            assert not store.exists("a/b")
            with pytest.raises(StoreError):
                store.put("a", b"1")
            assert os.listdir(tmp_path / "s/a") == ["c"]


def test_nothing_is_asked_until_it_is_needed(ssh: Sshd, network: Network, tmp_path: Path) -> None:
    network.refuse()
    url = ssh.url(tmp_path, network.port)
    with open_store(url, check=False, limit=5) as store:
        assert network.accepted == 0
        network.accept()
        store.put("a", b"1")
    assert SftpStore(parse_store_url(url)).concurrency > 1

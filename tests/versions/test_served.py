"""Versions of volumes that are in use: real nbdkit, real mounts, a real database."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from horcrux_nbd import host, server, versions
from horcrux_nbd.attach.freeze import Freezer
from horcrux_nbd.chunkstore import open_store
from horcrux_nbd.errors import Busy
from horcrux_nbd.generate import generate
from horcrux_nbd.names import Version
from horcrux_nbd.source.raw import RawSource
from horcrux_nbd.versions import Changes
from horcrux_nbd.versions import session as sessions
from tests.attach.conftest import needs_fuse
from tests.servers.nbdkit import MISSING, available, libnbd
from tests.versions.support import (
    AUTHOR,
    BLOCK,
    Disk,
    clear_cache,
    run_until_killed,
    small_repository,
    version_content,
)
from tests.volume.support import IMAGE, noise

LIMIT = 30.0
POSTGRES = Path("/usr/lib/postgresql/15/bin")

needs_nbdkit = pytest.mark.skipif(not available(), reason=MISSING)


def wait_for(done: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + LIMIT
    while not done():
        assert time.monotonic() < deadline, f"{what} did not come within {LIMIT} s"
        time.sleep(0.02)


# ---- served on a socket


class Served(Disk):
    """A volume that nbdkit serves; written through NBD."""

    def serve(self) -> None:
        host.serve(self.name)
        self.connect()

    def connect(self) -> None:
        running = server.running(self.name)
        assert running is not None
        self.pid = running.pid
        self.nbd = libnbd().NBD()  # type: ignore[union-attr]
        self.nbd.connect_unix(str(running.socket))

    def stop(self) -> None:
        """nbdkit ends when nobody is connected any more."""
        self.nbd = None
        host.stop(self.name, force=True)

    def put(self, offset: int, data: bytes) -> None:
        self.nbd.pwrite(data, offset)
        self.nbd.flush()
        self.model[offset : offset + len(data)] = data

    def get(self) -> bytes:
        return bytes(self.nbd.pread(len(self.model), 0))

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        wait_for(lambda: server.running(self.name) is None, "the end of nbdkit")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    disk = Served("v", small_repository(tmp_path / "repo"))
    disk.serve()
    yield disk
    disk.stop()


@needs_nbdkit
def test_a_served_volume_is_committed_and_pushed(served: Served) -> None:
    for number in range(3):
        served.put(number * 3000, noise(5000, number))
        made = served.commit(f"number {number}")
        assert 0 < made.frozen_seconds < 5
        assert served.get() == served.model
        served.push()
        assert served.get() == served.model
        assert version_content(served.url) == served.model
    served.stop()
    served.check()


@needs_nbdkit
def test_the_room_of_committed_layers_comes_back(served: Served) -> None:
    for number in range(5):
        served.put(0, noise(BLOCK, number))
        served.commit()
    assert served.get() == served.model
    descriptors = Path(f"/proc/{served.pid}/fd")

    def deleted() -> list[str]:
        targets = []
        for name in os.listdir(descriptors):
            with contextlib.suppress(FileNotFoundError):
                targets.append(os.readlink(descriptors / name))
        return [one for one in targets if "overlay" in one and "(deleted)" in one]

    wait_for(lambda: not deleted(), "the closing of the data files of committed layers")
    overlay = served.folder / "overlay"
    # The one that is written, and nothing of those that went into commits.
    assert [path.name for path in overlay.iterdir()] == [f"{served.state.layers[0].number:06d}"]


@needs_nbdkit
def test_the_index_comes_by_itself_so_that_a_commit_needs_no_store(tmp_path: Path) -> None:
    disk = Served("v", small_repository(tmp_path / "repo"))
    clear_cache()
    disk.serve()
    try:
        nodes = host.paths.cache() / "meta"
        wait_for(lambda: [p for p in nodes.rglob("*") if p.is_file()], "the index")
        (tmp_path / "repo").rename(tmp_path / "away")
        disk.put(0, noise(BLOCK, 1))
        disk.commit("offline")
        assert bytes(disk.nbd.pread(BLOCK, 0)) == disk.model[:BLOCK]
        disk.put(0, noise(BLOCK, 2))
        disk.commit("offline again")
        (tmp_path / "away").rename(tmp_path / "repo")
        assert disk.push().commits == 2
        assert disk.get() == disk.model
    finally:
        disk.stop()


@needs_nbdkit
@pytest.mark.parametrize("step", ["prepare", "freeze", "seal", "abandon"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_the_server_is_killed_in_mid_commit(
    served: Served, step: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """State before or after, and the next command goes on."""
    served.put(5000, noise(5000, 1))
    before = served.state.base
    original = getattr(sessions._Served, step)

    def killing(self: object, *arguments: object) -> None:
        if when == "before":
            served.kill()
        original(self, *arguments)
        served.kill()

    with monkeypatch.context() as patch:
        patch.setattr(sessions._Served, step, killing)
        if step == "abandon":  # reached only by a commit that fails
            patch.setattr(sys.modules["horcrux_nbd.versions.commit"], "write_index", _fail)
        if (step, when) == ("seal", "after"):
            served.commit("killed")  # the end of the server after the last step is no failure
        else:
            with pytest.raises((versions.ServerGone, Busy)):
                served.commit("killed")
    began = served.state.pending is not None or served.state.base != before
    served.serve()
    assert served.get() == served.model
    served.put(20000, noise(BLOCK, 2))
    served.commit("the next")
    assert served.get() == served.model
    with sessions.Session("v") as session:
        messages = [made.message for _, made in session.own_commits()]
    assert messages == (["the next", "killed"] if began else ["the next"])
    served.push()
    assert version_content(served.url) == served.model


def _fail(*_: object) -> None:
    raise Busy("no")


@needs_nbdkit
def test_a_volume_that_is_served_does_not_move(served: Served) -> None:
    served.put(0, b"x")
    served.commit()
    for move in (
        lambda: versions.checkout("v", "HEAD~1"),
        lambda: versions.reset("v", "HEAD~1"),
        lambda: versions.stash("v"),
    ):
        with pytest.raises(Busy, match=f"is served by process {served.pid}"):
            move()
    assert served.get() == served.model


@needs_nbdkit
def test_a_push_keeps_nobody_from_stopping_the_server(served: Served) -> None:
    """The host's lock of a volume is free while a push takes its time."""
    served.put(0, b"x")
    served.commit()
    with sessions.Session("v"):  # what a push holds
        served.stop()
    served.serve()


# ---- mounted


@pytest.fixture
def image(tmp_path: Path) -> str:
    """A repository with an ext4 image that holds one file."""
    disk, tree = tmp_path / "disk.img", tmp_path / "tree"
    tree.mkdir()
    (tree / "hello").write_text("hello")
    with open(disk, "wb") as file:
        file.truncate(64 << 20)
    options = ["-E", "lazy_itable_init=0,lazy_journal_init=0"]
    subprocess.run(["mkfs.ext4", "-q", "-F", *options, "-d", tree, disk], check=True)
    url = f"cp://{tmp_path / 'repo'}"
    with open_store(url, create=True) as store, RawSource(str(disk)) as source:
        generate(source, store, IMAGE, author="test", message="made")
    return url


@pytest.fixture
def mounted(image: str, tmp_path: Path) -> Iterator[Path]:
    """The volume `v` on a folder."""
    host.create("v", image, Version(IMAGE))
    target = tmp_path / "mnt"
    target.mkdir()
    host.mount("v", target, via="fuse")
    yield target
    if host.mounts("v") or server.running("v"):
        host.umount("v", force=True)


def fsck(url: str, folder: Path, ref: str = "main") -> None:
    """A version is a sound file system; its journal may have to be replayed."""
    path = folder / "check.img"
    path.write_bytes(version_content(url, ref))
    replayed = subprocess.run(["e2fsck", "-fp", path], capture_output=True, text=True, check=False)
    assert replayed.returncode in (0, 1), replayed.stdout
    subprocess.run(["e2fsck", "-fn", path], check=True, capture_output=True)


@needs_fuse
def test_a_mounted_volume_is_committed_under_load(
    mounted: Path, image: str, tmp_path: Path
) -> None:
    """Every version is a sound file system with what was there before, and the load goes on."""
    stop = threading.Event()
    written = 0

    def load() -> None:
        nonlocal written
        while not stop.is_set():
            (mounted / f"file-{written % 20}").write_bytes(noise(30000, written))
            written += 1

    thread = threading.Thread(target=load)
    thread.start()
    try:
        for number in range(3):
            (mounted / f"before-{number}").write_text(str(number))
            at = written
            made = versions.commit(["v"], f"number {number}", author=AUTHOR)["v"]
            assert made.frozen_seconds < 5
            wait_for(lambda at=at: written > at, "a write after the freeze")  # type: ignore[misc]
    finally:
        stop.set()
        thread.join(LIMIT)
    versions.push("v", author=AUTHOR)
    for back in range(3):
        fsck(image, tmp_path, f"main~{back}")
        other = tmp_path / f"mnt-{back}"
        other.mkdir()
        host.create(f"w{back}", image, Version(IMAGE, f"main~{back}"))
        host.mount(f"w{back}", other, via="fuse")
        try:
            there = {path.name for path in other.glob("before-*")}
            assert there == {f"before-{number}" for number in range(3 - back)}
        finally:
            host.umount(f"w{back}")


@needs_fuse
def test_a_mounted_volume_that_nobody_wrote_to_has_no_changes(mounted: Path) -> None:
    (mounted / "one").write_text("1")
    versions.commit(["v"], "one", author=AUTHOR)
    for _ in range(2):
        with pytest.raises(versions.NothingToCommit):
            versions.commit(["v"], "nothing", author=AUTHOR)
    host.umount("v")
    versions.checkout("v", "HEAD")  # nothing to be dropped either


@needs_fuse
def test_killed_while_it_is_frozen_a_file_system_goes_on(mounted: Path) -> None:
    (mounted / "one").write_text("1")
    run_until_killed(
        "horcrux_nbd.attach.freeze:Freezer.freeze",
        1,
        "after",
        f"versions.commit(['v'], 'killed', author={AUTHOR!r})",
    )
    done = threading.Event()

    def write() -> None:
        (mounted / "two").write_text("2")
        os.sync()
        done.set()

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    assert done.wait(LIMIT), "the file system is still frozen"
    assert versions.commit(["v"], "again", author=AUTHOR)["v"].commit.message == "again"


@needs_fuse
def test_a_freezer_that_is_forgotten_thaws(mounted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody thaws: the child does, after its own limit, and says so."""
    monkeypatch.setattr("horcrux_nbd.attach.freeze.LONGEST", 1)
    with Freezer([mounted]) as freezer:
        freezer.freeze()
        (mounted / "late").write_text("waits until the child thaws")
        with pytest.raises(Exception, match="took over"):
            freezer.thaw()


@needs_fuse
def test_checkout_of_a_mounted_volume(mounted: Path) -> None:
    (mounted / "one").write_text("1")
    versions.commit(["v"], "one", author=AUTHOR)
    (mounted / "two").write_text("2")
    with pytest.raises(Busy, match=f"is mounted on {mounted}"):
        versions.checkout("v", "HEAD~1")
    with pytest.raises(versions.HasChanges):
        versions.checkout("v", "HEAD~1", remount=True)
    assert (mounted / "two").read_text() == "2"  # mounted again, as it was
    options = host.mounts("v")[0].options
    moved = versions.checkout("v", "HEAD~1", changes=Changes.STASH, remount=True)
    assert moved.stashed
    assert sorted(path.name for path in mounted.iterdir()) == ["hello", "lost+found"]
    assert host.mounts("v")[0].options == options
    with open(mounted / "hello"), pytest.raises(Busy):
        versions.checkout("v", "main", remount=True)
    versions.checkout("v", "main", remount=True)
    versions.stash_pop("v", remount=True)
    assert (mounted / "two").read_text() == "2"


@needs_fuse
def test_two_mounted_volumes_at_one_moment(mounted: Path, image: str, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    host.create("w", image, Version(IMAGE))
    host.mount("w", other, via="fuse")
    try:
        (mounted / "one").write_text("1")
        (other / "two").write_text("2")
        made = versions.commit(["v", "w"], "both", author=AUTHOR)
        assert made.keys() == {"v", "w"}
        assert made["v"].frozen_seconds == made["w"].frozen_seconds
        versions.push("v", branch="v", author=AUTHOR)
        versions.push("w", branch="w", author=AUTHOR)
        fsck(image, tmp_path, "v")
        fsck(image, tmp_path, "w")
    finally:
        host.umount("w", force=True)


# ---- a database


def run_as_postgres(*argv: object) -> str:
    done = subprocess.run(
        ["runuser", "-u", "postgres", "--", *map(str, argv)],
        cwd="/",
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that others may enter, as PostgreSQL has to; pytest's own are private."""
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="horcrux-") as name:
        os.chmod(name, 0o755)
        yield Path(name)


class Database:
    """PostgreSQL on a mounted volume."""

    def __init__(self, folder: Path, sockets: Path) -> None:
        self.folder, self.sockets = folder, sockets

    def start(self) -> None:
        options = f"-k {self.sockets} -c listen_addresses= -c shared_buffers=16MB"
        log = self.sockets / "log"
        # A version of a running database names its postmaster, whose zombie may still have the pid.
        (self.folder / "postmaster.pid").unlink(missing_ok=True)
        run_as_postgres(
            POSTGRES / "pg_ctl", "-D", self.folder, "-o", options, "-l", log, "-w", "start"
        )

    def stop(self) -> None:
        run_as_postgres(POSTGRES / "pg_ctl", "-D", self.folder, "-w", "-m", "fast", "stop")

    def ask(self, query: str) -> str:
        return run_as_postgres(POSTGRES / "psql", "-h", self.sockets, "-Atc", query, "postgres")


@pytest.mark.slow
@needs_fuse
@pytest.mark.skipif(
    not (POSTGRES / "pgbench").exists(), reason="needs PostgreSQL: apt-get install postgresql-15"
)
def test_a_database_is_committed_while_it_works(open_folder: Path) -> None:
    """Rows that were committed before the freeze are in the version, and the database is whole."""
    tmp_path = open_folder
    disk, sockets, target = tmp_path / "disk.img", tmp_path / "s", tmp_path / "mnt"
    with open(disk, "wb") as file:
        file.truncate(512 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", disk], check=True)
    url = f"cp://{tmp_path / 'repo'}"
    with open_store(url, create=True) as store, RawSource(str(disk)) as source:
        generate(source, store, IMAGE, author="test", message="empty")
    disk.unlink()
    sockets.mkdir()
    shutil.chown(sockets, "postgres")
    target.mkdir()
    host.create("v", url, Version(IMAGE))
    host.mount("v", target, via="fuse")
    database = Database(target / "data", sockets)
    load = None
    try:
        database.folder.mkdir(mode=0o700)
        shutil.chown(database.folder, "postgres")
        run_as_postgres(POSTGRES / "initdb", "-D", database.folder, "-A", "trust", "--no-sync")
        database.start()
        run_as_postgres(POSTGRES / "pgbench", "-h", sockets, "-i", "-s", "2", "-q", "postgres")
        load = subprocess.Popen(
            ["runuser", "-u", "postgres", "--", POSTGRES / "pgbench", "-h", sockets, "-c", "2",
             "-T", "60", "-n", "postgres"],
            cwd="/",
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        wait_for(
            lambda: int(database.ask("select count(*) from pgbench_history")) > 20, "some rows"
        )
        counts = []
        for number in range(2):
            counts.append(int(database.ask("select count(*) from pgbench_history")))
            versions.commit(["v"], f"number {number}", author=AUTHOR)
        assert int(database.ask("select count(*) from pgbench_history")) >= counts[-1]
        load.terminate()
        load.wait(LIMIT)
        versions.push("v", author=AUTHOR)
        database.stop()
        host.umount("v")
        for back, count in enumerate(reversed(counts)):
            versions.checkout("v", f"origin/main~{back}", changes=Changes.DISCARD)
            host.mount("v", target, via="fuse")
            database.start()
            assert int(database.ask("select count(*) from pgbench_history")) >= count
            # Every transaction whole: pgbench keeps these three sums alike.
            sums = {
                database.ask(f"select sum({column}) from {table}")
                for table, column in (
                    ("pgbench_accounts", "abalance"),
                    ("pgbench_tellers", "tbalance"),
                    ("pgbench_history", "delta"),
                )
            }
            assert len(sums) == 1
            database.stop()
            host.umount("v")
    finally:
        if load is not None and load.poll() is None:
            load.terminate()
            load.wait(LIMIT)
        if host.mounts("v"):
            if (database.folder / "postmaster.pid").exists():
                database.stop()
            host.umount("v", force=True)

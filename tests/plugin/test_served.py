"""Who is served what: versions, overlays, volumes, in the background."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from pathlib import Path

from horcrux_nbd.volume import state as states
from tests.servers.nbdkit import PLUGIN, Nbdkit, connected
from tests.volume.support import (
    CHUNK,
    IMAGE,
    make_image,
    make_volume,
    noise,
)

from .support import (
    SIZE,
    errno_of,
    nbd,
    needs_nbdkit,
    original,
    serve,
)

pytestmark = needs_nbdkit


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

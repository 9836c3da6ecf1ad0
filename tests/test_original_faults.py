"""One test for each fault of the original Horcrux that this side of the seam can have.

They were found by reading its code (docs/design.md and PEERS.md, last section). Those of mounting,
of the Docker driver and of `volume rm` have their tests there.
"""

from __future__ import annotations

import getpass
import os
import re
import shutil
import socket
import subprocess
import threading
from pathlib import Path

import pytest

from horcrux_nbd.chunkstore import open_store
from horcrux_nbd.errors import Damaged, UsageError
from horcrux_nbd.generate import generate
from horcrux_nbd.source import open_source
from horcrux_nbd.units import GiB, KiB, MiB
from horcrux_nbd.volume.volume import Volume

from .servers import nbdkit as servers
from .servers.fixtures import ssh, sshd_server  # noqa: F401 - fixtures
from .servers.nbdkit import Nbdkit, connected, traced
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
    read,
    write,
)

needs_nbdkit = pytest.mark.skipif(not servers.available(), reason=servers.MISSING)


def opened(folder: Path, cache: Path) -> Volume:
    return Volume.open(folder, cache=cache)


def test_two_volumes_at_once_keep_their_state_apart(tmp_path: Path) -> None:
    """Of the original's volumes the last one that was mounted was all of them."""
    first_url = make_image(tmp_path / "one", noise(4 * CHUNK, 1))
    second_url = make_image(tmp_path / "two", noise(7 * CHUNK, 2), image="OTHER")
    folders = [
        make_volume(tmp_path / "a", first_url),
        make_volume(tmp_path / "b", second_url, "OTHER"),
        make_volume(tmp_path / "c", first_url),
    ]
    volumes = [opened(folder, tmp_path / "cache") for folder in folders]
    seeds = [1, 2, 1]
    sizes = [4 * CHUNK, 7 * CHUNK, 4 * CHUNK]
    assert [volume.size for volume in volumes] == sizes

    def work(number: int) -> None:
        for turn in range(40):
            at = turn * 5000
            write(volumes[number], at, noise(3000, (number, turn)))
            assert read(volumes[number], at, 3000) == noise(3000, (number, turn))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for number, volume in enumerate(volumes):
        expected = bytearray(noise(sizes[number], seeds[number]))
        for turn in range(40):
            expected[turn * 5000 : turn * 5000 + 3000] = noise(3000, (number, turn))
        assert read(volume, 0, volume.size) == expected
        volume.close()
        again = opened(folders[number], tmp_path / "cache")
        assert read(again, 0, again.size) == expected
        again.close()


def test_writes_across_a_chunk_boundary(tmp_path: Path) -> None:
    """The original's corrupted both chunks."""
    image = bytearray(noise(6 * CHUNK))
    volume = opened(make_volume(tmp_path / "v", make_image(tmp_path / "r", bytes(image))), tmp_path)
    for number, (before, length) in enumerate([(1, 2), (100, 200), (5000, 9000), (10, CHUNK + 20)]):
        at = (number + 1) * CHUNK - before
        data = noise(length, number)
        write(volume, at, data)
        image[at : at + length] = data
        assert read(volume, 0, 6 * CHUNK) == image
    volume.close()


def test_reads_across_a_chunk_boundary(tmp_path: Path) -> None:
    """The original's were short."""
    image = noise(5 * CHUNK)
    volume = opened(make_volume(tmp_path / "v", make_image(tmp_path / "r", image)), tmp_path)
    for before, length in [(1, 2), (100, 200), (1, CHUNK + 2), (CHUNK, 3 * CHUNK)]:
        at = 2 * CHUNK - before
        assert read(volume, at, length) == image[at : at + length]
    volume.close()


def test_a_failed_fetch_does_not_stay_in_the_cache(tmp_path: Path) -> None:
    """The original kept it as an empty file and served that for ever."""
    image = noise(3 * CHUNK)
    url = make_image(tmp_path / "r", image)
    volume = opened(make_volume(tmp_path / "v", url), tmp_path / "cache")
    path = object_file(url, chunk_ids(url)[1])
    whole = path.read_bytes()
    for failed in (b"", whole[:100]):
        path.write_bytes(failed)
        with pytest.raises(Damaged):
            read(volume, CHUNK, 10)
        assert not list((tmp_path / "cache" / "chunks").glob("??/*"))
    path.write_bytes(whole)
    assert read(volume, CHUNK, CHUNK) == image[CHUNK : 2 * CHUNK]
    volume.close()


def serve(tmp_path: Path, url: str) -> Nbdkit:
    return Nbdkit(repo=url, name=IMAGE, overlay=tmp_path / "o", cache=tmp_path / "cache")


@needs_nbdkit
def test_the_user_of_an_scp_url_counts(tmp_path: Path, ssh: Sshd) -> None:  # noqa: F811
    """The original connected as whoever ran it."""
    make_image(tmp_path / "r", noise(3 * CHUNK))
    with serve(tmp_path, ssh.url(tmp_path / "r")) as server, connected(server) as handle:
        assert handle.pread(3 * CHUNK, 0) == noise(3 * CHUNK)
    assert f"Accepted publickey for {getpass.getuser()} " in ssh.log.read_text()
    stranger = ssh.url(tmp_path / "r").replace(f"{ssh.user}@", "stranger@")
    (said,) = serve(tmp_path / "x", stranger).refused().splitlines()
    assert "stranger" in said
    assert re.search(r"Invalid user stranger|for invalid user stranger", ssh.log.read_text())


@needs_nbdkit
def test_the_host_key_is_checked(tmp_path: Path, ssh: Sshd) -> None:  # noqa: F811
    """The original took any. One that is not known is refused, and never added."""
    make_image(tmp_path / "r", noise(CHUNK))
    known = ssh.known_hosts.read_text()
    (tmp_path / "none").touch()
    ssh.write_config(UserKnownHostsFile=tmp_path / "none")
    (said,) = serve(tmp_path, ssh.url(tmp_path / "r")).refused().splitlines()
    assert "host key" in said
    assert (tmp_path / "none").read_text() == ""
    other = tmp_path / "other"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", other], check=True)
    key = " ".join(other.with_suffix(".pub").read_text().split()[:2])
    (tmp_path / "wrong").write_text(f"[127.0.0.1]:{ssh.port} {key}\n")
    ssh.write_config(UserKnownHostsFile=tmp_path / "wrong")
    (said,) = serve(tmp_path, ssh.url(tmp_path / "r")).refused().splitlines()
    assert "host key" in said
    assert ssh.known_hosts.read_text() == known
    assert not (tmp_path / "o").exists()


@needs_nbdkit
def test_a_password_is_not_logged(tmp_path: Path) -> None:
    """The original wrote it into its log. Here a URL with one is refused without repeating it."""
    said = serve(tmp_path, "scp://user:geheim-4711@host:/x").refused()
    assert len(said.splitlines()) == 1
    assert "geheim" not in said
    assert "ssh-agent" in said


def test_generate_takes_a_directory_with_a_socket(tmp_path: Path) -> None:
    """The original died on mysql.sock."""
    if not shutil.which("mke2fs", path=f"{os.environ['PATH']}:/usr/sbin"):
        pytest.skip("needs mke2fs: apt-get install e2fsprogs")
    data = tmp_path / "d"
    data.mkdir()
    (data / "ibdata1").write_bytes(noise(100 * KiB))
    with socket.socket(socket.AF_UNIX) as sock:
        here = os.getcwd()
        os.chdir(data)  # a socket's path has 107 bytes
        try:
            sock.bind("mysql.sock")
        finally:
            os.chdir(here)
    os.mkfifo(data / "fifo")
    with open_source(data) as source, open_store(f"cp://{tmp_path}/r", create=True) as store:
        made = generate(source, store, IMAGE, chunk_size=CHUNK, author="t", message="m")
    assert made.problems == []
    assert made.commit.filesystem == "ext4"


@needs_nbdkit
def test_a_flush_reaches_the_disk(tmp_path: Path) -> None:
    """The original's fsync did nothing. Counted where it counts: in the system calls."""
    url = make_image(tmp_path / "r", noise(3 * CHUNK))
    with serve(tmp_path, url) as server, connected(server) as handle:
        handle.pwrite(noise(BLOCK), 0)
        with traced(server) as synced:
            handle.flush()
            handle.pwrite(noise(BLOCK, 1), 0)
            handle.flush()
        assert synced == ["data-000000", "map", "data-000000"]


def test_files_and_images_beyond_2_gib_keep_their_tails(tmp_path: Path) -> None:
    """Chunks of 2 GiB and more lost what was behind in the original."""
    size = 5 * GiB + 777
    edges = [2 * GiB, 4 * GiB, 64 * MiB, size - 300]
    pieces = {at - 300: noise(600, at) for at in edges}
    url = make_image(tmp_path / "r", pieces, size=size, chunk_size=8 * MiB)
    volume = opened(make_volume(tmp_path / "v", url), tmp_path / "cache")
    assert volume.size == size
    for at, data in pieces.items():
        assert read(volume, at, len(data)) == data
    write(volume, size - 5, b"tail!")
    write(volume, 2 * GiB - 2, b"edge")
    volume.flush()
    assert read(volume, size - 8, 8) == pieces[size - 600][-8:-5] + b"tail!"
    assert read(volume, 2 * GiB - 2, 4) == b"edge"
    volume.close()


def test_a_chunk_size_that_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"chunk size 2\.0 GiB cannot be"):
        make_image(tmp_path / "r", b"x", chunk_size=2 * GiB)

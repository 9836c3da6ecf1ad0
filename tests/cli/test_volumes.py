"""Volumes as a user handles them: made, mounted, written, unmounted, mounted again, removed."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from horcrux_nbd.attach.processes import Process

from ..attach.conftest import needs_fuse, needs_root
from .support import LIMIT, PROGRAM, fails, make_directory, run

KEYS = {
    "name", "repository", "image", "ref", "base", "size", "chunk_size", "read_only", "created",
    "data_bytes", "cached_bytes", "written_bytes", "zeroed_bytes", "disk_bytes", "fetched_bytes",
    "server", "attached", "mounted", "problem",
}  # fmt: skip


def status(volume: str) -> dict[str, object]:
    found: dict[str, object] = run("status", volume, "--json").json
    return found


# ---- create, status, rm


def test_create_fetches_nothing(made_repository: Path, horcrux_host: Path) -> None:
    made = run("create", "--json", "amcc", made_repository, "AMCC@main~1").json
    assert set(made) >= KEYS
    assert (made["image"], made["ref"]) == ("AMCC", "main~1")
    assert made["repository"] == f"cp://{made_repository}"
    assert made["cached_bytes"] == made["written_bytes"] == 0
    assert (made["server"], made["attached"], made["mounted"]) == (None, None, [])
    assert not list((horcrux_host / "root" / "cache").glob("chunks/*/*"))
    assert run("status", "--json").json == [made]
    text = run("status").out.splitlines()
    assert text[0].split()[:2] == ["VOLUME", "VERSION"]
    assert text[1].startswith("amcc  ")
    assert "AMCC@main~1" in run("status", "amcc").out
    run("rm", "amcc")
    assert run("status", "--json").json == []
    assert "no volume yet" in run("status").err


@pytest.mark.parametrize("name", ["../x", "a/b", ".", "-x", "x" * 101])
def test_bad_volume_names(made_repository: Path, horcrux_host: Path, name: str) -> None:
    assert "cannot name a volume" in fails(2, "create", "--", name, made_repository, "AMCC")
    assert not (horcrux_host / "root").exists()
    for command in ("rm", "attach", "detach", "serve"):
        assert "cannot name a volume" in fails(2, command, "--", name)


def test_create_twice(made_repository: Path, volume: str) -> None:
    assert "exists already" in fails(2, "create", volume, made_repository, "AMCC")


@pytest.mark.parametrize("command", ["rm", "attach", "detach", "serve", "status"])
def test_unknown_volumes(command: str, volume: str) -> None:
    assert "did you mean amcc?" in fails(3, command, "amc")


# ---- serve


@pytest.fixture
def served(volume: str) -> str:
    return run("serve", volume).out.strip()


def test_serve(volume: str, served: str) -> None:
    """The server goes on when the command is done, and other programs read it."""
    size = subprocess.run(
        ["nbdinfo", "--size", served], capture_output=True, text=True, timeout=30, check=True
    )
    assert int(size.stdout) == status(volume)["size"]
    server = status(volume)["server"]
    assert isinstance(server, dict)
    assert server["uri"] == served
    assert "served" in run("status").out
    assert "is served already" in fails(5, "serve", volume)
    assert "is served by" in fails(5, "rm", "--force", volume)
    assert "not served any more" in run("detach", volume).out
    assert "neither attached nor served" in fails(3, "detach", volume)
    assert Process.of(server["pid"]) is None


def test_the_configured_cache(volume: str, horcrux_host: Path) -> None:
    (horcrux_host / "config.toml").write_text('[cache]\nsize = "100M"\n')
    server = run("serve", "--json", volume).json
    command = Path(f"/proc/{server['pid']}/cmdline").read_bytes().split(b"\0")
    assert b"cache_size=%d" % (100 << 20) in command


def test_serve_elsewhere(volume: str, tmp_path: Path) -> None:
    socket = tmp_path / "my socket?"
    made = run("serve", "--json", "--socket", socket, volume).json
    assert made["socket"] == str(socket)
    subprocess.run(["nbdinfo", "--size", made["uri"]], timeout=30, check=True, capture_output=True)


def test_changes_outlive_servers(volume: str, served: str) -> None:
    """Written by qemu, there after the server was killed; rm refuses to lose them."""
    write = ["qemu-io", "-f", "raw", "-c", "write -P 0x5a 32M 64k", "-c", "flush", served]
    subprocess.run(write, check=True, capture_output=True, timeout=60)
    server = status(volume)["server"]
    assert isinstance(server, dict)
    os.kill(server["pid"], signal.SIGKILL)
    again = run("serve", volume).out.strip()
    read = ["qemu-io", "-f", "raw", "-c", "read -P 0x5a 32M 64k", again]
    done = subprocess.run(read, check=True, capture_output=True, text=True, timeout=60)
    assert "verification failed" not in done.stdout
    run("detach", volume)
    assert status(volume)["written_bytes"] == 64 << 10
    said = fails(5, "rm", volume)
    assert "64.0 KiB" in said
    assert "--force" in said
    assert status(volume)["written_bytes"] == 64 << 10
    run("rm", "--force", volume)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_in_the_foreground(volume: str, number: int) -> None:
    child = subprocess.Popen(
        [PROGRAM, "serve", "--foreground", volume], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdout is not None
    uri = child.stdout.readline().decode().strip()
    subprocess.run(["nbdinfo", "--size", uri], timeout=30, check=True, capture_output=True)
    child.send_signal(number)
    child.communicate(timeout=LIMIT)
    assert child.returncode == 128 + number
    assert status(volume)["server"] is None


def test_a_second_server_on_one_overlay(volume: str, served: str, horcrux_host: Path) -> None:
    """Also one that was started by hand is kept out."""
    folder = horcrux_host / "root" / "volumes" / volume
    plugin = run("plugin-path").out.strip()
    done = subprocess.run(
        ["nbdkit", "-f", "-U", "-", "python", plugin, f"volume={folder}"],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode != 0
    assert "in use by process" in done.stderr


# ---- attach and mount


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "made" / "mnt"


@needs_fuse
def test_the_session(made_repository: Path, volume: str, target: Path) -> None:
    """Mounted, written, unmounted, mounted again: what was written is there."""
    mounted = run("mount", "--json", volume, target).json
    assert mounted["mounted"] == [str(target)]
    assert mounted["attached"]["device"].startswith("/dev/")
    assert (target / "small").read_text() == "hello again\n"
    assert not (target / "lost+found").exists()
    (target / "new").write_text("written\n")
    found = status(volume)
    assert isinstance(found["fetched_bytes"], int)
    assert found["fetched_bytes"] > 0
    assert str(target) in run("status").out
    assert "is mounted" in fails(5, "rm", "--force", volume)
    assert "mounted already" in fails(5, "mount", volume, target.parent / "other")
    assert "is unmounted" in run("umount", volume).out
    assert not os.path.ismount(target)
    assert status(volume)["server"] is None
    run("mount", volume, target)
    assert (target / "new").read_text() == "written\n"
    assert "is unmounted" in run("umount", target).out
    assert "not mounted" in fails(3, "umount", volume)
    assert "no volume" in fails(3, "umount", target)


@needs_fuse
def test_as_the_original_had_it(made_repository: Path, target: Path, horcrux_host: Path) -> None:
    """`mount NAME ACCESS-URL DIR`: makes the volume, and takes it again the next time."""
    try:
        run("mount", "AMCC", f"cp://{made_repository}", target)
        (target / "new").write_text("written\n")
        run("umount", "AMCC")
        run("mount", "AMCC", f"cp://{made_repository}", target)
        assert (target / "new").read_text() == "written\n"
        run("umount", target)
        other = target.parent / "other"
        said = fails(2, "mount", "AMCC", f"cp://{horcrux_host}", other)
        assert "is of AMCC@main in" in said
    finally:
        run("umount", "--force", "AMCC", ok=False)


@needs_root
def test_a_mount_that_fails_leaves_nothing(made_repository: Path, target: Path) -> None:
    """Neither a volume that this command made, nor a server, nor a device."""
    url = f"cp://{made_repository}"
    assert "no such way" in fails(2, "mount", "--via", "magic", "AMCC", url, target)
    assert run("status", "--json").json == []
    assert "did you mean AMCC" in fails(3, "mount", "AMC", url, target)
    assert run("status", "--json").json == []
    target.parent.mkdir(exist_ok=True)
    (target.parent / "file").touch()
    assert "no folder" in fails(2, "mount", "AMCC", url, target.parent / "file")


@needs_fuse
def test_what_is_no_file_system(tmp_path: Path, target: Path) -> None:
    image = tmp_path / "raw"
    image.write_bytes(os.urandom(1 << 20))
    run("generate", "-q", "RAW", image, tmp_path / "repo")
    run("create", "raw", tmp_path / "repo", "RAW")
    assert "file system" in fails(2, "mount", "raw", target)
    assert status("raw")["server"] is None
    assert status("raw")["attached"] is None


@needs_fuse
def test_read_only(made_repository: Path, target: Path) -> None:
    run("create", "--read-only", "amcc", made_repository, "AMCC")
    try:
        assert "read-only" in run("mount", "amcc", target).out
        assert (target / "small").read_text() == "hello again\n"
        with pytest.raises(OSError, match="Read-only"):
            (target / "new").touch()
    finally:
        run("umount", "amcc")
    run("rm", "amcc")  # nothing was written


@needs_fuse
def test_busy(volume: str, target: Path) -> None:
    """Who uses it is named, and it stays mounted; --force takes it away."""
    run("mount", volume, target)
    with open(target / "small"):
        said = fails(5, "umount", volume)
        assert str(os.getpid()) in said
        assert "is in use" in said
        assert os.path.ismount(target)
        assert "mounted" in fails(5, "detach", volume)
        run("umount", "--force", volume)
    assert not os.path.ismount(target)


@needs_fuse
def test_attach(volume: str, target: Path) -> None:
    device = run("attach", volume).out.strip()
    assert os.path.exists(device)
    with open(device, "rb") as file:
        assert file.read(1080)[1080 - 56 + 32 : 1080 - 56 + 34] is not None
    assert "attached already" in fails(5, "attach", volume)
    assert "is attached as" in fails(5, "rm", volume)
    assert device in run("status").out
    assert "is detached" in run("detach", volume).out


@needs_fuse
def test_a_server_that_died(volume: str, target: Path) -> None:
    """Status says so, umount --force cleans up, and what was flushed is there."""
    run("mount", volume, target)
    (target / "new").write_text("written\n")
    os.sync()
    server = status(volume)["server"]
    assert isinstance(server, dict)
    os.kill(server["pid"], signal.SIGKILL)
    assert status(volume)["problem"]
    run("umount", "--force", volume)
    run("mount", volume, target)
    assert (target / "new").read_text() == "written\n"
    run("umount", volume)


def test_configured_way(volume: str, horcrux_host: Path, target: Path) -> None:
    (horcrux_host / "config.toml").write_text('[attach]\nvia = "ublk"\n')
    if os.geteuid() != 0:
        assert "root" in fails(9, "mount", volume, target)
    elif not os.path.exists("/dev/ublk-control"):
        assert "ublk" in fails(9, "mount", volume, target)


# ---- a damaged or absent store


@pytest.fixture
def damaged(repository: Path) -> Iterator[Path]:
    """A repository whose largest chunk is altered, and a volume `hurt` of it."""
    run("create", "hurt", repository, "AMCC")
    path = max((repository / "objects").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    yield path
    run("umount", "--force", "hurt", ok=False)


@needs_fuse
def test_damage_is_never_served(damaged: Path, target: Path) -> None:
    """The file reads as an error, the rest of the volume is readable, the log names the object."""
    run("mount", "hurt", target)
    with pytest.raises(OSError, match="Input/output error"):
        (target / "sub" / "large").read_bytes()
    assert (target / "small").read_text() == "hello again\n"
    log = Path(os.environ["HORCRUX_RUN"], "hurt", "nbdkit.log").read_text()
    assert damaged.name in log
    run("umount", "hurt")


def test_an_overlay_of_another_image(made_repository: Path, volume: str, tmp_path: Path) -> None:
    """The bare nbdkit command line refuses to lay it over something else."""
    run("generate", "-q", "OTHER", make_directory(tmp_path / "in"), tmp_path / "repo")
    folder = Path(os.environ["HORCRUX_ROOT"], "volumes", volume)
    plugin = run("plugin-path").out.strip()
    words = [f"repo={tmp_path / 'repo'}", "name=OTHER", f"overlay={folder}"]
    done = subprocess.run(
        ["nbdkit", "-f", "-U", "-", "python", plugin, *words],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode != 0
    assert "belongs to AMCC@main" in done.stderr

"""Volumes in use, told by their files, against what the kernel shows of them."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from horcrux_nbd import host, paths, versions
from horcrux_nbd.cli.files import open_place
from horcrux_nbd.contents import changed_files, files_of, open_volume, steadily
from horcrux_nbd.errors import HorcruxError
from horcrux_nbd.units import KiB, MiB
from tests.cli.support import run
from tests.filesystem.support import Seen, check_changes, needs_root, read, seen
from tests.filesystem.trees import make_tree

pytestmark = [
    needs_root,
    pytest.mark.skipif(not Path("/dev/fuse").exists(), reason="needs /dev/fuse, to mount a volume"),
    pytest.mark.skipif(
        not shutil.which("nbdfuse"), reason="needs nbdfuse: apt-get install nbdfuse"
    ),
]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("contents")
    source = folder / "source"
    source.mkdir()
    make_tree(source)
    (source / "large").write_bytes(os.urandom(8 * MiB))
    (source / "time-3").unlink()  # of a year that the host's /tmp may not hold
    env = {"HORCRUX_ROOT": str(folder / "root"), "HORCRUX_RUN": str(folder / "run")}
    run("generate", "-q", "-s", "128K", "--free", "40M", "IMG", source, folder / "repo", env=env)
    return folder / "repo"


@pytest.fixture
def root(repository: Path, tmp_path: Path) -> Iterator[Path]:
    """A mounted volume `v`."""
    from horcrux_nbd.names import Version

    (tmp_path / "mnt").mkdir()
    host.create("v", f"cp://{repository}", Version("IMG"))
    host.mount("v", tmp_path / "mnt")
    yield tmp_path / "mnt"
    with contextlib.suppress(HorcruxError):  # the test did it
        host.umount("v", force=True)
    host.remove("v", force=True)


def changes(old: str | None, new: str | None) -> list[object]:
    with sides(old) as a, sides(new) as b:
        return changed_files(a, b)  # type: ignore[return-value]


def sides(ref: str | None):  # type: ignore[no-untyped-def]
    return open_volume("v") if ref is None else open_place("v", ref)


def work(root: Path, seed: int) -> None:
    (root / f"new-{seed}").write_bytes(b"n" * 9000)
    (root / f"many/name-{seed}").unlink()
    (root / f"many/name-{seed + 50}").rename(root / f"renamed-{seed}")
    with open(root / "large", "r+b") as file:
        os.pwrite(file.fileno(), b"changed", seed * 300_000)
    with open(root / "size-4096", "ab") as file:
        file.write(b"more")
    os.chmod(root / "size-59", 0o600 + seed)
    os.setxattr(root / "size-61", "user.seed", b"%d" % seed * 200)


def test_a_mounted_volume_against_its_versions(root: Path) -> None:
    looks: list[dict[bytes, Seen]] = [seen(root)]
    assert changes("HEAD", None) == []
    for seed in (1, 2):
        work(root, seed)
        looks.append(seen(root))
        check_changes(changes("HEAD", None), looks[-2], looks[-1])  # type: ignore[arg-type]
        versions.commit(["v"], f"number {seed}", author="me")
        assert changes("HEAD", None) == []
    work(root, 3)
    looks.append(seen(root))
    # Everything is on the disk only in part: the rest is in the kernel's memory until it is asked.
    for old, new, first, last in (
        ("HEAD~2", "HEAD~1", 0, 1), ("HEAD~2", "HEAD", 0, 2), ("HEAD~2", None, 0, 3),
        ("HEAD~1", None, 1, 3), (None, "HEAD", 3, 2), (None, "HEAD~2", 3, 0),
    ):  # fmt: skip
        check_changes(changes(old, new), looks[first], looks[last])  # type: ignore[arg-type]
    host.umount("v")
    check_changes(changes("HEAD~2", None), looks[0], looks[3])  # type: ignore[arg-type]
    with open_volume("v") as volume:
        assert read(files_of(volume)) == looks[3]


def test_while_somebody_writes(root: Path) -> None:
    """One file goes round under three names: at every moment it has exactly one."""
    names = ["one", "two", "three"]
    (root / "one").write_text("x")
    stop, failed = threading.Event(), []

    def turn() -> None:
        at = 0
        while not stop.is_set():
            os.rename(root / names[at % 3], root / names[(at + 1) % 3])
            (root / "log").write_bytes(os.urandom(5000))
            fd = os.open(root / "log", os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)
            at += 1

    writer = threading.Thread(target=turn)
    writer.start()
    try:
        for _ in range(8):
            with open_place("v", "HEAD") as old, open_volume("v") as new:
                found = {change.path for change in changed_files(old, new)}
                if len(found & {b"one", b"two", b"three"}) != 1:
                    failed.append(found)
                names_now = steadily([new], lambda _, new=new: _names(new))  # type: ignore[misc]
                if len(names_now & {b"one", b"two", b"three"}) != 1:
                    failed.append(names_now)
    finally:
        stop.set()
        writer.join()
    assert failed == []


def _names(content) -> set[bytes]:  # type: ignore[no-untyped-def]
    reader = files_of(content)
    return {entry.name for entry in reader.listdir(reader.root)}


def test_fetches_the_metadata_that_differs(root: Path) -> None:
    """Of 50 MiB a few chunks: where the change is, and what leads to it."""
    with open(root / "large", "r+b") as file:
        os.pwrite(file.fileno(), b"changed", 5 * MiB)
    versions.commit(["v"], "small", author="me")
    versions.push("v", author="me")
    host.umount("v")
    shutil.rmtree(paths.cache())
    with open_place("v", "HEAD~1") as old, open_place("v", "HEAD") as new:
        (change,) = changed_files(old, new)
        assert (change.path, change.changed_bytes) == (b"large", 4096)
        fetched = old.base.figures.fetched_bytes + new.base.figures.fetched_bytes
    assert fetched < 16 * 128 * KiB


def test_works_with_the_store_away(root: Path, repository: Path, tmp_path: Path) -> None:
    work(root, 1)
    before = changes("HEAD", None)
    hidden = repository.with_name("hidden")
    repository.rename(hidden)
    try:
        assert changes("HEAD", None) == before
    finally:
        hidden.rename(repository)


def test_takes_no_lock(root: Path) -> None:
    """Others commit meanwhile."""
    work(root, 1)
    with open_volume("v") as volume:
        before = steadily([volume], lambda _: read(files_of(volume)))
        versions.commit(["v"], "meanwhile", author="me")
        work(root, 2)
        assert read(files_of(volume)) == before, (
            "the layer that went into the commit stays readable"
        )
        with pytest.raises(HorcruxError, match="another version"):
            volume.refresh()


def test_leaves_nothing_open(root: Path) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    changes("HEAD", None)
    before = descriptors()
    for _ in range(3):
        changes("HEAD", None)
    assert descriptors() <= before
    assert not subprocess.run(
        ["pgrep", "-P", str(os.getpid()), "-f", "FIFREEZE"], capture_output=True, check=False
    ).stdout

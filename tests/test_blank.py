"""New, empty volumes: made on this host, pushed later."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from horcrux_nbd import blank, host, paths, versions
from horcrux_nbd.chunkstore import open_store
from horcrux_nbd.contents import holds_changes
from horcrux_nbd.errors import Busy, UsageError
from horcrux_nbd.names import Version
from horcrux_nbd.repository.repository import Repository
from horcrux_nbd.units import GiB, MiB
from tests.attach.conftest import needs_fuse
from tests.cli.support import fails, run
from tests.encrypted import encrypt_all

AUTHOR = "Test <test@example.org>"


def write(name: str, folder: Path, text: str) -> None:
    """A file with `text` on a volume, which is mounted for it."""
    folder.mkdir(exist_ok=True)
    host.mount(name, folder, via="fuse")
    try:
        (folder / "file").write_text(text)
    finally:
        host.umount(name)


def commit(name: str, message: str) -> bytes:
    return versions.commit([name], message=message, author=AUTHOR)[name].id


@needs_fuse
@pytest.mark.parametrize("filesystem", ["ext4", "xfs"])
def test_it_is_empty_and_takes_files(tmp_path: Path, filesystem: str) -> None:
    if filesystem == "xfs" and "xfs" not in Path("/proc/filesystems").read_text():
        done = subprocess.run(["modprobe", "xfs"], check=False, capture_output=True)
        if done.returncode:
            pytest.skip("this kernel has no xfs")
    state = blank.create("scratch", 10 * GiB, filesystem, author=AUTHOR)
    assert state.size == 10 * GiB
    folder = tmp_path / "m"
    folder.mkdir()
    mounted = host.mount("scratch", folder, via="fuse")
    try:
        assert mounted.fstype == filesystem
        assert list(folder.iterdir()) == []  # no lost+found: databases refuse it
        assert folder.stat().st_uid == 0
        (folder / "file").write_text("x")
        assert shutil.disk_usage(folder).free > 9 * GiB
    finally:
        host.umount("scratch")
    assert not paths.root().joinpath("repository").exists()


@needs_fuse
def test_commit_and_push_make_the_image(tmp_path: Path) -> None:
    url = f"cp://{tmp_path}/new/repository"
    blank.create("scratch", 64 * MiB, image="DATA", url=url, author=AUTHOR)
    write("scratch", tmp_path / "m", "written")
    oid = commit("scratch", "first")
    pushed = versions.push("scratch", author=AUTHOR)
    assert pushed.commits == 2
    state = host.load("scratch")
    assert (state.unborn, state.upstream) == (False, oid.hex())
    with open_store(url) as store:
        repository = Repository.open(store)
        assert state.repository_id == repository.id
        assert repository.resolve(Version("DATA")).id == oid
    host.create("other", url, Version("DATA"))
    (tmp_path / "o").mkdir()
    host.mount("other", tmp_path / "o", via="fuse")
    try:
        assert (tmp_path / "o" / "file").read_text() == "written"
    finally:
        host.umount("other")
    host.remove("other", changed=lambda name: holds_changes(name, 10.0))  # it was only mounted
    # From here on it is a volume like any other.
    write("scratch", tmp_path / "m", "again")
    commit("scratch", "second")
    assert versions.push("scratch", author=AUTHOR).commits == 1
    host.remove("scratch")


def test_pushed_without_a_commit(tmp_path: Path) -> None:
    """What is pushed then is the empty file system."""
    blank.create("scratch", 32 * MiB, author=AUTHOR)
    assert versions.push("scratch", author=AUTHOR).commits == 1
    with open_store(blank.local_repository()) as store:
        assert Repository.open(store).resolve(Version("scratch")).commit.message == blank.MESSAGE


def test_pushed_to_where_the_user_says(tmp_path: Path) -> None:
    blank.create("scratch", 32 * MiB, author=AUTHOR)
    url = f"cp://{tmp_path}/elsewhere"
    versions.push("scratch", to=url, author=AUTHOR)
    assert host.load("scratch").repository == url
    with pytest.raises(UsageError, match="never pushed"):
        versions.push("scratch", to=f"cp://{tmp_path}/third", author=AUTHOR)


def test_pushed_again_when_the_answer_was_lost(tmp_path: Path) -> None:
    """As if it had died between the branch and its own state."""
    blank.create("scratch", 32 * MiB, author=AUTHOR)
    before = host.load("scratch")
    versions.push("scratch", author=AUTHOR)
    before.save(host.folder_of("scratch"))
    versions.push("scratch", author=AUTHOR)
    state = host.load("scratch")
    assert not state.unborn
    assert state.repository_id


def test_an_image_of_that_name_is_there(tmp_path: Path) -> None:
    url = f"cp://{tmp_path}/repository"
    for name in ("one", "two"):
        blank.create(name, 32 * MiB, image="DATA", url=url, author=AUTHOR)
    versions.push("one", author=AUTHOR)
    other = 64 * MiB
    blank.create("three", other, image="DATA", url=url, author=AUTHOR)
    with pytest.raises(UsageError, match="has an image DATA already"):
        versions.push("three", author=AUTHOR)
    assert host.load("three").unborn


def test_an_encrypted_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named when the volume is made, its objects are made with its key; else they do not go."""
    encrypt_all(monkeypatch)
    url = f"cp://{tmp_path}/secret"
    with open_store(url, create=True) as store:
        repository = Repository.create(store)
    blank.create("scratch", 32 * MiB, url=url, author=AUTHOR)
    state = host.load("scratch")
    assert (state.encrypted, state.repository_id) == (True, repository.id)
    versions.push("scratch", author=AUTHOR)
    assert not host.load("scratch").unborn
    host.create("other", url, Version("scratch"))
    blank.create("plain", 32 * MiB, author=AUTHOR)
    with pytest.raises(UsageError, match="encrypted"):
        versions.push("plain", to=url, author=AUTHOR)
    assert host.load("plain").unborn


def test_before_the_first_push(tmp_path: Path) -> None:
    blank.create("scratch", 32 * MiB, author=AUTHOR)
    assert "is in no repository yet" in fails(2, "fetch", "scratch")
    assert "is in no repository yet" in fails(2, "pull", "scratch")
    run("status", "scratch")
    run("log", "scratch")


@needs_fuse
def test_removal(tmp_path: Path) -> None:
    """The empty file system is no loss; what was written and committed is."""
    blank.create("scratch", 32 * MiB, author=AUTHOR)
    host.remove("scratch")
    blank.create("scratch", 32 * MiB, author=AUTHOR)
    write("scratch", tmp_path / "m", "written")
    with pytest.raises(Busy, match="changes that exist nowhere else"):
        host.remove("scratch")
    commit("scratch", "mine")
    with pytest.raises(Busy, match="1 version that never"):
        host.remove("scratch")
    versions.push("scratch", author=AUTHOR)
    host.remove("scratch")


def test_refusals() -> None:
    with pytest.raises(UsageError, match="too small"):
        blank.create("scratch", 1 * MiB, author=AUTHOR)
    with pytest.raises(UsageError, match="ext4, xfs"):
        blank.create("scratch", 32 * MiB, "ntfs", author=AUTHOR)
    with pytest.raises(UsageError, match="cannot name"):
        blank.create("../x", 32 * MiB, author=AUTHOR)
    assert host.names() == []
    blank.create("scratch", 32 * MiB, author=AUTHOR)
    with pytest.raises(UsageError, match="exists already"):
        blank.create("scratch", 32 * MiB, author=AUTHOR)


def test_the_command() -> None:
    out = run("create", "scratch", "--size", "1G").out
    assert "scratch@main" in out
    assert "1.0 GiB" in out
    assert "say its size" in fails(2, "create", "other", "--filesystem", "xfs")
    assert "VOLUME REPO VERSION" in fails(2, "create", "other")
    assert "contradict" in fails(2, "create", "other", "--size", "1G", "-r")

"""The words of the command line: which thing a word names."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from horcrux_nbd import config, host
from horcrux_nbd.chunkstore import open_store
from horcrux_nbd.cli.words import SIZE, Where, existing_folder, find_version, where
from horcrux_nbd.errors import NotFound, UsageError
from horcrux_nbd.names import Version
from horcrux_nbd.repository.repository import Repository


@pytest.fixture
def volume(made_repository: Path) -> str:
    host.create("amcc", f"cp://{made_repository}", Version("AMCC"))
    return "amcc"


def test_where(made_repository: Path, volume: str) -> None:
    """A URL, a path, a volume, a remote; and the remote wins over a volume of its name."""
    url = f"cp://{made_repository}"
    assert where(url) == where(str(made_repository)) == Where(url)
    found = where(volume)
    assert (found.url, found.volume) == (url, volume)
    assert found.version is not None
    assert found.version.image == "AMCC"
    config.add_remote(volume, "cp:///elsewhere")
    assert where(volume) == Where("cp:///elsewhere")


def test_where_there_is_nothing(
    volume: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config.add_remote("team", "cp:///elsewhere")
    with pytest.raises(NotFound, match=r"'amc' is no remote \(there is team\) .* amcc\).* \./amc"):
        where("amc")
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    assert where("./folder") == where("folder") == Where(f"cp://{tmp_path}/folder")
    with pytest.raises(UsageError, match="ftp"):
        where("ftp://x")


def test_which_version(made_repository: Path, volume: str, tmp_path: Path) -> None:
    with open_store(f"cp://{made_repository}") as store:
        repository = Repository.open(store)
        place = Where(store.url)
        newest = find_version(repository, place, None)
        assert newest.commit.message == "second"
        assert find_version(repository, place, "AMCC@main~1").commit.message == "first"
        with pytest.raises(UsageError):
            find_version(repository, place, "@main")  # of which image?
        assert find_version(repository, where(volume), None).id == newest.id
        assert find_version(repository, where(volume), "@main~1").commit.message == "first"


def test_which_of_several_images(made_repository: Path, tmp_path: Path) -> None:
    shutil.copytree(made_repository, tmp_path / "copy")
    with open_store(f"cp://{tmp_path / 'copy'}") as store:
        repository = Repository.open(store)
        head = repository.refs.head("AMCC", "main")
        assert head is not None
        repository.refs.move("OTHER", "main", head.commit, None, author="x", why="x")
        with pytest.raises(UsageError, match="2 images: say which: AMCC, OTHER"):
            find_version(repository, Where(store.url), None)
    with open_store(f"cp://{tmp_path / 'empty'}", create=True) as store:
        with pytest.raises(NotFound, match="no image yet"):
            find_version(Repository.create(store), Where(store.url), None)


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert existing_folder("a/b") == tmp_path / "a" / "b"
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is no folder"):
        existing_folder("file")


def test_sizes_name_their_option() -> None:
    assert SIZE.convert("4K", None, None) == 4096
    with pytest.raises(UsageError, match="size 'x'"):
        SIZE.convert("x", None, None)

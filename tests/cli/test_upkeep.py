"""gc, clone, sync, repair, and mirrors of a remote, as a user types them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from horcrux_nbd import config, paths
from horcrux_nbd.chunkstore import open_store
from horcrux_nbd.errors import UsageError
from horcrux_nbd.names import Version
from horcrux_nbd.repository.repository import Repository
from horcrux_nbd.volume.volume import Volume

from .support import fails, run


def object_files(repository: Path) -> list[Path]:
    return sorted((repository / "objects").glob("*/*"), key=lambda path: path.stat().st_size)


def test_gc(repository: Path) -> None:
    before = len(object_files(repository))
    plan = run("gc", "--dry-run", "--keep-last", "1", "--json", repository).json
    assert plan["dry_run"] is True
    assert [version["stays"] for version in plan["versions"]] == [True, False]
    assert plan["versions"][1]["only_bytes"] == plan["unreachable_bytes"] > 0
    assert plan["bytes"] > plan["unreachable_bytes"]
    table = run("gc", "-n", "--keep-last", "1", repository).out
    assert "branch main" in table
    assert "would drop 1 version" in table

    said = run("gc", "-q", "--keep-last", "1", repository).out
    assert "dropped 1 version" in said
    assert "a removal begins at" in said
    assert len(object_files(repository)) == before
    assert run("gc", "--withdraw", "--json", repository).json["withdrawn"] == 1
    done = run("gc", "-q", "--no-grace", "--json", repository).json
    assert done["removed_objects"] == plan["unreachable_objects"]
    assert done["removed_bytes"] == plan["unreachable_bytes"]
    assert done["removal_begins"] is None
    assert len(object_files(repository)) == before - done["removed_objects"]
    run("verify", "-q", "--data", repository)
    assert "nothing to remove" in run("gc", "-q", repository).out
    assert "was removed" in fails(3, "create", "v", repository, "AMCC@main~1")


def test_gc_spares_what_volumes_lie_on(repository: Path) -> None:
    run("create", "old", repository, "AMCC@main~1")
    run("gc", "-q", "--no-grace", "--keep-last", "1", repository)
    assert run("verify", "-q", "--json", "--data", repository).json["versions"] == 2
    run("rm", "old")
    run("gc", "-q", "--no-grace", "--keep-last", "1", repository)
    assert run("verify", "-q", "--json", repository).json["versions"] == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--keep-last", "0"], "0"),
        (["--image", "AMCC"], "--keep-last"),
        (["--drop-tags"], "--keep-last"),
        (["--dry-run", "--no-grace"], "--no-grace"),
        (["--keep-last", "1", "--image", "../x"], "cannot name an image"),
    ],
)
def test_gc_bad_input(made_repository: Path, words: list[str], said: str) -> None:
    assert said in fails(2, "gc", "-q", *words, made_repository)


def test_clone_and_sync(repository: Path, tmp_path: Path) -> None:
    there = tmp_path / "copy"
    done = run("clone", "-q", "--json", repository, there).json
    assert done["versions"] == 2
    assert done["objects"] == len(object_files(repository))
    assert "0 new versions: 0 objects" in run("sync", "-q", repository, there).out
    run("verify", "-q", "--data", there)
    run("clone", "-q", repository, tmp_path / "one", "AMCC@main")
    assert run("verify", "-q", "--json", tmp_path / "one").json["versions"] == 1
    shutil.rmtree(there / "refs")
    run("sync", "-q", repository, there)
    assert (
        run("ls", "--json", there).json[0]["versions"]
        == run("ls", "--json", repository).json[0]["versions"]
    )


def test_copies_that_are_refused(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    run("generate", "-q", "X", tmp_path / "source", tmp_path / "other")
    assert "another repository" in fails(2, "clone", "-q", repository, tmp_path / "other")
    assert "name two places" in fails(2, "sync", "-q", repository, repository)
    assert "no image 'Y'" in fails(3, "clone", "-q", repository, tmp_path / "n", "Y")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert "holds something else" in fails(6, "clone", "-q", repository, tmp_path / "full")
    assert "no folder" in fails(3, "clone", "-q", tmp_path / "none", tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_both_were_pushed_to(repository: Path, tmp_path: Path) -> None:
    there = tmp_path / "copy"
    run("clone", "-q", repository, there)
    for folder, text in ((repository, "here"), (there, "there")):
        source = tmp_path / text
        source.mkdir()
        (source / "file").write_text(text)
        run("generate", "-q", "AMCC", source, folder)
    assert "branch main of AMCC" in run("sync", "-q", repository, there, ok=False).err
    assert run("sync", "-q", repository, there, ok=False).code == 5


def test_repair(repository: Path, tmp_path: Path) -> None:
    there = tmp_path / "copy"
    run("clone", "-q", repository, there)
    bad = object_files(repository)[-1]
    bad.write_bytes(bad.read_bytes()[:-1])
    run("verify", "-q", "--data", repository, ok=False)
    alone = run("repair", "-q", repository, ok=False)
    assert alone.code == 4
    assert bad.name in alone.out
    assert "needed by AMCC@" in alone.out
    assert "1 problem could not be mended" in alone.err
    done = run("repair", "-q", "--json", repository, "--from", there).json
    assert done["mended"] == [f"objects/{bad.parent.name}/{bad.name}"]
    assert done["ok"] is True
    run("verify", "-q", "--data", repository)


def test_repair_from_what_this_host_has(repository: Path) -> None:
    """The cache has chunks and nodes that were read."""
    run("create", "v", repository, "AMCC")
    from horcrux_nbd import host, paths

    with open_store(str(repository)) as store:
        version = Repository.open(store).resolve(Version("AMCC"))
    volume = Volume.open(host.folder_of("v"), cache=paths.cache())
    view = memoryview(bytearray(version.commit.size))
    volume.read_into(0, view)
    volume.close()
    bad = object_files(repository)[-1]
    bad.unlink()
    assert run("repair", "-q", "--json", repository).json["mended"]
    run("verify", "-q", "--data", repository)


# ---- mirrors


def test_a_remote_with_mirrors(repository: Path, tmp_path: Path) -> None:
    there = tmp_path / "copy"
    run("clone", "-q", repository, there)
    run("remote", "add", "team", repository, there)
    assert run("remote", "ls", "--json").json == {"team": f"cp://{repository}"}
    assert run("config", "--json").json["mirrors"] == {"team": [f"cp://{there}"]}
    run("remote", "add", "team", repository, there)  # the same again
    assert "already" in fails(2, "remote", "add", "team", repository)
    assert "twice" in fails(2, "remote", "add", "x", repository, repository)
    run("create", "v", "team", "AMCC")
    run("remote", "rm", "team")
    assert run("config", "--json").json["mirrors"] == {}

    from horcrux_nbd import host, paths

    assert host.load("v").mirrors == (f"cp://{there}",)
    with open_store(str(there)) as store:
        size = Repository.open(store).resolve(Version("AMCC")).commit.size
    whole = bytearray(size)
    volume = Volume.open(host.folder_of("v"), cache=paths.cache())
    volume.read_into(0, memoryview(whole))
    volume.close()
    shutil.rmtree(paths.cache())

    for bad in object_files(repository)[::2]:  # half of it damaged, then all of it away
        bad.write_bytes(os.urandom(bad.stat().st_size))
    for _ in range(2):
        volume = Volume.open(host.folder_of("v"), cache=paths.cache(), store_limit=5)
        again = bytearray(size)
        volume.read_into(0, memoryview(again))
        volume.close()
        assert again == whole
        shutil.rmtree(paths.cache())
        shutil.rmtree(repository, ignore_errors=True)


def test_a_mirror_must_be_of_the_same_repository(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    run("generate", "-q", "AMCC", tmp_path / "source", tmp_path / "other")
    run("remote", "add", "team", repository, tmp_path / "other")
    assert "not the same repository" in fails(2, "create", "v", "team", "AMCC")
    assert "different repositories" in fails(4, "repair", "-q", "team")


def test_a_volume_of_a_remote_that_is_away(repository: Path, tmp_path: Path) -> None:
    there = tmp_path / "copy"
    run("clone", "-q", repository, there)
    run("remote", "add", "team", repository, there)
    shutil.move(repository, tmp_path / "moved")
    run("create", "v", "team", "AMCC")
    assert json.loads(run("status", "v", "--json").out)["repository"] == f"cp://{repository}"


@pytest.mark.parametrize("value", ['"cp:///x"', "[1]", '["ftp://x"]'])
def test_mirrors_in_the_file(value: str, tmp_path: Path) -> None:
    text = f'[remotes.team]\nurl = "cp:///a"\nmirrors = {value}\n'
    with pytest.raises(UsageError, match=r"remotes\.team"):
        config.parse(text, tmp_path / "config.toml")


def test_versions_are_read_from_a_mirror_while_the_first_is_away(
    repository: Path, tmp_path: Path
) -> None:
    there = tmp_path / "copy"
    run("remote", "add", "team", repository, there)
    run("create", "v", "team", "AMCC")
    run("clone", "-q", repository, there)
    known = run("log", "v", "--json").json
    shutil.rmtree(paths.cache())
    repository.rename(tmp_path / "away")
    for words in (("log", "v"), ("log", "team"), ("log", "AMCC")):
        assert [one["id"] for one in run(*words, "--json").json] == [one["id"] for one in known]
    assert run("fetch", "v", "--json").json["behind"] == []
    for ref in (known[-1]["id"], "main"):
        run("checkout", "v", ref)
    # What writes does not.
    line = fails(3, "tag", "v", "v9")
    assert "no folder" in line
    (tmp_path / "away").rename(repository)
    run("tag", "v", "v9")

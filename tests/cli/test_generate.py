"""`generate` as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from .support import LIMIT, PROGRAM, fails, make_directory, run

KEYS = {
    "id", "version", "repository", "size", "chunk_size", "filesystem", "read_bytes",
    "stored_bytes", "stored_objects", "known_objects", "seconds", "problems",
}  # fmt: skip


def test_as_the_original_had_it(tmp_path: Path) -> None:
    """The command of the original README, 64M and all; a second run stores next to nothing."""
    source = make_directory(tmp_path / "in")
    result = run("generate", "--chunksize", "64M", "AMCC", source, tmp_path / "out")
    assert result.out.startswith("AMCC@main ")
    assert "new objects" in result.out
    assert "temporary space" in result.err  # said beforehand
    first = run("ls", "--json", tmp_path / "out").json[0]["versions"][0]
    assert first["chunk_size"] == 64 << 20
    again = run("generate", "--json", "-q", "AMCC", source, tmp_path / "out")
    assert again.err == ""
    assert set(again.json) == KEYS
    assert again.json["chunk_size"] == 64 << 20  # the image's own, without -s
    assert again.json["stored_objects"] == 1  # the commit alone
    assert again.json["id"] != first["id"]


def test_where_and_what(tmp_path: Path) -> None:
    """Message, author, branch and remote end where they belong."""
    source = make_directory(tmp_path / "in")
    run("remote", "add", "mine", tmp_path / "out")
    author = {"HORCRUX_AUTHOR": "Ada <ada@example.org>"}
    run("generate", "-q", "-m", "a message", "AMCC", source, "mine", env=author)
    found = run("ls", "--json", "mine").json[0]["versions"]
    assert len(found) == 1
    assert (found[0]["message"], found[0]["author"]) == ("a message", "Ada <ada@example.org>")
    assert (found[0]["ref"], found[0]["filesystem"]) == ("main", "ext4")
    run("generate", "-q", "AMCC", source, "mine")
    assert (
        run("ls", "--json", "mine").json[0]["versions"][0]["message"] == f"generated from {source}"
    )


def test_room(tmp_path: Path) -> None:
    source = make_directory(tmp_path / "in")
    sized = run("generate", "-q", "--json", "--size", "3G", "A", source, tmp_path / "out").json
    assert sized["size"] == 3 << 30
    freed = run("generate", "-q", "--json", "--free", "5G", "B", source, tmp_path / "out").json
    assert 5 << 30 < freed["size"] < 6 << 30
    assert freed["stored_bytes"] < 4 << 20  # room is a hole


def test_a_raw_image(tmp_path: Path) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(os.urandom(100_000))
    made = run("generate", "-q", "--json", "-s", "64K", "RAW", image, tmp_path / "out").json
    assert (made["size"], made["filesystem"]) == (100_000, None)
    assert "disk image" in fails(
        2, "generate", "-q", "--free", "1G", "RAW", image, tmp_path / "out"
    )


def test_files_that_change_meanwhile(tmp_path: Path) -> None:
    """The version is made, they are named, and the exit code is 10.

    The source has a file that grows once `generate` has looked at the directory: it says so.
    """
    source = make_directory(tmp_path / "in")
    (source / "log").write_bytes(bytes(range(1, 251)) * 4000)
    child = subprocess.Popen(
        [PROGRAM, "generate", "--json", "LIVE", source, tmp_path / "out"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stderr is not None
    for line in child.stderr:
        if "temporary space" in line:
            with open(source / "log", "ab") as log:
                log.write(b"one more line\n")
            break
    out, err = child.communicate(timeout=LIMIT)
    assert child.returncode == 10, err
    assert any("log" in line for line in json.loads(out)["problems"])
    assert "LIVE@main was made, but 1 file changed" in err.splitlines()[-1]
    assert run("verify", "-q", tmp_path / "out").code == 0


# ---- bad input: one line each, and nothing changed


@pytest.mark.parametrize("size", ["100K", "0", "32K", "128M", "many", "-1"])
def test_wrong_chunk_size(tmp_path: Path, size: str) -> None:
    source = make_directory(tmp_path / "in")
    said = fails(2, "generate", "-q", f"--chunksize={size}", "AMCC", source, tmp_path / "out")
    assert "size" in said
    assert not (tmp_path / "out").exists()


def test_another_chunk_size_than_the_image(repository: Path, tmp_path: Path) -> None:
    source = make_directory(tmp_path / "in")
    said = fails(2, "generate", "-q", "-s", "1M", "AMCC", source, repository)
    assert "has chunks of" in said


def test_missing_directory(tmp_path: Path) -> None:
    said = fails(2, "generate", "-q", "AMCC", tmp_path / "none", tmp_path / "out")
    assert f"{tmp_path / 'none'}" in said
    assert not (tmp_path / "out").exists()


def test_neither_directory_nor_image(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert "neither" in fails(2, "generate", "-q", "A", tmp_path / "fifo", tmp_path / "out")


@pytest.mark.parametrize("name", ["../x", "a b", "", "x" * 101])
def test_bad_names(tmp_path: Path, name: str) -> None:
    source = make_directory(tmp_path / "in")
    assert "cannot name an image" in fails(2, "generate", "-q", name, source, tmp_path / "out")
    said = fails(2, "generate", "-q", "--branch", name, "A", source, tmp_path / "out")
    assert "cannot name a branch" in said
    assert not (tmp_path / "out").exists()


def test_repository_and_source_apart(tmp_path: Path) -> None:
    source = make_directory(tmp_path / "in")
    link = tmp_path / "link"
    link.symlink_to(source)
    for repo in (source / "repo", link / "repo", f"cp://{source}/a/../repo"):
        assert "lies inside of SOURCE" in fails(2, "generate", "-q", "A", source, repo)
    assert "same folder" in fails(2, "generate", "-q", "A", source, link)
    assert "lies inside of REPO" in fails(2, "generate", "-q", "A", source / "sub", source)
    assert not (source / "repo").exists()


def test_no_space(tmp_path: Path, small_disk: Path) -> None:
    """Too small for the temporary file: said before anything is written."""
    source = make_directory(tmp_path / "in")
    words = ("generate", "-q", "--temporary", small_disk, "A", source, tmp_path / "out")
    said = fails(8, *words)
    assert str(small_disk) in said
    assert list(small_disk.iterdir()) == []


def test_no_space_in_the_repository(tmp_path: Path, small_disk: Path) -> None:
    source = make_directory(tmp_path / "in")
    (source / "big").write_bytes(os.urandom(8 << 20))
    said = fails(8, "generate", "-q", "A", source, small_disk / "out")
    assert "space" in said
    assert run("ls", "--json", small_disk / "out").json[0]["versions"] == []


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    """Named, and nothing is made: a version without it would look whole."""
    source = make_directory(tmp_path / "in")
    (source / "secret").write_text("x")
    (source / "secret").chmod(0)
    lacking = "-dac_override,-dac_read_search"  # with which root reads all
    as_root = ["setpriv", f"--bounding-set={lacking}", f"--inh-caps={lacking}"]
    done = subprocess.run(
        [
            *(as_root if os.geteuid() == 0 else []),
            *(PROGRAM, "generate", "-q", "A", source, tmp_path / "out"),
        ],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert f"{source}/secret" in done.stderr
    assert not (tmp_path / "out").exists()


def test_repository_place_is_taken(tmp_path: Path) -> None:
    source = make_directory(tmp_path / "in")
    taken = make_directory(tmp_path / "photos")
    assert "something else" in fails(6, "generate", "-q", "A", source, taken)
    assert sorted(os.listdir(taken)) == ["empty", "link", "small", "sub"]


def test_a_word_that_is_no_repository(tmp_path: Path) -> None:
    source = make_directory(tmp_path / "in")
    said = fails(2, "generate", "-q", "A", source, "nowhere")
    assert "./NAME" in said
    assert "remotes" in said


@pytest.mark.parametrize("url", ["ftp://host/x", "scp://host", "s3://", "scp://me:hunter2@nas:/x"])
def test_bad_urls(tmp_path: Path, url: str) -> None:
    assert "hunter2" not in fails(2, "generate", "-q", "A", make_directory(tmp_path / "in"), url)


def test_no_branch_of_that_name(repository: Path, tmp_path: Path) -> None:
    source = make_directory(tmp_path / "in")
    said = fails(3, "generate", "-q", "--branch", "other", "AMCC", source, repository)
    assert "no branch 'other'" in said

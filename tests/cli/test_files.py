"""`ls` of a path, `cat` and `restore`, as a user has them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from horcrux_nbd.cli.files import Spot, spot
from horcrux_nbd.errors import UsageError

from .support import PROGRAM, fails, run


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["v:/etc"], Spot("v", None, "/etc")),
        (["v:"], Spot("v", None, "")),
        (["AMCC@v3:/etc/a:b"], Spot("AMCC@v3", None, "/etc/a:b")),
        (["v", "/etc"], Spot("v", None, "/etc")),
        (["v", "/a:/b"], Spot("v", None, "/a:/b")),
        (["v", "etc/x"], Spot("v", None, "etc/x")),
        (["v", ":/etc"], Spot("v", None, "/etc")),
        (["v", "main~2:/etc"], Spot("v", "main~2", "/etc")),
        (["v", "@v3:etc"], Spot("v", "v3", "etc")),
        (["v", "@:etc"], Spot("v", "@", "etc")),
        (["v", "origin/main:/x"], Spot("v", "origin/main", "/x")),
        (["cp:///r", "AMCC@v3:/etc"], Spot("cp:///r", "AMCC@v3", "/etc")),
        (["cp:///r", "AMCC", "/a:b"], Spot("cp:///r", "AMCC", "/a:b")),
        (["v", "HEAD", "x\ny:z"], Spot("v", "HEAD", "x\ny:z")),
    ],
)
def test_words(words: list[str], expected: Spot) -> None:
    assert spot(words) == expected


@pytest.mark.parametrize("words", [[], ["v"], ["cp:///r"], ["a", "b", "c", "d"]])
def test_words_that_name_no_file(words: list[str]) -> None:
    with pytest.raises(UsageError, match="TARGET REF PATH"):
        spot(words)


def test_of_a_version(made_repository: Path) -> None:
    listed = run("ls", made_repository, "AMCC:/").out
    assert "small" in listed
    assert "hello again" in run("cat", made_repository, "AMCC", "/small").out
    assert "hello again" not in run("cat", made_repository, "AMCC@main~1", "/small").out
    assert "hello again" not in run("cat", made_repository, "main~1:small").out
    found = run("ls", made_repository, "AMCC", "/", "-R", "--json").json
    (small,) = [one for one in found["files"] if one["path"] == "small"]
    assert small["size"] == len("hello again\n")
    assert (small["type"], small["target"]) == ("file", None)
    assert found["in"].startswith("AMCC@")
    (alone,) = run("ls", made_repository, "AMCC", "small", "--json").json["files"]
    assert alone == small


def test_without_a_path_it_lists_the_repository(made_repository: Path) -> None:
    assert "AMCC@main" in run("ls", made_repository).out
    assert run("ls", made_repository, "--json").json[0]["versions"][0]["image"] == "AMCC"
    assert "--recursive" in fails(2, "ls", "-R", made_repository)
    assert "--stored" in fails(2, "ls", "--stored", made_repository, "AMCC:/")


def test_of_a_volume_by_its_names(volume: str) -> None:
    assert "small" in run("ls", f"{volume}:/").out
    assert run("cat", volume, "/small").out == "hello again\n"
    assert run("cat", volume, "HEAD:/small").out == "hello again\n"
    assert run("cat", volume, "HEAD~1:/small").out != "hello again\n"
    assert run("cat", "AMCC@main", "/small").out == "hello again\n"
    assert "small" in run("ls", "AMCC@main:/").out


def test_restore(made_repository: Path, tmp_path: Path) -> None:
    target = tmp_path / "new/folder"
    said = run("restore", "-q", made_repository, "AMCC", "/", target).out
    assert "restored into" in said
    assert (target / "small").read_text() == "hello again\n"
    error = fails(2, "restore", "-q", made_repository, "main~1:small", target)
    assert "--force" in error
    done = run("restore", "--json", "-f", made_repository, "main~1:small", target).json
    assert done["files"] == 1
    assert (target / "small").read_text() != "hello again\n"


def test_bad_input(made_repository: Path, tmp_path: Path) -> None:
    assert "there is no '/nowhere'" in fails(3, "cat", made_repository, "AMCC", "/nowhere")
    assert "is a directory" in fails(2, "cat", made_repository, "AMCC", "/")
    assert "nix" in fails(3, "cat", made_repository, "nix:/small")
    assert "TARGET" in fails(2, "cat", made_repository)
    assert "DIR" in fails(2, "restore", made_repository)
    fails(3, "restore", "-q", made_repository, "AMCC", "/nowhere", tmp_path / "target")
    assert not (tmp_path / "target").exists()
    (tmp_path / "file").touch()
    assert "no folder" in fails(
        2, "restore", "-q", made_repository, "AMCC:small", tmp_path / "file"
    )


def test_an_image_with_no_file_system(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(os.urandom(1 << 20))
    run("generate", "-q", "RAW", tmp_path / "raw", tmp_path / "repository")
    error = fails(2, "ls", tmp_path / "repository", "RAW:/")
    assert "holds no ext2, ext3 or ext4" in error


def test_a_name_that_would_move_the_cursor(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "evil\x1b[2J\n\\").write_text("x")
    (source / os.fsdecode(b"\xff")).write_text("y")
    run("generate", "-q", "-s", "64K", "ODD", source, tmp_path / "repository")
    out = run("ls", tmp_path / "repository", "ODD:/").out
    assert "evil\\033[2J\\012\\\\" in out
    assert "\\377" in out
    assert "\x1b" not in out
    found = run("ls", tmp_path / "repository", "ODD:/", "--json").json["files"]
    assert [one["path_hex"] for one in found if "path_hex" in one] == ["ff"]
    words = [PROGRAM, "cat", tmp_path / "repository", "ODD", b"/\xff"]
    assert subprocess.run(words, capture_output=True, check=True, timeout=60).stdout == b"y"


def test_a_closed_output(made_repository: Path) -> None:
    """`cat | head` ends quietly."""
    done = subprocess.run(
        ["bash", "-c", 'set -o pipefail; "$0" cat "$1" AMCC /sub/large | head -c 10 >/dev/null',
         PROGRAM, made_repository],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode in (0, 141)
    assert done.stderr == ""

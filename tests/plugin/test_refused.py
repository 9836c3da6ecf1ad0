"""Requests that cannot be served: one clear line each."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.servers.nbdkit import PLUGIN, Nbdkit, connected
from tests.volume.support import (
    CHUNK,
    make_image,
    noise,
)

from .support import (
    DATA,
    SIZE,
    lines,
    needs_nbdkit,
    original,
    serve,
)

pytestmark = needs_nbdkit


REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "unknown key": ({"nme": "x"}, "unknown key 'nme': the keys are volume, repo, name, ref"),
    "nothing": (
        {"repo": None, "name": None, "overlay": None},
        "say what to serve: repo= and name= (and overlay=), or volume=",
    ),
    "no name": ({"name": None}, "is no volume yet: repo= and name= say what to make it from"),
    "no overlay": ({"overlay": None}, "overlay= names the folder for what is written"),
    "empty": ({"name": ""}, "name= is empty"),
    "image name": ({"name": "../x"}, "'../x' cannot name an image: use 1 to 100 of"),
    "ref": ({"ref": "a b"}, "'a b' is no ref"),
    "flag": ({"readonly": "perhaps"}, "readonly=perhaps: say true or false"),
    "size": ({"cache_size": "many"}, "cache_size 'many' is no size"),
    "timeout": ({"timeout": "soon"}, "timeout=soon: give seconds, 1 to 86400"),
    "log": ({"log": "loud"}, "log=loud: say debug, error, info, warning"),
    "volume and repo": ({"volume": "v"}, "volume= already says it all: leave out name="),
    "volume": (
        {"repo": None, "name": None, "overlay": None, "volume": "/nowhere"},
        "/nowhere is no volume",
    ),
    "volume name": (
        {"repo": None, "name": None, "overlay": None, "volume": ".."},
        "'..' cannot name a volume",
    ),
    "scheme": ({"repo": "ftp://x/y"}, "ftp"),
    "no folder": ({"repo": "cp:///nowhere/at/all"}, "there is no folder /nowhere/at/all"),
    "no such image": ({"name": "AMCD"}, "AMCC"),
    "no such version": ({"ref": "mian"}, "AMCC has no version 'mian'"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_a_wrong_request_is_one_clear_line(tmp_path: Path, url: str, what: str) -> None:
    keys, expected = REFUSED[what]
    said = lines(serve(tmp_path, url, **keys).refused())
    assert len(said) == 1, said
    assert expected in said[0]
    assert not (tmp_path / "overlay").exists() or not list((tmp_path / "overlay").iterdir())


def test_a_key_that_is_given_twice(tmp_path: Path, url: str) -> None:
    (said,) = lines(Nbdkit("name=AMCC", repo=url, name="AMCD").refused())
    assert "name= is given twice" in said


def test_a_folder_that_is_no_repository(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (said,) = lines(serve(tmp_path, f"cp://{tmp_path}/empty").refused())
    assert "holds no Horcrux repository" in said


def test_a_folder_with_something_else_in_it(tmp_path: Path, url: str) -> None:
    (tmp_path / "overlay").mkdir()
    (tmp_path / "overlay" / "letters").write_text("dear")
    (said,) = lines(serve(tmp_path, url).refused())
    assert "is not empty and no volume ('letters' is in it)" in said
    assert [p.name for p in (tmp_path / "overlay").iterdir() if p.name != "lock"] == ["letters"]


def test_a_second_server_is_refused(served: Nbdkit, tmp_path: Path, url: str) -> None:
    (said,) = lines(serve(tmp_path, url).refused())
    assert f"is in use by process {served.pid}: stop it first" in said
    with connected(served) as handle:
        assert handle.pread(10, 0) == original(0, 10)


def test_an_overlay_of_something_else_is_refused(tmp_path: Path, url: str) -> None:
    with serve(tmp_path, url):
        pass
    make_image(tmp_path / "repo", b"other", image="OTHER")
    (said,) = lines(serve(tmp_path, url, name="OTHER").refused())
    assert "belongs to AMCC@main, not to OTHER@main" in said
    another = make_image(tmp_path / "repo2", DATA, size=SIZE)
    (said,) = lines(serve(tmp_path, another).refused())
    assert "belongs to another repository" in said
    shutil.copytree(tmp_path / "repo", tmp_path / "copy")
    with serve(tmp_path, f"cp://{tmp_path}/copy") as server, connected(server) as handle:
        assert handle.pread(10, 0) == original(0, 10), "a copy is the same repository"


def test_damaged_state_is_refused_and_left_alone(tmp_path: Path, url: str) -> None:
    with serve(tmp_path, url) as server, connected(server) as handle:
        for turn in range(3):
            handle.pwrite(noise(CHUNK), turn * CHUNK)
            handle.flush()
    (log,) = (tmp_path / "overlay" / "overlay").glob("*/map")
    for path in (log, tmp_path / "overlay" / "volume.json"):
        whole = path.read_bytes()
        path.write_bytes(whole[:60] + b"\xff" + whole[61:])
        damaged = path.read_bytes()
        (said,) = lines(serve(tmp_path, url).refused())
        assert str(path) in said
        assert "damaged" in said
        assert path.read_bytes() == damaged
        path.write_bytes(whole)
    with serve(tmp_path, url) as server, connected(server) as handle:
        assert handle.pread(CHUNK, CHUNK) == noise(CHUNK)


def test_a_python_without_our_packages_is_told_what_to_do(tmp_path: Path) -> None:
    alone = tmp_path / "horcrux_nbd" / "plugin.py"
    alone.parent.mkdir()
    shutil.copy(PLUGIN, alone)
    done = subprocess.run(
        ["nbdkit", "--foreground", "--unix", tmp_path / "s", "python", alone, "repo=cp:///x"],
        capture_output=True, text=True, check=False, timeout=30,
    )  # fmt: skip
    assert done.returncode != 0
    (said,) = lines(done.stderr)
    assert "cannot load Horcrux's packages" in said
    assert "/usr/bin/python3 -m venv" in said

"""Building the filter, and finding the one that fits."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from horcrux_nbd import server
from horcrux_nbd.errors import EnvironmentProblem
from horcrux_nbd.native import build, library
from tests.cli.support import fails, run


@pytest.fixture(autouse=True)
def only_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is built yet, and what is goes into the test's folder."""
    monkeypatch.setattr(build, "places", lambda: [tmp_path / "no" / "way", tmp_path / "built"])
    (tmp_path / "no").write_text("a file, so that no folder can be made below it")
    return tmp_path / "built"


@pytest.fixture
def built(only_here: Path) -> Path:
    if reason := build.why_not():
        pytest.skip(reason)
    return build.build()


def test_it_is_built_where_there_is_room_and_found(only_here: Path) -> None:
    if reason := build.why_not():
        pytest.skip(reason)
    assert build.found() is None
    assert "no native filter for this nbdkit: horcrux-cli native build" in str(build.not_there())
    assert server.filters() == []
    path = build.build()
    assert path == build.found() == only_here / library.NAME
    assert server.filters() == [f"--filter={path}"]
    loaded = subprocess.run(
        ["nbdkit", f"--filter={path}", "null", "--dump-plugin"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert loaded.returncode == 0, loaded.stderr


def test_one_of_another_nbdkit_or_release_is_not_used(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert build.found() == built
    with monkeypatch.context() as patched:
        patched.setattr(build, "nbdkit_version", lambda nbdkit="nbdkit": "1.32.6")
        assert build.found() is None
        assert "is not of nbdkit 1.32.6" in str(build.not_there())
        with pytest.raises(EnvironmentProblem, match=r"is not of nbdkit 1\.32\.6"):
            build.build()
    with monkeypatch.context() as patched:
        patched.setattr(build, "sources_digest", lambda: "another")
        assert build.found() is None
    (built.parent / build.RECORD).write_text("{")
    assert build.found() is None
    built.unlink()
    assert build.found() is None


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(build, "_compiler", lambda: None)
        with pytest.raises(EnvironmentProblem, match="no C compiler: apt-get install gcc"):
            build.build()
    with monkeypatch.context() as patched:
        patched.setattr(build, "VERSION_HEADER", Path("/nowhere/nbdkit-version.h"))
        with pytest.raises(EnvironmentProblem, match="nbdkit's headers are not there"):
            build.build()
    with monkeypatch.context() as patched:
        patched.setattr(build, "nbdkit_version", lambda nbdkit="nbdkit": None)
        with pytest.raises(EnvironmentProblem, match="nbdkit is not installed"):
            build.build()


def test_it_can_be_switched_off() -> None:
    off = {build.SWITCH: "0"}
    assert "switched off" in fails(9, "native", "path", env=off)
    told = run("doctor", "--json", env=off, ok=False).json["checks"]
    (check,) = (check for check in told if check["check"] == "native filter")
    assert check["level"] == "ok"
    assert "switched off" in check["what"]

"""`doctor` on a machine that has all, and on ones that lack something."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from horcrux_nbd.cli import checks
from horcrux_nbd.cli.checks import FAIL, OK, WARN

from .support import fails, run


def levels(found: list[dict[str, str]]) -> dict[str, str]:
    return {one["check"]: one["level"] for one in found}


def test_this_machine() -> None:
    """The one that the tests run on has what it takes to serve."""
    found = run("doctor", "--json").json
    assert found["ok"]
    assert set(found["checks"][0]) == {"check", "level", "what", "mend"}
    by_name = levels(found["checks"])
    for check in ("configuration", "nbdkit", "python", "plugin", "ext4", "state", "clock"):
        assert by_name[check] == OK, check
    assert {"attach nbd", "attach ublk", "attach fuse"} <= set(by_name)
    assert "nbdkit" in run("doctor").out


def test_a_repository(made_repository: Path, tmp_path: Path) -> None:
    found = run("doctor", "--json", "--write", made_repository).json
    by_name = levels(found["checks"])
    for check in ("store", "repository", "write", "store clock"):
        assert by_name[check] == OK, check
    assert not list(made_repository.glob("probe/*"))
    by_name = levels(run("doctor", "--json", tmp_path).json["checks"])
    assert by_name["repository"] == WARN
    result = run("doctor", "--json", tmp_path / "none", ok=False)
    assert result.code == 9
    assert levels(result.json["checks"])["store"] == FAIL
    assert "check failed: store" in result.err
    assert "say which" in fails(2, "doctor", "--write")


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    return folder


def fake(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


def test_nothing_installed(programs: Path) -> None:
    """Each line that is not ok says how to mend it."""
    result = run("doctor", "--json", env={"PATH": str(programs)}, ok=False)
    assert result.code == 9
    by_name = {one["check"]: one for one in result.json["checks"]}
    assert by_name["nbdkit"]["level"] == FAIL
    assert by_name["nbdkit"]["mend"] == "apt-get install nbdkit nbdkit-plugin-python"
    assert by_name["qemu-img"]["level"] == WARN
    assert all(one["mend"] for one in by_name.values() if one["level"] == FAIL)


@pytest.mark.parametrize(
    ("script", "check", "said"),
    [
        ("echo nbdkit 1.24.1", "nbdkit", "1.24.1 is too old"),
        ('[ "$1" = --version ] && echo nbdkit 1.40.0', "nbdkit-python", "no Python plugin"),
        ('echo "nbdkit 1.40.0"; echo python_version=3.99.1', "python", "embeds Python 3.99"),
        (
            '[ "$1" = --version ] && { echo nbdkit 1.40.0; exit; }; echo "python_version=3.99.1"\n'
            '[ "$2" = --dump-plugin ] || { echo "nbdkit: error: horcrux: cannot load"; exit 1; }',
            "plugin",
            "cannot load it: horcrux: cannot load",
        ),
        (
            'echo "nbdkit 1.40.0"; echo "horcrux_version=0.0.1"',
            "plugin",
            "loads version 0.0.1 of Horcrux",
        ),
    ],
)
def test_a_wrong_nbdkit(
    programs: Path, monkeypatch: pytest.MonkeyPatch, script: str, check: str, said: str
) -> None:
    fake(programs, "nbdkit", script)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    found = {one.check: one for one in checks.nbdkit()}
    assert found[check].level == FAIL
    assert said in found[check].what
    assert found[check].mend


def test_a_program_that_hangs(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(programs, "nbdkit", "exec sleep 60")
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setattr(checks, "LIMIT", 0.2)
    assert next(checks.nbdkit()).level == FAIL


def test_a_broken_configuration(horcrux_host: Path) -> None:
    horcrux_host.mkdir()
    (horcrux_host / "config.toml").write_text("[cash]")
    found = next(checks.settings())
    assert found.level == FAIL
    assert "cash" in found.what


def test_little_room(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HORCRUX_ROOT", str(small_disk / "root"))
    found = {one.check: one for one in checks.room()}
    assert found["state"].level == WARN
    (small_disk / "root" / "cache").mkdir(parents=True)
    (small_disk / "config.toml").write_text('[cache]\nsize = "64M"\n')
    monkeypatch.setenv("HORCRUX_CONFIG", str(small_disk / "config.toml"))
    found = {one.check: one for one in checks.room()}
    assert found["cache"].level == WARN
    assert "only" in found["cache"].what


def test_a_clock_in_the_past(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.time, "time", lambda: 86400.0)
    assert next(checks.clock()).level == FAIL


def test_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)

    def look() -> dict[str, str]:
        return {one.check: one.level for one in checks._ssh()}

    assert look()["ssh agent"] == WARN
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "id_ed25519.pub").touch()
    (tmp_path / ".ssh" / "known_hosts").touch()
    assert look() == {"ssh agent": OK, "known_hosts": OK}


@pytest.fixture
def broken_volume(made_repository: Path, horcrux_host: Path) -> Iterator[str]:
    run("create", "amcc", made_repository, "AMCC")
    state = horcrux_host / "root" / "volumes" / "amcc" / "volume.json"
    state.write_text("{")
    return "amcc"


def test_a_broken_volume(broken_volume: str) -> None:
    found = [one for one in checks.volumes() if one.check == "volume"]
    assert len(found) == 1
    assert broken_volume in found[0].what


def test_not_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    found = {one.check: one for one in checks.attaching()}
    assert found["root"].level == WARN
    assert FAIL not in {one.level for one in found.values()}


def test_the_python_that_runs_is_named() -> None:
    found = {one.check: one for one in checks.nbdkit()}
    assert f"{sys.version_info[0]}.{sys.version_info[1]}" in found["python"].what

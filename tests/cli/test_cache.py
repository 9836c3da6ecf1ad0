"""`cache`: what it says is what is there, and damage in it is found, named and never served."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from .support import fails, run


def entries(host: Path) -> list[Path]:
    return [path for path in (host / "root" / "cache").rglob("*/*/*") if path.is_file()]


def read_all(uri: str) -> bytes:
    """The whole device, by a client of another make."""
    return subprocess.run(["nbdcopy", uri, "-"], check=True, capture_output=True, timeout=60).stdout


@pytest.fixture
def filled(volume: str, horcrux_host: Path) -> Path:
    """A host whose cache has all of a volume, which is served."""
    read_all(run("serve", volume).out.strip())
    assert entries(horcrux_host)
    return horcrux_host


def test_nothing_cached(horcrux_host: Path) -> None:
    """Looking makes nothing."""
    assert run("cache", "ls", "--json").json == []
    assert run("cache", "size", "--json").json["bytes"] == 0
    for command in ("trim", "clear"):
        assert run("cache", command, "--json").json == {"removed_bytes": 0}
    assert not (horcrux_host / "root").exists()


def test_ls_and_size(filled: Path) -> None:
    files = entries(filled)
    listed = run("cache", "ls", "-n", "0", "--json").json
    assert {entry["id"] for entry in listed} == {path.name for path in files}
    assert {entry["kind"] for entry in listed} == {"chunks", "meta"}
    assert set(listed[0]) == {"id", "kind", "size", "used"}
    size = run("cache", "size", "--json").json
    assert size["bytes"] == sum(path.stat().st_size for path in files)
    assert size["chunks"]["count"] + size["meta"]["count"] == len(files)
    assert size["folder"] == str(filled / "root" / "cache")
    assert run("cache", "ls", "-n", "1").out.splitlines()[-1].endswith("-n 0 lists all")
    assert "limit" in run("cache", "size").out


def test_trim_and_clear_while_served(filled: Path, volume: str) -> None:
    """What is evicted is fetched again."""
    uri = run("status", volume, "--json").json["server"]["uri"]
    whole = read_all(uri)
    before = run("cache", "size", "--json").json["bytes"]
    removed = run("cache", "trim", "1M", "--json").json["removed_bytes"]
    after = run("cache", "size", "--json").json["bytes"]
    assert after <= 1 << 20
    assert removed == before - after > 0
    assert "removed" in run("cache", "clear").out
    assert run("cache", "size", "--json").json["bytes"] == 0
    assert read_all(uri) == whole


def test_damage_is_found_and_never_served(filled: Path, volume: str) -> None:
    """Every cached file is altered: the next server finds it, names it, and fetches it again."""
    whole = read_all(run("status", volume, "--json").json["server"]["uri"])
    run("detach", volume)
    for path in entries(filled):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 0xFF
        path.write_bytes(data)
        damaged = path.name
    assert read_all(run("serve", volume).out.strip()) == whole
    log = (filled / "run" / volume / "nbdkit.log").read_text()
    assert damaged in log
    assert "is damaged" in log


def test_the_configured_limit(filled: Path) -> None:
    (filled / "config.toml").write_text('[cache]\nsize = "64M"\n')
    assert run("cache", "size", "--json").json["limit"] == 64 << 20
    (filled / "config.toml").write_text('[cache]\nsice = "64M"\n')
    assert "cache.sice" in fails(2, "cache", "size")


def test_what_is_no_size() -> None:
    assert "is no size" in fails(2, "cache", "trim", "much")

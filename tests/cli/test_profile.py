"""Profiles as a user handles them: recorded of a mounted volume, shown, used, removed."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from horcrux_nbd.repository.profiles import of_key

from .support import LIMIT, fails, run


def read_all(uri: str) -> None:
    import subprocess

    words = ["qemu-io", "-f", "raw", "-r", "-c", "read 32M 1M", "-c", "read 0 64k", uri]
    subprocess.run(words, check=True, capture_output=True, timeout=LIMIT)


def progress(volume: str, stage: str) -> dict[str, object]:
    """What the status says of the prefetch once it has come to `stage`."""
    deadline = time.monotonic() + LIMIT
    while True:
        found: dict[str, object] = run("status", volume, "--json").json["prefetch_progress"]
        if found["stage"] == stage:
            return found
        assert time.monotonic() < deadline, found
        time.sleep(0.05)


@pytest.fixture
def own_volume(repository: Path) -> str:
    run("create", "amcc", repository, "AMCC@main~1")
    return "amcc"


def test_record_use_and_remove(repository: Path, own_volume: str, horcrux_host: Path) -> None:
    assert "has no profile" in fails(3, "profile", "show", own_volume)
    assert "not served" in fails(3, "profile", "record", own_volume)
    uri = run("serve", own_volume).out.strip()
    assert "nothing of amcc was read yet" in fails(2, "profile", "record", own_volume)
    read_all(uri)
    made = run("profile", "record", "--json", own_volume).json
    assert of_key(made["key"])
    assert made["count"] >= 1
    chunks = run("profile", "show", "--json", own_volume).json["chunks"]
    assert len(chunks) == made["count"]
    assert "AMCC@" in run("profile", "show", own_volume).out
    run("detach", own_volume)

    # Another host, and the next version: the chunks come by themselves, in one more server.
    (horcrux_host / "root" / "cache").rename(horcrux_host / "old-cache")
    run("create", "later", repository, "AMCC")
    run("serve", "later")
    found = progress("later", "done")
    assert found["profile_chunks"] == made["count"]
    assert run("status", "later", "--json").json["fetched_bytes"] > 0
    run("detach", "later")
    assert run("verify", repository).code == 0

    assert "is removed" in run("profile", "rm", repository, "AMCC@main~1").out
    assert "no profile of its own" in fails(3, "profile", "rm", repository, "AMCC@main~1")


def test_prefetch_is_kept_with_the_volume(repository: Path) -> None:
    run("create", "--prefetch", "all", "--fill-rate", "100M", "amcc", repository, "AMCC")
    found = run("status", "amcc", "--json").json
    assert (found["prefetch"], found["fill_rate"], found["record"]) == ("all", 100 << 20, 0)
    run("serve", "amcc")
    progress("amcc", "done")
    found = run("status", "amcc", "--json").json
    assert found["cached_bytes"] == found["data_bytes"] > 0
    assert "all, at most 100.0 MiB/s: done" in run("status", "amcc").out
    run("detach", "amcc")
    run("serve", "--prefetch", "none", "amcc")
    assert run("status", "amcc", "--json").json["prefetch_progress"]["stage"] == "none"
    run("detach", "amcc")


def test_recorded_by_itself(repository: Path, own_volume: str) -> None:
    uri = run("serve", "--record", "3600", own_volume).out.strip()
    read_all(uri)
    run("detach", own_volume)
    first = run("profile", "show", "--json", own_volume).json
    assert first["count"] >= 1
    uri = run("serve", "--record", "true", own_volume).out.strip()
    run("detach", own_volume)
    assert run("profile", "show", "--json", own_volume).json == first, "one is enough"


def test_wrong_words(repository: Path, own_volume: str) -> None:
    assert "--prefetch" in fails(2, "create", "--prefetch", "some", "x", repository, "AMCC")
    assert "record=soon" in fails(2, "serve", "--record", "soon", own_volume)
    assert "no size" in fails(2, "serve", "--fill-rate", "fast", own_volume)
    assert "no volume" in fails(3, "profile", "record", "nobody")

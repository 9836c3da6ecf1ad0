"""`ls` of repositories and `verify`: what is there, and whether it is sound."""

from __future__ import annotations

import json
import shutil
import socket
import time
from pathlib import Path

import pytest

from horcrux_nbd.repository.records import encode_record

from .support import fails, make_directory, run

VERSION_KEYS = {
    "image", "ref", "kind", "id", "size", "chunk_size", "filesystem", "author", "time", "message",
    "notes", "parents", "problem",
}  # fmt: skip


def objects(repository: Path) -> list[Path]:
    return sorted(path for path in (repository / "objects").rglob("*") if path.is_file())


def largest(repository: Path) -> Path:
    return max(objects(repository), key=lambda path: path.stat().st_size)


def config_of(repository: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((repository / "horcrux.json").read_text())
    return {key: value for key, value in found.items() if key not in ("check", "version")}


# ---- ls


def test_ls(made_repository: Path) -> None:
    text = run("ls", f"cp://{made_repository}").out
    header, row = text.splitlines()
    assert header.split() == ["VERSION", "ID", "SIZE", "CHANGED", "BY", "MESSAGE"]
    assert row.startswith("AMCC@main  ")
    assert row.endswith("  Test  second")  # the name without the mail
    found = run("ls", "--json", "--stored", made_repository).json
    assert len(found) == 1
    assert set(found[0]) == {
        *("url", "id", "chunk_size", "versions", "problem", "stored_bytes", "stored_objects"),
    }
    assert set(found[0]["versions"][0]) == VERSION_KEYS
    assert found[0]["stored_objects"] == len(objects(made_repository))
    assert found[0]["stored_bytes"] == sum(p.stat().st_size for p in objects(made_repository))


def test_ls_of_what_this_host_knows(made_repository: Path, tmp_path: Path) -> None:
    """Without REPO: remotes and the repositories of volumes, each once; one that is away is told
    and keeps no other from being listed.
    """
    assert "remote" in fails(2, "ls")
    assert run("ls", "--json").json == []
    run("create", "amcc", made_repository, "AMCC")
    assert "AMCC@main" in run("ls").out
    run("remote", "add", "team", made_repository)
    run("remote", "add", "away", tmp_path / "none")
    result = run("ls", "--json", ok=False)
    assert result.code == 3
    by_url = {one["url"]: one for one in result.json}
    assert set(by_url) == {f"cp://{made_repository}", f"cp://{tmp_path}/none"}
    assert by_url[f"cp://{made_repository}"]["versions"][0]["image"] == "AMCC"
    assert "none" in by_url[f"cp://{tmp_path}/none"]["problem"]
    text = run("ls", ok=False)
    assert "(team)" in text.out
    assert "AMCC@main" in text.out


def test_ls_of_a_volume_or_remote(made_repository: Path) -> None:
    run("create", "amcc", made_repository, "AMCC")
    run("remote", "add", "team", made_repository)
    assert run("ls", "amcc").out == run("ls", "team").out == run("ls", made_repository).out
    said = fails(3, "ls", "nothing")
    assert "team" in said
    assert "amcc" in said


def test_a_message_cannot_command_the_terminal(tmp_path: Path) -> None:
    message = "\x1b[2Jred\x1b[31m\nsecond line\u202e"
    source = make_directory(tmp_path / "in")
    run("generate", "-q", "-m", message, "A", source, tmp_path / "repo")
    out = run("ls", tmp_path / "repo").out
    assert "\x1b" not in out
    assert "\u202e" not in out
    assert len(out.splitlines()) == 2
    assert run("ls", "--json", tmp_path / "repo").json[0]["versions"][0]["message"] == message


# ---- bad repositories


def test_no_repository(tmp_path: Path) -> None:
    said = fails(3, "ls", tmp_path)
    assert "holds no Horcrux repository" in said
    assert "horcrux-cli generate" in said
    assert "none" in fails(3, "ls", tmp_path / "none")


def test_a_newer_repository(repository: Path) -> None:
    config = config_of(repository)
    config["format"] = 99
    (repository / "horcrux.json").write_bytes(encode_record(config))
    said = fails(9, "ls", repository)
    assert "newer than this program" in said
    assert "upgrade" in said
    assert "newer" in fails(9, "create", "v", repository, "AMCC")
    assert run("status", "--json").json == []


def test_a_damaged_configuration(repository: Path) -> None:
    (repository / "horcrux.json").write_text("{")
    assert "horcrux.json" in fails(4, "ls", repository)


def test_unknown_images_and_versions(repository: Path) -> None:
    """The ones that there are are named."""
    said = fails(3, "create", "v", repository, "AMC")
    assert "did you mean AMCC?" in said
    said = fails(3, "create", "v", repository, "AMCC@other")
    assert "main" in said
    assert "only 1 version before" in fails(3, "create", "v", repository, "AMCC@main~7")
    assert run("status", "--json").json == []


@pytest.mark.parametrize(
    "url", ["scp://nobody@127.0.0.1:1/x", "minio://127.0.0.1:1/bucket?tls=off"]
)
def test_an_unreachable_host(url: str) -> None:
    env = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "hunter2"}
    said = fails(6, "ls", url, env=env)
    assert "127.0.0.1" in said
    assert "hunter2" not in said


# ---- verify


def test_a_sound_repository(made_repository: Path) -> None:
    for words in ([], ["--data"]):
        result = run("verify", "-q", *words, made_repository)
        assert result.err == ""
        assert result.out.splitlines()[-1] == "no problem found"
    found = run("verify", "-q", "--json", "--data", made_repository).json
    assert found["ok"]
    assert (found["images"], found["versions"], found["problems"]) == (1, 2, [])
    assert found["read_objects"] >= 10
    one = run("verify", "-q", "--json", made_repository, "AMCC@main").json
    assert one["versions"] == 1
    assert run("verify", "-q", "--json", made_repository, "AMCC").json["versions"] == 2


def test_an_altered_object(repository: Path) -> None:
    """Structure only misses it, --data names it and the versions that need it."""
    path = largest(repository)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    assert run("verify", "-q", repository).code == 0
    result = run("verify", "-q", "--json", "--data", repository, ok=False)
    assert result.code == 4
    assert not result.json["ok"]
    assert [problem["key"].split("/")[-1] for problem in result.json["problems"]] == [path.name]
    assert result.json["problems"][0]["affects"][0].startswith("AMCC@")
    text = run("verify", "-q", "--data", repository, ok=False)
    assert path.name in text.out
    assert "has 1 problem" in text.err


@pytest.mark.parametrize("how", ["truncated", "missing", "empty"])
def test_a_truncated_object(repository: Path, how: str) -> None:
    path = largest(repository)
    data = path.read_bytes()
    path.unlink()
    if how != "missing":
        path.write_bytes(data[: len(data) // 2] if how == "truncated" else b"")
    result = run("verify", "-q", "--data", repository, ok=False)
    assert result.code == 4
    assert path.name in result.out


def test_verify_says_what_it_cannot_find(repository: Path) -> None:
    assert "did you mean AMCC?" in fails(3, "verify", "-q", repository, "AMC")
    assert "other" in fails(3, "verify", "-q", repository, "AMCC@other")


def test_a_copy_works_elsewhere(repository: Path, tmp_path: Path) -> None:
    """By any copying program: nothing in it says where it is."""
    shutil.move(repository, tmp_path / "elsewhere")
    assert run("verify", "-q", "--data", tmp_path / "elsewhere").code == 0
    run("create", "amcc", tmp_path / "elsewhere", "AMCC")


def test_a_store_that_hangs() -> None:
    """It takes connections and never answers: told within the limit, not waited for for ever."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        began = time.monotonic()
        port = server.getsockname()[1]
        result = run("ls", f"scp://x@127.0.0.1:{port}/x", ok=False)
        assert result.code == 6
        assert "Traceback" not in result.err
        assert f"127.0.0.1 port {port}" in result.err.splitlines()[-1]
        assert time.monotonic() - began < 45


def test_ls_beside_damage(repository: Path, tmp_path: Path) -> None:
    """A commit that is gone is told in its row; the others are listed, and the exit code is 4."""
    run("generate", "-q", "-s", "64K", "OTHER", make_directory(tmp_path / "in"), repository)
    head = run("ls", "--json", repository).json[0]["versions"][0]["id"]
    (repository / "objects" / head[:2] / head).unlink()
    result = run("ls", "--json", repository, ok=False)
    assert result.code == 4
    first, second = result.json[0]["versions"]
    assert head in first["problem"]
    assert (second["image"], second["problem"]) == ("OTHER", None)
    text = run("ls", repository, ok=False)
    assert text.code == 4
    assert "OTHER@main" in text.out

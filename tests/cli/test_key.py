"""`key` and `generate --encrypt`, as a user meets them: with files, at a terminal, locked out."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import shutil
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ..servers.nbdkit import MISSING, libnbd
from .support import PROGRAM, fails, make_directory, run

WORDS = "correct horse battery"


@pytest.fixture
def key(tmp_path: Path) -> Path:
    run("key", "make", tmp_path / "key")
    return tmp_path / "key"


@pytest.fixture
def encrypted(tmp_path: Path, key: Path) -> Path:
    """An encrypted repository, which this host has unlocked."""
    source = make_directory(tmp_path / "source")
    words = ["-q", "-s", "64K", "--size", "32M", "--encrypt", "--key-file", key]
    made = run("generate", *words, "AMCC", source, tmp_path / "repository")
    assert "this host keeps the key until a reboot" in made.err
    return tmp_path / "repository"


def at_terminal(*words: str | Path, answers: list[str], env: dict[str, str]) -> tuple[int, str]:
    """Run a command at a terminal and answer its prompts; exit code, and all that was shown."""
    main, side = pty.openpty()
    process = subprocess.Popen(
        [PROGRAM, *map(str, words)],
        stdin=side, stdout=side, stderr=side, env={**os.environ, **env}, start_new_session=True,
    )  # fmt: skip
    os.close(side)
    shown = b""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if not select.select([main], [], [], 1)[0]:
            continue
        try:
            data = os.read(main, 4096)
        except OSError:  # the other end was closed
            break
        shown += data
        if answers and data.rstrip().endswith(b":"):
            os.write(main, f"{answers.pop(0)}\n".encode())
    os.close(main)
    return process.wait(30), shown.decode()


def test_generate_with_a_passphrase(tmp_path: Path) -> None:
    source, repo = make_directory(tmp_path / "source"), tmp_path / "repository"
    words = ["generate", "-q", "--size", "32M", "--encrypt", "AMCC", source, repo]
    assert "there is no terminal" in fails(2, *words)
    assert not repo.exists()
    code, shown = at_terminal(*words, answers=[WORDS, WORDS], env={})
    assert code == 0, shown
    assert WORDS not in shown
    run("verify", "--data", repo)
    run("key", "lock", repo)
    assert f"key unlock cp://{repo}" in fails(7, "ls", repo)
    code, shown = at_terminal("key", "unlock", repo, answers=["something else"], env={})
    assert (code, "no key of" in shown) == (7, True)
    fails(7, "ls", repo)
    assert at_terminal("key", "unlock", repo, answers=[WORDS], env={})[0] == 0
    run("ls", repo)
    file = tmp_path / "passphrase"
    file.write_text(WORDS + "\n")
    run("key", "lock", repo)
    run("key", "unlock", "--passphrase-file", file, repo)
    run("ls", repo)


def test_nothing_works_without_the_key(encrypted: Path, key: Path, tmp_path: Path) -> None:
    run("create", "v", encrypted, "AMCC")
    run("key", "lock", encrypted)
    for words in (
        ("ls", encrypted), ("verify", encrypted), ("create", "w", encrypted, "AMCC"),
        ("clone", encrypted, tmp_path / "copy"), ("gc", encrypted), ("log", encrypted),
        ("serve", "v"), ("commit", "v", "-m", "x"), ("push", "v"), ("diff", "v"),
        ("generate", "-q", "AMCC", tmp_path / "source", encrypted),
        ("rm", "v"),
    ):  # fmt: skip
        assert "is encrypted, and this host does not have its key" in fails(7, *map(str, words))
    assert not (tmp_path / "copy").exists()
    assert "encrypted" in str(run("status", "v", "--json").json["problem"])
    # A key file by its path: no prompt, no key in the environment, nothing kept on this host.
    env = {"HORCRUX_KEY_FILE": os.path.relpath(key)}
    run("verify", "--data", encrypted, env=env)
    run("generate", "-q", "AMCC", tmp_path / "source", encrypted, env=env)
    uri = run("serve", "v", "--json", env=env).json["uri"]  # the server finds it by the same path
    with connected(uri) as handle:
        assert handle.pread(2, 1080) == b"\x53\xef"  # of an ext4 superblock
    run("detach", "v")
    fails(7, "ls", encrypted)
    run("rm", "--force", "v")


def test_a_volume_of_an_encrypted_repository(encrypted: Path, key: Path, tmp_path: Path) -> None:
    """Served, written to, committed while the store is away, pushed, read by somebody else."""
    run("create", "v", encrypted, "AMCC")
    served = run("serve", "v", "--json").json
    try:
        with connected(served["uri"]) as handle:
            handle.pwrite(b"canary-canary-" * 10_000, 4 << 20)
            handle.flush()
        away = encrypted.rename(tmp_path / "away")
        run("commit", "v", "-m", "canary-message")
        own = tmp_path_of("volumes") / "v" / "objects"
        assert not holds(own, b"canary")
        away.rename(encrypted)
        run("push", "v")
    finally:
        run("detach", "v")
    assert not holds(encrypted, b"canary")
    assert "canary-message" in run("log", encrypted).out
    run("verify", "--data", encrypted)
    # Somebody else, on a host of his own.
    host = {name: str(tmp_path / "other" / name) for name in ("HORCRUX_ROOT", "HORCRUX_RUN")}
    fails(7, "ls", encrypted, env=host)
    run("key", "unlock", "--keep", "--key-file", key, encrypted, env=host)
    run("create", "w", encrypted, "AMCC", env=host)
    uri = run("serve", "w", "--json", env=host).json["uri"]
    try:
        with connected(uri) as handle:
            assert handle.pread(14, 4 << 20) == b"canary-canary-"
    finally:
        run("detach", "w", env=host)


@contextlib.contextmanager
def connected(uri: str) -> Iterator[Any]:
    nbd = libnbd()
    if nbd is None:
        pytest.skip(MISSING)
    handle = nbd.NBD()
    handle.connect_uri(uri)
    try:
        yield handle
    finally:
        handle.shutdown()


def tmp_path_of(name: str) -> Path:
    return Path(os.environ["HORCRUX_ROOT"]) / name


def holds(folder: Path, word: bytes) -> bool:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return any(word in path.read_bytes() or word in path.name.encode() for path in files)


def test_keys_come_and_go(encrypted: Path, key: Path, tmp_path: Path) -> None:
    new, file = tmp_path / "new", tmp_path / "passphrase"
    run("key", "make", new)
    file.write_text(WORDS)
    before = {p: p.read_bytes() for p in encrypted.rglob("*") if p.is_file()}
    run("key", "add", "--label", "backup", "--new-passphrase-file", file, encrypted)
    listed = run("key", "ls", "--json", encrypted).json
    assert [(one["kind"], one["label"]) for one in listed] == [
        ("file", ""), ("passphrase", "backup")
    ]  # fmt: skip
    assert "backup" in run("key", "ls", encrypted).out
    said = run("key", "change", "--key-file", key, "--new-key-file", new, encrypted).out
    assert listed[0]["key"] in said
    run("key", "lock", encrypted)
    assert "no key of" in fails(7, "key", "unlock", "--key-file", key, encrypted)
    run("key", "unlock", "--passphrase-file", file, encrypted)
    run("verify", "--data", encrypted)
    run("key", "rm", encrypted, listed[1]["key"])
    (left,) = run("key", "ls", "--json", encrypted).json
    assert "last sound key" in fails(2, "key", "rm", encrypted, left["key"])
    run("key", "lock", encrypted)
    run("key", "unlock", "--key-file", new, encrypted)
    # No object was written anew.
    after = {p: p.read_bytes() for p in encrypted.rglob("*") if p.is_file()}
    assert {p for p in before | after if before.get(p) != after.get(p)} <= {
        p for p in before | after if p.parent.name == "keys"
    }


def test_a_master_key_in_a_safe_place(encrypted: Path, tmp_path: Path) -> None:
    run("key", "export", encrypted, tmp_path / "master")
    assert stat.S_IMODE((tmp_path / "master").stat().st_mode) == 0o600
    run("key", "lock", encrypted)
    shutil.rmtree(encrypted / "keys")  # all keys are lost
    run("key", "unlock", "--key-file", tmp_path / "master", encrypted)
    assert "no sound key is left" in run("verify", encrypted, ok=False).out
    run("key", "make", tmp_path / "again")
    run("key", "add", "--new-key-file", tmp_path / "again", encrypted)
    run("verify", "--data", encrypted)


def test_what_cannot_be(tmp_path: Path, encrypted: Path, key: Path, made_repository: Path) -> None:
    for command in ("ls", "unlock", "lock"):
        assert "is not encrypted" in fails(2, "key", command, made_repository)
    source = tmp_path / "source"
    words = ["generate", "-q", "--encrypt", "--key-file", key]
    assert "is not encrypted" in fails(2, *words, "AMCC", source, made_repository)
    fresh = tmp_path / "fresh"
    line = fails(2, "generate", "-q", "--key-file", key, "AMCC", source, fresh)
    assert "say --encrypt" in line
    assert not fresh.exists()
    assert "is there already" in fails(2, "key", "make", key)
    assert "no key file" in fails(2, "key", "unlock", "--key-file", __file__, encrypted)
    both = ["--key-file", key, "--passphrase-file", key]
    assert "not both" in fails(2, "key", "unlock", *both, encrypted)
    assert "has no key" in fails(3, "key", "rm", encrypted, "zz")

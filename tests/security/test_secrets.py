"""No secret is where others look: canaries that are searched for everywhere afterwards."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from ..cli.support import make_directory, run
from ..servers.fixtures import moto_server, s3
from ..servers.moto_s3 import S3Server, write_credentials

__all__ = ["moto_server", "s3"]

AWS = "canaryAwsSecret0123456789"
WORDS = "canary-passphrase-5f0e"


def processes(word: str) -> list[str]:
    """Processes, this one apart, that have `word` in their command line or environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        if int(folder.name) == os.getpid():
            continue
        for name in ("cmdline", "environ"):
            try:
                data = (folder / name).read_bytes()
            except OSError:  # gone
                continue
            if word.encode() in data:
                found.append(f"{name} of {data[:80]!r}")
    return found


def files(folder: Path, word: str) -> list[Path]:
    return [
        path
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink() and word.encode() in path.read_bytes()
    ]


def test_no_secret_anywhere(
    s3: S3Server, tmp_path: Path, horcrux_host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    credentials = write_credentials(tmp_path / "aws", "test", AWS)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(credentials))
    monkeypatch.setenv("HORCRUX_DEBUG", "1")
    monkeypatch.setenv("HORCRUX_LOG", "debug")
    (tmp_path / "words").write_text(WORDS)
    source = make_directory(tmp_path / "source")
    bucket = s3.make_bucket()
    url = s3.url(bucket, "p")
    said = []

    def do(*words: str | Path, ok: bool = True) -> str:
        result = run(*words, ok=ok)
        said.append(result.out + result.err)
        return result.out

    secret = ["--passphrase-file", tmp_path / "words"]
    do("generate", "-q", "--size", "32M", "--encrypt", *secret, "AMCC", source, url)
    do("remote", "add", "team", url)
    do("key", "lock", "team")
    do("ls", "team", ok=False)
    do("key", "unlock", *secret, "team")
    (held,) = (horcrux_host / "run" / "keys").iterdir()
    found = re.search(r"[0-9a-f]{64}", held.read_text())
    assert found is not None
    master = found[0]
    do("create", "v", "team", "AMCC")
    do("serve", "v")
    try:
        do("cat", "v", "small")
        do("commit", "v", "-m", "x", "--allow-empty")
        do("push", "v")
        do("status", "v")
        do("key", "ls", "team")
        do("config")
        do("doctor", "--json", ok=False)
        do("create", "w", f"s3://AKIA:{AWS}@{bucket}", "AMCC", ok=False)  # in a URL: refused
        do("remote", "add", "x", f"scp://me:{AWS}@nas:/x", ok=False)
        do("key", "unlock", "--key-file", tmp_path / "words", "team", ok=False)
        for word in (AWS, WORDS, master):
            assert not processes(word), word
    finally:
        do("detach", "v")
    for word in (AWS, WORDS, master):
        assert word not in "".join(said), word
        left = files(horcrux_host, word)
        assert left == ([held] if word == master else []), (word, left)
    client = s3.client()
    keys = [one["Key"] for one in client.list_objects_v2(Bucket=bucket)["Contents"]]
    everything = [client.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys]
    client.close()
    assert len(everything) > 3
    for word in (AWS, WORDS, master, "hello"):
        assert not any(word.encode() in data for data in everything)
    assert not any(bytes.fromhex(master) in data for data in everything)


def test_the_search_can_find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess

    word = "canary-that-is-there"
    for words, env in ((["sleep", "60", word], {}), (["sleep", "60"], {"X": word})):
        words = ["python3", "-c", "import time; time.sleep(60)", *words[2:]]
        with subprocess.Popen(words, env={**os.environ, **env}) as process:
            try:
                assert processes(word)
            finally:
                process.kill()
    (tmp_path / "log").write_text(json.dumps({"a": word}))
    assert files(tmp_path, word)

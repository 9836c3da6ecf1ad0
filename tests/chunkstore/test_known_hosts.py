"""known_hosts files, checked against ssh-keygen's own reading where it can tell."""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from horcrux_nbd.chunkstore.known_hosts import fingerprint, host_name, read

KEY1, KEY2 = b"\0\0\0\x0bssh-ed25519" + b"1" * 36, b"\0\0\0\x0bssh-ed25519" + b"2" * 36
LINE1, LINE2 = (f"ssh-ed25519 {base64.b64encode(key).decode()}" for key in (KEY1, KEY2))


def write(path: Path, *lines: str) -> list[Path]:
    path.write_text("\n".join(lines) + "\n")
    return [path]


def found(paths: list[Path], name: str) -> set[bytes]:
    return {key for _, key in read(paths, name).trusted}


def test_names() -> None:
    assert host_name("Host", 22) == "host"
    assert host_name("host", 2222) == "[host]:2222"
    assert host_name("::1", 2222) == "[::1]:2222"


def test_plain_lines(tmp_path: Path) -> None:
    paths = write(
        tmp_path / "k", "# comment", "", f"host,other {LINE1} who@where", f"[host]:2222 {LINE2}"
    )
    assert found(paths, "host") == {KEY1}
    assert found(paths, "other") == {KEY1}
    assert found(paths, "[host]:2222") == {KEY2}
    assert found(paths, "third") == set()
    assert found(paths, "hos") == set()
    assert read(paths, "host").types == ["ssh-ed25519"]


def test_patterns_and_negation(tmp_path: Path) -> None:
    paths = write(tmp_path / "k", f"*.example.org,!bad.example.org,h?st {LINE1}", f"[*]:22 {LINE2}")
    assert found(paths, "good.example.org") == {KEY1}
    assert found(paths, "bad.example.org") == set()
    assert found(paths, "host") == {KEY1}
    assert found(paths, "[a]:22") == {KEY2}
    assert found(paths, "a:22") == set()


def test_revoked_and_authorities(tmp_path: Path) -> None:
    paths = write(
        tmp_path / "k", f"host {LINE1}", f"@revoked host {LINE2}", f"@cert-authority * {LINE2}"
    )
    keys = read(paths, "host")
    assert {key for _, key in keys.trusted} == {KEY1}
    assert keys.revoked == {KEY2}


def test_rubbish_says_nothing(tmp_path: Path) -> None:
    path = tmp_path / "k"
    path.write_bytes(
        b"host\nhost ssh-ed25519\nhost ssh-ed25519 !!!\n\xff\xfe\n|1|x|y z w\n|1| a b\n"
    )
    assert read([path, tmp_path / "missing", path / "below"], "host").trusted == frozenset()


def test_several_files(tmp_path: Path) -> None:
    paths = write(tmp_path / "a", f"host {LINE1}") + write(tmp_path / "b", f"host {LINE2}")
    assert found(paths, "host") == {KEY1, KEY2}


@pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="needs ssh-keygen (openssh-client)")
def test_hashed_by_ssh_keygen(tmp_path: Path) -> None:
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    public = " ".join(key.with_suffix(".pub").read_text().split()[:2])
    blob = base64.b64decode(public.split()[1])
    paths = write(tmp_path / "k", f"host {public}", f"[127.0.0.1]:2222 {public}")
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", paths[0]], check=True, capture_output=True)
    assert "host" not in paths[0].read_text()
    assert found(paths, "host") == {blob}
    assert found(paths, "[127.0.0.1]:2222") == {blob}
    assert found(paths, "127.0.0.1") == set()
    shown = subprocess.run(
        ["ssh-keygen", "-l", "-f", key.with_suffix(".pub")],
        check=True,
        capture_output=True,
        text=True,
    )
    assert fingerprint(blob) == shown.stdout.split()[1]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be another user")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    paths = write(tmp_path / "k", f"host {LINE1}")
    paths[0].chmod(0)
    pid = os.fork()
    if pid == 0:
        os.setuid(65534)
        os._exit(1 if read(paths, "host").trusted else 0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

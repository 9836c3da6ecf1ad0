"""SSH settings, host keys and authentication, against a real sshd."""

from __future__ import annotations

import base64
import getpass
import os
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from horcrux_nbd.chunkstore import open_store, parse_store_url
from horcrux_nbd.chunkstore import ssh as ssh_module
from horcrux_nbd.errors import StoreError, StoreRefused, StoreUnavailable

from ..servers.moto_s3 import S3Server
from ..servers.process import free_port
from ..servers.sshd import Sshd, make_key, ssh_agent, sshd

# ---- settings -----------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "config"
    path.write_text("")
    monkeypatch.setenv("HORCRUX_SSH_CONFIG", str(path))
    monkeypatch.setenv("HOME", str(tmp_path))
    return path


def settings(url: str) -> ssh_module.Settings:
    return ssh_module.read_settings(parse_store_url(url))


def test_defaults(config: Path, tmp_path: Path) -> None:
    found = settings("scp://host:/x")
    assert (found.host, found.port, found.user) == ("host", 22, getpass.getuser())
    assert found.known_hosts[0] == tmp_path / ".ssh/known_hosts"
    assert Path("/etc/ssh/ssh_known_hosts") in found.known_hosts
    assert not found.identities
    assert not found.proxy


def test_config_fills_what_the_url_leaves_out(config: Path, tmp_path: Path) -> None:
    config.write_text(
        "Host kural\n  HostName kural.example.org\n  Port 2222\n  User muthu\n"
        "  IdentityFile ~/one\n  IdentityFile /two\n  IdentitiesOnly yes\n"
        "  UserKnownHostsFile ~/known /other\n  HostKeyAlias Alias\n"
        "Host *\n  User somebody\n  Port 1\n"
    )
    found = settings("scp://kural:/x")
    assert (found.host, found.port, found.user) == ("kural.example.org", 2222, "muthu")
    assert found.identities == (tmp_path / "one", Path("/two"))
    assert found.identities_only
    assert found.known_hosts[:2] == (tmp_path / "known", Path("/other"))
    assert found.known_name == "alias"
    found = settings("scp://root@kural:22/x")
    assert (found.host, found.port, found.user) == ("kural.example.org", 22, "root")


def test_include(config: Path, tmp_path: Path) -> None:
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d/b").write_text("Host h\n  Port 3\n")
    (tmp_path / "conf.d/a").write_text("Include conf.d/nothing-*\nHost h\n  Port 2\n  User u\n")
    config.write_text("Include conf.d/*\nHost *\n  User last\n")
    found = settings("scp://h:/x")
    assert (found.port, found.user) == (2, "u")
    config.write_text(f"Include {config}\nHost *\n  User loops\n")
    assert settings("scp://h:/x").user == "loops"


def test_proxies(config: Path) -> None:
    config.write_text("Host *\n  ProxyCommand nc %h %p\n")
    assert settings("scp://h:7/x").proxy == ("/bin/sh", "-c", "exec nc h 7")
    config.write_text("Host *\n  ProxyCommand none\n")
    assert settings("scp://h:7/x").proxy == ()
    config.write_text("Host *\n  ProxyJump a,me@b:2222\n")
    assert settings("scp://h:7/x").proxy == (
        "ssh", "-F", str(config), "-o", "BatchMode=yes", "-J", "a", "-p", "2222",
        "-W", "h:7", "--", "me@b",
    )  # fmt: skip


def test_a_config_that_is_none(config: Path) -> None:
    config.write_text("Host\x00 what is\nthis\n")
    with pytest.raises(StoreError, match="cannot use the SSH configuration") as caught:
        settings("scp://h:/x")
    assert "\n" not in str(caught.value)
    config.unlink()
    with pytest.raises(StoreError, match="No such file"):
        settings("scp://h:/x")


# ---- host keys ----------------------------------------------------------------------------------


def refused(url: str) -> str:
    with pytest.raises(StoreRefused) as caught:
        open_store(url)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def known(ssh: Sshd, tmp_path: Path) -> Path:
    """A known_hosts of the test's own, empty, that the client uses."""
    path = tmp_path / "known_hosts"
    path.write_text("")
    ssh.write_config(UserKnownHostsFile=path)
    return path


def public(path: Path) -> str:
    return " ".join(path.with_suffix(".pub").read_text().split()[:2])


def test_an_unknown_host_key(ssh: Sshd, known: Path, tmp_path: Path) -> None:
    message = refused(ssh.url(tmp_path))
    assert (
        f"the host key of [127.0.0.1]:{ssh.port} is not known (it shows ed25519 SHA256:" in message
    )
    assert f"logging in once: ssh -F {ssh.config} -p {ssh.port} {ssh.user}@127.0.0.1" in message
    assert known.read_text() == ""  # never added to


def test_a_changed_host_key(ssh: Sshd, known: Path, tmp_path: Path) -> None:
    other = make_key(tmp_path / "other")
    known.write_text(f"[127.0.0.1]:{ssh.port} {public(other)}\n")
    message = refused(ssh.url(tmp_path))
    assert "has changed" in message
    assert f"ssh-keygen -R '[127.0.0.1]:{ssh.port}' -f {known}" in message
    assert public(other) in known.read_text()


def test_a_key_of_another_type_only(ssh: Sshd, known: Path, tmp_path: Path) -> None:
    """A server that hides the known type is as suspect as one with another key."""
    known.write_text(f"[127.0.0.1]:{ssh.port} {public(make_key(tmp_path / 'k', 'ecdsa'))}\n")
    assert "has changed" in refused(ssh.url(tmp_path))


def test_a_revoked_host_key(ssh: Sshd, known: Path, tmp_path: Path) -> None:
    line = f"[127.0.0.1]:{ssh.port} {public(ssh.host_key)}\n"
    known.write_text(line + f"@revoked {line}")
    assert "revoked" in refused(ssh.url(tmp_path))


def test_a_host_key_for_another_port_does_not_count(ssh: Sshd, known: Path, tmp_path: Path) -> None:
    known.write_text(f"127.0.0.1 {public(ssh.host_key)}\n[127.0.0.1]:1 {public(ssh.host_key)}\n")
    assert "is not known" in refused(ssh.url(tmp_path))


def test_a_hashed_host_key(ssh: Sshd, known: Path, tmp_path: Path) -> None:
    import hashlib
    import hmac

    salt, name = os.urandom(20), f"[127.0.0.1]:{ssh.port}".encode()
    digest = hmac.new(salt, name, hashlib.sha1).digest()
    hashed = "|".join(["", "1", *(base64.b64encode(part).decode() for part in (salt, digest))])
    known.write_text(f"{hashed} {public(ssh.host_key)}\n")
    open_store(ssh.url(tmp_path)).close()


def test_host_key_alias(ssh: Sshd, known: Path, tmp_path: Path) -> None:
    known.write_text(f"the-server {public(ssh.host_key)}\n")
    ssh.write_config(UserKnownHostsFile=known, HostKeyAlias="The-Server")
    open_store(ssh.url(tmp_path)).close()


def test_the_type_that_is_known_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server with several keys shows its favourite, unless it is asked for another."""
    extra = "\n".join(f"HostKey {make_key(tmp_path / kind, kind)}" for kind in ("ecdsa", "rsa"))
    with sshd(tmp_path / "sshd", extra=extra) as server:
        monkeypatch.setenv("HORCRUX_SSH_CONFIG", str(server.config))
        for path in (tmp_path / "rsa", tmp_path / "ecdsa", server.host_key):
            server.known_hosts.write_text(f"[127.0.0.1]:{server.port} {public(path)}\n")
            open_store(server.url(tmp_path)).close()


# ---- authentication -----------------------------------------------------------------------------


def test_no_key_is_let_in(ssh: Sshd, tmp_path: Path) -> None:
    stranger = make_key(tmp_path / "stranger")
    ssh.write_config(IdentityFile=stranger)
    message = refused(ssh.url(tmp_path))
    assert f"refused every key for user {ssh.user} (tried {stranger})" in message
    assert "ssh-copy-id" in message


def test_no_key_at_all(ssh: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    ssh.write_config(IdentityFile=None, IdentitiesOnly=None)
    assert "there was none to try" in refused(ssh.url(tmp_path))


def test_default_key_files(ssh: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    key = tmp_path / ".ssh/id_ed25519"
    key.write_bytes(ssh.user_key.read_bytes())
    key.chmod(stat.S_IRUSR)
    make_key(tmp_path / ".ssh/id_rsa", "rsa")
    ssh.write_config(IdentityFile=None, IdentitiesOnly=None)
    open_store(ssh.url(tmp_path)).close()


def test_no_such_user(ssh: Sshd, tmp_path: Path) -> None:
    url = ssh.url(tmp_path).replace(f"{ssh.user}@", "nobody-at-all@")
    assert "refused every key for user nobody-at-all" in refused(url)


def test_a_locked_key_and_the_agent(
    ssh: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked = make_key(tmp_path / "locked", passphrase="open sesame")
    ssh.write_config(IdentityFile=locked)
    message = refused(ssh.url(tmp_path))
    assert f"ssh-add {locked}" in message
    assert "sesame" not in message
    with ssh_agent(tmp_path, ssh.user_key) as agent:
        monkeypatch.setenv("SSH_AUTH_SOCK", agent)
        # The agent's key is not one of those that the config names.
        assert "refused every key" in refused(ssh.url(tmp_path))
        ssh.write_config(IdentityFile=locked, IdentitiesOnly="no")
        open_store(ssh.url(tmp_path)).close()
        # The agent holds the key whose public half is the identity file.
        ssh.write_config(IdentityFile=ssh.user_key.with_suffix(".pub"))
        open_store(ssh.url(tmp_path)).close()


def test_a_key_file_that_is_none(
    ssh: Sshd, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "rubbish").write_text("no key\n")
    ssh.write_config(IdentityFile=f"{tmp_path}/rubbish\n  IdentityFile {ssh.user_key}")
    open_store(ssh.url(tmp_path)).close()
    assert "cannot use the key" in caplog.text


# ---- reaching -----------------------------------------------------------------------------------


def unavailable(url: str) -> str:
    with pytest.raises(StoreUnavailable) as caught:
        open_store(url, limit=2)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_nobody_listens(ssh: Sshd, tmp_path: Path) -> None:
    port = free_port()
    message = unavailable(ssh.url(tmp_path, port))
    assert f"cannot connect to 127.0.0.1 port {port}: Connection refused" in message


def test_no_such_host(config: Path) -> None:
    assert "host name there-is-no.invalid cannot be resolved" in unavailable(
        "scp://there-is-no.invalid:/x"
    )


def test_what_listens_is_no_ssh(ssh: Sshd, tmp_path: Path, s3: S3Server) -> None:
    assert "no SSH connection" in unavailable(ssh.url(tmp_path, s3.port))


CONNECT = """
import os, socket, sys, threading

def carry(read, write):
    while data := read():
        write(data)

sock = socket.create_connection((sys.argv[1], int(sys.argv[2])))
back = threading.Thread(
    target=carry, args=(lambda: sock.recv(65536), lambda data: os.write(1, data)), daemon=True
)
back.start()
carry(lambda: os.read(0, 65536), sock.sendall)
"""


def test_proxy_command(ssh: Sshd, tmp_path: Path) -> None:
    # The name cannot be resolved, so it is the proxy's connection that was used.
    script = tmp_path / "connect.py"
    script.write_text(CONNECT)
    ssh.write_config(ProxyCommand=f"/usr/bin/env python3 {script} 127.0.0.1 %p", HostKeyAlias="h")
    with ssh.known_hosts.open("a") as file:
        file.write(f"h {public(ssh.host_key)}\n")
    url = ssh.url(tmp_path).replace("127.0.0.1", "there-is-no.invalid")
    with open_store(url) as store:
        store.put("a", b"x" * 3_000_000)
        assert store.get("a") == b"x" * 3_000_000


def test_proxy_jump(ssh: Sshd, tmp_path: Path) -> None:
    config = ssh.write_config(HostKeyAlias="h", User=ssh.user)
    with ssh.known_hosts.open("a") as file:
        file.write(f"h {public(ssh.host_key)}\n")
    rest = config.read_text()
    config.write_text(
        f"Host target\n  HostName 127.0.0.1\n  ProxyJump 127.0.0.1:{ssh.port}\n{rest}"
    )
    with open_store(ssh.url(tmp_path).replace("127.0.0.1", "target")) as store:
        store.put("a", b"1")
        assert store.get("a") == b"1"


def test_a_proxy_command_that_fails(ssh: Sshd, tmp_path: Path) -> None:
    ssh.write_config(ProxyCommand="sh -c 'echo the proxy says no >&2; exit 1'")
    assert "the proxy says no" in unavailable(ssh.url(tmp_path))


def test_no_traceback_is_printed(ssh: Sshd, tmp_path: Path, known: Path, s3: S3Server) -> None:
    """paramiko logs tracebacks to stderr where nobody set up logging, as pytest has."""
    code = """
import sys
from horcrux_nbd.chunkstore import open_store
from horcrux_nbd.errors import StoreError
for url in sys.argv[1:]:
    try:
        open_store(url, limit=1)
    except StoreError:
        print("refused")
"""
    urls = [ssh.url(tmp_path), ssh.url(tmp_path, free_port()), ssh.url(tmp_path, s3.port)]
    done = subprocess.run(
        [sys.executable, "-c", code, *urls], capture_output=True, timeout=60, check=True
    )
    assert done.stdout.split() == [b"refused"] * 3
    # Our own warnings, that it is being tried again, are one line each.
    assert all(line.startswith(b"scp://") for line in done.stderr.splitlines()), done.stderr


def test_a_write_to_a_peer_that_reads_nothing_ends() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(0.05)  # as paramiko sets it
        packetizer = ssh_module._BoundedPacketizer(ours)
        packetizer.limit = 0.3
        began = time.monotonic()
        with pytest.raises(EOFError):
            packetizer.write_all(bytes(50 << 20))
        assert 0.2 < time.monotonic() - began < 10

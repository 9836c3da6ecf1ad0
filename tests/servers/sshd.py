"""A real OpenSSH server with its own port, host key and user key; it serves whoever runs it."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .process import free_port, server, stop

MISSING = "needs sshd and ssh-keygen: apt-get install openssh-server openssh-client"


def find_sshd() -> str | None:
    """The path of sshd (often in /usr/sbin, which is on no user's PATH), or None."""
    return shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


def find_sftp_server() -> str | None:
    """The path of the sftp-server program, which is on no PATH, or None."""
    folders = ("/usr/lib/openssh", "/usr/libexec/openssh", "/usr/lib/ssh", "/usr/libexec")
    return shutil.which("sftp-server", path=":".join(folders))


def available() -> bool:
    return bool(find_sshd() and shutil.which("ssh-keygen"))


def make_key(path: Path, kind: str = "ed25519", passphrase: str = "") -> Path:
    """A new key pair at `path` and `path`.pub."""
    subprocess.run(
        ["ssh-keygen", "-q", "-t", kind, "-N", passphrase, "-C", "test", "-f", path], check=True
    )
    return path


@dataclass
class Sshd:
    """A running server. `config` is a client's configuration that trusts and enters it."""

    folder: Path
    port: int
    user: str
    host_key: Path
    user_key: Path
    config: Path
    known_hosts: Path
    log: Path

    def url(self, path: Path | str, port: int | None = None) -> str:
        """The store URL of a folder; by another `port` where a proxy stands in front."""
        return f"scp://{self.user}@127.0.0.1:{port or self.port}{path}"

    def trust(self, port: int) -> None:
        """Let `known_hosts` know the host key on `port` too."""
        key = " ".join(self.host_key.with_suffix(".pub").read_text().split()[:2])
        with self.known_hosts.open("a") as file:
            file.write(f"[127.0.0.1]:{port} {key}\n")

    def write_config(self, **options: object) -> Path:
        """Write `config`; options replace the defaults, None leaves one out."""
        settings: dict[str, object] = {
            "IdentityFile": self.user_key,
            "IdentitiesOnly": "yes",
            "UserKnownHostsFile": self.known_hosts,
            "GlobalKnownHostsFile": "/dev/null",
            **options,
        }
        lines = [f"  {key} {value}\n" for key, value in settings.items() if value is not None]
        self.config.write_text("Host *\n" + "".join(lines))
        return self.config


@contextlib.contextmanager
def sshd(
    folder: Path | None = None, *, sftp: str = "internal-sftp", extra: str = ""
) -> Iterator[Sshd]:
    """A server with its files in `folder`; `extra` lines go into sshd_config.

    Clients find it with the environment variable HORCRUX_SSH_CONFIG set to `.config`.
    """
    with contextlib.ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="horcrux-sshd-")))
        folder.mkdir(parents=True, exist_ok=True)
        port = free_port()
        host_key = make_key(folder / "host_key")
        user_key = make_key(folder / "user_key")
        authorized = folder / "authorized_keys"
        authorized.write_text(user_key.with_suffix(".pub").read_text())
        made = Sshd(
            folder, port, getpass.getuser(), host_key, user_key,
            folder / "ssh_config", folder / "known_hosts", folder / "sshd.log",
        )  # fmt: skip
        made.trust(port)
        made.write_config()
        config = folder / "sshd_config"
        config.write_text(
            f"ListenAddress 127.0.0.1\nPort {port}\nHostKey {host_key}\nPidFile {folder}/pid\n"
            f"AuthorizedKeysFile {authorized}\nStrictModes no\nUsePAM no\nPermitRootLogin yes\n"
            "PasswordAuthentication no\nKbdInteractiveAuthentication no\n"
            # Tests open many connections at once; the default drops some beyond ten.
            "MaxStartups 100\nPrintMotd no\nLogLevel VERBOSE\n"
            f"Subsystem sftp {sftp}\n{extra}\n"
        )
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)  # where sshd as root locks up its helper
        program = find_sshd()
        if program is None:
            raise RuntimeError(MISSING)
        # -D keeps it in the foreground; its sessions leave its process group, so they are ended
        # by their connections' end.
        stack.enter_context(server([program, "-D", "-e", "-f", config], port, made.log))
        yield made


@contextlib.contextmanager
def ssh_agent(folder: Path, *keys: Path) -> Iterator[str]:
    """An ssh-agent that holds `keys`; the path of its socket, for SSH_AUTH_SOCK."""
    path = folder / "agent.sock"
    process = subprocess.Popen(
        ["ssh-agent", "-D", "-a", path], stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        for _ in range(500):
            if path.exists():
                break
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.01)
        for key in keys:
            subprocess.run(
                ["ssh-add", "-q", key], check=True, env={**os.environ, "SSH_AUTH_SOCK": str(path)}
            )
        yield str(path)
    finally:
        stop(process)

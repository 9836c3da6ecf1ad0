"""SSH connections: settings of ~/.ssh/config, the host key's check, and authentication.

paramiko carries the protocol. Its `SSHClient` is not used: it asks the server for one type of host
key only, adds keys where a policy says so, and prints tracebacks.
"""

from __future__ import annotations

import contextlib
import getpass
import glob
import logging
import os
import shlex
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ..errors import StoreError, StoreRefused, StoreUnavailable
from . import known_hosts
from .light import allow_exec, paramiko
from .url import StoreURL

KEEPALIVE = 30  # seconds; NAT tables forget idle connections after a few minutes
WINDOW = 8 << 20  # bytes under way to us on one channel: 100 MB/s over 80 ms
# Bytes in one SSH packet to us. paramiko's cost is per packet; OpenSSH sends up to this and no
# packet of it is above 256 KiB.
PACKET = 128 << 10
DEFAULT_KEYS = ("id_ed25519", "id_ecdsa", "id_rsa")
# CTR with an encrypt-then-MAC pair needs two passes over the data in Python; GCM needs one.
CIPHERS = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com", "aes128-ctr", "aes256-ctr")
MANY_KEYS = 4  # a server that hangs up after so many had enough (OpenSSH's MaxAuthTries is 6)
_CONFIG_ENV = "HORCRUX_SSH_CONFIG"
_INCLUDE_DEPTH = 16  # as in OpenSSH

# paramiko reports what it also raises, with tracebacks, on the "last resort" handler: stderr.
_CHANNEL = "horcrux_nbd.paramiko"
logging.getLogger(_CHANNEL).setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class Settings:
    """How to reach one server: the URL first, then ~/.ssh/config, then OpenSSH's defaults."""

    url: str
    alias: str  # the host as the URL has it
    host: str
    port: int
    user: str
    identities: tuple[Path, ...] = ()
    identities_only: bool = False
    known_hosts: tuple[Path, ...] = ()
    host_key_alias: str = ""
    proxy: tuple[str, ...] = ()  # a command whose standard input and output are the connection
    ssh_options: str = ""  # for messages that show a command: "-F file -p 2222 "

    @property
    def known_name(self) -> str:
        return self.host_key_alias or known_hosts.host_name(self.host, self.port)


def read_settings(url: StoreURL) -> Settings:
    """Settings for `url`; raises StoreError for a config file that cannot be read."""
    override = os.environ.get(_CONFIG_ENV)
    files = [Path(override)] if override else [Path("~/.ssh/config"), Path("/etc/ssh/ssh_config")]
    config = paramiko.SSHConfig()
    # Before all files, as the first value found counts; and what is made of them (%p) uses it too.
    given = [f"Port {url.port}\n"] * bool(url.port) + [f"User {url.user}\n"] * bool(url.user)
    config.parse(["Host *\n", *given])
    try:
        for path in files:
            config.parse(_expanded(path.expanduser(), required=bool(override)))
        found = config.lookup(url.host)
    except (OSError, paramiko.SSHException, UnicodeDecodeError, ImportError) as error:
        raise StoreError(f"{url}: cannot use the SSH configuration: {error}") from error
    port = _number(found.get("port"), known_hosts.SSH_PORT)
    user = found.get("user") or getpass.getuser()
    host = found.get("hostname", url.host)
    identities = tuple(Path(path).expanduser() for path in found.get("identityfile", []))
    files_known = found.get("userknownhostsfile", "~/.ssh/known_hosts ~/.ssh/known_hosts2")
    files_global = found.get("globalknownhostsfile", "/etc/ssh/ssh_known_hosts")
    options = f"-F {shlex.quote(override)} " if override else ""
    return Settings(
        url=str(url),
        alias=url.host,
        host=host,
        port=port,
        user=user,
        identities=identities,
        identities_only=found.get("identitiesonly", "no").lower() == "yes",
        known_hosts=tuple(
            Path(path).expanduser() for path in shlex.split(f"{files_known} {files_global}")
        ),
        host_key_alias=found.get("hostkeyalias", "").lower(),
        proxy=_proxy(found, override, host, port),
        ssh_options=f"{options}{f'-p {url.port} ' if url.port else ''}",
    )


def _number(text: str | None, default: int) -> int:
    return int(text) if text and text.isdigit() else default


def _expanded(path: Path, *, required: bool, depth: int = 0) -> Iterator[str]:
    """The lines of a config file with `Include` done, which paramiko passes over."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        if required:
            raise
        return
    for line in text.splitlines():
        keyword, _, value = line.strip().replace("=", " ", 1).partition(" ")
        if keyword.lower() == "match" and "exec" in value.lower():
            allow_exec()
        if keyword.lower() != "include":
            yield line + "\n"
        elif depth < _INCLUDE_DEPTH:
            for pattern in shlex.split(value):
                full = path.parent / Path(pattern).expanduser()
                for name in sorted(glob.glob(str(full))):
                    yield from _expanded(Path(name), required=False, depth=depth + 1)


def _proxy(
    found: paramiko.SSHConfigDict, override: str | None, host: str, port: int
) -> tuple[str, ...]:
    """The command of ProxyCommand, or one that does what ProxyJump asks; empty for neither."""
    jump = found.get("proxyjump", "none")
    if jump.lower() != "none":
        *before, last = jump.split(",")
        command = ["ssh", *(["-F", override] if override else []), "-o", "BatchMode=yes"]
        if before:
            command += ["-J", ",".join(before)]
        target = last.removeprefix("ssh://")
        name, colon, number = target.rpartition(":")
        if colon and number.isdigit() and not name.endswith(":"):
            command += ["-p", number]
            target = name
        return (
            *command,
            "-W",
            f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
            "--",
            target,
        )
    text = found.get("proxycommand") or "none"
    # OpenSSH hands it to the shell; so do we, it is the user's own file.
    return ("/bin/sh", "-c", f"exec {text}") if text.lower() != "none" else ()


class _BoundedPacketizer(paramiko.packet.Packetizer):
    """A packetizer whose writes end. paramiko's own tries for ever while the peer reads nothing."""

    limit = 15.0

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self._sock = sock

    def write_all(self, out: Any) -> None:
        view = memoryview(out)
        last = time.monotonic()
        while view:
            try:
                sent = self._sock.send(view)
            except TimeoutError:
                if self.closed or time.monotonic() - last > self.limit:
                    raise EOFError from None
                continue
            except OSError:
                raise EOFError from None
            view = view[sent:]
            last = time.monotonic()


@dataclass
class Connection:
    """One authenticated connection. Channels for SFTP are opened on it."""

    transport: paramiko.Transport
    proxy: subprocess.Popen[bytes] | None = None
    _errors: IO[bytes] | None = field(default=None, repr=False)

    @property
    def alive(self) -> bool:
        return self.transport.is_active()

    def close(self) -> None:
        self.transport.close()
        _end(self.proxy)
        if self._errors:
            self._errors.close()


def _end(process: subprocess.Popen[bytes] | None) -> None:
    """A proxy command ends when its input does; one that does not is killed."""
    if process is None:
        return
    try:
        process.wait(1)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextlib.contextmanager
def bounded(transport: paramiko.Transport, seconds: float) -> Iterator[None]:
    """Close `transport` if the block takes longer: some calls of paramiko wait without a limit."""
    timer = threading.Timer(seconds, transport.close)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def connect(settings: Settings, timeout: float) -> Connection:
    """A connection that is encrypted, to the host that it should be, and logged in.

    `timeout`: seconds for each of: reaching the host, all of the rest. Raises StoreUnavailable,
    StoreRefused (host key, authentication).
    """
    url = settings.url
    errors = process = None
    if settings.proxy:
        sock, process, errors = _through_proxy(settings)
    else:
        sock = _reach(settings, timeout)
    connection: Connection | None = None
    try:
        packetizer = type("_Packetizer", (_BoundedPacketizer,), {"limit": timeout})
        transport = paramiko.Transport(
            sock,
            default_window_size=WINDOW,
            default_max_packet_size=PACKET,
            packetizer_class=packetizer,
        )
        transport.daemon = True
        connection = Connection(transport, process, errors)
        transport.set_log_channel(_CHANNEL)
        transport.banner_timeout = transport.handshake_timeout = transport.auth_timeout = timeout
        transport.clear_to_send_timeout = transport.channel_timeout = timeout
        with bounded(transport, timeout):
            _login(transport, settings, timeout)
        transport.set_keepalive(KEEPALIVE)
    except StoreError:
        _discard(connection, sock)
        raise
    except (paramiko.SSHException, OSError, EOFError) as error:
        why = _last_line(errors) or str(error) or "the connection was closed"
        _discard(connection, sock)
        raise StoreUnavailable(
            f"{url}: no SSH connection to {settings.host} port {settings.port}: {why}"
        ) from error
    except BaseException:
        _discard(connection, sock)
        raise
    return connection


def _discard(connection: Connection | None, sock: socket.socket) -> None:
    if connection:
        connection.close()
    sock.close()


def _reach(settings: Settings, timeout: float) -> socket.socket:
    where = f"{settings.host} port {settings.port}"
    try:
        sock = socket.create_connection((settings.host, settings.port), timeout)
    except socket.gaierror as error:
        raise StoreUnavailable(
            f"{settings.url}: the host name {settings.host} cannot be resolved ({error.strerror})"
        ) from error
    except OSError as error:
        why = error.strerror or "no answer"
        raise StoreUnavailable(
            f"{settings.url}: cannot connect to {where}: {why}: is sshd running there?"
        ) from error
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # A peer that vanished makes the kernel end the connection, not only our own waiting.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(timeout * 1000))
    return sock


def _through_proxy(
    settings: Settings,
) -> tuple[socket.socket, subprocess.Popen[bytes], IO[bytes]]:
    ours, theirs = socket.socketpair()
    errors = tempfile.TemporaryFile()
    try:
        process = subprocess.Popen(
            settings.proxy,
            stdin=theirs.fileno(),
            stdout=theirs.fileno(),
            stderr=errors,
            start_new_session=True,  # Ctrl-C is for us to handle
        )
    except OSError as error:
        ours.close()
        errors.close()
        raise StoreError(
            f"{settings.url}: cannot run the proxy command {settings.proxy[0]}: {error.strerror}"
        ) from error
    finally:
        theirs.close()
    return ours, process, errors


def _last_line(errors: IO[bytes] | None) -> str:
    """What a proxy command said last; it says why there is no connection."""
    if errors is None:
        return ""
    errors.seek(0)
    lines = errors.read(64 << 10).decode(errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else ""


def _login(transport: paramiko.Transport, settings: Settings, timeout: float) -> None:
    keys = known_hosts.read(settings.known_hosts, settings.known_name)
    options = transport.get_security_options()
    options.key_types = _host_key_order(tuple(options.key_types), keys.types)
    options.ciphers = [c for c in CIPHERS if c in options.ciphers] + [
        c for c in options.ciphers if c not in CIPHERS
    ]
    transport.start_client(timeout=timeout)
    _check_host_key(transport.get_remote_server_key(), keys, settings)
    _authenticate(transport, settings)


def _host_key_order(offered: tuple[str, ...], known: list[str]) -> tuple[str, ...]:
    """Types of which a key is known come first, else a server with several shows another one."""
    # The key is of type ssh-rsa, and is used with these algorithms (RFC 8332).
    wanted = set(known) | ({"rsa-sha2-256", "rsa-sha2-512"} if "ssh-rsa" in known else set())
    return tuple(sorted(offered, key=lambda kind: kind not in wanted))


def _check_host_key(key: paramiko.PKey, keys: known_hosts.HostKeys, settings: Settings) -> None:
    blob, kind = key.asbytes(), key.get_name()
    shown = f"{kind.removeprefix('ssh-')} {known_hosts.fingerprint(blob)}"
    file = settings.known_hosts[0] if settings.known_hosts else "~/.ssh/known_hosts"
    if blob in keys.revoked:
        raise StoreRefused(
            f"{settings.url}: the host key of {keys.name} ({shown}) is marked as revoked in "
            f"{file}: somebody may be in between; do not connect"
        )
    if (kind, blob) in keys.trusted:
        return
    if keys.trusted:
        raise StoreRefused(
            f"{settings.url}: the host key of {keys.name} has changed (it shows {shown}): "
            "somebody may be in between; if the server was set up anew, forget the old key with: "
            f"ssh-keygen -R {shlex.quote(keys.name)} -f {shlex.quote(str(file))}"
        )
    raise StoreRefused(
        f"{settings.url}: the host key of {keys.name} is not known (it shows {shown}): compare "
        f"that with the server's and add it by logging in once: ssh {settings.ssh_options}"
        f"{settings.user}@{settings.alias}"
    )


def _authenticate(transport: paramiko.Transport, settings: Settings) -> None:
    """Try keys as OpenSSH does: those of the config, the agent's, the default files."""
    tried: list[str] = []
    locked: list[str] = []
    for name, key in _keys(settings, locked):
        tried.append(name)
        try:
            if not transport.auth_publickey(settings.user, key):
                return
            raise StoreRefused(
                f"{settings.url}: {settings.alias} wants a password besides the key: Horcrux gives "
                "none; allow the key alone there"
            )
        except paramiko.BadAuthenticationType:
            break  # no keys at all there
        except paramiko.AuthenticationException as error:
            if not transport.is_active() and len(tried) < MANY_KEYS:
                raise  # cut, or timed out
            if not transport.is_active():
                raise StoreRefused(
                    f"{settings.url}: {settings.alias} closed the connection after "
                    f"{len(tried)} keys ({error}): name one with IdentityFile and IdentitiesOnly "
                    "in ~/.ssh/config"
                ) from error
    known = f"tried {', '.join(tried)}" if tried else "there was none to try"
    advice = (
        f"load the one with a passphrase by: ssh-add {shlex.quote(locked[0])}"
        if locked
        else f"let one in by: ssh-copy-id {settings.ssh_options}{settings.user}@{settings.alias}"
    )
    raise StoreRefused(
        f"{settings.url}: {settings.alias} refused every key for user {settings.user} ({known}): "
        f"{advice}"
    )


def _keys(settings: Settings, locked: list[str]) -> Iterator[tuple[str, paramiko.PKey]]:
    """Keys to try, each with a name for messages. Files that need a passphrase go to `locked`."""
    yield from _files(settings.identities, locked)
    agent = paramiko.Agent()
    try:
        for key in agent.get_keys():
            if not settings.identities_only or key.asbytes() in _public_keys(settings.identities):
                yield f"{key.get_name()} of ssh-agent", key
    finally:
        agent.close()
    if not settings.identities and not settings.identities_only:
        yield from _files(tuple(Path("~/.ssh", n).expanduser() for n in DEFAULT_KEYS), locked)


def _files(paths: tuple[Path, ...], locked: list[str]) -> Iterator[tuple[str, paramiko.PKey]]:
    for path in paths:
        try:
            key = paramiko.PKey.from_path(path)
        except FileNotFoundError:
            continue
        except (paramiko.PasswordRequiredException, TypeError):
            locked.append(str(path))  # TypeError is cryptography's word for a missing passphrase
            continue
        except (OSError, ValueError, paramiko.SSHException) as error:
            logging.getLogger("horcrux_nbd.chunkstore").warning(
                "cannot use the key %s: %s", path, error
            )
            continue
        yield str(path), key


def _public_keys(paths: tuple[Path, ...]) -> set[bytes]:
    found = set()
    for path in paths:
        public = path.with_name(path.name.removesuffix(".pub") + ".pub")
        with contextlib.suppress(OSError, ValueError, IndexError, paramiko.SSHException):
            found.add(paramiko.pkey.PublicBlob.from_file(str(public)).key_blob)
    return found

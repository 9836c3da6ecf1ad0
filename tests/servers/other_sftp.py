"""An SFTP server that is not OpenSSH: no extensions, short reads.

paramiko's own server, in a thread of this process, on a folder and with one user key. It stands for
the servers of appliances and hosting companies.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paramiko
from paramiko import common, sftp

from .sshd import make_key


class _Server(paramiko.ServerInterface):
    def __init__(self, key: paramiko.PKey) -> None:
        self._key = key

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        return int(common.AUTH_SUCCESSFUL if key == self._key else common.AUTH_FAILED)

    def get_allowed_auths(self, username: str) -> str:
        return "publickey"

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return int(common.OPEN_SUCCEEDED)


def _status(error: OSError) -> int:
    return int(paramiko.SFTPServer.convert_errno(error.errno or 0))


class _Handle(paramiko.SFTPHandle):
    def __init__(self, fd: int, most: int) -> None:
        super().__init__()
        self._fd, self._most = fd, most

    def read(self, offset: int, length: int) -> bytes | int:
        return os.pread(self._fd, min(length, self._most), offset) or sftp.SFTP_EOF

    def write(self, offset: int, data: Any) -> int:
        os.pwrite(self._fd, data, offset)
        return sftp.SFTP_OK

    def stat(self) -> paramiko.SFTPAttributes:
        return paramiko.SFTPAttributes.from_stat(os.fstat(self._fd))

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self._fd)


class _Files(paramiko.SFTPServerInterface):
    most = 1000  # bytes in an answer to a read

    def open(
        self, path: str, flags: int, attr: paramiko.SFTPAttributes
    ) -> paramiko.SFTPHandle | int:
        if os.path.isdir(path):
            return sftp.SFTP_FAILURE
        try:
            return _Handle(os.open(path, flags, 0o644), self.most)
        except OSError as error:
            return _status(error)

    def _try(self, function: object, *arguments: object) -> int:
        try:
            function(*arguments)  # type: ignore[operator]
        except OSError as error:
            return _status(error)
        return sftp.SFTP_OK

    def stat(self, path: str) -> paramiko.SFTPAttributes | int:
        try:
            return paramiko.SFTPAttributes.from_stat(os.stat(path))
        except OSError as error:
            return _status(error)

    def list_folder(self, path: str) -> list[paramiko.SFTPAttributes] | int:
        try:
            return [
                paramiko.SFTPAttributes.from_stat(entry.stat(follow_symlinks=False), entry.name)
                for entry in os.scandir(path)
            ]
        except OSError as error:
            return _status(error)

    def remove(self, path: str) -> int:
        return self._try(os.unlink, path)

    def mkdir(self, path: str, attr: paramiko.SFTPAttributes) -> int:
        return self._try(os.mkdir, path)

    def rename(self, oldpath: str, newpath: str) -> int:
        if os.path.lexists(newpath):
            return sftp.SFTP_FAILURE
        return self._try(os.rename, oldpath, newpath)


@dataclass
class OtherSftp:
    port: int
    config: Path  # for HORCRUX_SSH_CONFIG

    def url(self, path: Path) -> str:
        return f"scp://me@127.0.0.1:{self.port}{path}"


@contextlib.contextmanager
def other_sftp(folder: Path) -> Iterator[OtherSftp]:
    """The server, with its keys in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    host_key = paramiko.PKey.from_path(make_key(folder / "host_key"))
    user_key = paramiko.PKey.from_path(make_key(folder / "user_key"))
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    (folder / "known_hosts").write_text(
        f"[127.0.0.1]:{port} {host_key.get_name()} {host_key.get_base64()}\n"
    )
    config = folder / "ssh_config"
    config.write_text(
        f"Host *\n  IdentityFile {folder}/user_key\n  IdentitiesOnly yes\n"
        f"  UserKnownHostsFile {folder}/known_hosts\n"
    )
    transports: list[paramiko.Transport] = []

    def serve() -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            transport = paramiko.Transport(sock)
            transports.append(transport)
            transport.add_server_key(host_key)
            transport.set_subsystem_handler("sftp", paramiko.SFTPServer, _Files)
            with contextlib.suppress(EOFError, paramiko.SSHException):
                transport.start_server(server=_Server(user_key))

    thread = threading.Thread(target=serve, name="other-sftp", daemon=True)
    thread.start()
    try:
        yield OtherSftp(port, config)
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for transport in transports:
            transport.close()
        thread.join(10)

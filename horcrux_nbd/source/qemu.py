"""A source in a format that qemu reads (qcow2, vmdk, vdi, vhdx …), served by qemu-nbd.

Nothing is converted beforehand: qemu-nbd opens the file for reading on a socket of ours, and a
few connections to it stay open as long as the source. It ends when the last of them is gone, so
it never outlives this process.

Protocol: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md (fixed newstyle
handshake, simple replies).
"""

from __future__ import annotations

import errno
import json
import os
import queue
import shutil
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from ..errors import EnvironmentProblem, HorcruxError, UsageError
from ..progress import Progress
from ..units import MiB
from .base import Source, check_range
from .raw import detect_filesystem
from .tools import find_tool, last_line, run_tool

CONNECTIONS = 4  # reads at once; qemu-nbd serves each in order
_START_LIMIT = 30.0  # seconds for qemu-nbd to open the image
_REPLY_LIMIT = 120.0  # seconds for one read; a disk that takes longer is gone
_READ_LIMIT = 32 * MiB  # what the protocol lets a client ask for without negotiation
_AS_RAW = frozenset(["raw", "luks"])  # an encrypted disk is kept as it is

# For a machine without qemu: the formats people have most, by their first bytes.
_MAGIC = {
    b"QFI\xfb": "qcow2",
    b"KDMV": "vmdk",
    b"# Disk DescriptorFile": "vmdk",
    b"vhdxfile": "vhdx",
    b"conectix": "vpc",
    b"<<< ": "vdi",
}


def image_format(path: str) -> str:
    """The format of the image file at `path`, as qemu names it; "raw" is none of its own.

    Raises UsageError if qemu cannot open it (in use by a virtual machine, damaged);
    EnvironmentProblem where it is not raw and there is no qemu.
    """
    try:
        info = _info(path)
    except EnvironmentProblem:
        with open(path, "rb") as file:
            head = file.read(32)
        if not any(head.startswith(magic) for magic in _MAGIC):
            return "raw"
        raise
    return "raw" if info["format"] in _AS_RAW else str(info["format"])


class QemuSource(Source):
    """The disk in the image file at `path`, of format `kind`; backing files included."""

    def __init__(self, path: str, kind: str, progress: Progress | None = None) -> None:
        self._path = os.path.abspath(path)  # a name with a colon would be a protocol to qemu
        self._idle: queue.LifoQueue[socket.socket] = queue.LifoQueue()
        self._connections: list[socket.socket] = []
        self._server: subprocess.Popen[bytes] | None = None
        self._files = [self._path, *_backing_files(self._path, kind)]
        if progress and len(self._files) > 1:
            progress.note(f"{path} builds on {', '.join(self._files[1:])}: these are read, too")
        self._began = [_identity(file) for file in self._files]
        self._map = _map(self._path, kind)
        folder = tempfile.mkdtemp(prefix="horcrux-qemu-")
        try:
            self.size = self._start(kind, os.path.join(folder, "nbd.sock"))
            self.filesystem = detect_filesystem(self.read)
        except BaseException:
            self.close()
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # connections outlive the socket's name

    def _start(self, kind: str, address: str) -> int:
        self._server = subprocess.Popen(
            [
                find_tool("qemu-nbd", "qemu-utils"),
                *("--read-only", f"--format={kind}", f"--shared={CONNECTIONS}"),
                *(f"--socket={address}", "--", self._path),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        limit = time.monotonic() + _START_LIMIT
        size = 0
        while len(self._connections) < CONNECTIONS:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.settimeout(_REPLY_LIMIT)
            try:
                connection.connect(address)
            except (FileNotFoundError, ConnectionRefusedError):
                connection.close()
                if self._server.poll() is not None:
                    assert self._server.stderr
                    said = self._server.stderr.read().decode(errors="replace").strip()
                    raise UsageError(f"qemu-nbd cannot open {self._path}: {said}") from None
                if time.monotonic() > limit:
                    raise HorcruxError(
                        f"qemu-nbd did not open {self._path} within {_START_LIMIT:.0f} s"
                    ) from None
                time.sleep(0.01)
                continue
            self._connections.append(connection)
            size = _handshake(connection)
            self._idle.put(connection)
        return size

    def extents(self) -> Iterator[tuple[int, int]]:
        yield from self._map

    def read(self, offset: int, length: int) -> bytes:
        check_range(offset, length)
        inside = max(min(length, self.size - offset), 0)
        connection = self._idle.get(timeout=_REPLY_LIMIT)
        try:
            parts = [
                _read(connection, offset + at, min(_READ_LIMIT, inside - at))
                for at in range(0, inside, _READ_LIMIT)
            ]
        except OSError as error:
            connection.close()
            raise OSError(errno.EIO, f"cannot read {self._path} through qemu: {error}") from error
        finally:
            # A closed one stays in the circle: who gets it learns at once that it is broken.
            self._idle.put(connection)
        return b"".join([*parts, bytes(length - inside)])

    def problems(self) -> list[str]:
        return [
            f"{file}: changed while it was read"
            for file, began in zip(self._files, self._began, strict=True)
            if _identity(file) != began
        ]

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        if self._server:
            self._server.terminate()
            self._server.wait()
            if self._server.stderr:
                self._server.stderr.close()
            self._server = None


# ---- qemu-img -----------------------------------------------------------------------------------


def _info(path: str, kind: str | None = None) -> dict[str, Any]:
    format_option = [f"--format={kind}"] if kind else []
    result = run_tool(
        [
            find_tool("qemu-img", "qemu-utils"),
            *("info", "--output=json", *format_option, "--", os.path.abspath(path)),
        ]
    )
    if result.returncode:
        raise UsageError(f"qemu-img cannot read {path}: {last_line(result)}")
    info: dict[str, Any] = json.loads(result.stdout)
    return info


def _backing_files(path: str, kind: str) -> list[str]:
    """The files that the image builds on. Raises UsageError for what is no plain file."""
    found: list[str] = []
    while True:
        info = _info(path, kind)
        details = info.get("format-specific", {}).get("data", {})
        if isinstance(details, dict) and details.get("data-file"):
            raise UsageError(f"{path} keeps its data in another file: convert it by qemu-img first")
        if not info.get("backing-filename"):
            return found
        name = str(info.get("full-backing-filename", info["backing-filename"]))
        # An image from elsewhere could name any address or driver here.
        if not name.startswith("/") or name in found:
            raise UsageError(f"{path} builds on {name}, which is no local file: convert it first")
        found.append(name)
        path, kind = name, str(info.get("backing-filename-format") or _info(name)["format"])


def _map(path: str, kind: str) -> list[tuple[int, int]]:
    result = run_tool(
        [
            find_tool("qemu-img", "qemu-utils"),
            *("map", "--output=json", f"--format={kind}", "--", path),
        ]
    )
    if result.returncode:
        raise UsageError(f"qemu-img cannot read {path}: {last_line(result)}")
    return [(part["start"], part["length"]) for part in json.loads(result.stdout) if part["data"]]


def _identity(path: str) -> tuple[int, int, int, int] | None:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


# ---- NBD ----------------------------------------------------------------------------------------

_HELLO = struct.Struct(">8s8sH")
_OPTION = struct.Struct(">I8sII")
_EXPORT = struct.Struct(">QH")
_REQUEST = struct.Struct(">IHHQQI")
_REPLY = struct.Struct(">IIQ")
_OPTION_EXPORT_NAME = 1
_FIXED_NO_ZEROES = 3


def _receive(connection: socket.socket, length: int) -> bytes:
    data = bytearray(length)
    view = memoryview(data)
    while view:
        got = connection.recv_into(view)
        if not got:
            raise OSError(errno.ECONNRESET, "the connection ended")
        view = view[got:]
    return bytes(data)


def _handshake(connection: socket.socket) -> int:
    """Ask for the default export; its size in bytes."""
    magic, have_option, flags = _HELLO.unpack(_receive(connection, _HELLO.size))
    if (magic, have_option) != (b"NBDMAGIC", b"IHAVEOPT") or flags & 3 != 3:
        raise HorcruxError("qemu-nbd does not speak the NBD protocol as expected")
    connection.sendall(_OPTION.pack(_FIXED_NO_ZEROES, b"IHAVEOPT", _OPTION_EXPORT_NAME, 0))
    size, _ = _EXPORT.unpack(_receive(connection, _EXPORT.size))
    return int(size)


def _read(connection: socket.socket, offset: int, length: int) -> bytes:
    connection.sendall(_REQUEST.pack(0x25609513, 0, 0, 0, offset, length))
    magic, error, _ = _REPLY.unpack(_receive(connection, _REPLY.size))
    if magic != 0x67446698:
        raise OSError(errno.EIO, "an answer that is none")
    if error:
        raise OSError(error, os.strerror(error))
    return _receive(connection, length)

"""The opening of an NBD connection, up to where a kernel can take the socket over.

Fixed newstyle with NBD_OPT_GO, no structured replies (the kernel's client knows none). Source: the
NBD protocol, github.com/NetworkBlockDevice/nbd doc/proto.md.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

from ..errors import HorcruxError, NotFound
from .processes import TimedOut

_MAGIC = b"NBDMAGIC"
_OPTION_MAGIC = b"IHAVEOPT"
_REPLY_MAGIC = 0x3E889045565A9
_FIXED_NEWSTYLE, _NO_ZEROES = 1, 2  # handshake flags, the same bits in both directions
_OPT_GO = 7
_REP_ACK, _REP_INFO = 1, 3
_REP_ERROR = 1 << 31
_INFO_EXPORT, _INFO_BLOCK_SIZE = 0, 3
_MAX_REPLY = 64 * 1024  # bytes; the protocol's strings have 4096 at most

READ_ONLY = 1 << 1  # transmission flags
SEND_FLUSH = 1 << 2
MULTI_CONN = 1 << 8


@dataclass(frozen=True)
class Export:
    """What the server says about the disk: size in bytes, transmission flags, least request."""

    size: int
    flags: int
    minimum_block: int = 1

    @property
    def read_only(self) -> bool:
        return bool(self.flags & READ_ONLY)

    @property
    def multi_conn(self) -> bool:
        return bool(self.flags & MULTI_CONN)


def connect(path: Path, timeout: float) -> tuple[socket.socket, Export]:
    """A socket in transmission phase to the default export of the server at `path`.

    Raises NotFound if nobody listens, TimedOut after `timeout` seconds without an answer,
    HorcruxError if it refuses or is no NBD server.
    """
    stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        stream.settimeout(timeout)
        try:
            stream.connect(str(path))
            export = _negotiate(stream)
        except TimeoutError:
            raise TimedOut(f"the NBD server on {path} did not answer in {timeout:.0f} s") from None
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise NotFound(f"no NBD server listens on {path}: serve the volume first") from error
        except OSError as error:
            raise HorcruxError(f"the NBD server on {path} hung up: {error}") from error
        stream.settimeout(None)
    except BaseException:
        stream.close()
        raise
    return stream, export


def connect_all(path: Path, count: int, timeout: float) -> tuple[list[socket.socket], Export]:
    """`count` connections (one, if the server does not allow more) that agree on the export."""
    first, export = connect(path, timeout)
    streams = [first]
    try:
        while len(streams) < count and export.multi_conn:
            stream, again = connect(path, timeout)
            streams.append(stream)
            if again != export:
                raise HorcruxError(f"{path} is {export} on one connection, {again} on another")
    except BaseException:
        close_all(streams)
        raise
    return streams, export


def close_all(streams: list[socket.socket]) -> None:
    for stream in streams:
        with contextlib.suppress(OSError):
            stream.close()


def _negotiate(stream: socket.socket) -> Export:
    magic, option, flags = struct.unpack(">8s8sH", _receive(stream, 18))
    if magic != _MAGIC or option != _OPTION_MAGIC or not flags & _FIXED_NEWSTYLE:
        raise HorcruxError("it is no NBD server of the fixed newstyle kind")
    data = struct.pack(">IH", 0, 0)  # default export; no information asked for beyond the must
    stream.sendall(
        struct.pack(">I", flags & (_FIXED_NEWSTYLE | _NO_ZEROES))
        + _OPTION_MAGIC
        + struct.pack(">II", _OPT_GO, len(data))
        + data
    )
    export: Export | None = None
    minimum = 1
    while True:
        magic, option, kind, length = struct.unpack(">QIII", _receive(stream, 20))
        if magic != _REPLY_MAGIC or option != _OPT_GO or length > _MAX_REPLY:
            raise HorcruxError("the NBD server answered out of turn")
        payload = _receive(stream, length)
        if kind == _REP_ACK:
            break
        if kind & _REP_ERROR:
            said = payload.decode(errors="replace") or f"error {kind & ~_REP_ERROR}"
            raise HorcruxError(f"the NBD server refused the export: {said}")
        if kind == _REP_INFO and length >= 12 and payload[:2] == _INFO_EXPORT.to_bytes(2, "big"):
            export = Export(*struct.unpack(">QH", payload[2:12]))
        elif kind == _REP_INFO and payload[:2] == _INFO_BLOCK_SIZE.to_bytes(2, "big"):
            minimum = int.from_bytes(payload[2:6], "big")
    if export is None:
        raise HorcruxError("the NBD server did not say how large the export is")
    return Export(export.size, export.flags, minimum)


def _receive(stream: socket.socket, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        part = stream.recv(count - len(parts))
        if not part:
            raise ConnectionResetError("end of file during the handshake")
        parts += part
    return bytes(parts)

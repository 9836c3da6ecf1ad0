from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from horcrux_nbd.attach import handshake
from horcrux_nbd.attach.processes import TimedOut
from horcrux_nbd.errors import HorcruxError, NotFound

from .conftest import Server

HELLO = b"NBDMAGICIHAVEOPT\0\3"


def reply(kind: int, payload: bytes, option: int = 7) -> bytes:
    return struct.pack(">QIII", 0x3E889045565A9, option, kind, len(payload)) + payload


@contextmanager
def says(path: Path, data: bytes, hang: bool = False) -> Iterator[Path]:
    """A server that says `data` whatever it is asked, then hangs up, or not."""
    done = threading.Event()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()

        def talk() -> None:
            stream = server.accept()[0]
            stream.sendall(data)
            if not hang:
                stream.shutdown(socket.SHUT_WR)
            done.wait(10)
            stream.close()

        thread = threading.Thread(target=talk)
        thread.start()
        yield path
        done.set()
        thread.join()


def test_nbdkit_is_understood(server: Server) -> None:
    streams, export = handshake.connect_all(server.socket, 3, 5)
    try:
        assert len(streams) == 3
        assert export.size == server.image.stat().st_size
        assert export.flags & handshake.SEND_FLUSH
        assert not export.read_only
        # Transmission phase: a read of the ext4 superblock's magic.
        streams[2].sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, 42, 1024 + 0x38, 2))
        answer = streams[2].recv(18, socket.MSG_WAITALL)
        assert answer == struct.pack(">IIQ", 0x67446698, 0, 42) + b"\x53\xef"
    finally:
        handshake.close_all(streams)


def test_a_server_of_one_connection_gets_one(server: Server) -> None:
    server.stop()
    server.filters = ["multi-conn"]
    server.arguments = ["multi-conn-mode=disable"]
    server.start()
    streams, export = handshake.connect_all(server.socket, 4, 5)
    handshake.close_all(streams)
    assert len(streams) == 1
    assert not export.multi_conn


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no NBD server listens"):
        handshake.connect(tmp_path / "none", 1)
    path = tmp_path / "dead"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with pytest.raises(NotFound, match="no NBD server listens"):
        handshake.connect(path, 1)


def test_a_server_that_says_nothing(tmp_path: Path) -> None:
    with says(tmp_path / "s", b"", hang=True) as path:
        with pytest.raises(TimedOut, match="did not answer"):
            handshake.connect(path, 0.2)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "hung up"),
        (HELLO, "hung up"),
        (b"SSH-2.0-OpenSSH_9.2p1\r\n", "no NBD server"),
        (b"NBDMAGIC" + b"\0\0\x42\2\x81\x86\x12\x53" + bytes(2), "no NBD server"),  # oldstyle
        (HELLO[:-1] + b"\0", "no NBD server"),  # not the fixed kind
        (HELLO + reply(1, b""), "how large"),
        (HELLO + reply(1 << 31 | 6, b"no such export"), "refused the export: no such export"),
        (HELLO + reply(1, b"", option=3), "out of turn"),
        (HELLO + b"x" * 20, "out of turn"),
        (HELLO + struct.pack(">QIII", 0x3E889045565A9, 7, 3, 1 << 31), "out of turn"),
    ],
)
def test_nonsense_is_one_line(tmp_path: Path, data: bytes, message: str) -> None:
    with says(tmp_path / "s", data) as path, pytest.raises(HorcruxError, match=message):
        handshake.connect(path, 5)


def test_what_a_server_says_about_blocks(tmp_path: Path) -> None:
    data = (
        HELLO
        + reply(3, struct.pack(">HQH", 0, 1 << 40, 0x103))
        + reply(3, struct.pack(">HIII", 3, 4096, 65536, 1 << 25))
        + reply(3, struct.pack(">H", 1) + b"a name")
        + reply(1, b"")
    )
    with says(tmp_path / "s", data) as path:
        stream, export = handshake.connect(path, 5)
        stream.close()
    assert export == handshake.Export(1 << 40, 0x103, 4096)
    assert export.read_only
    assert export.multi_conn

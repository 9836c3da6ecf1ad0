"""The client's side of SFTP version 3 on one channel, with many requests under way.

Source: draft-ietf-secsh-filexfer-02, and OpenSSH's PROTOCOL file for the extensions. Own code, as
paramiko's SFTPClient waits for each answer where a chunk store wants a whole object in two round
trips, and knows none of OpenSSH's extensions for durability.

One thread at a time uses a session. Requests are sent, and their answers are asked for in any
order; answers that nobody wants any more (of a close) are dropped when they come.
"""

from __future__ import annotations

import stat
import struct
from dataclasses import dataclass

from ..errors import StoreUnavailable
from .light import paramiko

INIT, VERSION = 1, 2
OPEN, CLOSE, READ, WRITE, FSTAT = 3, 4, 5, 6, 8
OPENDIR, READDIR, REMOVE, MKDIR, STAT, RENAME = 11, 12, 13, 14, 17, 18
STATUS, HANDLE, DATA, NAME, ATTRS = 101, 102, 103, 104, 105
EXTENDED, EXTENDED_REPLY = 200, 201

OK, EOF, NO_SUCH_FILE, PERMISSION_DENIED, FAILURE = 0, 1, 2, 3, 4
NO_CONNECTION, CONNECTION_LOST = 6, 7

# Open flags
READING, WRITING, CREATE, TRUNCATE, EXCLUSIVE = 0x01, 0x02, 0x08, 0x10, 0x20

FSYNC, POSIX_RENAME = b"fsync@openssh.com", b"posix-rename@openssh.com"
STATVFS, LIMITS = b"statvfs@openssh.com", b"limits@openssh.com"

SAFE_BLOCK = 32 << 10  # what every server must take in one read or write (draft §3)
PIECE = 64 << 10  # bytes given to paramiko at once; it sends 32 KiB of it to OpenSSH
# Longest message that is believed. OpenSSH's longest is 256 KiB; a length beyond this is no SFTP,
# but a greeting that some shell start-up file prints.
LONGEST = 4 << 20


class Status(Exception):
    """An answer that says no (or, for `EOF`, no more)."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True)
class Attributes:
    size: int
    mode: int
    mtime: int

    @property
    def is_folder(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.mode)

    @property
    def is_link(self) -> bool:
        return stat.S_ISLNK(self.mode)


def text(value: bytes | memoryview) -> bytes:
    """A string on the wire: length and bytes."""
    return b"".join((struct.pack(">I", len(value)), value))


class Session:
    """An SFTP session on `channel`, which is at the server's `sftp` subsystem.

    Raises StoreUnavailable when the peer says nothing for `timeout` seconds, or hangs up: then the
    session is `broken` and of no more use.
    """

    def __init__(self, channel: paramiko.Channel, timeout: float, url: str) -> None:
        self._channel, self._timeout, self._url = channel, timeout, url
        self._next = 0
        self._waiting: set[int] = set()
        self._unwanted: set[int] = set()
        self._answers: dict[int, tuple[int, bytes]] = {}
        self._buffer = bytearray()
        self.broken = False
        self.extensions: dict[bytes, bytes] = {}
        self.read_block = self.write_block = SAFE_BLOCK
        channel.settimeout(timeout)
        self._hello()

    def _hello(self) -> None:
        self._write(struct.pack(">IBI", 5, INIT, 3))
        kind, body = self._message()
        if kind != VERSION:
            self._fail("the server speaks no SFTP")
        reader = _Reader(body)
        reader.number()
        while reader.left:
            name = reader.text()
            self.extensions[name] = reader.text()
        if LIMITS in self.extensions:
            try:
                limits = _Reader(self.extended(self.request(EXTENDED, text(LIMITS))))
            except Status:
                return
            limits.long()
            # The draft's block is what these can always be; more only makes messages fewer.
            self.read_block = min(max(limits.long(), SAFE_BLOCK), 1 << 20)
            self.write_block = min(max(limits.long(), SAFE_BLOCK), 1 << 20)

    # ---- requests -------------------------------------------------------------------------------

    def request(self, kind: int, body: bytes) -> int:
        """Send one request; its number."""
        return self.requests([(kind, body)])[0]

    def requests(self, messages: list[tuple[int, bytes]]) -> list[int]:
        """Send several as one, so that they share packets; their numbers."""
        numbers, parts = [], []
        for kind, body in messages:
            self._next = (self._next + 1) & 0xFFFFFFFF
            numbers.append(self._next)
            parts.append(struct.pack(">IBI", len(body) + 5, kind, self._next))
            parts.append(body)
        self._waiting.update(numbers)
        self._write(b"".join(parts))
        return numbers

    def drop(self, number: int) -> None:
        """The answer to request `number` is not wanted."""
        if self._answers.pop(number, None) is None:
            self._unwanted.add(number)
        self._waiting.discard(number)

    @property
    def idle(self) -> bool:
        """Whether every answer has been taken or dropped, so that somebody else may go on."""
        return not self.broken and not self._waiting

    # ---- answers --------------------------------------------------------------------------------

    def _answer(self, number: int, kind: int) -> bytes:
        """The body of the answer to `number`, of type `kind`; raises Status for one that is."""
        while number not in self._answers:
            found, body = self._message()
            if len(body) < 4:
                self._fail("the server's SFTP answer is cut short")
            got = int.from_bytes(body[:4], "big")
            if got in self._unwanted:
                self._unwanted.discard(got)
            elif got in self._waiting:
                self._answers[got] = (found, body[4:])
            else:
                self._fail("the server answered what nobody asked")
        found, body = self._answers.pop(number)
        self._waiting.discard(number)
        if found == kind and found != STATUS:
            return body
        if found != STATUS:
            self._fail(f"the server's SFTP answer is of type {found}, not {kind}")
        reader = _Reader(body)
        code = reader.number()
        message = reader.text().decode(errors="replace") if reader.left else ""
        if code in (NO_CONNECTION, CONNECTION_LOST):
            self._fail(message or "the server lost its connection")
        if code == OK and kind == STATUS:
            return b""
        raise Status(code, message)

    def done(self, number: int) -> None:
        """Wait for a plain OK; raises Status."""
        self._answer(number, STATUS)

    def handle(self, number: int) -> bytes:
        return _Reader(self._answer(number, HANDLE)).text()

    def data(self, number: int) -> bytes:
        """The bytes that a READ gave; raises Status (EOF behind the end)."""
        return _Reader(self._answer(number, DATA)).text()

    def attributes(self, number: int) -> Attributes:
        return _Reader(self._answer(number, ATTRS)).attributes()

    def extended(self, number: int) -> bytes:
        return self._answer(number, EXTENDED_REPLY)

    def names(self, number: int) -> list[tuple[str, Attributes]]:
        """What a READDIR gave; raises Status (EOF at the end)."""
        reader = _Reader(self._answer(number, NAME))
        found = []
        for _ in range(reader.number()):
            name = reader.text()
            reader.text()  # the line that `ls -l` would show
            found.append((name.decode(errors="surrogateescape"), reader.attributes()))
        return found

    # ---- bytes ----------------------------------------------------------------------------------

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        try:
            while view:
                # Piece by piece: paramiko's sendall copies the whole rest for each packet.
                view = view[self._channel.send(bytes(view[:PIECE])) :]
        except TimeoutError:
            self._fail(f"no answer in {self._timeout:.3g} s")
        except (OSError, EOFError, paramiko.SSHException) as error:
            self._fail(str(error) or "the connection broke")

    def _message(self) -> tuple[int, bytes]:
        head = self._read(4)
        length = int.from_bytes(head, "big")
        if not 1 <= length <= LONGEST:
            self._fail("the server's answer is no SFTP: does its shell print something at login?")
        body = self._read(length)
        return body[0], bytes(memoryview(body)[1:])

    def _read(self, length: int) -> bytes:
        buffer = self._buffer
        while len(buffer) < length:
            try:
                part = self._channel.recv(1 << 20)
            except TimeoutError:
                self._fail(f"no answer in {self._timeout:.3g} s")
            except (OSError, EOFError, paramiko.SSHException) as error:
                self._fail(str(error) or "the connection broke")
            if not part:
                self._fail("the server closed the connection")
            buffer += part
        taken = bytes(memoryview(buffer)[:length])
        del buffer[:length]
        return taken

    def _fail(self, why: str) -> None:
        self.broken = True
        raise StoreUnavailable(f"{self._url}: {why}")

    def close(self) -> None:
        self.broken = True
        self._channel.close()


class _Reader:
    """Takes an answer apart; raises StoreUnavailable for one that is too short."""

    def __init__(self, body: bytes) -> None:
        self._body, self._at = body, 0

    @property
    def left(self) -> int:
        return len(self._body) - self._at

    def _take(self, count: int) -> bytes:
        if count > self.left:
            raise StoreUnavailable("the server's SFTP answer is cut short")
        self._at += count
        return self._body[self._at - count : self._at]

    def number(self) -> int:
        return int.from_bytes(self._take(4), "big")

    def long(self) -> int:
        return int.from_bytes(self._take(8), "big")

    def text(self) -> bytes:
        return self._take(self.number())

    def attributes(self) -> Attributes:
        flags = self.number()
        size = self.long() if flags & 0x1 else 0
        if flags & 0x2:
            self._take(8)  # uid, gid
        mode = self.number() if flags & 0x4 else 0
        mtime = 0
        if flags & 0x8:
            self.number()  # atime
            mtime = self.number()
        if flags & 0x80000000:
            for _ in range(self.number()):
                self.text()
                self.text()
        return Attributes(size, mode, mtime)

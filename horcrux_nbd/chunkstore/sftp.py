"""`scp://`: a chunk store in a folder of an SSH server, by SFTP.

Round trips on a session that stands: get 2 (open; size, reads and close together), put 3 (open;
writes, sync and close together; rename), stat and delete 1. A put makes a folder only when it
failed for want of it.
"""

from __future__ import annotations

import contextlib
import posixpath
import secrets
import struct
from collections import deque
from collections.abc import Iterator

from ..errors import (
    KeyExists,
    KeyNotFound,
    StoreError,
    StoreFull,
    StoreMissing,
    StoreRefused,
)
from ..files import TEMPORARY_PREFIX
from . import base, sftp_wire, ssh, walk
from .base import ChunkStore, Stat
from .sftp_pool import Pool
from .sftp_wire import Attributes, Session, Status, text
from .url import StoreURL

CONCURRENCY = 16  # sessions; each is a process on the server, and a chunk under way here
TIMEOUT = 15.0  # seconds without an answer
READS_UNDER_WAY = 16  # of one object, when it is larger than the first guess
LEAST_GUESS, MOST_GUESS = 64 << 10, 4 << 20  # bytes asked for before the size is known
FOLDERS_AT_ONCE = 32  # listed together; servers limit open handles (sftp-server: about 1,000)
READDIRS = 4  # under way for each folder; an answer of OpenSSH holds 100 names
WRITES_AT_ONCE = 16  # joined into one stretch of bytes

_NO_ATTRIBUTES = struct.pack(">I", 0)


class SftpStore(ChunkStore):
    """Objects are files below one folder; written under a temporary name, synced, renamed.

    An exclusive put is SFTP's own rename, which must fail on an existing target: OpenSSH does it
    by link(2). A replacing put is OpenSSH's posix-rename. Where the server cannot sync
    (fsync@openssh.com, OpenSSH ≥ 6.5), durability is what it gives by itself.
    """

    def __init__(
        self, url: StoreURL, *, timeout: float = TIMEOUT, concurrency: int | None = None
    ) -> None:
        self.url = str(url)
        self.timeout = timeout
        self.concurrency = concurrency or CONCURRENCY
        self._root = url.path
        self._pool = Pool(ssh.read_settings(url), self.concurrency, timeout)
        # About as large as the objects read lately; a hint only, so no lock.
        self._guess = LEAST_GUESS

    def _path(self, key: str) -> bytes:
        return _encode(f"{self._root}/{base.check_key(key)}")

    # ---- errors ---------------------------------------------------------------------------------

    def _error(self, status: Status, doing: str) -> StoreError:
        if status.code == sftp_wire.PERMISSION_DENIED:
            return StoreRefused(
                f"{self.url}: {doing}: permission denied: check owner and mode of {self._root} "
                "there"
            )
        return StoreError(f"{self.url}: {doing}: {status}")

    def _check_root(self, session: Session, number: int | None = None) -> None:
        """Raise StoreMissing if the store's folder is not there; `number`: its STAT, if sent."""
        if number is None:
            number = session.request(sftp_wire.STAT, text(_encode(self._root)))
        try:
            found = session.attributes(number)
        except Status as status:
            if status.code == sftp_wire.NO_SUCH_FILE:
                raise StoreMissing(
                    f"{self.url}: the server has no folder {self._root}: check the path"
                ) from None
            raise self._error(status, "cannot look at the folder") from None
        if not found.is_folder:
            raise StoreMissing(f"{self.url}: {self._root} is not a folder")

    def _check_space(self, session: Session, size: int, key: str) -> None:
        """Raise StoreFull if the file system has no room for `size` bytes.

        SFTP version 3 has one word, "failure", for a full disk and everything else.
        """
        if sftp_wire.STATVFS not in session.extensions:
            return
        body = text(sftp_wire.STATVFS) + text(_encode(self._root))
        try:
            answer = session.extended(session.request(sftp_wire.EXTENDED, body))
        except Status:
            return
        _, block, _, _, available, _, _, inodes, *_ = struct.unpack(">11Q", answer[:88])
        if available * block < size + block or inodes == 0:
            raise StoreFull(f"{self.url}: no space left for {key}: free some on the server")

    # ---- the place ------------------------------------------------------------------------------

    def check(self) -> None:
        with self._pool.session() as session:
            self._check_root(session)

    def prepare(self) -> None:
        with self._pool.session() as session:
            try:
                self._check_root(session)
            except StoreMissing:
                self._make_folder(session, self._root, "/")
                self._check_root(session)

    def _make_folder(self, session: Session, path: str, above: str) -> None:
        """Make `path` and what is missing of its parents, below `above`, durably."""
        missing = []
        while path not in (above, "/"):
            missing.append(path)
            path = posixpath.dirname(path)
        for folder in reversed(missing):
            number = session.request(sftp_wire.MKDIR, text(_encode(folder)) + _NO_ATTRIBUTES)
            try:
                session.done(number)
            except Status:
                # Version 3 has no word for "exists", and "permission denied" is often said of a
                # parent that does. Whether it matters is told by what is done there next.
                continue
            self._sync_folder(session, posixpath.dirname(folder))

    def _sync_folder(self, session: Session, folder: str) -> None:
        if sftp_wire.FSYNC not in session.extensions:
            return
        try:
            handle = session.handle(session.request(*_open(_encode(folder), sftp_wire.READING)))
        except Status:
            return  # a server that opens no folders; it has no way to sync one
        sync, close = session.requests(
            [
                (sftp_wire.EXTENDED, text(sftp_wire.FSYNC) + text(handle)),
                (sftp_wire.CLOSE, text(handle)),
            ]
        )
        session.drop(close)
        try:
            session.done(sync)
        except Status as status:
            raise self._error(status, f"cannot sync {folder}") from None

    # ---- reading --------------------------------------------------------------------------------

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        base.check_range(offset, length)
        path = self._path(key)
        with self._pool.session() as session:
            try:
                handle = session.handle(session.request(*_open(path, sftp_wire.READING)))
                try:
                    return self._read(session, handle, key, offset, length)
                finally:
                    _close(session, handle)
            except Status as status:
                if status.code == sftp_wire.NO_SUCH_FILE:
                    self._check_root(session)
                    raise KeyNotFound(self.url, key) from None
                raise self._error(status, f"cannot read {key}") from None

    def _read(
        self, session: Session, handle: bytes, key: str, offset: int, length: int | None
    ) -> bytes:
        """Bytes of an open file. The size, and reads of what is probably there, go out at once;
        a read behind the end costs no more than a short answer."""
        block = session.read_block
        guess = self._guess if length is None else min(length, MOST_GUESS)
        pieces = [
            (at, min(block, offset + guess - at)) for at in range(offset, offset + guess, block)
        ]
        size, *numbers = session.requests(
            [(sftp_wire.FSTAT, text(handle)), *(_read_at(handle, *piece) for piece in pieces)]
        )
        waiting = deque(zip(numbers, pieces, strict=True))
        try:
            found = session.attributes(size)
            if not found.is_file:
                raise KeyNotFound(self.url, key)
            self._guess = min(max(found.size, self._guess * 7 // 8, LEAST_GUESS), MOST_GUESS)
            end = found.size if length is None else min(offset + length, found.size)
            asked = offset + guess
            parts: list[bytes] = []
            while waiting or asked < end:
                while asked < end and len(waiting) < READS_UNDER_WAY:
                    piece = (asked, min(block, end - asked))
                    waiting.append((session.request(*_read_at(handle, *piece)), piece))
                    asked += piece[1]
                number, (at, count) = waiting.popleft()
                want = min(count, end - at)
                if want <= 0:
                    session.drop(number)
                    continue
                part = session.data(number)
                parts.append(part[:want])
                while len(part) < want:  # a server may give less than was asked for
                    at, want = at + len(part), want - len(part)
                    part = session.data(session.request(*_read_at(handle, at, want)))
                    parts.append(part)
            return parts[0] if len(parts) == 1 else b"".join(parts)
        finally:
            for number, _ in waiting:
                session.drop(number)

    def stat(self, key: str) -> Stat:
        path = self._path(key)
        with self._pool.session() as session:
            number, root = session.requests(
                [(sftp_wire.STAT, text(path)), (sftp_wire.STAT, text(_encode(self._root)))]
            )
            try:
                found = session.attributes(number)
            except Status as status:
                if status.code != sftp_wire.NO_SUCH_FILE:
                    session.drop(root)
                    raise self._error(status, f"cannot look at {key}") from None
                self._check_root(session, root)
                raise KeyNotFound(self.url, key) from None
            session.drop(root)
        if not found.is_file:
            raise KeyNotFound(self.url, key)
        return Stat(key, found.size, float(found.mtime))

    # ---- writing --------------------------------------------------------------------------------

    def put(self, key: str, data: bytes) -> None:
        self._publish(key, data, exclusive=False)

    def put_exclusive(self, key: str, data: bytes) -> None:
        self._publish(key, data, exclusive=True)

    def _publish(self, key: str, data: bytes, *, exclusive: bool) -> None:
        target = self._path(key)
        folder = posixpath.dirname(target)
        taken = False
        temporary = folder + b"/" + TEMPORARY_PREFIX.encode() + secrets.token_hex(8).encode()
        with self._pool.session() as session:
            try:
                try:
                    handle, above = self._create(session, temporary, folder)
                except Status as status:
                    if status.code != sftp_wire.NO_SUCH_FILE:
                        raise
                    self._check_root(session)  # make folders below the root, never the root itself
                    self._make_folder(session, posixpath.dirname(f"{self._root}/{key}"), self._root)
                    handle, above = self._create(session, temporary, folder)
            except Status as status:
                raise self._cannot_store(session, status, key, len(data)) from None
            try:
                self._write(session, handle, data)
                self._rename(session, temporary, target, above, exclusive=exclusive)
            except Status as status:
                session.drop(session.request(sftp_wire.REMOVE, text(temporary)))
                there = status.code == sftp_wire.FAILURE and self._is_there(session, target)
                if there and exclusive:
                    raise KeyExists(self.url, key) from None
                if not there or sftp_wire.POSIX_RENAME in session.extensions:
                    raise self._cannot_store(session, status, key, len(data)) from None
                taken = True
        # A server that cannot replace: most objects are named by their bytes, and need not be.
        if taken and self.get(key) != data:
            raise StoreError(
                f"{self.url}: {key} is there, and this server has no way to replace it "
                f"({sftp_wire.POSIX_RENAME.decode()})"
            )

    def _cannot_store(self, session: Session, status: Status, key: str, size: int) -> StoreError:
        if status.code == sftp_wire.FAILURE:
            self._check_space(session, size, key)
        return self._error(status, f"cannot store {key}")

    def _create(self, session: Session, path: bytes, folder: bytes) -> tuple[bytes, bytes | None]:
        """A new file's handle; and that of its folder, to sync it, where the server can."""
        flags = sftp_wire.WRITING | sftp_wire.CREATE | sftp_wire.EXCLUSIVE
        can_sync = sftp_wire.FSYNC in session.extensions
        messages = [_open(path, flags)] + ([_open(folder, sftp_wire.READING)] if can_sync else [])
        number, *numbers = session.requests(messages)
        above = None
        for other in numbers:
            try:
                above = session.handle(other)
            except Status:
                above = None  # a server that opens no folders has no way to sync one
        try:
            return session.handle(number), above
        except Status:
            if above is not None:
                _close(session, above)
            raise

    def _write(self, session: Session, handle: bytes, data: bytes) -> None:
        """Write, sync and close an open file."""
        block = session.write_block
        numbers: list[int] = []
        view = memoryview(data)
        for start in range(0, len(data), block * WRITES_AT_ONCE):
            numbers += session.requests(
                [
                    (
                        sftp_wire.WRITE,
                        b"".join(
                            (text(handle), struct.pack(">Q", at), text(view[at : at + block]))
                        ),
                    )
                    for at in range(start, min(start + block * WRITES_AT_ONCE, len(data)), block)
                ]
            )
        if sftp_wire.FSYNC in session.extensions:
            numbers.append(
                session.request(sftp_wire.EXTENDED, text(sftp_wire.FSYNC) + text(handle))
            )
        numbers.append(session.request(sftp_wire.CLOSE, text(handle)))
        _all_done(session, numbers)

    def _rename(
        self, session: Session, old: bytes, new: bytes, above: bytes | None, *, exclusive: bool
    ) -> None:
        names = text(old) + text(new)
        # Without the extension a name that is taken is an error: removing it first would leave a
        # moment with no object.
        if exclusive or sftp_wire.POSIX_RENAME not in session.extensions:
            messages = [(sftp_wire.RENAME, names)]
        else:
            messages = [(sftp_wire.EXTENDED, text(sftp_wire.POSIX_RENAME) + names)]
        if above is not None:
            messages.append((sftp_wire.EXTENDED, text(sftp_wire.FSYNC) + text(above)))
            messages.append((sftp_wire.CLOSE, text(above)))
        _all_done(session, session.requests(messages))

    def _is_there(self, session: Session, path: bytes) -> bool:
        try:
            session.attributes(session.request(sftp_wire.STAT, text(path)))
        except Status:
            return False
        return True

    def delete(self, key: str) -> None:
        path = self._path(key)
        with self._pool.session() as session:
            number, root = session.requests(
                [(sftp_wire.REMOVE, text(path)), (sftp_wire.STAT, text(_encode(self._root)))]
            )
            try:
                session.done(number)
            except Status as status:
                if status.code == sftp_wire.NO_SUCH_FILE:
                    self._check_root(session, root)
                    return
                session.drop(root)
                if not self._is_folder(session, path):  # a folder of other keys is no object
                    raise self._error(status, f"cannot delete {key}") from None
                return
            session.drop(root)

    def sweep(self) -> int:
        found = [text(_encode(f"{self._root}/{path}")) for path in walk.stale(self._scan)]
        for path in found:
            with self._pool.session() as session, contextlib.suppress(Status):
                session.done(session.request(sftp_wire.REMOVE, path))
        return len(found)

    def _is_folder(self, session: Session, path: bytes) -> bool:
        try:
            return session.attributes(session.request(sftp_wire.STAT, text(path))).is_folder
        except Status:
            return False

    # ---- listing --------------------------------------------------------------------------------

    def children(self, prefix: str) -> list[str]:
        (entries,) = self._scan([base.check_folder(prefix)])
        return sorted(
            entry.name
            for entry in entries
            if base.is_part(entry.name) and (entry.is_folder or entry.look())
        )

    def _scan(self, folders: list[str]) -> Iterator[list[walk.Entry]]:
        for start in range(0, len(folders), FOLDERS_AT_ONCE):
            batch = folders[start : start + FOLDERS_AT_ONCE]
            with self._pool.session() as session:
                found = self._list_folders(session, batch)
            yield from found

    def _list_folders(self, session: Session, folders: list[str]) -> list[list[walk.Entry]]:
        """What is in each of `folders`, in about as many round trips as for one."""
        paths = [_encode(f"{self._root}/{folder}".rstrip("/")) for folder in folders]
        numbers = session.requests([(sftp_wire.OPENDIR, text(path)) for path in paths])
        handles: dict[int, bytes] = {}
        refused: list[tuple[str, Status]] = []
        for index, number in enumerate(numbers):
            try:
                handles[index] = session.handle(number)
            except Status as status:
                refused.append((folders[index], status))
        found: list[list[tuple[str, Attributes]]] = [[] for _ in folders]
        unread = dict(handles)
        while unread:
            asked = session.requests(
                [(sftp_wire.READDIR, text(h)) for h in unread.values() for _ in range(READDIRS)]
            )
            for index, number in zip(
                [i for i in unread for _ in range(READDIRS)], asked, strict=True
            ):
                try:
                    found[index] += session.names(number)
                except Status as status:
                    if status.code != sftp_wire.EOF:
                        refused.append((folders[index], status))
                    unread.pop(index, None)
        for handle in handles.values():
            _close(session, handle)
        for folder, refusal in refused:
            if refusal.code != sftp_wire.NO_SUCH_FILE:
                raise self._error(refusal, f"cannot list {folder or 'the folder'}")
        if refused:
            self._check_root(session)
        return [
            self._entries(session, path, names) for path, names in zip(paths, found, strict=True)
        ]

    def _entries(
        self, session: Session, path: bytes, names: list[tuple[str, Attributes]]
    ) -> list[walk.Entry]:
        links = [name for name, attributes in names if attributes.is_link]
        numbers = session.requests(
            [(sftp_wire.STAT, text(path + b"/" + _encode(name))) for name in links]
        )
        behind: dict[str, Attributes] = {}
        for name, number in zip(links, numbers, strict=True):
            try:
                behind[name] = session.attributes(number)
            except Status:
                continue  # it points nowhere
        return [
            walk.Entry(name, attributes.is_folder, _Look(attributes))
            for name, attributes in ((name, behind.get(name, seen)) for name, seen in names)
            if name not in (".", "..")
        ]

    def list(self, prefix: str = "", after: str = "", limit: int | None = None) -> Iterator[Stat]:
        return walk.walk(self._scan, base.check_prefix(prefix), after, limit)

    def close(self) -> None:
        self._pool.close()


class _Look:
    """Size and time of a name in a folder; none for what is no plain file."""

    __slots__ = ("_attributes",)

    def __init__(self, attributes: Attributes) -> None:
        self._attributes = attributes

    def __call__(self) -> tuple[int, float] | None:
        if not self._attributes.is_file:
            return None
        return self._attributes.size, float(self._attributes.mtime)


def _encode(path: str) -> bytes:
    return path.encode(errors="surrogateescape")


def _open(path: bytes, flags: int) -> tuple[int, bytes]:
    return sftp_wire.OPEN, text(path) + struct.pack(">I", flags) + _NO_ATTRIBUTES


def _read_at(handle: bytes, offset: int, length: int) -> tuple[int, bytes]:
    return sftp_wire.READ, text(handle) + struct.pack(">QI", offset, length)


def _close(session: Session, handle: bytes) -> None:
    """Close without waiting for the answer."""
    if not session.broken:
        session.drop(session.request(sftp_wire.CLOSE, text(handle)))


def _all_done(session: Session, numbers: list[int]) -> None:
    """Wait for all; raise the first Status that is no OK."""
    first: Status | None = None
    for number in numbers:
        try:
            session.done(number)
        except Status as status:
            first = first or status
    if first:
        raise first

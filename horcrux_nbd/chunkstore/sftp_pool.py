"""SFTP sessions to one server: several to a connection, several connections, made when needed.

A session is used by one thread at a time and goes back when its answers are all taken. The one used
last is given out first, so that few threads need few sessions. A session that broke takes its
connection with it; the next operation makes a new one.

**Invariant:** the connection's lock is held while connecting only, and connecting is bounded.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import paramiko

from ..errors import StoreError, StoreUnavailable
from . import ssh
from .sftp_wire import Session

# OpenSSH allows 10 sessions to a connection (MaxSessions); and one paramiko connection, which has
# one thread, carries about 100 MB/s however many sessions it has.
SESSIONS_PER_CONNECTION = 8


class _Line:
    """A place for one connection, made by the first thread that needs it while others wait."""

    def __init__(self, settings: ssh.Settings, timeout: float) -> None:
        self._settings, self._timeout = settings, timeout
        self._lock = threading.Lock()
        self._connection: ssh.Connection | None = None
        self._failure: tuple[float, StoreError] | None = None
        self.sessions = 0  # guarded by the pool's lock

    def connection(self) -> ssh.Connection:
        asked = time.monotonic()
        with self._lock:
            if self._connection and self._connection.alive:
                return self._connection
            if self._failure and self._failure[0] > asked:
                # Who waited while another one failed shares that, else their limits would add up.
                raise self._failure[1]
            self._drop()
            try:
                self._connection = ssh.connect(self._settings, self._timeout)
            except StoreError as error:
                self._failure = (time.monotonic(), error)
                raise
            return self._connection

    def _drop(self) -> None:
        if self._connection:
            self._connection.close()
            self._connection = None

    def close(self) -> None:
        with self._lock:
            self._drop()


class Pool:
    """Up to `size` sessions to the server of `settings`."""

    def __init__(self, settings: ssh.Settings, size: int, timeout: float) -> None:
        self._url, self._timeout = settings.url, timeout
        self._slots = threading.Semaphore(size)
        lines = -(-size // SESSIONS_PER_CONNECTION)
        self._lines = [_Line(settings, timeout) for _ in range(lines)]
        self._lock = threading.Lock()
        self._free: list[tuple[Session, _Line, ssh.Connection]] = []
        self._closed = False
        self._worked = time.monotonic()  # when something last did

    @contextlib.contextmanager
    def session(self) -> Iterator[Session]:
        """A session for the length of a `with` block, taken back in order or thrown away."""
        self._wait_for_slot()
        try:
            session, line, connection = self._take()
            try:
                yield session
            except StoreUnavailable:
                session.broken = True
                raise
            finally:
                if session.idle:
                    self._worked = time.monotonic()
                    self._give_back(session, line, connection)
                else:
                    self._throw_away(session, line, connection)
        finally:
            self._slots.release()

    def _wait_for_slot(self) -> None:
        # A long queue is nothing bad while it moves; one that stands is a store that is away.
        began = time.monotonic()
        while not self._slots.acquire(timeout=self._timeout):
            if time.monotonic() - max(began, self._worked) > self._timeout:
                raise StoreUnavailable(f"{self._url}: no answer in {self._timeout:.0f} s")

    def _take(self) -> tuple[Session, _Line, ssh.Connection]:
        while True:
            with self._lock:
                if self._closed:
                    raise StoreError(f"{self._url}: the store is closed")
                if not self._free:
                    line = min(self._lines, key=lambda line: line.sessions)
                    line.sessions += 1
                    break
                found = self._free.pop()
            if found[2].alive:
                return found
            self._throw_away(*found)
        try:
            connection = line.connection()
            return self._open(connection), line, connection
        except BaseException:
            with self._lock:
                line.sessions -= 1
            raise

    def _open(self, connection: ssh.Connection) -> Session:
        transport = connection.transport
        try:
            with ssh.bounded(transport, self._timeout):
                channel = transport.open_session(timeout=self._timeout)
                channel.invoke_subsystem("sftp")
        except (paramiko.SSHException, OSError, EOFError) as error:
            if transport.is_active():
                raise StoreError(
                    f"{self._url}: the server gives no SFTP session ({error}): check Subsystem and "
                    "MaxSessions in its sshd_config"
                ) from error
            raise StoreUnavailable(f"{self._url}: the connection broke ({error})") from error
        return Session(channel, self._timeout, self._url)

    def _give_back(self, session: Session, line: _Line, connection: ssh.Connection) -> None:
        with self._lock:
            if not self._closed:
                self._free.append((session, line, connection))
                return
        self._throw_away(session, line, connection)

    def _throw_away(self, session: Session, line: _Line, connection: ssh.Connection) -> None:
        with self._lock:
            line.sessions -= 1
        if session.broken:
            # What one session found out spares the others their own waiting.
            connection.transport.close()
        session.close()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._free.clear()
        for line in self._lines:
            line.close()

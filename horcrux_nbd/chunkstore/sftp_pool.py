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
from dataclasses import dataclass

from ..errors import StoreError, StoreUnavailable
from . import ssh
from .light import paramiko
from .sftp_wire import Session

# OpenSSH allows 10 sessions to a connection (MaxSessions); and one paramiko connection, which has
# one thread, carries about 100 MB/s however many sessions it has.
SESSIONS_PER_CONNECTION = 8


class _Line:
    """A place for one connection, made by the first thread that needs it while others wait."""

    def __init__(self, settings: ssh.Settings, timeout: float, most: int) -> None:
        self._settings, self._timeout = settings, timeout
        # Guarded by the pool's lock: sessions that it has, and may have
        self.sessions, self.most = 0, most
        self._lock = threading.Lock()
        self._connection: ssh.Connection | None = None
        self._failure: tuple[float, StoreError] | None = None

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


@dataclass(frozen=True)
class _Place:
    """A session and where it belongs."""

    session: Session
    line: _Line
    connection: ssh.Connection


class _NoMore(Exception):
    """The server gives no further session on a connection that stands."""


class Pool:
    """Up to `size` sessions to the server of `settings`; fewer where it allows no more."""

    def __init__(self, settings: ssh.Settings, size: int, timeout: float) -> None:
        self._url, self._timeout = settings.url, timeout
        count = -(-size // SESSIONS_PER_CONNECTION)
        self._lines = [
            _Line(settings, timeout, size // count + (index < size % count))
            for index in range(count)
        ]
        self._changed = threading.Condition()  # guards all below, and the counts of the lines
        self._free: list[_Place] = []
        self._closed = False
        self._worked = time.monotonic()  # when something last did

    @contextlib.contextmanager
    def session(self) -> Iterator[Session]:
        """A session for the length of a `with` block, taken back in order or thrown away."""
        place = self._take()
        session = place.session
        try:
            yield session
        except StoreUnavailable:
            session.broken = True
            raise
        finally:
            if session.idle:
                self._give_back(place)
            else:
                self._throw_away(place)

    def _take(self) -> _Place:
        while True:
            found = self._free_place_or_line()
            if isinstance(found, _Place):
                if found.connection.alive:
                    return found
                self._throw_away(found)
                continue
            try:
                connection = found.connection()
                return _Place(self._open(connection), found, connection)
            except _NoMore as error:
                with self._changed:
                    found.sessions -= 1
                    if not found.sessions:
                        raise StoreError(
                            f"{self._url}: the server gives no SFTP session ({error}): check "
                            "Subsystem and MaxSessions in its sshd_config"
                        ) from error
                    found.most = found.sessions  # go on with those that there are
            except BaseException:
                with self._changed:
                    found.sessions -= 1
                    self._changed.notify()
                raise

    def _free_place_or_line(self) -> _Place | _Line:
        """A session that nobody uses; else a line to open one on, counted there already."""
        began = time.monotonic()
        with self._changed:
            while True:
                if self._closed:
                    raise StoreError(f"{self._url}: the store is closed")
                if self._free:
                    return self._free.pop()
                line = min(self._lines, key=lambda line: line.sessions - line.most)
                if line.sessions < line.most:
                    line.sessions += 1
                    return line
                # A long queue is nothing bad while it moves; one that stands is a store away.
                moved = self._changed.wait(self._timeout)
                stands = time.monotonic() - max(began, self._worked) > self._timeout
                if not moved and stands:
                    raise StoreUnavailable(f"{self._url}: no answer in {self._timeout:.3g} s")

    def _open(self, connection: ssh.Connection) -> Session:
        transport = connection.transport
        try:
            with ssh.bounded(transport, self._timeout):
                channel = transport.open_session(timeout=self._timeout)
                channel.invoke_subsystem("sftp")
        except (paramiko.SSHException, OSError, EOFError) as error:
            if transport.is_active():
                raise _NoMore(str(error)) from error
            raise StoreUnavailable(f"{self._url}: the connection broke ({error})") from error
        return Session(channel, self._timeout, self._url)

    def _give_back(self, place: _Place) -> None:
        with self._changed:
            self._worked = time.monotonic()
            if not self._closed:
                self._free.append(place)
                self._changed.notify()
                return
        self._throw_away(place)

    def _throw_away(self, place: _Place) -> None:
        with self._changed:
            place.line.sessions -= 1
            self._changed.notify()
        if place.session.broken:
            # What one session found out spares the others their own waiting.
            place.connection.transport.close()
        place.session.close()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._free.clear()
            self._changed.notify_all()
        for line in self._lines:
            line.close()

"""Who removes objects right now: one at a time, and no writer makes a ref meanwhile.

An announcement says when a removal may begin; several hosts may then find it due. Each that works
makes a key of its own under `gc/` with the same beginning, so that writers wait for it too, and
takes it away when it is done. One that was killed leaves it: whoever comes next tells that it is
stale by the process, on the same host, or by its age.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path

from ..chunkstore.base import ChunkStore
from ..errors import Busy, Damaged, KeyNotFound
from .sweeps import MARGIN, PREFIX, announcement, begins

MARK = b"working "
RENEW = 600.0  # seconds after which a lease is written anew
# A worker stops by itself when it could not renew for this long; so whoever finds a lease that is
# older by a clock's difference (the margin) and by one store operation knows that nobody works.
GIVE_UP = 1800.0
STALE = GIVE_UP + MARGIN + 600.0


class Lease:
    """That this process removes objects. Use it in a `with` block; `check` before each batch."""

    def __init__(
        self, store: ChunkStore, begin: float, clock: Callable[[], float] = time.time
    ) -> None:
        self._store, self._clock = store, clock
        self._begin, self._key, self._since = min(begin, clock()), "", 0.0

    def __enter__(self) -> Lease:
        """Raises Busy where somebody else removes objects."""
        self._write()
        try:
            refuse_others(self._store, self._key, self._clock)
        except BaseException:
            self._store.delete(self._key)
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._store.delete(self._key)

    def _write(self) -> None:
        now, old = self._clock(), self._key
        key = announcement(self._begin, secrets.token_hex(16))
        value = {"host": socket.gethostname(), "boot": _boot(), "pid": os.getpid(), "time": now}
        self._store.put_exclusive(key, MARK + json.dumps(value).encode())
        self._key, self._since = key, now
        if old:
            self._store.delete(old)

    def check(self) -> None:
        """Go on being the one. Raises Busy where this process stood still for too long."""
        age = self._clock() - self._since
        if age > GIVE_UP:
            raise Busy(f"{self._store.url}: the removal stood still for {age:.0f} s: run it again")
        if age > RENEW:
            self._write()


def refuse_others(store: ChunkStore, mine: str, clock: Callable[[], float]) -> None:
    """Raises Busy where another removal is at work; takes away what dead ones left."""
    for name in store.children(PREFIX):
        key = PREFIX + name
        if key == mine or begins(name) is None:
            continue
        try:
            data = store.get(key, 0, 4096)
        except KeyNotFound:  # done
            continue
        if not data.startswith(MARK):
            continue
        try:
            value = json.loads(data[len(MARK) :])
            stale = _is_stale(value, clock())
        except (ValueError, KeyError, TypeError) as error:
            raise Damaged(
                f"{store.url}: {key} is damaged ({error}): delete it if nobody removes objects"
            ) from None
        if stale:
            store.delete(key)
            continue
        raise Busy(
            f"{store.url}: process {value['pid']} on {value['host']} removes objects: wait for it"
        )


def _is_stale(value: dict[str, object], now: float) -> bool:
    if value["host"] == socket.gethostname() and value["boot"] == _boot():
        try:
            os.kill(int(str(value["pid"])), 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # it lives, and is somebody else's
            return False
        return False
    return now - float(str(value["time"])) > STALE


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()

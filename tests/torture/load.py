"""Random requests over one NBD connection, told to the oracle; as many of these as one likes."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Any

from tests.servers.nbdkit import libnbd

from .oracle import SECTOR, Oracle

KINDS = ("write", "zero", "trim", "read", "flush", "connect")
WEIGHTS = (50, 9, 9, 18, 10, 1)


def share(sectors: int, number: int, of: int) -> list[range]:
    """The sectors that writer `number` of `of` has for itself: half of all are dealt out in pairs,
    so that writers share blocks of 4 KiB; the others are long runs.
    """
    half = sectors // 2
    pairs = half // 2 // of
    dealt = [range((p * of + number) * 2, (p * of + number) * 2 + 2) for p in range(pairs)]
    run = half // of
    begin = half + number * run
    return [*dealt, range(begin, begin + run)]


class Load(threading.Thread):
    """Reads, writes, zeros, trims, flushes and connects anew until the server is gone."""

    def __init__(
        self, connect: Callable[[], Any], oracle: Oracle, number: int, of: int, seed: str
    ) -> None:
        """`seed` decides what is asked for, in which order."""
        super().__init__(daemon=True, name=f"writer {number}")
        self._connect, self._oracle = connect, oracle
        self._handle = connect()
        *self._pairs, self._run = share(oracle.sectors, number, of)
        self._chance = random.Random(seed)
        self._nbd = libnbd()
        self.requests = 0
        self.wrong: list[str] = []
        self.failed: BaseException | None = None
        self.ended = 0.0  # monotonic

    def run(self) -> None:
        assert self._nbd is not None
        try:
            while not self.wrong:
                self._request()
                self.requests += 1
        except self._nbd.Error as error:
            self.failed = error
            self.ended = time.monotonic()
        except BaseException as error:
            self.wrong.append(repr(error))

    def _sectors(self) -> range:
        if self._chance.random() < 0.5:
            pair = self._chance.choice(self._pairs)
            return pair[: self._chance.choice([1, 2])]
        first = self._chance.choice(self._run)
        stop = min(first + self._chance.choice([1, 8, 64, 400]), self._run.stop)
        return range(first, stop)

    def _request(self) -> None:
        assert self._nbd is not None
        (kind,) = self._chance.choices(KINDS, WEIGHTS)
        if kind == "flush":
            covered = self._oracle.now()
            self._handle.flush()
            self._oracle.flushed(covered)
        elif kind == "connect":
            self._handle.shutdown()
            self._handle = self._connect()
        elif kind == "read":
            self._read()
        else:
            self._write(kind)

    def _write(self, kind: str) -> None:
        sectors = self._sectors()
        offset, length = sectors.start * SECTOR, len(sectors) * SECTOR
        fua = self._chance.random() < 0.05
        flags = self._nbd.CMD_FLAG_FUA if fua else 0  # type: ignore[union-attr]
        version = self._oracle.begins(sectors, zero=kind != "write")
        if kind == "write":
            self._handle.pwrite(self._oracle.data(sectors, version), offset, flags)
        elif kind == "zero":
            self._handle.zero(length, offset, flags)
        else:
            self._handle.trim(length, offset, flags)
        self._oracle.acknowledged(sectors, durable=fua)

    def _read(self) -> None:
        """Anywhere: what was acknowledged before must show, or what others write just now."""
        first = self._chance.randrange(self._oracle.sectors)
        count = min(self._chance.choice([1, 8, 64, 400]), self._oracle.sectors - first)
        before = self._oracle.now()
        found = self._handle.pread(count * SECTOR, first * SECTOR)
        wrong, _ = self._oracle.check(found, self._oracle.allowed(before), first)
        self.wrong.extend(f"read under load: {line}" for line in wrong)

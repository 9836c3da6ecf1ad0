"""What each sector of a block device may hold after a crash, and what a version of it may hold.

A sector (512 bytes) has one writer, so its contents have an order. A content is a version: 0 is
what the image was made with, others are numbers that requests got, in the order in which they
began. A written sector says which sector and version it is; a zeroed one is zeros.
"""

from __future__ import annotations

import itertools
import struct
import threading
from collections.abc import Iterable

SECTOR = 512
_CONTENT = struct.Struct("<QQ")
_REPEAT = SECTOR // _CONTENT.size


class Oracle:
    """Keeps for each sector what was flushed last and all that was written since.

    Any number of threads may tell it what they do, in this order: `begins`, the request itself,
    `acknowledged`. What is read is judged by `check`.
    """

    def __init__(self, original: bytes) -> None:
        """`original` is what the image holds at the beginning; a part of a sector is left out."""
        self.sectors = len(original) // SECTOR
        self._original = original
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._zeroing: set[int] = set()  # versions that are zeros
        self._history: dict[int, list[int]] = {}  # oldest first; [0] where there is none
        self._done: dict[int, int] = {}  # where in the history what is acknowledged ends
        self._durable: dict[int, int] = {}  # and where what is flushed ends

    def content(self, sector: int, version: int) -> bytes:
        """What the sector holds with that version."""
        if version in self._zeroing:
            return bytes(SECTOR)
        if version == 0:
            return self._original[sector * SECTOR : (sector + 1) * SECTOR]
        return _CONTENT.pack(sector, version) * _REPEAT

    def begins(self, sectors: range, *, zero: bool = False) -> int:
        """A write of `sectors` is about to be sent; the version that it makes."""
        with self._lock:
            version = next(self._numbers)
            if zero:
                self._zeroing.add(version)
            for sector in sectors:
                self._history.setdefault(sector, [0]).append(version)
            return version

    def data(self, sectors: range, version: int) -> bytes:
        return b"".join(_CONTENT.pack(sector, version) * _REPEAT for sector in sectors)

    def acknowledged(self, sectors: range, *, durable: bool = False) -> None:
        """The write of `sectors` that began last was answered; with FUA it is `durable`."""
        with self._lock:
            for sector in sectors:
                self._done[sector] = len(self._history[sector]) - 1
                if durable:
                    self._durable[sector] = self._done[sector]

    def now(self) -> dict[int, int]:
        """Where each sector's acknowledged history ends: a flush that is about to be sent covers
        that much, and a read must show that or something later.
        """
        with self._lock:
            return dict(self._done)

    def flushed(self, covered: dict[int, int]) -> None:
        """A flush was answered that was sent after `covered` was what `now` said."""
        with self._lock:
            for sector, at in covered.items():
                self._durable[sector] = max(at, self._durable.get(sector, 0))

    def allowed(self, since: dict[int, int]) -> dict[int, list[int]]:
        """The versions that each sector had at some moment since `since` was `now`."""
        with self._lock:
            return {s: known[since.get(s, 0) :] for s, known in self._history.items()}

    # ---- judging

    def check(
        self, data: bytes | memoryview, allowed: dict[int, list[int]], first: int = 0
    ) -> tuple[list[str], dict[int, list[int]]]:
        """(what is wrong, the versions that fit each sector) of `data` from sector `first` on,
        where `allowed` says what may be there and every other sector is as it was made.
        """
        wrong, fitting = [], {}
        for at in range(len(data) // SECTOR):
            sector = first + at
            found = bytes(data[at * SECTOR : (at + 1) * SECTOR])
            known = allowed.get(sector, [0])
            fits = [version for version in known if self.content(sector, version) == found]
            if fits:
                fitting[sector] = fits
            else:
                wrong.append(f"sector {sector}: {self.describe(found)}, allowed {known}")
        return wrong, fitting

    def describe(self, found: bytes) -> str:
        """What a sector's content looks like, for people."""
        if not any(found):
            return "zeros"
        sector, version = _CONTENT.unpack_from(found)
        if found == _CONTENT.pack(sector, version) * _REPEAT and sector < self.sectors:
            return f"version {version} of sector {sector}"
        at = self._original.find(found)
        if at >= 0 and at % SECTOR == 0:
            return f"original of sector {at // SECTOR}"
        return f"garbage {found[:16].hex()}"

    def survived(self, image: bytes, *, power_cut: bool) -> list[str]:
        """What is wrong with the device after a crash. From here on each sector is what it is now.

        The kernel outlives the death of a process, so then all that was acknowledged must be there,
        flushed or not. A power cut spares what was flushed.
        """
        with self._lock:
            floor = self._durable if power_cut else self._done
            allowed = {s: known[floor.get(s, 0) :] for s, known in self._history.items()}
            wrong, fitting = self.check(image, allowed)
            for sector, known in list(self._history.items()):
                fits = fitting.get(sector)
                if fits is None:  # it is wrong, and told; not again after the next crash
                    del self._history[sector]
                    continue
                # What a dead process has written may still be in memory only: an older content may
                # come back when the power goes.
                low = known.index(fits[-1]) if power_cut else self._durable.get(sector, 0)
                self._history[sector] = known[low : known.index(fits[-1]) + 1]
            self._done = {s: len(known) - 1 for s, known in self._history.items()}
            self._durable = dict.fromkeys(self._history, 0)
            return wrong

    def one_moment(
        self,
        image: bytes,
        allowed: dict[int, list[int]],
        writers: Iterable[tuple[object, Iterable[int]]],
    ) -> list[str]:
        """What is wrong with a version that was made while `allowed` says what was there.

        It has to be one moment: of each writer all requests up to one, and none after it. `writers`
        are those, and the sectors of each. A request that zeroes may be cut through.
        """
        wrong, fitting = self.check(image, allowed)
        for writer, sectors in writers:
            mine = [sector for sector in sectors if sector in fitting and sector in allowed]
            newest = max((fitting[sector][0] for sector in mine), default=0)
            for sector in mine:
                here = fitting[sector][-1]
                late = [
                    version
                    for version in allowed[sector]
                    if here < version < newest
                    or (here < version == newest and version not in self._zeroing)
                ]
                if late:
                    wrong.append(
                        f"sector {sector}: version {here}, but {writer} wrote "
                        f"{late[0]} there before {newest}, which is in"
                    )
        return wrong

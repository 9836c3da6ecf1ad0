"""Bringing chunks to this host before anybody asks: by the version's profile, then all the rest.

Nobody waits for it, so it gives way: readers fetch in their own threads, a chunk that is on its way
is joined by whoever needs it, and while a reader waits for one that is not, the fill holds back. It
never evicts anything: when the cache is full it ends.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

from ..chunkstore.limit import Bandwidth
from ..errors import Damaged, HorcruxError
from ..repository.index import FANOUT, FANOUT_BITS
from .base import Base
from .demand import Demand
from .options import FillOptions
from .warm import run_in_threads
from .window import Window

log = logging.getLogger(__name__)

WORKERS = 32  # PEERS.md: 16 to 32 replay a start
AGAIN = 60.0  # seconds until the next try with a store that is away
LOOK = 64  # chunks between two looks at the room in the cache
# Places of the window that are given out while a reader waits for the store. A start goes through
# its profile: who waits, waits for what is not in it, and the rest is needed next.
BESIDE = {"profile": 0.5, "all": 0.5}


class Filler:
    """Fills the cache in threads of its own, from its making to `stop` or the end of its work."""

    def __init__(
        self,
        base: Callable[[], Base],
        demand: Demand,
        options: FillOptions,
        profile: Callable[[], tuple[int, ...]],
    ) -> None:
        """`base` tells the version that the volume lies on now; `profile` looks for the chunks of
        its profile (none: there is none), and may raise HorcruxError.
        """
        self._base, self._demand, self._options, self._profile = base, demand, options, profile
        self._most = max(1, min(WORKERS, base().repository.store.concurrency * 3 // 4))
        self._window = Window(self._most)
        self._bandwidth = Bandwidth(options.rate)
        self._stopped = threading.Event()
        self._taking = threading.Lock()
        self._since_look = 0
        self._listed = self._done = self._profile_chunks = 0
        self._stage = "none" if options.mode == "none" else "starting"
        self.idle = threading.Event()  # there is nothing to do any more
        self._thread = threading.Thread(target=self._run, name="fill", daemon=True)
        if options.mode == "none":
            self.idle.set()
        else:
            self._thread.start()

    def figures(self) -> dict[str, Any]:
        """How far it is. `chunks` are those that it has looked at in this stage, of `of` where that
        is known.
        """
        return {
            "mode": self._options.mode,
            "stage": self._stage,
            "chunks": self._done,
            "of": self._listed or None,
            "profile_chunks": self._profile_chunks,
            "under_way_limit": self._window.size,
        }

    def stop(self) -> None:
        """End it; what is being fetched gets two seconds."""
        self._stopped.set()
        self._window.stop()
        self._bandwidth.close()
        if self._thread.ident is not None:
            self._thread.join(2)

    # ---- what to do

    def _run(self) -> None:
        try:
            while not self._stopped.is_set():
                try:
                    self._stages()
                except HorcruxError as error:
                    log.info("prefetch: %s: again in %.0f s", error, AGAIN)
                    self._stage = "store away"
                    self._stopped.wait(AGAIN)
                else:
                    return
        finally:
            self.idle.set()

    def _stages(self) -> None:
        chunks = self._profile()
        self._profile_chunks = len(chunks)
        self._begin("profile", len(chunks))
        if not self._work(iter(chunks)):
            return
        if self._options.mode == "all":
            self._begin("all", 0)
            if not self._work(self._rest()):
                return
        self._stage = "done"

    def _begin(self, stage: str, listed: int) -> None:
        self._stage, self._listed, self._done = stage, listed, 0

    def _rest(self) -> Iterator[int]:
        """All chunks that are no holes: leaf by leaf, the one in which readers miss most first."""
        done: set[int] = set()
        following = 0
        while True:
            base = self._base()
            leaf = self._demand.hottest(done, following)
            if leaf is None:
                while following in done:
                    done.discard(following)  # before `following` all are done
                    following += 1
                first = base.next_chunk(following << FANOUT_BITS)
                if first is None:
                    return
                leaf = following = first >> FANOUT_BITS
                if leaf in done:
                    continue
            done.add(leaf)
            yield from range(leaf * FANOUT, (leaf + 1) * FANOUT)

    # ---- doing it

    def _work(self, chunks: Iterator[int]) -> bool:
        """Fetch what is missing of `chunks`, in several threads; False if it was ended."""
        failed: list[HorcruxError] = []
        full = threading.Event()

        def work() -> None:
            while not (self._stopped.is_set() or failed or full.is_set()):
                try:
                    with self._taking:
                        number = self._missing(chunks)
                    if number is None:
                        return
                    if not self._room():
                        full.set()
                        return
                    self._fetch(number)
                except Damaged as error:  # whoever reads it is told; the others are not its fault
                    log.warning("prefetch: %s", error)
                except HorcruxError as error:
                    failed.append(error)

        run_in_threads(work, self._most)
        if failed:
            raise failed[0]
        if full.is_set():
            self._stage = "cache full"
            log.info("prefetch: the cache is full, so it ends here")
        return not (full.is_set() or self._stopped.is_set())

    def _missing(self, chunks: Iterator[int]) -> int | None:
        base = self._base()
        for number in chunks:
            self._done += 1
            if self._stopped.is_set():
                return None
            if not base.present(number):
                return number
        return None

    def _room(self) -> bool:
        self._since_look += 1
        if self._since_look % LOOK == 1:
            return self._base().cache_has_room(LOOK + self._most)
        return True

    def _fetch(self, number: int) -> None:
        self._bandwidth.wait()
        beside = BESIDE.get(self._stage, 1.0)
        began = self._window.enter(lambda: self._demand.waiting, beside)
        if began is None:
            return
        received = 0
        try:
            received = self._base().bring(number)
        finally:
            self._window.leave(began, received > 0)
        self._bandwidth.take(received)

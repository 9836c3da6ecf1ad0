"""Bringing a volume's index to this host while it is served.

A commit rewrites the nodes above what changed, so it needs them, and must work with the store away.
They are fetched in the background, roots first: a laptop that was online for a few seconds can
commit anywhere.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from ..errors import HorcruxError
from ..repository.index import check_node, table_ids
from ..repository.objects import NULL_ID
from .base import Base

log = logging.getLogger(__name__)

# Nodes fetched at most: with leaves of 256 chunks they are the index of 512 GiB in chunks of
# 512 KiB, and 32 MiB in the cache. What lies beyond comes when it is first read.
MAX_NODES = 4096
THREADS = 4
AGAIN = 60.0  # seconds until the next try with a store that is away


class IndexWarmer:
    """Loads the nodes of one version, a level at a time, until all are here or MAX_NODES are."""

    def __init__(self, base: Base, most: int = MAX_NODES) -> None:
        self._base, self._most = base, most
        self._stopped = threading.Event()
        self.done = threading.Event()  # all that it wanted is on this host
        self._thread = threading.Thread(target=self._run, name="warm-index", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                self._walk()
            except HorcruxError as error:
                log.info("the index is not all here yet: %s", error)
                self._stopped.wait(AGAIN)
            else:
                self.done.set()
                return

    def _walk(self) -> None:
        commit = self._base.commit
        nodes = {commit.index} - {NULL_ID}
        left = self._most
        for level in range(commit.levels - 1, -1, -1):
            wanted = sorted(nodes)[:left]
            left -= len(wanted)
            nodes = self._level(wanted, level)
            if not nodes or not left:
                return

    def _level(self, wanted: list[bytes], level: int) -> set[bytes]:
        """Load the nodes of one level; what they name."""
        found: set[bytes] = set()
        failed: list[HorcruxError] = []
        rest = iter(wanted)
        lock = threading.Lock()

        def work() -> None:
            while not self._stopped.is_set() and not failed:
                with lock:
                    oid = next(rest, None)
                if oid is None:
                    return
                try:
                    table = check_node(self._base.load_node(oid), level)
                except HorcruxError as error:
                    failed.append(error)
                    return
                if level:
                    ids = set(table_ids(table))
                    with lock:
                        found.update(ids)

        run_in_threads(work, min(THREADS, len(wanted)))
        if failed:
            raise failed[0]
        return found

    def stop(self) -> None:
        """End it; what is being fetched gets a few seconds."""
        self._stopped.set()
        self._thread.join(timeout=5)


def run_in_threads(work: Callable[[], None], count: int) -> None:
    """Run `work` in `count` daemon threads; returns when all have ended."""
    threads = [threading.Thread(target=work, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

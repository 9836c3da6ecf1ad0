"""Sequential readers, found and read ahead of.

Several streams at once, since a database scan and a backup overlap. A stream begins where a read
follows one that was just before it; its window doubles as it goes on, so a random reader costs
nothing and a long scan has the network busy.
"""

from __future__ import annotations

from collections import OrderedDict

from ..units import KiB, MiB

FIRST_WINDOW = 128 * KiB  # PEERS.md: 128 KiB doubling to 8 MiB
LAST_WINDOW = 8 * MiB
STREAMS = 16


class ReadAhead:
    """Tells which chunks a reader will want. One lock-free instance for each volume: two threads
    that race in it at worst miss a stream or fetch a chunk early.
    """

    def __init__(self, chunk_size: int, chunks: int) -> None:
        self._chunk_size, self._chunks = chunk_size, chunks
        # Chunk that a stream reads next → (window in bytes, first chunk not asked for yet).
        self._streams: OrderedDict[int, tuple[int, int]] = OrderedDict()
        self._last = -1

    def observe(self, first: int, last: int) -> range:
        """Chunks [first, last] are read now; the chunks that should be fetched ahead."""
        if last == self._last:
            return range(0)
        self._last = last
        stream = self._streams.pop(first, None)
        if stream is None and first != last:
            stream = self._streams.pop(first + 1, None)  # a read that ended within `first` before
        window, asked = stream or (0, last + 1)
        if stream:
            window = min(LAST_WINDOW, max(FIRST_WINDOW, window * 2))
        ahead = -(-window // self._chunk_size) if window else 0
        stop = min(self._chunks, last + 1 + ahead)
        begin = max(asked, last + 1)
        self._streams[last + 1] = (window, max(begin, stop))
        while len(self._streams) > STREAMS:
            try:
                self._streams.popitem(last=False)
            except KeyError:  # another thread emptied it
                break
        return range(begin, max(begin, stop))

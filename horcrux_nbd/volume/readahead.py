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

    def observe(self, first: int, last: int) -> range:
        """Chunks [first, last] are read now; the chunks that should be fetched ahead."""
        following = last + 1
        if following in self._streams:  # one more read of the chunk that a stream is in
            return range(0)
        stream = self._streams.pop(first, None)
        if stream is None and first != last:
            stream = self._streams.pop(first + 1, None)  # a read that ended within `first` before
        window, asked = stream or (0, following)
        if stream:
            window = min(LAST_WINDOW, max(FIRST_WINDOW, window * 2))
        ahead = -(-window // self._chunk_size)
        begin = max(asked, following)
        stop = max(begin, min(self._chunks, following + ahead))
        self._streams[following] = (window, stop)
        while len(self._streams) > STREAMS:
            try:
                self._streams.popitem(last=False)
            except KeyError:  # another thread emptied it
                break
        return range(begin, stop)

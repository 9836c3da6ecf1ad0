"""One layer of an overlay on disk: data files, and a map that says which of their blocks count.

```
<layer>/data-000000   sparse; block b of the image is at b * 4096, 1 TiB of the image a file
<layer>/map           maplog.py
```

Data is written in place and synced before the map that makes it visible (DESIGN §4). One file for
each TiB, because ext4 holds no file beyond 16 TiB and an image may be larger.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from .. import files
from ..errors import Damaged, HorcruxError, NoSpace
from ..units import TiB
from .blockmap import DATA, ZERO, BlockMap
from .maplog import MapLog

BLOCK_BITS = 12
BLOCK_SIZE = 1 << BLOCK_BITS
SEGMENT = 1 * TiB  # bytes of the image in one data file

_libc = ctypes.CDLL(None, use_errno=True)
_PUNCH_HOLE = 0x02 | 0x01  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, linux/falloc.h
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class SyncFailed(HorcruxError):
    """The disk under the overlay failed a sync. Linux drops what it could not write and reports
    that once (fsyncgate, 2018), so nothing after it can be acknowledged until a restart.
    """


class _File:
    """A descriptor that closes when nobody holds it any more, readers in other threads included."""

    def __init__(self, path: Path, flags: int) -> None:
        self.fd = os.open(path, flags | os.O_CLOEXEC, 0o600)

    def __del__(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            os.close(self.fd)


class Layer:
    """An open layer. Any number of threads may call it at once.

    **Invariant:** a block's mark follows its data: `write` marks after `pwrite` returned, `flush`
    takes the marks first and syncs the data before it logs them.
    """

    def __init__(self, folder: Path, layer_id: bytes, size: int) -> None:
        self.folder, self.id, self.size = folder, layer_id, size
        self._log = MapLog(folder / "map", layer_id, size)
        self.blocks = BlockMap()
        self._files: dict[int, _File] = {}
        self._lock = threading.Lock()  # marks, files, dirty segments
        self._dirty_segments: set[int] = set()
        self._group_commit = threading.Condition()
        self._asked = self._done = 0
        self._flushing = False
        self._failed: SyncFailed | None = None
        self.read_only = False

    @classmethod
    def create(cls, folder: Path, layer_id: bytes, size: int) -> Layer:
        """Make an empty layer in the new folder `folder`, durably, and open it."""
        files.make_folder(folder, 0o700)
        layer = cls(folder, layer_id, size)
        layer._log.create()
        return layer.open()

    def open(self, read_only: bool = False) -> Layer:
        """Read the map and be ready. Raises Damaged."""
        self.read_only = read_only
        try:
            self.blocks = self._log.open(read_only)
        except FileNotFoundError:
            raise Damaged(f"{self._log.path} is missing: restore the volume's folder") from None
        flags = os.O_RDONLY if read_only else os.O_RDWR
        for path in self.folder.glob("data-*"):
            self._files[int(path.name[5:])] = _File(path, flags)
        return self

    # ---- data

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[int, int, int, int]]:
        """(segment, offset in it, start, stop in the request), split where a data file ends."""
        start = 0
        while start < length:
            segment, at = divmod(offset + start, SEGMENT)
            stop = min(length, start + SEGMENT - at)
            yield segment, at, start, stop
            start = stop

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill `view` from the data files; every block in it must be DATA. Raises Damaged."""
        for segment, at, start, stop in self._pieces(offset, len(view)):
            file = self._files.get(segment)
            got = 0
            while file is not None and start + got < stop:
                count = os.preadv(file.fd, [view[start + got : stop]], at + got)
                if count == 0:
                    break
                got += count
            if start + got < stop:
                raise Damaged(
                    f"{self.folder}/data-{segment:06d} is shorter than its map says (byte {at}): "
                    "it was cut off from outside; restore the volume's folder from a backup"
                )

    def _file(self, segment: int) -> _File:
        file = self._files.get(segment)
        if file is None:
            with self._lock:
                file = self._files.get(segment)
                if file is None:
                    path = self.folder / f"data-{segment:06d}"
                    file = _File(path, os.O_RDWR | os.O_CREAT)
                    files.sync_folder(self.folder)
                    self._files[segment] = file
        return file

    def write(self, offset: int, data: memoryview | bytes) -> None:
        """Put bytes into the data files and nothing else: for blocks that are DATA already."""
        if self._failed:
            raise self._failed
        view = memoryview(data)
        try:
            for segment, at, start, stop in self._pieces(offset, len(view)):
                files.write_all(self._file(segment).fd, view[start:stop], at)
                if segment not in self._dirty_segments:
                    with self._lock:
                        self._dirty_segments.add(segment)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NoSpace(f"no space left in {self.folder} for what is written") from error
            raise

    def mark(self, first: int, count: int, state: int) -> None:
        """Give blocks a state. Their data must have been written before, for DATA."""
        if self._failed:
            raise self._failed
        with self._lock:
            self.blocks.mark(first, count, state)

    def zero(self, first: int, count: int) -> None:
        """Let `count` blocks from `first` read as zeros, and give back the room they took."""
        had_data = [run for run in self.blocks.runs(first, first + count) if run[0] == DATA]
        self.mark(first, count, ZERO)
        for _, start, stop in had_data:
            offset, length = start << BLOCK_BITS, (stop - start) << BLOCK_BITS
            for segment, at, low, high in self._pieces(offset, length):
                file = self._files[segment]
                # A file system that cannot punch (EOPNOTSUPP) keeps the room; nothing else is lost.
                _libc.fallocate(file.fd, _PUNCH_HOLE, at, high - low)

    # ---- durability

    def flush(self) -> None:
        """Make everything that was written before this call durable. Calls at once share a sync.

        Raises SyncFailed from the first failed sync on.
        """
        with self._group_commit:
            self._asked += 1
            mine = self._asked
            while self._flushing and self._done < mine:
                self._group_commit.wait()
            if self._done >= mine:
                if self._failed:
                    raise self._failed
                return
            self._flushing = True
            target = self._asked
        try:
            self._flush()
        finally:
            with self._group_commit:
                self._flushing = False
                self._done = target
                self._group_commit.notify_all()

    def _flush(self) -> None:
        if self._failed:
            raise self._failed
        with self._lock:
            compact = self._log.wants_compaction(self.blocks.entries)
            changes = self.blocks.take_dirty()
            everything = self.blocks.everything() if compact else None
        # After the marks: each mark taken has its segment in the set that is taken here.
        with self._lock:
            segments, self._dirty_segments = self._dirty_segments, set()
        try:
            for segment in segments:
                os.fdatasync(self._files[segment].fd)
            if everything is not None:
                self._log.compact(everything)
            elif changes[0] or changes[1]:
                self._log.append(changes)
        except (OSError, HorcruxError) as error:
            self._failed = SyncFailed(
                f"{self.folder} could not be synced ({error}): nothing more is acknowledged; what "
                "was flushed before is safe. Mend the disk and restart the volume"
            )
            self._failed.errno = getattr(error, "errno", None) or errno.EIO
            raise self._failed from error

    # ---- figures

    def allocated(self) -> int:
        """Bytes that the data files take on disk."""
        total = 0
        for file in list(self._files.values()):
            total += os.fstat(file.fd).st_blocks * 512
        return total

    def retire(self) -> None:
        """Nothing is written any more; reads that are under way go on."""
        self._log.close()

    def close(self) -> None:
        """Forget the files; `flush` first. Readers that still hold one finish."""
        self._log.close()
        self._files = {}

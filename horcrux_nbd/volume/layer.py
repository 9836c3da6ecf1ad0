"""One layer of an overlay on disk: data files, and a map that says which of their blocks count.

```
<layer>/data-000000   sparse; block b of the image is at b * 4096, 1 TiB of the image a file
<layer>/map           maplog.py
<layer>/recent        recent.py, while a process writes the layer
<layer>/journal       journal.py, while a process writes the layer and syncs it often
```

Data is written in place and synced before the map that makes it visible (DESIGN §4). One file for
each TiB, because ext4 holds no file beyond 16 TiB and an image may be larger.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

from .. import files
from ..errors import Damaged, HorcruxError, NoSpace
from ..units import TiB
from . import core
from .blockmap import DATA, ZERO
from .journal import MOST, Journal
from .maplog import Changes, MapLog
from .recent import Recent

BLOCK_BITS = 12
BLOCK_SIZE = 1 << BLOCK_BITS
SEGMENT = 1 * TiB  # bytes of the image in one data file
_DATA_NAME = re.compile(r"data-(\d{6,})")

_libc = ctypes.CDLL(None, use_errno=True)
_PUNCH_HOLE = 0x02 | 0x01  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, linux/falloc.h
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class SyncFailed(HorcruxError):
    """The disk under the overlay failed a sync. Linux drops what it could not write and reports
    that once (fsyncgate, 2018), so nothing after it can be acknowledged until a restart.
    """

    def __init__(self, folder: Path, error: BaseException) -> None:
        super().__init__(
            f"{folder} could not be synced ({error}): nothing more is acknowledged; what was "
            "flushed before is safe. Mend the disk and restart the volume"
        )
        self.errno = getattr(error, "errno", None) or errno.EIO


class _File:
    """A descriptor that closes when nobody holds it any more, readers in other threads included."""

    def __init__(self, path: Path, flags: int) -> None:
        self.fd = os.open(path, flags | os.O_CLOEXEC, 0o600)

    def __del__(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            os.close(self.fd)


class Layer:
    """An open layer. Any number of threads may call it at once.

    **Invariant:** a block's mark follows its data: `mark` is called after `write` returned, which
    notes the data file as dirty before it returns. `flush` takes the marks first, then the dirty
    files, syncs those and logs the marks. So no mark reaches the disk before its data.
    **Invariant:** flushes go one after another, so what an earlier one took is synced by then.
    **Invariant:** what was written since the last flush is in `core`'s list of written blocks, or
    that has overflown; a block gets into it together with its mark, and both are taken together. So
    a small flush knows all that it has to make durable.
    **Invariant:** a mark is in `recent` before it is in the map, so it survives this process.
    """

    def __init__(self, folder: Path, layer_id: bytes, size: int) -> None:
        self.folder, self.id, self.size = folder, layer_id, size
        self._log = MapLog(folder / "map", layer_id, size)
        self.core = core.make(size, SEGMENT, layer_id)
        self.blocks = self.core.blocks
        self._recent = Recent(folder / "recent", self.core.pen)
        self._journal = Journal(folder / "journal", layer_id, self.core.journal)
        self._replayed: dict[int, bytes] = {}  # blocks of a layer that is read only
        self._whole = False  # the next flush syncs data files and map
        self._files: dict[int, _File] = {}
        self._lock = self.core.lock  # marks
        self._opening = threading.Lock()  # of data files
        self._group_commit = threading.Condition()
        self._asked = self._done = 0
        self._flushing = self._given_back = False
        self._failed: BaseException | None = None  # what a sync failed with
        self.read_only = False
        self._opened = False  # until then nothing is known of what is in `recent`

    @classmethod
    def create(cls, folder: Path, layer_id: bytes, size: int) -> Layer:
        """Make an empty layer in the new folder `folder`, durably, and open it."""
        files.make_folder(folder, 0o700)
        layer = cls(folder, layer_id, size)
        layer._log.create()
        return layer.open()

    def open(self, read_only: bool = False) -> Layer:
        """Read the map and be ready. Raises Damaged.

        What a process that died had acknowledged is there, flushed or not, and is durable when
        this returns, unless `read_only`. Raises NoSpace where that cannot be.
        """
        self.read_only = read_only
        try:
            self._log.open(read_only, self.blocks)
        except FileNotFoundError:
            raise Damaged(f"{self._log.path} is missing: restore the volume's folder") from None
        try:
            if not read_only:
                files.sweep_temporaries(self.folder)
            flags = os.O_RDONLY if read_only else os.O_RDWR
            for name in os.listdir(self.folder):
                if match := _DATA_NAME.fullmatch(name):
                    self._keep(int(match.group(1)), _File(self.folder / name, flags))
            for mark in self._recent.load():
                self.blocks.mark(*mark)
            self._replay(self._journal.load(read_only))
            if not read_only:
                # A process that died may have written without a sync; nobody else remembers.
                for segment in self._files:
                    self.core.touch(segment)
                if self.blocks.is_dirty or self._journal.in_use:
                    self.settle()
                elif self._files:
                    self._set_whole(True)  # the first flush, of what no list has
                self._recent.start()
                self.core.set_writable(True)
        except BaseException:
            self.close()
            raise
        self._opened = True
        return self

    def _replay(self, blocks: dict[int, bytes]) -> None:
        """Take blocks that were flushed into the journal before the power was cut."""
        for block, content in blocks.items():
            if block << BLOCK_BITS >= self.size:
                raise Damaged(f"{self.folder}/journal has a block behind the end of the image")
            if not self.read_only:
                self.write(block << BLOCK_BITS, content)
            self.blocks.mark(block, 1, DATA)
        if self.read_only and blocks:
            self._replayed = blocks
            for segment in self._files:
                self.core.set_file(segment, -1)  # the native part would not look at them

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
        if self._replayed:
            self._read_replayed(offset, view)
            return
        self._read_files(offset, view)

    def _read_replayed(self, offset: int, view: memoryview) -> None:
        at = offset
        while at < offset + len(view):
            end = min(offset + len(view), ((at >> BLOCK_BITS) + 1) << BLOCK_BITS)
            part, first = view[at - offset : end - offset], at & (BLOCK_SIZE - 1)
            content = self._replayed.get(at >> BLOCK_BITS)
            if content is None:
                self._read_files(at, part)
            else:
                part[:] = content[first : first + len(part)]
            at = end

    def _read_files(self, offset: int, view: memoryview) -> None:
        segment, at = divmod(offset, SEGMENT)
        file = self._files.get(segment)
        in_one_file = at + len(view) <= SEGMENT
        if file and in_one_file and os.preadv(file.fd, [view], at) == len(view):
            return
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
            with self._opening:
                file = self._files.get(segment)
                if file is None:
                    path = self.folder / f"data-{segment:06d}"
                    file = _File(path, os.O_RDWR | os.O_CREAT)
                    files.sync_folder(self.folder)
                    self._keep(segment, file)
        return file

    def _keep(self, segment: int, file: _File) -> None:
        self._files[segment] = file
        self.core.set_file(segment, file.fd)

    def write(self, offset: int, data: memoryview | bytes) -> None:
        """Put bytes into the data files and nothing else: for blocks that are DATA already."""
        if self._failed:
            raise SyncFailed(self.folder, self._failed)
        view = memoryview(data)
        segment, at = divmod(offset, SEGMENT)
        try:
            if at + len(view) <= SEGMENT:
                self._write_piece(segment, at, view)
            else:
                for segment, at, start, stop in self._pieces(offset, len(view)):
                    self._write_piece(segment, at, view[start:stop])
            self.core.wrote(offset >> BLOCK_BITS, -(-(offset + len(view)) >> BLOCK_BITS))
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NoSpace(f"no space left in {self.folder} for what is written") from error
            raise

    def _write_piece(self, segment: int, at: int, view: memoryview) -> None:
        files.write_all((self._files.get(segment) or self._file(segment)).fd, view, at)
        self.core.touch(segment)

    def mark(self, first: int, count: int, state: int) -> None:
        """Give blocks a state. Their data must have been written before, for DATA."""
        while True:
            if self._failed:
                raise SyncFailed(self.folder, self._failed)
            with self._lock:
                noted = self._recent.note(first, count, state)
                if noted:
                    self.blocks.mark(first, count, state)
                    if state == ZERO:
                        self._set_whole(True)
                    else:
                        self.core.wrote(first, first + count)
                    if self._recent.active:
                        return
            # To make room for it; or because there is none to note it, so it is made durable.
            self._set_whole(True)  # by a flush of everything: a small one makes no room there
            self.flush()
            if noted:
                return

    def zero(self, first: int, count: int) -> None:
        """Let `count` blocks from `first` read as zeros, and give back the room they took.

        The caller keeps writes of blocks that are not DATA away meanwhile.
        """
        begin = end = -1
        for state, start, stop in self.blocks.runs(first, first + count):
            if state == DATA:
                begin, end = start if begin < 0 else begin, stop
        self.mark(first, count, ZERO)
        if begin < 0:
            return
        # One call for each file, not for each run: all between is zeroed, and holes cost nothing.
        offset, length = begin << BLOCK_BITS, (end - begin) << BLOCK_BITS
        for segment, at, low, high in self._pieces(offset, length):
            if file := self._files.get(segment):
                # A file system that cannot punch (EOPNOTSUPP) keeps the room; nothing else is lost.
                _libc.fallocate(file.fd, _PUNCH_HOLE, at, high - low)

    # ---- durability

    def flush(self) -> None:
        """Make everything that was written before this call durable. Calls at once share a sync.

        Raises SyncFailed from the first failed sync on; NoSpace where the map found no room: a
        later flush may do, and nothing is lost until then.
        """
        with self._group_commit:
            self._asked += 1
            mine = self._asked
            while self._flushing and self._done < mine:
                self._group_commit.wait()
            if self._done >= mine:
                return
            self._flushing = True
            target = self._asked
        try:
            with self.core.flushing:
                self._flush()
        except BaseException:
            target = 0  # who waited tries for itself, and gets an error of its own
            raise
        finally:
            with self._group_commit:
                self._flushing = False
                self._done = max(self._done, target)
                self._group_commit.notify_all()

    def settle(self) -> None:
        """`flush`, and nothing is left in the journal: for a layer that is frozen, or closed."""
        self._set_whole(True)
        self.flush()
        while self._journal.in_use:  # somebody else's flush was under way
            self._set_whole(True)
            self.flush()

    def _set_whole(self, whole: bool) -> None:
        self._whole = whole
        self.core.set_whole(whole)

    def _flush_small(self) -> bool:
        """Make a few blocks durable in the journal, if that is all that there is to do."""
        if self._whole or self._given_back or not self._recent.active:
            return False
        if not self._journal.in_use and not self.blocks.is_dirty:
            return False  # only data files to sync, or nothing
        ranges = self.core.take_written()
        if ranges is None:
            self._journal.wanted(MOST + 1)
            return False
        numbers = sorted({block for first, stop in ranges for block in range(first, stop)})
        if not numbers:
            return self._journal.in_use
        if not self._journal.wanted(len(numbers)) or not self._journal.make():
            return False
        if not self._journal.has_room(len(numbers)):
            return False
        contents = b"".join(self._content(block) for block in numbers)
        self._journal.append(numbers, contents)
        return True

    def _content(self, block: int) -> bytes:
        """What the data file has of a block; zeros behind its end."""
        segment, at = divmod(block << BLOCK_BITS, SEGMENT)
        return files.read_exactly(self._files[segment].fd, BLOCK_SIZE, at)

    def _flush(self) -> None:
        if code := self.core.failure():  # of a native flush
            self._failed = self._failed or OSError(code, os.strerror(code))
            self._journal.distrust()
        if self._failed:
            raise SyncFailed(self.folder, self._failed)
        changes: Changes = [], []
        everything = None
        try:
            if self._flush_small():
                return
            with self._lock:
                self._set_whole(False)
                # What an earlier flush gave back is in the half that would be used now.
                if self._recent.noted and not self._given_back:
                    self._recent.switch()
                changes = self.blocks.take_dirty()
                changed = bool(changes[0] or changes[1])
                if changed and self._log.wants_compaction(self.blocks.entries):
                    everything = self.blocks.everything()
                # With the marks: each that is left for the next flush has its blocks left as well.
                self.core.take_written()
            # After the marks: each mark taken has its segment among those that are taken here.
            for segment in self.core.take_touched():
                os.fdatasync(self._files[segment].fd)
            if changed:
                self._log_changes(changes, everything)
            self._journal.clear()
            self._given_back = False
        except NoSpace:
            with self._lock:
                self._given_back = True
                self._set_whole(True)
                self.blocks.give_back(changes[0], [number for number, _ in changes[1]])
            raise
        except BaseException as error:
            # Whatever it was, what has been taken is not durable and no later flush knows of it.
            self.core.set_writable(False)
            self._journal.distrust()
            self._failed = error.with_traceback(None)  # a traceback holds on to nbdkit's buffers
            raise SyncFailed(self.folder, error) from error

    def _log_changes(self, changes: Changes, everything: Changes | None) -> None:
        if everything is not None:
            # No room for a second log beside the first, which is only long.
            with contextlib.suppress(NoSpace):
                self._log.compact(everything)
                return
        self._log.append(changes)

    # ---- figures

    def allocated(self) -> int:
        """Bytes that the data files take on disk."""
        total = 0
        for file in list(self._files.values()):
            total += os.fstat(file.fd).st_blocks * 512
        return total

    def retire(self) -> None:
        """Nothing is written any more; reads that are under way go on."""
        self.core.set_writable(False)
        self._log.close()
        all_durable = self._failed is None and not self.blocks.is_dirty
        if self._opened and all_durable and not self.read_only:
            with contextlib.suppress(OSError):  # what is in it is durable: it may be done again
                self._recent.remove()
                if not self._journal.in_use:
                    self._journal.remove()
        self._recent.close()
        self._journal.close()

    def close(self) -> None:
        """Give up the files; `flush` first. Nobody may call the layer any more.

        A frozen layer that readers may still hold needs no `close`: its files go with it.
        """
        self.retire()
        for segment in self._files:
            self.core.set_file(segment, -1)
        self._files = {}

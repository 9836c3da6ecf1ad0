"""A volume's own objects: small ones many to a file, so that a commit is one file and one sync.

```
objects/ab/abcdef…           chunks and commits: a file each, as in any local store
objects/packs/<token>.pack   patches and index nodes that are the volume's own
objects/packs/<token>.sent   a pack whose objects the repository has by now; the newest are kept
```

A thousand patches as a thousand files are three thousand system calls and a sync of each; as a pack
they are one of each (docs/design.md, "Layout of a volume's folder", has its bytes). A pack is
published whole and never changed. Its objects are proven by their ids when they are read.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import secrets
import struct
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import xxhash

from .. import files
from ..chunkstore.base import ChunkStore, Stat, check_prefix
from ..chunkstore.walk import merge
from ..errors import Damaged, KeyNotFound, NoSpace, StoreError, StoreFull
from ..repository.objects import Kind, key_id, kind_of, object_key
from ..units import MiB

log = logging.getLogger(__name__)

FOLDER = "packs"  # below the root; no key of a repository begins so
OWN, SENT = ".pack", ".sent"
MAGIC = b"HRXPACK1"
ENTRY = struct.Struct("<32sQI")  # id, offset in the file, bytes
END = struct.Struct("<8sIIQ")  # magic, number of entries, 0, XXH3-64 of the entries
PACKED = (Kind.PATCH, Kind.NODE)
PACK_SIZE = 16 * MiB  # of objects in one pack; it is in memory until it is published
KEEP_SENT = 64 * MiB  # of packs whose objects the repository has
# A folder's time goes in steps of 4 ms or more: a change right after a look may not show in it.
SETTLED = 50_000_000  # nanoseconds


class Pack:
    """One published pack. Its descriptor closes with the last reference."""

    def __init__(self, path: Path) -> None:
        """Raises Damaged; FileNotFoundError where it is gone."""
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        status = os.fstat(self._fd)
        self.size, self.mtime = status.st_size, status.st_mtime
        self.entries: dict[bytes, tuple[int, int]] = self._table()
        self.gone: set[bytes] = set()  # deleted, as far as this process is concerned

    def _table(self) -> dict[bytes, tuple[int, int]]:
        end = files.read_exactly(self._fd, END.size, max(self.size - END.size, 0))
        with contextlib.suppress(struct.error):
            magic, count, zero, check = END.unpack(end)
            start = self.size - END.size - count * ENTRY.size
            if magic == MAGIC and zero == 0 and start >= 0:
                table = files.read_exactly(self._fd, count * ENTRY.size, start)
                if xxhash.xxh3_64_intdigest(table) == check:
                    return {oid: (at, length) for oid, at, length in ENTRY.iter_unpack(table)}
        raise Damaged(f"{self.path} is damaged: restore the volume's folder from a backup")

    def read(self, oid: bytes) -> bytes:
        """One of its objects as it is stored."""
        at, length = self.entries[oid]
        return files.read_exactly(self._fd, length, at)

    def __del__(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            os.close(self._fd)


def encode_pack(objects: Mapping[bytes, bytes]) -> bytes:
    """The content of a pack with these objects (id → stored form)."""
    starts = itertools.accumulate(map(len, objects.values()), initial=0)
    table = b"".join(
        ENTRY.pack(oid, at, len(data))
        for (oid, data), at in zip(objects.items(), starts, strict=False)
    )
    end = END.pack(MAGIC, len(objects), 0, xxhash.xxh3_64_intdigest(table))
    return b"".join([*objects.values(), table, end])


class PackedStore(ChunkStore):
    """The objects of one volume, as a chunk store. Safe for several threads, and for others that
    read the same folder while one writes.

    What is put is there for this store at once, and durably, for everybody, after the next `sync`.
    """

    def __init__(self, loose: ChunkStore, root: Path) -> None:
        """`loose` keeps a file for each key below `root`."""
        self.url, self.concurrency, self.timeout = loose.url, loose.concurrency, loose.timeout
        self._loose, self._folder = loose, root / FOLDER
        self._growing: dict[bytes, bytes] = {}
        self._growing_bytes = 0
        self._packs: dict[str, Pack] = {}  # by name
        self._broken: Damaged | None = None  # an own pack that cannot be read
        self._looked = (-1, False)  # time of the folder, and whether a later change would show
        self._lock = threading.RLock()

    # ---- what is there

    def _current(self, *, anew: bool = False) -> list[Pack]:
        """The packs that are there now, the volume's own and those that were sent."""
        try:
            changed = os.stat(self._folder).st_mtime_ns
        except FileNotFoundError:
            return []
        if anew or self._looked != (changed, True):
            with self._lock:
                settled = time.time_ns() - changed > SETTLED
                self._packs = self._scan()
                self._looked = changed, settled
        return list(self._packs.values())

    def _scan(self) -> dict[str, Pack]:
        found: dict[str, Pack] = {}
        self._broken = None
        for name in sorted(os.listdir(self._folder)):
            token, dot, end = name.partition(".")
            if not token or dot + end not in (OWN, SENT):
                continue
            pack = self._packs.get(name) or self._packs.get(f"{token}{OWN}")
            try:
                pack = pack or Pack(self._folder / name)
            except FileNotFoundError:  # sent or removed just now
                continue
            except Damaged as error:
                if dot + end == SENT:  # the repository has what was in it
                    log.warning("%s: what was in it comes from the repository", error)
                    with contextlib.suppress(OSError):
                        os.unlink(self._folder / name)
                else:
                    self._broken = error
                continue
            pack.path = self._folder / name
            found[name] = pack
        return found

    def _check_whole(self) -> None:
        """Raise if it cannot be told what is there: nobody may take it for what is all."""
        self._current()
        if self._broken is not None:
            raise self._broken

    def _own(self) -> list[Pack]:
        return [pack for pack in self._current() if pack.path.suffix == OWN]

    def _find(self, oid: bytes, packs: list[Pack]) -> Pack | None:
        return next((p for p in packs if oid in p.entries and oid not in p.gone), None)

    # ---- the store

    def prepare(self) -> None:
        self._loose.prepare()

    def check(self) -> None:
        self._loose.check()

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        oid = _packed_id(key)
        if oid is None:
            return self._loose.get(key, offset, length)
        data = self._growing.get(oid)
        if data is None:
            # Where it is in none, for sure: file systems whose times are whole seconds do not show
            # each change of the folder, and the store may have it no more than we do.
            pack = self._find(oid, self._current()) or self._find(oid, self._current(anew=True))
            if pack is None:
                try:
                    return self._loose.get(key, offset, length)
                except KeyNotFound:
                    self._check_whole()
                    raise
            try:
                data = pack.read(oid)
            except OSError as error:
                raise StoreError(f"{pack.path} cannot be read: {error.strerror}") from error
        return data[offset:] if length is None else data[offset : offset + length]

    def put(self, key: str, data: bytes) -> None:
        oid = _packed_id(key)
        if oid is None:
            self._loose.put(key, data)
            return
        with self._lock:
            self._growing_bytes += len(data) - len(self._growing.get(oid, b""))
            self._growing[oid] = data
            if self._growing_bytes >= PACK_SIZE:
                self._publish()

    def sync(self) -> None:
        with self._lock:
            self._publish()
        self._loose.sync()  # after it: a commit comes behind what it names

    def _publish(self) -> None:
        objects, self._growing, self._growing_bytes = self._growing, {}, 0
        if not objects:
            return
        try:
            self._publish_file(encode_pack(objects))
        except BaseException:
            # Whoever syncs again means these too.
            self._growing = {**objects, **self._growing}
            self._growing_bytes = sum(map(len, self._growing.values()))
            raise

    def _publish_file(self, data: bytes) -> None:
        try:
            files.make_folder(self._folder, 0o700)
            path = self._folder / f"{secrets.token_hex(8)}{OWN}"
            files.publish(path, data, mode=0o600)
        except NoSpace as error:
            raise StoreFull(f"No space left for {self._folder}: free some space there") from error
        except OSError as error:
            raise StoreError(f"{self._folder}: cannot store objects: {error.strerror}") from error

    def put_exclusive(self, key: str, data: bytes) -> None:
        self._loose.put_exclusive(key, data)

    def stat(self, key: str) -> Stat:
        oid = _packed_id(key)
        if oid is None:
            return self._loose.stat(key)
        if oid in self._growing:
            return Stat(key, len(self._growing[oid]), time.time())
        pack = self._find(oid, self._own())
        if pack is None:
            self._check_whole()
        return Stat(key, pack.entries[oid][1], pack.mtime) if pack else self._loose.stat(key)

    def children(self, prefix: str) -> list[str]:
        packed = {entry.key[len(prefix) :].split("/")[0] for entry in self._packed(prefix, "")}
        return sorted(packed | (set(self._loose.children(prefix)) - {FOLDER}))

    def delete(self, key: str) -> None:
        oid = _packed_id(key)
        with self._lock:
            if oid is not None and oid in self._growing:
                self._growing_bytes -= len(self._growing.pop(oid))
            for pack in self._own() if oid is not None else ():
                if oid in pack.entries:
                    pack.gone.add(oid)
                    if len(pack.gone) == len(pack.entries):
                        self._remove(pack)
        self._loose.delete(key)

    def _remove(self, pack: Pack) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(pack.path)
        self._packs.pop(pack.path.name, None)

    def _packed(self, prefix: str, after: str) -> list[Stat]:
        """The packed objects of the volume's own, by key."""
        self._check_whole()
        found = {
            oid: Stat(object_key(oid), length, pack.mtime)
            for pack in self._own()
            for oid, (_, length) in pack.entries.items()
            if oid not in pack.gone
        }
        for oid, data in list(self._growing.items()):
            found[oid] = Stat(object_key(oid), len(data), time.time())
        some = (s for s in found.values() if s.key.startswith(prefix) and s.key > after)
        return sorted(some, key=lambda entry: entry.key)

    def list(self, prefix: str = "", after: str = "", limit: int | None = None) -> Iterator[Stat]:
        packed = self._packed(check_prefix(prefix), after)
        loose = (s for s in self._loose.list(prefix, after) if not s.key.startswith(f"{FOLDER}/"))
        return merge(packed, loose, limit)

    def close(self) -> None:
        with self._lock:
            self._packs = {}
        self._loose.close()

    # ---- what is more than a store

    def sizes(self) -> dict[bytes, int]:
        """The volume's own objects: id → bytes as stored. Those that were sent are none."""
        self._check_whole()
        found = {
            oid: entry.size
            for entry in self._loose.list("objects/")
            if (oid := key_id(entry.key)) is not None
        }
        for pack in self._own():
            found.update((oid, e[1]) for oid, e in pack.entries.items() if oid not in pack.gone)
        found.update((oid, len(data)) for oid, data in list(self._growing.items()))
        return found

    def sent(self, ids: Collection[bytes]) -> set[bytes]:
        """The repository has `ids` now: packs that hold nothing else are the volume's own no more.
        What was in them; it can still be read, while there is room for it.
        """
        done: set[bytes] = set()
        with self._lock:
            for pack in self._own():
                if all(oid in ids for oid in pack.entries.keys() - pack.gone):
                    os.rename(pack.path, pack.path.with_suffix(SENT))
                    done |= pack.entries.keys() - pack.gone
            kept = 0
            there = [pack for pack in self._current() if pack.path.suffix == SENT]
            for pack in sorted(there, key=lambda pack: pack.mtime, reverse=True):
                kept += pack.size
                if kept > KEEP_SENT:
                    self._remove(pack)
        return done

    def sweep(self) -> int:
        """As the contract says; packs that were never finished at once. Under the versions lock."""
        with contextlib.suppress(FileNotFoundError):
            return files.sweep_temporaries(self._folder)
        return 0


def _packed_id(key: str) -> bytes | None:
    """The id in the key of an object that goes into packs."""
    oid = key_id(key)
    return oid if oid is not None and kind_of(oid) in PACKED else None

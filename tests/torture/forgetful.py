"""A file system that forgets what was not synced when the power is cut. In memory, over FUSE.

    python -m tests.torture.forgetful FOLDER     then on standard input, a line each:
        cut SEED               the power goes, and comes back
        try SEED FOLDER        what a cut now would leave, in another folder until it is unmounted

What POSIX promises is all that it keeps: data and size of a file after an fsync of the file, and a
name (made, removed or renamed) after an fsync of its folder. Of the rest a cut keeps nothing, what
came before some moment, or anything at random. A page of 4 KiB and a rename are never cut through.
Times are whole seconds. Real file systems keep more; what is safe here is safe there.
"""

from __future__ import annotations

import errno
import os
import random
import signal
import stat
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from .fuse_server import KEEP_SIZE, PUNCH_HOLE, Mount

PAGE = 4096
WRITE_BACK = 0.03  # how likely a request has some dirty page written by itself
ROOT = 1


@dataclass
class Change:
    """A change of names that may or may not have reached the disk; all of it or nothing."""

    when: int
    folders: tuple[Node, ...]
    apply: Callable[[], None]
    done: bool = False

    def reach_disk(self) -> None:
        if not self.done:
            self.done = True
            self.apply()


@dataclass(eq=False)
class Node:
    """A file or folder: as it is, and as the disk has it."""

    number: int
    mode: int
    links: int = 1
    size: int = 0
    changed: int = field(default_factory=lambda: int(time.time()))
    pages: dict[int, bytes] = field(default_factory=dict)
    entries: dict[bytes, Node] = field(default_factory=dict)
    # As the disk has it.
    disk_size: int = 0
    disk_pages: dict[int, bytes] = field(default_factory=dict)
    disk_entries: dict[bytes, Node] = field(default_factory=dict)
    # What differs.
    dirty: dict[int, int] = field(default_factory=dict)  # page → when it was written
    sized: int = 0  # when the size changed
    changes: list[Change] = field(default_factory=list)

    @property
    def is_folder(self) -> bool:
        return stat.S_ISDIR(self.mode)

    def page_reaches_disk(self, number: int) -> None:
        self.dirty.pop(number, None)
        if number in self.pages:
            self.disk_pages[number] = self.pages[number]
        else:
            self.disk_pages.pop(number, None)


class Forgetful:
    """The file system. `cut` is what it is for."""

    def __init__(self) -> None:
        self._chance = random.Random(0)
        self._root = Node(ROOT, stat.S_IFDIR | 0o700)
        self._nodes = {ROOT: self._root}
        self._last = ROOT
        self._now = 0
        self.syncs = 0

    def _node(self, number: int) -> Node:
        try:
            return self._nodes[number]
        except KeyError:
            raise OSError(errno.ESTALE, "") from None

    def _child(self, folder: Node, name: bytes) -> Node:
        try:
            return folder.entries[name]
        except KeyError:
            raise OSError(errno.ENOENT, "") from None

    def _changed(self, apply: Callable[[], None], *folders: Node) -> None:
        self._now += 1
        change = Change(self._now, folders, apply)
        for folder in folders:
            folder.changes.append(change)
            folder.changed = int(time.time())

    # ---- names

    def attributes(self, node: int) -> Node:
        return self._node(node)

    def lookup(self, node: int, name: bytes) -> int:
        return self._child(self._node(node), name).number

    def names(self, node: int) -> list[tuple[bytes, int]]:
        return [(name, child.number) for name, child in self._node(node).entries.items()]

    def create(self, node: int, name: bytes, mode: int) -> int:
        folder = self._node(node)
        if name in folder.entries:
            raise OSError(errno.EEXIST, "")
        self._last += 1
        made = self._nodes[self._last] = Node(self._last, mode)
        folder.entries[name] = made
        self._changed(lambda: folder.disk_entries.__setitem__(name, made), folder)
        return made.number

    def link(self, node: int, to: int, name: bytes) -> None:
        file, folder = self._node(node), self._node(to)
        if name in folder.entries:
            raise OSError(errno.EEXIST, "")
        folder.entries[name] = file
        file.links += 1
        self._changed(lambda: folder.disk_entries.__setitem__(name, file), folder)

    def unlink(self, node: int, name: bytes, *, folder: bool) -> None:
        parent = self._node(node)
        child = self._child(parent, name)
        if child.is_folder != folder:
            raise OSError(errno.ENOTDIR if folder else errno.EISDIR, "")
        if child.entries:
            raise OSError(errno.ENOTEMPTY, "")
        del parent.entries[name]
        child.links -= 1
        self._changed(lambda: _removed(parent, name, child), parent)

    def rename(self, node: int, name: bytes, to: int, new: bytes, *, replace: bool) -> None:
        source, target = self._node(node), self._node(to)
        child = self._child(source, name)
        there = target.entries.get(new)
        if there is not None:
            if not replace:
                raise OSError(errno.EEXIST, "")
            if there is child:
                return
            if there.entries:
                raise OSError(errno.ENOTEMPTY, "")
            there.links -= 1
        del source.entries[name]
        target.entries[new] = child

        def apply() -> None:
            _removed(source, name, child)
            target.disk_entries[new] = child

        self._changed(apply, *{source.number: source, target.number: target}.values())

    # ---- content

    def read(self, node: int, offset: int, length: int) -> bytes:
        file = self._node(node)
        stop = min(offset + length, file.size)
        if stop <= offset:
            return b""
        first = offset // PAGE
        pages = [file.pages.get(page, _ZEROS) for page in range(first, -(-stop // PAGE))]
        return b"".join(pages)[offset - first * PAGE : stop - first * PAGE]

    def write(self, node: int, offset: int, data: bytes) -> None:
        file = self._node(node)
        self._put(file, offset, data)
        self._resize(file, max(file.size, offset + len(data)))
        if self._chance.random() < WRITE_BACK and file.dirty:
            for page in self._chance.sample(list(file.dirty), min(4, len(file.dirty))):
                file.page_reaches_disk(page)

    def _put(self, file: Node, offset: int, data: bytes) -> None:
        self._now += 1
        file.changed = int(time.time())
        end = offset + len(data)
        for page in range(offset // PAGE, -(-end // PAGE)):
            low, high = max(offset, page * PAGE), min(end, (page + 1) * PAGE)
            part = data[low - offset : high - offset]
            if len(part) < PAGE:
                old, at = file.pages.get(page, _ZEROS), low - page * PAGE
                part = old[:at] + part + old[at + len(part) :]
            file.pages[page] = part
            file.dirty[page] = self._now

    def _resize(self, file: Node, size: int) -> None:
        if size != file.size:
            self._now += 1
            file.size, file.sized = size, self._now

    def truncate(self, node: int, size: int) -> None:
        file = self._node(node)
        if size < file.size:
            self._clear(file, size, file.size)
        self._resize(file, size)

    def _clear(self, file: Node, low: int, high: int) -> None:
        """Let a range be zeros."""
        self._now += 1
        first, stop = -(-low // PAGE), high // PAGE
        if high >= file.size:
            stop = -(-high // PAGE)
        for page in [page for page in file.pages if first <= page < stop]:
            del file.pages[page]
            file.dirty[page] = self._now
        for start, end in ((low, min(high, first * PAGE)), (max(low, stop * PAGE), high)):
            if start < end and start // PAGE in file.pages:
                self._put(file, start, bytes(end - start))

    def change_mode(self, node: int, mode: int) -> None:
        file = self._node(node)
        file.mode = stat.S_IFMT(file.mode) | (mode & 0o7777)

    def allocate(self, node: int, mode: int, offset: int, length: int) -> None:
        file = self._node(node)
        if mode & PUNCH_HOLE:
            self._clear(file, offset, min(offset + length, -(-file.size // PAGE) * PAGE))
        elif not mode & KEEP_SIZE:
            self._resize(file, max(file.size, offset + length))

    def sync(self, node: int) -> None:
        self.syncs += 1
        one = self._node(node)
        for page in list(one.dirty):
            one.page_reaches_disk(page)
        one.disk_size = one.size
        for change in one.changes:
            change.reach_disk()
        one.changes.clear()

    # ---- the power goes

    def cut(self, seed: str) -> None:
        """Keep what is durable and, of the rest, what chance wants; forget everything else."""
        chance = self._chance = random.Random(seed)
        how = chance.choice(["nothing", "until", "anything", "anything"])
        moment = chance.randrange(self._now + 1)
        part = chance.random()

        def kept(when: int) -> bool:
            return when <= moment if how == "until" else how != "nothing" and chance.random() < part

        everything = list(self._nodes.values())
        changes = {change.when: change for node in everything for change in node.changes}
        for when in sorted(changes):
            if kept(when):
                changes[when].reach_disk()
        for node in everything:
            for page, when in list(node.dirty.items()):
                if kept(when):
                    node.page_reaches_disk(page)
            if node.size != node.disk_size and kept(node.sized):
                durable, node.disk_size = node.disk_size, node.size
                if chance.random() < 0.2 and durable < node.size:  # a part of a longer end
                    node.disk_size = chance.randrange(durable, node.size + 1)
        self._start_from_disk()

    def _start_from_disk(self) -> None:
        self._nodes = {}
        waiting = [self._root]
        while waiting:
            node = waiting.pop()
            node.links += 1
            if node.number in self._nodes:
                continue
            self._nodes[node.number] = node
            node.links = 1
            node.size, node.dirty, node.changes, node.sized = node.disk_size, {}, [], 0
            node.pages = {p: d for p, d in node.disk_pages.items() if p * PAGE < node.size}
            if node.size % PAGE and (tail := node.size // PAGE) in node.pages:
                node.pages[tail] = node.pages[tail][: node.size % PAGE].ljust(PAGE, b"\0")
            node.disk_pages = dict(node.pages)
            node.entries = dict(node.disk_entries)
            waiting.extend(node.entries.values())


_ZEROS = bytes(PAGE)


def _removed(folder: Node, name: bytes, child: Node) -> None:
    if folder.disk_entries.get(name) is child:
        del folder.disk_entries[name]


def main(target: Path) -> None:
    system = Forgetful()
    mount = Mount(system, target)
    print("mounted", flush=True)

    def command() -> bool:
        """False where the mount is not the one of before."""
        nonlocal mount
        match sys.stdin.readline().split():
            case ["cut", seed]:
                mount.close()
                system.cut(seed)
                mount = Mount(system, target)
                print("done", flush=True)
            case ["try", seed, other]:
                if os.fork():
                    return True
                mount.forget()
                system.cut(seed)
                trial = Mount(system, Path(other))
                print("done", flush=True)
                trial.serve()
                os._exit(0)
            case _:
                mount.close()
                sys.exit(0)
        return False

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the trials
    while True:
        mount.serve(sys.stdin.fileno(), command)


if __name__ == "__main__":
    os.umask(0o022)
    main(Path(sys.argv[1]))

"""Which files differ between two file systems: added, deleted, modified, renamed.

Both trees are walked side by side. Where they are versions of one file system, only inodes that
differ are looked at, a directory that does not is read once, and the walk ends when the names of
all that differ are found.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from .changes import ADDED, DELETED, KINDS, MODIFIED, RENAMED, Change, Changed
from .content import Contents, data_bytes
from .inode import VALUE, Inode
from .reader import MAX_PATH, Reader
from .touched import touched_inodes


class _Pair(NamedTuple):
    """Two directories to compare. None where nothing differs: one that both have as it is."""

    old: Inode | None
    new: Inode
    old_path: bytes
    new_path: bytes


class _Name(NamedTuple):
    path: bytes
    inode: int


def compare(old: Reader, new: Reader, changed: Changed | None = None) -> list[Change]:
    """What differs between two file systems, by path.

    `changed` says which bytes of the images may differ (None: any). Where it tells blocks of 4 KiB
    exactly, so does the result. Access times, change times and link counts do not count, nor does
    the time of a directory. Raises Damaged, and what reading raises.
    """
    return _Comparison(old, new, changed).run()


class _Comparison:
    def __init__(self, old: Reader, new: Reader, changed: Changed | None) -> None:
        self._old, self._new = old, new
        self._contents = Contents(old, new, changed)
        self._same_system = old.superblock.identity == new.superblock.identity
        # Inodes that differ; meaningless where numbers do not mean the same in both.
        self._touched = touched_inodes(old, new, self._contents) if self._same_system else set()
        self._found: list[Change] = []
        self._differing: list[_Pair] = []
        self._unchanged: list[_Pair] = []
        self._removed: list[_Name] = []
        self._added: list[_Name] = []
        # Of each inode that is in both and differs: how many of its names were not met yet.
        self._unnamed: dict[int, int] = {}
        self._blocks: dict[str, set[int]] = {"old": set(), "new": set()}
        self._met: set[int] = set()

    def run(self) -> list[Change]:
        if self._same_system and not self._touched:
            return []
        self._expect()
        self._pair(b"", b"", self._old.root.number, self._new.root.number)
        self._walk()
        self._moves()
        return sorted(self._found, key=lambda change: change.path)

    def _expect(self) -> None:
        hidden = self._new.superblock.hidden_inodes
        for number in self._touched - hidden:
            if number > min(self._old.superblock.inodes, self._new.superblock.inodes):
                continue
            old, new = self._old.inodes.find(number), self._new.inodes.find(number)
            if old is None or new is None or new.flags & VALUE:
                continue
            if old.generation == new.generation:
                self._unnamed[number] = 1 if new.is_dir else new.links

    # ---- walking

    def _walk(self) -> None:
        while self._differing or (self._unchanged and (self._unnamed or not self._same_system)):
            if self._differing:
                self._compare_names(self._differing.pop())
            else:
                self._look_through(self._unchanged.pop())

    def _names(self, side: str, inode: Inode, path: bytes) -> dict[bytes, tuple[int, int]]:
        reader = self._old if side == "old" else self._new
        if len(path) > MAX_PATH:
            raise reader.image.damaged(f"paths are longer than {MAX_PATH:,} bytes")
        entries = reader.listdir(inode, self._blocks[side])
        return {entry.name: (entry.inode, entry.type) for entry in entries}

    def _look_through(self, pair: _Pair) -> None:
        """A directory that is the same in both: only what its names lead to may differ."""
        for entry in self._new.listdir(pair.new, self._blocks["new"]):
            is_touched = entry.inode in self._touched
            if is_touched or self._new.is_dir(entry):
                paths = _join(pair.old_path, entry.name), _join(pair.new_path, entry.name)
                self._pair(*paths, entry.inode, entry.inode)

    def _compare_names(self, pair: _Pair) -> None:
        assert pair.old is not None
        old = self._names("old", pair.old, pair.old_path)
        new = self._names("new", pair.new, pair.new_path)
        for name, (number, _) in old.items():
            if name not in new:
                self._removed.append(_Name(_join(pair.old_path, name), number))
        for name, (number, kind) in new.items():
            paths = _join(pair.old_path, name), _join(pair.new_path, name)
            if name not in old:
                self._added.append(_Name(paths[1], number))
                self._name_met(number)
            elif self._is_same(old[name][0], number) and kind not in (0, 2):
                continue
            else:
                self._pair(*paths, old[name][0], number)

    def _is_same(self, old: int, new: int) -> bool:
        return self._same_system and old == new and new not in self._touched

    def _name_met(self, number: int) -> None:
        left = self._unnamed.get(number, 0) - 1
        if left > 0:
            self._unnamed[number] = left
        else:
            self._unnamed.pop(number, None)

    def _pair(self, old_path: bytes, new_path: bytes, old_number: int, number: int) -> None:
        """What both trees have under a path."""
        self._name_met(number)
        new = self._new.inode(number)
        if self._is_same(old_number, number):
            if new.is_dir:
                self._enter(new)
                self._unchanged.append(_Pair(None, new, old_path, new_path))
            return
        old = self._old.inode(old_number)
        if _type(old) != _type(new):
            self._removed.append(_Name(old_path, old_number))
            self._added.append(_Name(new_path, number))
            return
        change = self._compare_inodes(old, new, new_path)
        if change is not None:
            self._found.append(change)
        if new.is_dir:
            self._enter(new)
            self._differing.append(_Pair(old, new, old_path, new_path))

    def _enter(self, inode: Inode) -> None:
        if inode.number in self._met:
            raise self._new.image.damaged(f"directory {inode.number} has two names")
        self._met.add(inode.number)

    # ---- one file

    def _compare_inodes(self, old: Inode, new: Inode, path: bytes) -> Change | None:
        what, changed_bytes = [], 0
        if new.is_file:
            differs, changed_bytes = self._contents.compare(old, new)
            what += ["content"] if differs else []
        elif new.is_link and self._old.readlink(old) != self._new.readlink(new):
            what.append("content")
            changed_bytes = new.size
        if old.mode != new.mode:
            what.append("mode")
        if (old.uid, old.gid) != (new.uid, new.gid):
            what.append("owner")
        if old.mtime != new.mtime and not new.is_dir:
            what.append("times")
        if self._old.xattrs(old) != self._new.xattrs(new):
            what.append("xattrs")
        if old.device != new.device:
            what.append("device")
        if not what:
            return None
        kind = KINDS[_type(new)]
        return Change(path, MODIFIED, kind, old.size, new.size, changed_bytes, tuple(what))

    # ---- what came, went and moved

    def _moves(self) -> None:
        """Match names that went with names that came, then look into those directories that went
        or came for good, until there is nothing left to look into.
        """
        while self._match() or self._open():
            self._walk()
        self._settle()

    def _match(self) -> bool:
        """Find what was renamed; whether anything was."""
        gone: dict[int, list[_Name]] = {}
        for name in self._removed if self._same_system else ():
            gone.setdefault(name.inode, []).append(name)
        added, self._added = self._added, []
        moved: set[bytes] = set()
        for name in added:
            if gone.get(name.inode) and self._survives(name.inode):
                before = gone[name.inode].pop()
                moved.add(before.path)
                self._pair_moved(before, name)
            else:
                self._added.append(name)
        self._removed = [name for name in self._removed if name.path not in moved]
        return bool(moved)

    def _survives(self, number: int) -> bool:
        """Whether an inode is the same file in both, under whatever name."""
        if not self._same_system:
            return False
        if number > min(self._old.superblock.inodes, self._new.superblock.inodes):
            return False
        old, new = self._old.inodes.find(number), self._new.inodes.find(number)
        if old is None or new is None:
            return False
        return old.generation == new.generation and _type(old) == _type(new)

    def _pair_moved(self, before: _Name, after: _Name) -> None:
        old, new = self._old.inode(before.inode), self._new.inode(after.inode)
        change = self._compare_inodes(old, new, after.path)
        if change is None:
            change = Change(after.path, RENAMED, KINDS[_type(new)], old.size, new.size)
        self._found.append(replace(change, kind=RENAMED, old_path=before.path))
        if not new.is_dir:
            return
        self._enter(new)
        # The kernel notes a rename in the directory too; a tool that wrote to the disk may not.
        if self._is_same(before.inode, after.inode):
            self._unchanged.append(_Pair(None, new, before.path, after.path))
        else:
            self._differing.append(_Pair(old, new, before.path, after.path))

    def _open(self) -> bool:
        """Look into directories that went or came; whether there was one."""
        gone = [n for n in self._removed if self._old.inode(n.inode).is_dir]
        come = [n for n in self._added if self._new.inode(n.inode).is_dir]
        # One that is on both sides was moved into or out of another, and is met there later.
        lost = [n for n in gone if not self._survives(n.inode)]
        fresh = [n for n in come if not self._survives(n.inode)]
        if not lost and not fresh:
            lost, fresh = gone, come
        gone_for_good, come_anew = set(lost), set(fresh)
        self._removed = [n for n in self._removed if n not in gone_for_good]
        self._added = [n for n in self._added if n not in come_anew]
        for name in lost:
            inode = self._old.inode(name.inode)
            self._found.append(Change(name.path, DELETED, "directory", inode.size))
            self._removed += self._children("old", name, inode)
        for name in fresh:
            inode = self._new.inode(name.inode)
            self._enter(inode)
            self._found.append(Change(name.path, ADDED, "directory", new_size=inode.size))
            self._added += self._children("new", name, inode)
        return bool(lost or fresh)

    def _children(self, side: str, name: _Name, inode: Inode) -> list[_Name]:
        names = self._names(side, inode, name.path)
        found = [_Name(_join(name.path, child), number) for child, (number, _) in names.items()]
        if side == "new":
            for child in found:
                self._name_met(child.inode)
        return found

    def _settle(self) -> None:
        for name in self._removed:
            inode = self._old.inode(name.inode)
            self._found.append(Change(name.path, DELETED, KINDS[_type(inode)], inode.size))
        for name in self._added:
            inode = self._new.inode(name.inode)
            data = data_bytes(self._new, inode) if inode.is_file else 0
            self._found.append(
                Change(name.path, ADDED, KINDS[_type(inode)], None, inode.size, data)
            )


def _type(inode: Inode) -> int:
    return inode.mode & 0o170000


def _join(folder: bytes, name: bytes) -> bytes:
    return folder + b"/" + name if folder else name

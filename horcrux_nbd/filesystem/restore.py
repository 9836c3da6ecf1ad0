"""Files of an image become files of this host: whole or not at all, and nowhere else.

Everything is made in a folder of our own (mode 0700) inside the target folder, where nobody can put
a link in our way, and is renamed into place when it is complete. Names come from strangers, so only
one name at a time is used, relative to a folder that is open. What would give power on this host
(set-user-id bits, devices, capabilities and other attributes of root) is left out unless asked for.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .. import files
from ..errors import EnvironmentProblem, NoSpace, UsageError
from ..progress import Progress
from .changes import shown
from .inode import Inode
from .reader import Reader

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_HARMLESS = (b"user.", b"system.posix_acl_")
MAX_TOLD = 20


@dataclass
class Restored:
    """What was made. `left_out` says what was not, a line each, the first of `left_out_count`."""

    files: int = 0
    directories: int = 0
    others: int = 0
    bytes: int = 0  # of content, holes left out
    left_out: list[str] = field(default_factory=list)
    left_out_count: int = 0

    def leave_out(self, line: str) -> None:
        self.left_out_count += 1
        if len(self.left_out) < MAX_TOLD:
            self.left_out.append(line)


def restore(
    reader: Reader,
    path: bytes | str,
    target: Path,
    *,
    force: bool = False,
    trusted: bool = False,
    progress: Progress | None = None,
) -> Restored:
    """Bring what lies at `path` into the folder `target`, under its own name; the root brings all
    that is in it. A directory comes with everything below it.

    Modes, times, links, holes and attributes are as they were, owners too where we are root.
    `trusted` also brings what `restore.py` leaves out by default. Raises UsageError where something
    is there already, unless `force` replaces it; NotFound, NoSpace, Damaged. After an error
    `target` is as it was.
    """
    path = os.fsencode(path) if isinstance(path, str) else path
    inode = reader.lookup(path, follow=False)
    parts = [part for part in path.split(b"/") if part not in (b"", b".")]
    if inode.number == reader.root.number:
        found = list(reader.children(inode))
    elif parts[-1] == b"..":
        raise UsageError("a path that ends in .. says no name to restore it under")
    else:
        found = [(parts[-1], inode)]
    _check_once(reader, inode, [name for name, _ in found])
    with files.opened(target, os.O_RDONLY | os.O_DIRECTORY) as folder:
        if not force:
            for name, _ in found:
                if _there(folder, name):
                    raise UsageError(
                        f"{target}/{shown(name)} exists already: --force replaces it, or name "
                        "another folder"
                    )
        with _staged(folder) as staging:
            work = _Restore(reader, staging, trusted, progress or Progress())
            try:
                for name, one in found:
                    work.bring(name, one)
                for name, one in found:
                    if name in work.made:
                        work.publish(folder, name, one)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise NoSpace(f"no space left in {target}: nothing was restored") from error
                raise
    return work.done


def _check_once(reader: Reader, directory: Inode, names: list[bytes]) -> None:
    if len(set(names)) < len(names):
        raise reader.image.damaged(f"directory {directory.number} has a name twice")


def _there(folder: int, name: bytes) -> bool:
    try:
        os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


@contextlib.contextmanager
def _staged(folder: int) -> Iterator[int]:
    """A folder in `folder` where things are made; what is left in it at the end is removed."""
    name = f"{files.TEMPORARY_PREFIX}{secrets.token_hex(8)}".encode()
    os.mkdir(name, 0o700, dir_fd=folder)
    staging = os.open(name, _FOLDER, dir_fd=folder)
    try:
        for part in (b"new", b"old", b"links"):
            os.mkdir(part, 0o700, dir_fd=staging)
        yield staging
    finally:
        os.close(staging)
        remove_tree(folder, name)


class _Restore:
    def __init__(self, reader: Reader, staging: int, trusted: bool, progress: Progress) -> None:
        self._reader, self._staging, self._trusted = reader, staging, trusted
        self._progress = progress
        self._linked: set[int] = set()  # inodes that wait in `links` for their other names
        self._blocks: set[int] = set()
        self._met: set[int] = set()
        self._as_root = os.geteuid() == 0
        self.made: set[bytes] = set()  # what lies in `new`
        self.done = Restored()
        progress.start("restore")

    def bring(self, name: bytes, inode: Inode) -> None:
        """One file, or a directory with all below it, into `new`.

        One folder is open at a time, and `..` leads back: a tree may be deeper than paths or
        descriptors go, and nobody else can move folders in here.
        """
        here = os.open(b"new", _FOLDER, dir_fd=self._staging)
        try:
            if not inode.is_dir:
                if self._make(here, name, inode, name):
                    self.made.add(name)
                return
            self.made.add(name)
            here = self._enter(here, name, inode)
            pending = [(inode, self._entries(inode), name)]
            while pending:
                directory, entries, path = pending[-1]
                if not entries:
                    pending.pop()
                    above = os.open(b"..", _FOLDER, dir_fd=here)
                    if pending:
                        self._describe(here, directory, path)
                    os.close(here)
                    here = above
                    continue
                child, number = entries.pop()
                found = self._reader.inode(number)
                full = path + b"/" + child
                if found.is_dir:
                    here = self._enter(here, child, found)
                    pending.append((found, self._entries(found), full))
                else:
                    self._make(here, child, found, full)
        finally:
            os.close(here)

    def publish(self, folder: int, name: bytes, inode: Inode) -> None:
        """Rename what `bring` made into `folder`. A directory is described only then: one without
        write permission could not be renamed by its owner.
        """
        with contextlib.ExitStack() as stack:
            fd = -1
            if inode.is_dir:
                fd = os.open(b"new/" + name, _FOLDER, dir_fd=self._staging)
                stack.callback(os.close, fd)
            old = b"old/" + name
            there = _there(folder, name)
            if there:
                self._set_aside(folder, name, old)
            try:
                os.rename(b"new/" + name, name, src_dir_fd=self._staging, dst_dir_fd=folder)
            except OSError:
                if there:
                    os.rename(old, name, src_dir_fd=self._staging, dst_dir_fd=folder)
                raise
            if inode.is_dir:
                self._describe(fd, inode, name)

    def _set_aside(self, folder: int, name: bytes, place: bytes) -> None:
        try:
            os.rename(name, place, src_dir_fd=folder, dst_dir_fd=self._staging)
        except PermissionError:
            # A folder without write permission, which its owner can give, and it goes anyway.
            fd = os.open(name, _FOLDER, dir_fd=folder)
            try:
                os.chmod(fd, 0o700)
            finally:
                os.close(fd)
            os.rename(name, place, src_dir_fd=folder, dst_dir_fd=self._staging)

    def _enter(self, here: int, name: bytes, inode: Inode) -> int:
        if inode.number in self._met:
            raise self._reader.image.damaged(f"directory {inode.number} has two names")
        self._met.add(inode.number)
        os.mkdir(name, 0o700, dir_fd=here)
        self.done.directories += 1
        return _step(here, name)

    def _entries(self, inode: Inode) -> list[tuple[bytes, int]]:
        entries = self._reader.listdir(inode, self._blocks)
        found = [(entry.name, entry.inode) for entry in entries]
        _check_once(self._reader, inode, [name for name, _ in found])
        return found[::-1]

    # ---- all but directories

    def _make(self, here: int, name: bytes, inode: Inode, path: bytes) -> bool:
        """Whether it was made; a device is left out."""
        waiting = b"links/%d" % inode.number
        if inode.number in self._linked:
            os.link(waiting, name, src_dir_fd=self._staging, dst_dir_fd=here, follow_symlinks=False)
            return True
        if not self._make_new(here, name, inode, path):
            return False
        if inode.links > 1:
            os.link(name, waiting, src_dir_fd=here, dst_dir_fd=self._staging, follow_symlinks=False)
            self._linked.add(inode.number)
        return True

    def _make_new(self, here: int, name: bytes, inode: Inode, path: bytes) -> bool:
        kind = stat.S_IFMT(inode.mode)
        if kind == stat.S_IFREG:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(name, flags, 0o600, dir_fd=here)
            try:
                self._fill(fd, inode, path)
                self._describe(fd, inode, path)
            finally:
                os.close(fd)
            self.done.files += 1
            return True
        self.done.others += 1
        if kind == stat.S_IFLNK:
            os.symlink(self._reader.readlink(inode), name, dir_fd=here)
        elif kind in (stat.S_IFIFO, stat.S_IFSOCK):
            os.mknod(name, 0o600 | kind, dir_fd=here)
        elif self._trusted:
            os.mknod(name, 0o600 | kind, os.makedev(*inode.device), dir_fd=here)
        else:
            self.done.others -= 1
            self.done.leave_out(f"{shown(path)}: a device")
            return False
        self._describe_at(here, name, inode, path)
        return True

    def _fill(self, fd: int, inode: Inode, path: bytes) -> None:
        try:
            for offset, data in self._reader.read_pieces(inode):
                files.write_all(fd, data, offset)
                self.done.bytes += len(data)
                self._progress.advance(len(data))
            os.ftruncate(fd, inode.size)
        except OSError as error:
            if error.errno != errno.EFBIG:
                raise
            raise EnvironmentProblem(
                f"{shown(path)} has {inode.size} bytes, more than this file system can hold: "
                "restore it elsewhere"
            ) from error

    # ---- what is said of them

    def _mode(self, inode: Inode) -> int:
        mode = stat.S_IMODE(inode.mode)
        if self._trusted or inode.is_dir:
            return mode
        return mode & ~(stat.S_ISUID | stat.S_ISGID)

    def _describe(self, fd: int, inode: Inode, path: bytes) -> None:
        """Owner, attributes, mode and times of an open file or directory, in an order in which
        none undoes another.
        """
        if self._as_root:
            os.chown(fd, inode.uid, inode.gid)
        for name, value in self._attributes(inode, path):
            try:
                os.setxattr(fd, name, value)
            except OSError as error:
                self._no_attribute(path, name, error)
        if self._mode(inode) != stat.S_IMODE(inode.mode):
            self.done.leave_out(f"{shown(path)}: its set-user-id or set-group-id bit")
        os.chmod(fd, self._mode(inode))
        os.utime(fd, ns=(inode.atime, inode.mtime))

    def _describe_at(self, here: int, name: bytes, inode: Inode, path: bytes) -> None:
        """The same of what cannot be opened."""
        if self._as_root:
            os.chown(name, inode.uid, inode.gid, dir_fd=here, follow_symlinks=False)
        place = b"/proc/self/fd/%d/%s" % (here, name)
        for key, value in self._attributes(inode, path):
            try:
                os.setxattr(place, key, value, follow_symlinks=False)
            except OSError as error:
                self._no_attribute(path, key, error)
        if not inode.is_link:
            os.chmod(name, self._mode(inode), dir_fd=here)
        os.utime(name, ns=(inode.atime, inode.mtime), dir_fd=here, follow_symlinks=False)

    def _attributes(self, inode: Inode, path: bytes) -> Iterator[tuple[bytes, bytes]]:
        for name, value in self._reader.xattrs(inode).items():
            if self._trusted or name.startswith(_HARMLESS):
                yield name, value
            else:
                self.done.leave_out(f"{shown(path)}: its attribute {shown(name)}")

    def _no_attribute(self, path: bytes, name: bytes, error: OSError) -> None:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise error
        self.done.leave_out(f"{shown(path)}: its attribute {shown(name)} ({error.strerror})")


def _step(here: int, name: bytes) -> int:
    """The folder `name` in the folder `here`, which is closed."""
    there = os.open(name, _FOLDER, dir_fd=here)
    os.close(here)
    return there


def remove_tree(folder: int, name: bytes) -> None:
    """Remove the directory `name` in `folder` with all that is in it, however deep it is.

    Follows no link. Only for a tree that nobody else changes.
    """
    here = os.open(name, _FOLDER, dir_fd=folder)
    names, pending = [name], [_listed(here)]
    try:
        while True:
            if pending[-1]:
                child, is_folder = pending[-1].pop()
                if is_folder:
                    here = _step(here, child)
                    names.append(child)
                    pending.append(_listed(here))
                else:
                    os.unlink(child, dir_fd=here)
                continue
            pending.pop()
            done = names.pop()
            if not names:
                break
            here = _step(here, b"..")
            os.rmdir(done, dir_fd=here)
    finally:
        os.close(here)
    os.rmdir(name, dir_fd=folder)


def _listed(folder: int) -> list[tuple[bytes, bool]]:
    os.chmod(folder, 0o700)  # who is not root cannot remove what is in a folder without it
    with os.scandir(folder) as entries:
        return [(os.fsencode(entry.name), entry.is_dir(follow_symlinks=False)) for entry in entries]

"""A file system as files: listing, looking up, reading."""

from __future__ import annotations

import stat
from collections.abc import Iterator

from ..errors import EnvironmentProblem, NotFound, UsageError
from ..units import MiB
from . import superblock as superblocks
from .blocks import Blocks, Read
from .directory import DIRECTORY_TYPE, Directories, Entry
from .inode import ENCRYPTED, EXTENTS, INDEXED, INLINE, VALUE, Inode, Inodes
from .journal import Journal
from .mapping import Mapper
from .superblock import ROOT, Groups
from .xattr import Attributes

PIECE = 1 * MiB  # bytes of content at once
MAX_PATH = 65536  # bytes; the kernel takes 4,096 in one call, and a tree may be deeper
_MAX_LINKS = 40  # symbolic links on the way to a file, as for the kernel
_FAST_LINK = 60  # bytes that an inode has for a short link's target
_MAX_LINK = 65536

# (offset in the file, offset in the image, length), bytes
Piece = tuple[int, int, int]


def open_filesystem(read: Read, size: int, name: str = "the image") -> Reader:
    """The ext2, ext3 or ext4 in an image of `size` bytes. `name` is for messages.

    `read(offset, length)` gives exactly `length` bytes; what it raises passes through. A journal
    that was not replayed is taken into account, in memory. Reads what is asked for and nothing
    ahead. Raises UsageError for an image that holds something else, EnvironmentProblem for
    features that are not known here, Damaged.
    """
    return Reader(Blocks(read, size, name))


class Reader:
    """One file system. Paths are bytes, relative to its root, parts joined by `/`.

    Every method may raise Damaged, and what the image's `read` raises. Whatever the image holds,
    each ends in bounded time and memory. Not for several threads.
    """

    def __init__(self, image: Blocks) -> None:
        self.image = image
        self._load()
        if self.superblock.needs_recovery:
            self._replay()
            self._load()  # the journal may have newer ones of all that was read so far

    def _load(self) -> None:
        image = self.image
        at = superblocks.OFFSET
        if image.size < at + superblocks.SIZE:
            raise UsageError(f"{image.name} is too small to hold a file system")
        block, skip = divmod(at, image.block_size)
        if block in image.overlay:
            data = image.overlay[block]()[skip : skip + superblocks.SIZE]
        else:
            data = image.raw(at, superblocks.SIZE)
        self.superblock = superblocks.parse(data, image)
        image.use(self.superblock.block_size, self.superblock.blocks)
        self.groups = Groups(self.superblock, image)
        self.inodes = Inodes(self.superblock, self.groups, image)
        self._mapper = Mapper(self.superblock, image)
        self._directories = Directories(self.superblock, image)
        self._attributes = Attributes(self.superblock, image, self._value)

    def _replay(self) -> None:
        number = self.superblock.journal_inode
        if not number:
            raise EnvironmentProblem(
                f"the journal of the file system in {self.image.name} is on another device and "
                "was not replayed: mount and unmount it once"
            )
        inode = self.inode(number)
        extents = list(self._mapper.extents(inode, self.inodes.seed(inode)))
        self.image.overlay = Journal(self.image, extents).replay()

    # ---- inodes and names

    def inode(self, number: int) -> Inode:
        """An inode that is in use."""
        found = self.inodes.find(number)
        if found is None:
            raise self.image.damaged(f"inode {number} is named but not in use")
        return found

    @property
    def root(self) -> Inode:
        inode = self.inode(ROOT)
        if not inode.is_dir:
            raise self.image.damaged("its root is no directory")
        return inode

    def listdir(self, inode: Inode, seen: set[int] | None = None) -> Iterator[Entry]:
        """Names in a directory, in the order of the disk; `.` and `..` left out.

        `seen` collects the blocks of directories: who lists several, and must not be led to list
        one block for ever under several names, gives one set for all.
        """
        if not inode.is_dir:
            raise UsageError(f"inode {inode.number} of {self.image.name} is no directory")
        if inode.flags & ENCRYPTED:
            raise self._encrypted(inode)
        what = f"directory {inode.number}"
        if inode.flags & INLINE:
            yield from self._directories.entries(inode.body[4:], what)  # 4 bytes: its parent
            yield from self._directories.entries(self._attributes.inline(inode), what)
            return
        seed, size = self.inodes.seed(inode), self.image.block_size
        blocks = -(-inode.size // size)
        seen = set() if seen is None else seen
        for extent in self._mapper.extents(inode, seed):
            for at in range(min(extent.length, blocks - extent.logical)):
                number = extent.physical + at
                if number in seen:
                    raise self.image.damaged(f"{what} has a block that is in use already")
                seen.add(number)
                block = self.image.block(number)
                self._directories.check(block, seed, bool(inode.flags & INDEXED), what)
                yield from self._directories.entries(block, what)

    def children(self, inode: Inode, seen: set[int] | None = None) -> Iterator[tuple[bytes, Inode]]:
        """(name, inode) of what is in a directory, by inode number: their tables are read once,
        where the order of an indexed directory would jump about in them.
        """
        for entry in sorted(self.listdir(inode, seen), key=_by_inode):
            yield entry.name, self.inode(entry.inode)

    def _encrypted(self, inode: Inode) -> EnvironmentProblem:
        return EnvironmentProblem(
            f"inode {inode.number} of {self.image.name} is encrypted by fscrypt: mount it with "
            "its key"
        )

    def is_dir(self, entry: Entry) -> bool:
        """Whether an entry names a directory. Reads its inode only where the entry does not say."""
        return entry.type == DIRECTORY_TYPE if entry.type else self.inode(entry.inode).is_dir

    def lookup(self, path: bytes | str, *, follow: bool = True) -> Inode:
        """The inode at `path`. Symbolic links lead inside this file system only, the last part
        of the path with `follow`. Raises NotFound, which says how far there was something.
        """
        path = path.encode(errors="surrogateescape") if isinstance(path, str) else path
        parts = [part for part in reversed(path.split(b"/")) if part not in (b"", b".")]
        trail, links = [self.root], 0
        while parts:
            part = parts.pop()
            if part == b"..":
                if len(trail) > 1:
                    trail.pop()
                continue
            if not trail[-1].is_dir:
                raise NotFound(f"{_shown(path)} in {self.image.name}: not a directory on the way")
            inode = self._child(trail[-1], part)
            if inode is None:
                raise NotFound(f"there is no {_shown(path)} in {self.image.name}")
            if inode.is_link and (parts or follow):
                links += 1
                target = self.readlink(inode)
                if links > _MAX_LINKS or len(parts) > MAX_PATH:
                    raise NotFound(f"{_shown(path)} in {self.image.name}: too many symbolic links")
                if target.startswith(b"/"):
                    trail = trail[:1]
                parts += [p for p in reversed(target.split(b"/")) if p not in (b"", b".")]
                continue
            trail.append(inode)
        return trail[-1]

    def _child(self, directory: Inode, name: bytes) -> Inode | None:
        for entry in self.listdir(directory):
            if entry.name == name:
                return self.inode(entry.inode)
        return None

    def walk(self, top: Inode | None = None, prefix: bytes = b"") -> Iterator[tuple[bytes, Inode]]:
        """(path, inode) of everything below `top` (the root), a directory before what is in it.

        Paths begin with `prefix`. Raises Damaged where a directory has two names.
        """
        seen: set[int] = set()
        blocks: set[int] = set()
        pending = [(top or self.root, prefix)]
        while pending:
            directory, path = pending.pop()
            if directory.number in seen:
                raise self.image.damaged(f"directory {directory.number} has two names")
            seen.add(directory.number)
            if len(path) > MAX_PATH:
                raise self.image.damaged(f"paths are longer than {MAX_PATH:,} bytes")
            below = []
            for name, inode in self.children(directory, blocks):
                full = path + b"/" + name if path else name
                yield full, inode
                if inode.is_dir:
                    below.append((inode, full))
            pending += reversed(below)

    # ---- content

    def pieces(self, inode: Inode) -> Iterator[Piece]:
        """Where a file's data lies, ascending, up to its end; what is left out reads as zeros.

        Not for inline files (`inline` has their data).
        """
        size = self.image.block_size
        for extent in self._mapper.extents(inode, self.inodes.seed(inode)):
            start = extent.logical * size
            length = min(extent.length * size, inode.size - start)
            if length <= 0:
                return
            yield start, extent.physical * size, length

    def inline(self, inode: Inode) -> bytes | None:
        """The data of a file that lies in its inode; None for any other."""
        if not inode.flags & INLINE:
            return None
        data = (inode.body + self._attributes.inline(inode))[: inode.size]
        if len(data) != inode.size:
            raise self.image.damaged(f"inode {inode.number} is shorter than it says")
        return data

    def read_pieces(self, inode: Inode) -> Iterator[tuple[int, bytes]]:
        """(offset, data) of a regular file, at most PIECE at once; holes are left out."""
        if not inode.is_file:
            raise UsageError(f"inode {inode.number} of {self.image.name} is no regular file")
        if inode.flags & ENCRYPTED:
            raise self._encrypted(inode)
        yield from self._read(inode)

    def _read(self, inode: Inode) -> Iterator[tuple[int, bytes]]:
        data = self.inline(inode)
        if data is not None:
            if data:
                yield 0, data
            return
        for start, place, length in self.pieces(inode):
            for at in range(0, length, PIECE):
                yield start + at, self.image.bytes_at(place + at, min(PIECE, length - at))

    def read_file(self, inode: Inode) -> Iterator[bytes]:
        """The content of a regular file, in order, holes as zeros."""
        at, zeros = 0, bytes(PIECE)
        for start, data in self.read_pieces(inode):
            while at < start:
                step = min(PIECE, start - at)
                yield zeros[:step]
                at += step
            yield data
            at += len(data)
        while at < inode.size:
            step = min(PIECE, inode.size - at)
            yield zeros[:step]
            at += step

    def readlink(self, inode: Inode) -> bytes:
        """What a symbolic link leads to."""
        if not inode.is_link:
            raise UsageError(f"inode {inode.number} of {self.image.name} is no symbolic link")
        if inode.flags & ENCRYPTED:
            raise self._encrypted(inode)
        if not 0 < inode.size <= _MAX_LINK:
            raise self.image.damaged(f"link {inode.number} has {inode.size} bytes")
        short = inode.size < _FAST_LINK and not inode.flags & (INLINE | EXTENTS)
        target = inode.body[: inode.size] if short else self._whole(inode)
        if b"\0" in target:
            raise self.image.damaged(f"link {inode.number} leads to what cannot be a path")
        return target

    def _whole(self, inode: Inode) -> bytes:
        """The content of a small one."""
        content = bytearray(inode.size)
        for start, data in self._read(inode):
            content[start : start + len(data)] = data
        return bytes(content)

    def xattrs(self, inode: Inode) -> dict[bytes, bytes]:
        """Extended attributes and ACLs, as listxattr(2) and getxattr(2) give them to root."""
        return self._attributes.read(inode)

    def _value(self, number: int, size: int) -> bytes:
        inode = self.inode(number)
        if not inode.flags & VALUE or inode.size != size or not stat.S_ISREG(inode.mode):
            raise self.image.damaged(f"inode {number} holds no value of an attribute")
        return self._whole(inode)


def _by_inode(entry: Entry) -> int:
    return entry.inode


def _shown(path: bytes) -> str:
    return repr(path.decode(errors="replace"))

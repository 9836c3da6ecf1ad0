"""Inodes: the fields of one, and where to find it.

Source: Linux Documentation/filesystems/ext4/inodes.rst.
"""

from __future__ import annotations

import stat
import struct
from typing import NamedTuple

from .blocks import Blocks
from .crc32c import crc32c
from .superblock import LARGE_DIR, Groups, Superblock

# i_flags
ENCRYPTED, INDEXED, EXTENTS, VALUE, INLINE = 0x800, 0x1000, 0x80000, 0x200000, 0x10000000

_FIELDS = struct.Struct("<HHIIIIIHHIII60sIII4xHHHHHHHH")
_KINDS = {
    stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO,
    stat.S_IFSOCK,
}  # fmt: skip


class Inode(NamedTuple):
    """One file, whatever it is. Times in nanoseconds since 1970; `raw` is what the disk has."""

    number: int
    mode: int  # as stat(2) has it: kind and permissions
    uid: int
    gid: int
    size: int
    links: int
    flags: int
    generation: int  # tells two files apart that had the same number, one after the other
    atime: int
    mtime: int
    ctime: int
    xattr_block: int  # 0 for none
    body: bytes  # 60 bytes: where its data lies, or what a short link leads to
    raw: bytes

    @property
    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.mode)

    @property
    def is_link(self) -> bool:
        return stat.S_ISLNK(self.mode)

    @property
    def device(self) -> tuple[int, int]:
        """(major, minor) of a device; (0, 0) of anything else."""
        if not (stat.S_ISCHR(self.mode) or stat.S_ISBLK(self.mode)):
            return 0, 0
        old, new = struct.unpack_from("<II", self.body)  # kernel: old_decode_dev, new_decode_dev
        if old:
            return old >> 8 & 0xFF, old & 0xFF
        return (new & 0xFFF00) >> 8, new & 0xFF | new >> 12 & 0xFFF00

    @property
    def extra(self) -> int:
        """How far the fields go; extended attributes may follow."""
        if len(self.raw) <= 128:
            return 128
        return 128 + int.from_bytes(self.raw[0x80:0x82], "little")


class Inodes:
    """The inode tables."""

    def __init__(self, superblock: Superblock, groups: Groups, image: Blocks) -> None:
        self._super, self._groups, self._image = superblock, groups, image

    def place(self, number: int) -> tuple[int, int]:
        """(block, offset in it) of inode `number`. Raises Damaged for one that there is not."""
        sb = self._super
        if not 1 <= number <= sb.inodes:
            raise self._image.damaged(f"inode {number} is named, of {sb.inodes}")
        group, index = divmod(number - 1, sb.inodes_per_group)
        block, at = divmod(index * sb.inode_size, sb.block_size)
        return self._groups[group].table + block, at

    def raw(self, number: int) -> bytes:
        """The bytes of inode `number`, in use or not."""
        block, at = self.place(number)
        return self._image.block(block)[at : at + self._super.inode_size]

    def find(self, number: int) -> Inode | None:
        """Inode `number`, or None if it is not in use."""
        return self.parse(number, self.raw(number))

    def parse(self, number: int, raw: bytes) -> Inode | None:
        """The inode in `raw`, or None if it is not in use. Raises Damaged."""
        (
            mode, uid, size, atime, ctime, mtime, _, gid, links, _, flags, _, body,
            generation, xattr_low, size_high, _, xattr_high, uid_high, gid_high, csum_low, _,
            extra, csum_high,
        ) = _FIELDS.unpack_from(raw.ljust(132, b"\0"))  # fmt: skip
        if not mode or not links:
            return None
        wide = len(raw) > 128
        if wide and (extra > len(raw) - 128 or extra & 3):
            raise self._image.damaged(f"inode {number} has fields beyond its end")
        if self._super.checksums:
            head = raw[:0x7C] + b"\0\0" + raw[0x7E:0x82]
            if wide and extra >= 4:
                head += b"\0\0" + raw[0x84:]
                stored, mask = csum_high << 16 | csum_low, 0xFFFFFFFF
            else:
                head += raw[0x82:]
                stored, mask = csum_low, 0xFFFF
            if self._crc(number, generation, head) & mask != stored:
                raise self._image.damaged(f"the checksum of inode {number} is wrong")
        if stat.S_IFMT(mode) not in _KINDS:
            raise self._image.damaged(f"inode {number} is of no kind that there is ({mode:o})")
        extras = (0, 0, 0)
        if wide and extra >= 16:
            extras = struct.unpack_from("<III", raw, 0x84)
        # In a directory these bits are something else, but where it may be as large.
        if stat.S_ISREG(mode) or self._super.incompat & LARGE_DIR:
            size |= size_high << 32
        return Inode(
            number, mode, uid_high << 16 | uid, gid_high << 16 | gid, size, links, flags,
            generation, _time(atime, extras[2]), _time(mtime, extras[1]), _time(ctime, extras[0]),
            xattr_high << 32 | xattr_low, body, raw,
        )  # fmt: skip

    def _crc(self, number: int, generation: int, data: bytes) -> int:
        return crc32c(self._super.seed, struct.pack("<II", number, generation) + data)

    def seed(self, inode: Inode) -> int:
        """What checksums of the inode's own blocks begin with."""
        return crc32c(self._super.seed, struct.pack("<II", inode.number, inode.generation))


def _time(seconds: int, extra: int) -> int:
    """Nanoseconds since 1970: 32 bits with a sign, two bits more, and the part of a second."""
    signed = seconds - (1 << 32) if seconds & 0x80000000 else seconds
    return (signed + ((extra & 3) << 32)) * 1_000_000_000 + (extra >> 2)

"""Superblock and group descriptors of ext2, ext3 and ext4.

Source: Linux Documentation/filesystems/ext4/ (super, group_descr, blockgroup), fs/ext4/super.c.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from ..errors import EnvironmentProblem, UsageError
from .blocks import Blocks
from .crc32c import SEED, crc32c

OFFSET, SIZE = 1024, 1024
MAGIC = 0xEF53
ROOT = 2

# compat
HAS_JOURNAL, SPARSE_SUPER2, FAST_COMMIT = 0x4, 0x200, 0x400
# incompat
COMPRESSION, FILETYPE, RECOVER, JOURNAL_DEVICE, META_BG = 0x1, 0x2, 0x4, 0x8, 0x10
EXTENTS, WIDE, CSUM_SEED, LARGE_DIR = 0x40, 0x80, 0x2000, 0x4000
_INLINE_DATA, _ENCRYPT, _CASEFOLD = 0x8000, 0x10000, 0x20000
_MMP, _FLEX_BG, _EA_INODE = 0x100, 0x200, 0x400
_KNOWN = (
    FILETYPE | RECOVER | META_BG | EXTENTS | WIDE | CSUM_SEED | LARGE_DIR | _INLINE_DATA
    | _ENCRYPT | _CASEFOLD | _MMP | _FLEX_BG | _EA_INODE
)  # fmt: skip
# ro_compat
SPARSE_SUPER, METADATA_CSUM = 0x1, 0x400

_GROUP_INODES_UNUSED_KNOWN = 0x10 | METADATA_CSUM  # uninit_bg (gdt_csum) or metadata_csum
_INODE_UNINIT = 0x1  # bg_flags: no inode of the group was ever used

# Other things that disks begin with: (name, offset, magic).
_OTHERS = (
    ("XFS", 0, b"XFSB"),
    ("Btrfs", 0x10040, b"_BHRfS_M"),
    ("F2FS", 1024, b"\x10\x20\xf5\xf2"),
    ("NTFS", 3, b"NTFS    "),
    ("a LUKS volume", 0, b"LUKS\xba\xbe"),
    ("LVM", 0x218, b"LVM2 001"),
    ("a swap area", 4086, b"SWAPSPACE2"),
    ("a partition table", 510, b"\x55\xaa"),
)


@dataclass(frozen=True)
class Superblock:
    """What of a superblock matters to a reader. Sizes in bytes."""

    block_size: int
    blocks: int
    first_block: int
    blocks_per_group: int
    groups: int
    inodes: int
    inodes_per_group: int
    inode_size: int
    descriptor_size: int
    first_meta_bg: int
    backup_groups: tuple[int, int]
    compat: int
    incompat: int
    ro_compat: int
    state: int
    uuid: bytes
    seed: int  # that checksums of metadata begin with
    journal_inode: int
    hidden_inodes: frozenset[int]  # of the file system itself: no name leads to them

    @property
    def checksums(self) -> bool:
        return bool(self.ro_compat & METADATA_CSUM)

    @property
    def needs_recovery(self) -> bool:
        return bool(self.incompat & RECOVER)

    @property
    def table_blocks(self) -> int:
        """Blocks that the inode table of a group takes."""
        return -(-self.inodes_per_group * self.inode_size // self.block_size)

    @property
    def identity(self) -> tuple[bytes, int, int, int]:
        """Equal in two versions of one file system: then inode numbers mean the same in both."""
        return self.uuid, self.block_size, self.inode_size, self.inodes_per_group


def parse(data: bytes, image: Blocks) -> Superblock:
    """The superblock in `data` (SIZE bytes). Raises UsageError where the image holds something
    else, EnvironmentProblem for features that are not known here, Damaged.
    """

    def word(at: int) -> int:
        return int.from_bytes(data[at : at + 4], "little")

    def half(at: int) -> int:
        return int.from_bytes(data[at : at + 2], "little")

    if half(0x38) != MAGIC:
        raise UsageError(_what_else(image))
    compat, incompat, ro_compat = word(0x5C), word(0x60), word(0x64)
    if word(0x4C) == 0:  # revision 0, of 1993: no features, small inodes
        compat = incompat = ro_compat = 0
    if incompat & JOURNAL_DEVICE:
        raise UsageError(f"{image.name} holds a journal of ext4, not a file system")
    if incompat & ~_KNOWN:
        raise EnvironmentProblem(
            f"the ext4 in {image.name} has features that are not known here "
            f"({incompat & ~_KNOWN:#x}): mount it to look at its files"
        )
    if ro_compat & METADATA_CSUM and crc32c(SEED, data[:0x3FC]) != word(0x3FC):
        raise image.damaged("the checksum of the superblock is wrong")
    if word(0x18) > 6:
        raise image.damaged(f"blocks of 2^{word(0x18) + 10} bytes")
    block_size = 1024 << word(0x18)
    wide = bool(incompat & WIDE)
    blocks = word(0x4) | (word(0x150) << 32 if wide else 0)
    first, blocks_per_group = word(0x14), word(0x20)
    inodes, inodes_per_group = word(0x0), word(0x28)
    inode_size = half(0x58) if word(0x4C) else 128
    descriptor_size = half(0xFE) if wide else 32
    sound = (
        blocks_per_group
        and inodes_per_group
        and first <= (block_size == 1024)
        and first < blocks
        and 128 <= inode_size <= block_size
        and not inode_size & (inode_size - 1)
        and 32 <= descriptor_size <= block_size
        and not descriptor_size & (descriptor_size - 1)
        and (not wide or descriptor_size >= 64)
        and inodes_per_group <= 8 * block_size
    )
    groups = -(-(blocks - first) // blocks_per_group) if sound else 0
    if not sound or inodes > groups * inodes_per_group or inodes < 11:
        raise image.damaged("sizes in the superblock that cannot be")
    if blocks * block_size > image.size:
        raise image.damaged(f"it has {blocks * block_size} bytes in an image of {image.size}")
    uuid = data[0x68:0x78]
    return Superblock(
        block_size=block_size,
        blocks=blocks,
        first_block=first,
        blocks_per_group=blocks_per_group,
        groups=groups,
        inodes=inodes,
        inodes_per_group=inodes_per_group,
        inode_size=inode_size,
        descriptor_size=descriptor_size,
        first_meta_bg=word(0x104),
        backup_groups=(word(0x24C), word(0x250)),
        compat=compat,
        incompat=incompat,
        ro_compat=ro_compat,
        state=half(0x3A),
        uuid=uuid,
        seed=word(0x270) if incompat & CSUM_SEED else crc32c(SEED, uuid),
        journal_inode=word(0xE0) if compat & HAS_JOURNAL else 0,
        # Quotas of users, groups and projects, and the list of orphans.
        hidden_inodes=frozenset({*range(1, ROOT), *range(ROOT + 1, 11)})
        | {word(0x240), word(0x244), word(0x26C), word(0x280)},
    )


def _what_else(image: Blocks) -> str:
    head = image.raw(0, min(image.size, 0x10048))
    found = [name for name, at, magic in _OTHERS if head[at : at + len(magic)] == magic]
    name = found[0] if found else "something else" if any(head) else "zeros at its beginning"
    return (
        f"{image.name} holds no ext2, ext3 or ext4 but {name}: files can be read of those only; "
        "--blocks compares any image, and `horcrux-cli mount` shows what the kernel can mount"
    )


@dataclass(frozen=True)
class Group:
    """A group descriptor: where the inode table begins, and how many of its inodes were used."""

    table: int
    used: int


class Groups:
    """The group descriptors, read as they are asked for."""

    def __init__(self, superblock: Superblock, image: Blocks) -> None:
        self._super, self._image = superblock, image
        self._known: dict[int, Group] = {}

    def __getitem__(self, number: int) -> Group:
        found = self._known.get(number)
        if found is None:
            found = self._known[number] = self._read(number)
        return found

    def block_of(self, number: int) -> int:
        """The block that holds the descriptor of group `number` (kernel: descriptor_loc)."""
        sb = self._super
        per_block = sb.block_size // sb.descriptor_size
        block = number // per_block
        if not sb.incompat & META_BG or block < sb.first_meta_bg:
            return OFFSET // sb.block_size + 1 + block
        group = block * per_block
        behind = self._has_super(group)
        if sb.block_size == 1024 and block == 0 and sb.first_block == 0:
            behind += 1
        return behind + sb.first_block + group * sb.blocks_per_group

    def _has_super(self, group: int) -> int:
        sb = self._super
        if sb.compat & SPARSE_SUPER2:
            return int(group == 0 or group in sb.backup_groups)
        if group <= 1 or not sb.ro_compat & SPARSE_SUPER:
            return 1
        for base in (3, 5, 7):
            power = base
            while power < group:
                power *= base
            if power == group:
                return 1
        return 0

    def _read(self, number: int) -> Group:
        sb = self._super
        at = number % (sb.block_size // sb.descriptor_size) * sb.descriptor_size
        data = self._image.block(self.block_of(number))[at : at + sb.descriptor_size]
        if sb.checksums:
            crc = crc32c(crc32c(sb.seed, struct.pack("<I", number)), data[:0x1E])
            crc = crc32c(crc, b"\0\0" + data[0x20:])
            if crc & 0xFFFF != int.from_bytes(data[0x1E:0x20], "little"):
                raise self._image.damaged(f"the checksum of group descriptor {number} is wrong")
        (table,) = struct.unpack_from("<I", data, 0x8)
        flags, unused = struct.unpack_from("<H8xH", data, 0x12)
        if sb.descriptor_size >= 64:
            table |= struct.unpack_from("<I", data, 0x28)[0] << 32
            unused |= struct.unpack_from("<H", data, 0x32)[0] << 16
        if not sb.first_block < table <= sb.blocks - sb.table_blocks:
            raise self._image.damaged(f"the inode table of group {number} is at block {table}")
        used = sb.inodes_per_group
        if sb.ro_compat & _GROUP_INODES_UNUSED_KNOWN:
            used = 0 if flags & _INODE_UNINIT else used - unused
            if used < 0:
                raise self._image.damaged(f"group {number} has less than no inodes")
        return Group(table, used)

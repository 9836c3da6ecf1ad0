"""The few functions of libext2fs that fill an ext4 without mounting it.

libext2fs.so.2 comes with e2fsprogs. Structures and signatures: <ext2fs/ext2fs.h> of 1.43 and
later; what is used here is its public interface, unchanged since then. The library keeps bitmaps,
group descriptors, the super block and all checksums right; what goes into inodes and blocks is
packed by our own modules.

Not safe for several threads.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
from collections.abc import Iterator
from ctypes import (
    POINTER,
    byref,
    c_char_p,
    c_int,
    c_long,
    c_uint,
    c_uint32,
    c_uint64,
    c_ulong,
    c_void_p,
)
from types import TracebackType

from ..errors import EnvironmentProblem, HorcruxError, NoSpace

BLOCK = 4096
INODE = 256
LOST_AND_FOUND = 11  # what mke2fs makes; also the first inode that files may have

_OPEN_FLAGS = 0x01 | 0x20000  # EXT2_FLAG_RW, EXT2_FLAG_64BITS
_CLOSE_WITHOUT_SYNC = 1  # EXT2_FLAG_FLUSH_NO_SYNC: a temporary file need not survive
_UNSIGNED_HASH = 2  # EXT2_FLAGS_UNSIGNED_HASH in s_flags
_UNSIGNED_VERSION = 3  # what it adds to the version of the hash


class _Filesystem(ctypes.Structure):
    """`struct struct_ext2_filsys` up to the last field that is used."""

    _fields_ = [
        ("magic", c_long),
        ("io", c_void_p),
        ("flags", c_int),
        ("device_name", c_char_p),
        ("super", c_void_p),
        ("blocksize", c_uint),
        ("fragsize", c_int),
        ("group_desc_count", c_uint32),
        ("desc_blocks", c_ulong),
        ("group_desc", c_void_p),
        ("inode_blocks_per_group", c_uint),
        ("inode_map", c_void_p),
        ("block_map", c_void_p),
        ("callbacks", c_void_p * 5),
        ("badblocks", c_void_p),
        ("dblist", c_void_p),
        ("stride", c_uint32),
        ("orig_super", c_void_p),
        ("image_header", c_void_p),
        ("umask", c_uint32),
        ("now", c_long),
    ]


_Pointer = POINTER(_Filesystem)

# name: (what it returns, what it takes)
_FUNCTIONS: dict[str, tuple[object, list[object]]] = {
    "ext2fs_open2": (
        c_long,
        [c_char_p, c_char_p, c_int, c_int, c_uint, c_void_p, POINTER(_Pointer)],
    ),
    "ext2fs_close2": (c_long, [_Pointer, c_int]),
    "ext2fs_free": (None, [_Pointer]),
    "ext2fs_read_bitmaps": (c_long, [_Pointer]),
    "ext2fs_find_first_zero_block_bitmap2": (
        c_long,
        [c_void_p, c_uint64, c_uint64, POINTER(c_uint64)],
    ),
    "ext2fs_find_first_set_block_bitmap2": (
        c_long,
        [c_void_p, c_uint64, c_uint64, POINTER(c_uint64)],
    ),
    "ext2fs_block_alloc_stats_range": (None, [_Pointer, c_uint64, c_uint32, c_int]),
    "ext2fs_inode_alloc_stats2": (None, [_Pointer, c_uint32, c_int, c_int]),
    "ext2fs_read_inode_full": (c_long, [_Pointer, c_uint32, c_void_p, c_int]),
    "ext2fs_write_inode_full": (c_long, [_Pointer, c_uint32, c_char_p, c_int]),
    "ext2fs_write_dir_block4": (c_long, [_Pointer, c_uint64, c_char_p, c_int, c_uint32]),
    "ext2fs_write_ext_attr3": (c_long, [_Pointer, c_uint64, c_char_p, c_uint32]),
    "ext2fs_extent_block_csum_set": (c_long, [_Pointer, c_uint32, c_void_p]),
    "ext2fs_ext_attr_hash_entry": (c_uint32, [c_char_p, c_char_p]),
    "ext2fs_dirhash": (
        c_long,
        [c_int, c_char_p, c_int, POINTER(c_uint32), POINTER(c_uint32), POINTER(c_uint32)],
    ),
}


@functools.cache
def _libraries() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    """libext2fs and libcom_err, which words its errors."""
    try:
        library, words = ctypes.CDLL("libext2fs.so.2"), ctypes.CDLL("libcom_err.so.2")
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        words.error_message.restype, words.error_message.argtypes = c_char_p, [c_long]
        library.initialize_ext2_error_table()
    except (OSError, AttributeError) as error:
        raise EnvironmentProblem(
            f"libext2fs is missing or too old ({error}): apt-get install e2fsprogs"
        ) from error
    return library, words


def xattr_hash(entry: bytes, value: bytes) -> int:
    """`e_hash` of an attribute: `entry` is its packed entry with the name, `value` padded to 4."""
    return int(_libraries()[0].ext2fs_ext_attr_hash_entry(entry, value))


class Ext4:
    """An ext4 image that nobody has mounted, open for filling. Closing it writes it out.

    `path` names the image file. Block numbers are in blocks of 4 KiB. `now` is what the super
    block says of when it was last written, in seconds since 1970.
    """

    def __init__(self, path: str, now: int) -> None:
        self._library, self._words = _libraries()
        self._handle = _Pointer()
        manager = c_void_p.in_dll(self._library, "unix_io_manager")
        self._check(
            self._library.ext2fs_open2(
                os.fsencode(path), None, _OPEN_FLAGS, 0, 0, manager, byref(self._handle)
            )
        )
        try:
            self._check(self._library.ext2fs_read_bitmaps(self._handle))
        except BaseException:
            self._library.ext2fs_free(self._handle)
            raise
        filesystem = self._handle.contents
        filesystem.now = now
        super_block = ctypes.string_at(filesystem.super, 1024)
        self.inodes, low = struct.unpack_from("<II", super_block, 0)
        (high,) = struct.unpack_from("<I", super_block, 0x150)
        self.blocks = low | high << 32
        (flags,) = struct.unpack_from("<I", super_block, 0x160)
        self.hash_version = super_block[0xFC]
        self._hash_version = self.hash_version + (
            _UNSIGNED_VERSION if flags & _UNSIGNED_HASH else 0
        )
        self._hash_seed = (c_uint32 * 4).from_buffer_copy(super_block, 0xEC)
        self._hash, self._minor_hash = c_uint32(), c_uint32()
        self._hash_pointers = byref(self._hash), byref(self._minor_hash)
        self._open = True

    def free_ranges(self) -> Iterator[tuple[int, int]]:
        """[start, end) of blocks that are free, ascending."""
        bitmap = self._handle.contents.block_map
        last, found = self.blocks - 1, c_uint64()
        start = 0
        while start <= last:
            if self._library.ext2fs_find_first_zero_block_bitmap2(
                bitmap, start, last, byref(found)
            ):
                return  # ENOENT: all that follow are taken
            free = found.value
            missing = self._library.ext2fs_find_first_set_block_bitmap2(
                bitmap, free, last, byref(found)
            )
            start = self.blocks if missing else found.value
            yield free, start

    def mark_blocks(self, start: int, count: int, *, used: bool = True) -> None:
        """Count blocks as taken, or as free again."""
        while count > 0:
            size = min(count, 1 << 31)  # the library counts in 32 bits
            self._library.ext2fs_block_alloc_stats_range(
                self._handle, start, size, 1 if used else -1
            )
            start += size
            count -= size

    def mark_inode(self, number: int, *, directory: bool, used: bool = True) -> None:
        """Count an inode as taken, or as free again."""
        self._library.ext2fs_inode_alloc_stats2(
            self._handle, number, 1 if used else -1, 1 if directory else 0
        )

    def read_inode(self, number: int) -> bytes:
        """Its 256 bytes."""
        buffer = ctypes.create_string_buffer(INODE)
        self._check(self._library.ext2fs_read_inode_full(self._handle, number, buffer, INODE))
        return buffer.raw

    def write_inode(self, number: int, inode: bytes) -> None:
        """`inode` is 256 bytes; its checksum is filled in."""
        assert len(inode) == INODE
        self._check(self._library.ext2fs_write_inode_full(self._handle, number, inode, INODE))

    def write_directory_block(self, number: int, block: int, data: bytes) -> None:
        """One block of directory inode `number`; its checksum is filled in."""
        assert len(data) == BLOCK
        self._check(self._library.ext2fs_write_dir_block4(self._handle, block, data, 0, number))

    def write_xattr_block(self, number: int, block: int, data: bytes) -> None:
        """A block of extended attributes; its checksum is filled in."""
        assert len(data) == BLOCK
        self._check(self._library.ext2fs_write_ext_attr3(self._handle, block, data, number))

    def seal_extent_block(self, number: int, data: bytes) -> bytes:
        """`data`, a block of the extent tree of inode `number`, with its checksum."""
        assert len(data) == BLOCK
        buffer = ctypes.create_string_buffer(data, BLOCK)
        self._check(self._library.ext2fs_extent_block_csum_set(self._handle, number, buffer))
        return buffer.raw

    def name_hash(self, name: bytes) -> tuple[int, int]:
        """Where `name` belongs in an indexed directory: major and minor hash."""
        self._library.ext2fs_dirhash(
            self._hash_version, name, len(name), self._hash_seed, *self._hash_pointers
        )
        return self._hash.value, self._minor_hash.value

    def close(self) -> None:
        """Write everything out."""
        if self._open:
            self._open = False
            code = self._library.ext2fs_close2(self._handle, _CLOSE_WITHOUT_SYNC)
            if code:
                self._library.ext2fs_free(self._handle)
            self._check(code)

    def abandon(self) -> None:
        """Free what it holds and write nothing more."""
        if self._open:
            self._open = False
            self._library.ext2fs_free(self._handle)

    def _check(self, code: int) -> None:
        if not code:
            return
        text = (self._words.error_message(code) or b"unknown error").decode(errors="replace")
        if code == 28:  # ENOSPC of the temporary file
            raise NoSpace(f"no temporary space left for the file system's metadata ({text})")
        raise HorcruxError(f"libext2fs: {text}")

    def __enter__(self) -> Ext4:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()

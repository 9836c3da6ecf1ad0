"""Empty ext4 file systems, the same bytes each time, and the check of filled ones."""

from __future__ import annotations

import uuid
from dataclasses import dataclass

from ..errors import HorcruxError, UsageError
from ..units import GiB, MiB, format_size, round_up
from .libext2fs import BLOCK, INODE
from .temporary import UnnamedFile
from .tools import find_tool, last_line, run_tool

# Said outright and not left to /etc/mke2fs.conf, which differs between machines. What kernels from
# 4.4 on can mount and grow; no orphan_file (6.x only), no project or quota.
_FEATURES = (
    "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,"
    "sparse_super,large_file,huge_file,dir_nlink,extra_isize,metadata_csum"
)
# What the super block says of when it was made and written: past on any machine's clock.
TIMESTAMP = 946_684_800  # 2000-01-01
_NAMESPACE = uuid.UUID("7f0b9f0e-4d0c-5c58-9a35-0b6f7d1f6a11")
MIN_SIZE = 32 * MiB
_GROUP = 128 * MiB  # what one block of bitmap covers
_LABEL_BYTES = 16

# A journal larger than this makes local changes and commits larger (it is written round and
# round), and smaller than a database's bursts makes it wait; the kernel's own choice at 10 GiB.
_JOURNALS = ((256 * MiB, 4), (GiB, 16), (4 * GiB, 32))
_LARGEST_JOURNAL = 64  # MiB


@dataclass(frozen=True)
class Geometry:
    """What decides where the metadata of an empty file system lies."""

    size: int  # bytes
    inodes: int

    @property
    def journal(self) -> int:
        """Bytes."""
        for below, journal in _JOURNALS:
            if self.size < below:
                return journal * MiB
        return _LARGEST_JOURNAL * MiB

    @property
    def overhead(self) -> int:
        """About how many bytes the empty file system takes of its size."""
        groups = -(-self.size // _GROUP)
        descriptors = round_up(groups * 64, BLOCK)
        # sparse_super: groups 0, 1 and powers of 3, 5 and 7 hold a copy and room to grow it.
        copies = sum(
            1 for group in range(min(groups, 50)) if group in (0, 1, 3, 5, 7, 9, 25, 27, 49)
        )
        copies += max(groups.bit_length() - 5, 0)
        reserved = copies * (descriptors + 4 * MiB + BLOCK)
        return self.journal + round_up(self.inodes, 16) * INODE + groups * 2 * BLOCK + reserved


def inodes_for(size: int, files: int) -> int:
    """How many inodes an image of `size` bytes has: enough for `files` and as many again.

    One for each 16 KiB up to 64 GiB, as mke2fs has it, and for each 64 KiB beyond; unused ones
    are holes. In coarse steps, so that a few files more do not move everything behind them.
    """
    by_size = min(size, 64 * GiB) // (16 << 10) + max(size - 64 * GiB, 0) // (64 << 10)
    by_files = coarse(files * 2 + 1024)
    return min(max(by_size, by_files), (1 << 32) - 1)


def coarse(value: int) -> int:
    """The next of the numbers that have three significant bits, so at most 25 % more."""
    step = 1 << max(value.bit_length() - 3, 0)
    return round_up(value, step)


def make_ext4(file: UnnamedFile, geometry: Geometry, label: str) -> None:
    """Make `file` an empty ext4. Label, UUID and hash seed follow from `label`.

    Raises UsageError where the size does not do, EnvironmentProblem without mke2fs.
    """
    if geometry.size < MIN_SIZE:
        raise UsageError(
            f"{format_size(geometry.size)} is too small for an ext4 image: "
            f"it takes at least {format_size(MIN_SIZE)}"
        )
    file.resize(0)
    file.resize(geometry.size)
    identity = str(uuid.uuid5(_NAMESPACE, label))
    result = run_tool(
        [
            find_tool("mke2fs", "e2fsprogs"),
            *("-q", "-F", "-t", "ext4", "-O", _FEATURES),
            *("-b", str(BLOCK), "-I", str(INODE), "-N", str(geometry.inodes), "-m", "0"),
            *("-J", f"size={geometry.journal // MiB}", "-e", "continue"),
            *("-L", _short(label), "-U", identity),
            "-E",
            # The file is all holes. "discard" lets mke2fs know and mark inode tables as zeroed
            # without writing them, else the kernel would zero them into the first commit;
            # a lazy journal is one that is not written full of zeros here.
            "packed_meta_blocks=1,lazy_itable_init=0,lazy_journal_init=1,discard,"
            f"hash_seed={identity}",
            file.path,
            str(geometry.size // BLOCK),
        ],
        pass_fds=[file.fd],
        environment={"MKE2FS_CONFIG": "/dev/null", "E2FSPROGS_FAKE_TIME": str(TIMESTAMP)},
    )
    if result.returncode:
        raise UsageError(
            f"mke2fs cannot make an ext4 of {format_size(geometry.size)} with "
            f"{geometry.inodes} inodes ({last_line(result)}): choose a larger size"
        )


def check_ext4(file: UnnamedFile) -> None:
    """Have e2fsck look at all metadata; raises HorcruxError if it finds anything wrong."""
    result = run_tool(
        [find_tool("e2fsck", "e2fsprogs"), "-f", "-n", file.path],
        pass_fds=[file.fd],
        environment={"E2FSCK_CONFIG": "/dev/null"},
    )
    if result.returncode:
        said = " / ".join(line for line in result.stdout.splitlines() if line.strip())
        raise HorcruxError(
            f"the file system that was made is not sound, nothing was stored (e2fsck says: "
            f"{said[:500]}): this is a mistake of Horcrux, please report it"
        )


def _short(label: str) -> str:
    return label.encode()[:_LABEL_BYTES].decode(errors="ignore")

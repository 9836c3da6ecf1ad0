"""Which file system a device holds, read by ourselves.

An image reaches the kernel's file system driver, and that is code which trusts what it reads. So
only file systems that people keep data in are mounted, and none that mount(8) would guess.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import UsageError
from .processes import run_bytes

# (name, offset, magic). Source: the kernel's include/uapi/linux/magic.h and each one's own layout.
_MAGICS = (
    ("xfs", 0, b"XFSB"),
    ("btrfs", 0x10040, b"_BHRfS_M"),
    ("ext", 1024 + 0x38, b"\x53\xef"),
)
SUPPORTED = ("ext2", "ext3", "ext4", "xfs", "btrfs")
_EXT_HAS_JOURNAL = 0x4  # s_feature_compat
_EXT_NEEDS_RECOVERY = 0x4  # s_feature_incompat
_EXT3_INCOMPAT = 0x2 | 0x4 | 0x8 | 0x10  # filetype, recovery, journal device, meta_bg
_EXT3_RO_COMPAT = 0x1 | 0x2 | 0x4  # sparse_super, large_file, btree_dir
READ = 0x10048  # bytes: up to the last magic


def read(device: str | Path, timeout: float) -> bytes:
    """The first READ bytes of `device`, by a child process: a server that hangs must not hang us.

    Raises TimedOut, ProgramFailed.
    """
    return run_bytes(["head", "--bytes", str(READ), str(device)], timeout)


def filesystem(head: bytes, device: str) -> str:
    """The file system that begins with `head`, one of SUPPORTED. Raises UsageError for any other.

    `device` is for the message.
    """
    name = detect(head)
    if not name:
        raise UsageError(
            f"{device} holds no file system that can be mounted ({', '.join(SUPPORTED)}): an image "
            "with a partition table or another file system is for a VM; use `horcrux-cli serve`"
        )
    return name


def detect(head: bytes) -> str:
    """The file system that begins with `head` (READ bytes), or an empty string."""
    for name, offset, magic in _MAGICS:
        if head[offset : offset + len(magic)] == magic:
            return _ext_version(head) if name == "ext" else name
    return ""


def needs_recovery(head: bytes) -> bool:
    """Whether an ext journal must be replayed first, which a read-only device cannot do."""
    return detect(head).startswith("ext") and bool(_ext_features(head)[1] & _EXT_NEEDS_RECOVERY)


def _ext_features(head: bytes) -> tuple[int, int, int]:
    """compat, incompat and ro_compat feature words of an ext superblock."""
    words = head[1024 + 0x5C : 1024 + 0x68]
    return (
        int.from_bytes(words[0:4], "little"),
        int.from_bytes(words[4:8], "little"),
        int.from_bytes(words[8:12], "little"),
    )


def _ext_version(head: bytes) -> str:
    """Told apart as libblkid does: by the journal and by features that ext3 does not have."""
    compat, incompat, ro_compat = _ext_features(head)
    if incompat & ~_EXT3_INCOMPAT or ro_compat & ~_EXT3_RO_COMPAT:
        return "ext4"
    return "ext3" if compat & _EXT_HAS_JOURNAL else "ext2"

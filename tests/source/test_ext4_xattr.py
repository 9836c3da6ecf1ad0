"""Where attributes go; that the kernel reads them is proven in test_directory."""

from __future__ import annotations

import struct

import pytest

from horcrux_nbd.errors import UsageError
from horcrux_nbd.source.ext4_inode import XATTR_ROOM
from horcrux_nbd.source.ext4_xattr import pack, to_disk, with_references


def test_small_ones_lie_in_the_inode() -> None:
    inside, outside = pack(to_disk([(b"user.a", b"1"), (b"trusted.b", b"")]))
    assert len(inside) == XATTR_ROOM
    assert outside == b""


def test_large_ones_lie_in_a_block_beside_small_ones() -> None:
    inside, outside = pack(to_disk([(b"user.a", b"1"), (b"user.large", b"x" * 3900)]))
    assert b"large" not in inside
    assert inside
    assert len(outside) == 4096
    assert outside.endswith(b"x" * 3900)


def test_references() -> None:
    _, block = pack(to_disk([(b"user.large", b"x" * 100)]))
    assert struct.unpack_from("<II", with_references(block, 77), 4) == (77, 1)


@pytest.mark.parametrize(
    "pairs",
    [
        [(b"user.large", b"x" * 4100)],
        [(b"user.%d" % number, b"x" * 200) for number in range(20)],
        [(b"btrfs.compression", b"zstd")],
        [(b"system.posix_acl_access", b"\1\0\0\0")],
        [(b"system.posix_acl_access", b"\2\0\0\0xxx")],
    ],
)
def test_what_ext4_cannot_hold(pairs: list[tuple[bytes, bytes]]) -> None:
    with pytest.raises(UsageError):
        pack(to_disk(pairs))


def test_empty() -> None:
    assert pack([]) == (b"", b"")

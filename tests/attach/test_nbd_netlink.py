"""The wire format; what the kernel makes of it is in test_kernel_nbd.py."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from horcrux_nbd.attach import nbd_netlink
from horcrux_nbd.errors import EnvironmentProblem


def test_attributes_are_padded_and_read_back() -> None:
    data = nbd_netlink._attribute(1, b"abc") + nbd_netlink._attribute(0x8000 | 7, b"")
    assert len(data) % 4 == 0
    assert list(nbd_netlink.attributes(data)) == [(1, b"abc"), (7, b"")]


@pytest.mark.parametrize("data", [b"", b"abc", b"\3\0\1\0", b"\xff\0\1\0abc"])
def test_cut_off_attributes_end_it(data: bytes) -> None:
    assert list(nbd_netlink.attributes(data)) == []


@pytest.mark.skipif(os.path.exists("/sys/module/nbd"), reason="this kernel has the NBD driver")
def test_a_kernel_without_the_driver_is_one_line() -> None:
    with pytest.raises(EnvironmentProblem, match="no NBD driver loaded: modprobe nbd"):
        nbd_netlink.disconnect(0)
    child = subprocess.run(
        [sys.executable, "-m", nbd_netlink.__name__, "disconnect", "0", "name"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 1
    assert child.stderr.count("\n") == 1

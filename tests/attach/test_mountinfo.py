from __future__ import annotations

from pathlib import Path

import pytest

from horcrux_nbd.attach import mountinfo
from horcrux_nbd.attach.mountinfo import Mount

LINE = (
    r"36 35 98:0 /mnt1 /mnt2\040with\011all\012of\134it rw,noatime master:1 shared:7 - ext3 "
    r"/dev/root\040x rw,errors=continue"
)


def test_a_line_with_every_field() -> None:
    mount = mountinfo.parse(LINE)
    assert mount == Mount(
        id=36,
        parent=35,
        device="98:0",
        root="/mnt1",
        target="/mnt2 with\tall\nof\\it",
        options=frozenset({"rw", "noatime"}),
        propagation="master:1 shared:7",
        fstype="ext3",
        source="/dev/root x",
        super_options=frozenset({"rw", "errors=continue"}),
    )
    assert not mount.read_only


@pytest.mark.parametrize(
    "line", ["", "36 35 98:0 / /x rw - ext3", "1 2 3", LINE.replace(" - ", " ")]
)
def test_what_is_no_line_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="no line of mountinfo"):
        mountinfo.parse(line)


def test_read_only_by_mount_or_by_file_system() -> None:
    assert mountinfo.parse("1 0 8:1 / /a ro - ext4 /dev/a rw").read_only
    assert mountinfo.parse("1 0 8:1 / /a rw - ext4 /dev/a ro").read_only


def test_an_escaped_backslash_does_not_escape_what_follows() -> None:
    assert mountinfo.unescape(r"\134040") == r"\040"


def test_the_topmost_mount_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["1 0 8:1 / /a rw - ext4 /dev/a rw", "2 1 8:2 / /a rw - xfs /dev/b rw"]
    monkeypatch.setattr(mountinfo, "mounts", lambda: [mountinfo.parse(line) for line in lines])
    found = mountinfo.mounted_at("/a")
    assert found is not None
    assert found.id == 2
    assert mountinfo.mounted_at("/a/b") is None
    assert mountinfo.mounted_at("/ab") is None


def test_below_is_deepest_first_and_not_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = ["/a", "/a/b", "/ab", "/a/b/c", "/a/d"]
    lines = [f"{i} 0 8:{i} / {target} rw - ext4 x rw" for i, target in enumerate(targets)]
    monkeypatch.setattr(mountinfo, "mounts", lambda: [mountinfo.parse(line) for line in lines])
    assert [mount.target for mount in mountinfo.below("/a")] == ["/a/b/c", "/a/d", "/a/b"]


def test_our_own_mounts_hold_the_root() -> None:
    assert any(mount.target == "/" for mount in mountinfo.mounts())
    assert mountinfo.mounted_at(Path("/proc")) is not None
    with pytest.raises(OSError):
        mountinfo.mounts(pid=2**22 + 1)

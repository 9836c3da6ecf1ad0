"""The disk that forgets keeps what it must, and does forget."""

from __future__ import annotations

import os
import stat

from .forgetful import PAGE, ROOT, Forgetful

CUTS = [str(number) for number in range(60)]
FILE = stat.S_IFREG | 0o600


def content(system: Forgetful, name: bytes) -> bytes | None:
    try:
        node = system.lookup(ROOT, name)
    except FileNotFoundError:
        return None
    return system.read(node, 0, 1 << 20)


def test_synced_data_survives_whatever_follows_it() -> None:
    """An end that grew unsynced may be there or not, what is before it always is."""
    found = set()
    for seed in CUTS:
        system = Forgetful()
        node = system.create(ROOT, b"f", FILE)
        system.write(node, 0, b"a" * 100)
        system.sync(node)
        system.sync(ROOT)
        system.write(node, 100, b"b" * 50)
        system.cut(seed)
        left = content(system, b"f") or b""
        assert left[:100] == b"a" * 100
        assert set(left[100:]) <= {0, ord("b")}
        found.add(len(left))
    assert {100, 150} < found, "an end is lost, kept, and cut through"


def test_unsynced_pages_are_old_or_new() -> None:
    found = set()
    for seed in CUTS:
        system = Forgetful()
        node = system.create(ROOT, b"f", FILE)
        system.write(node, 0, b"a" * 4 * PAGE)
        system.sync(node)
        system.sync(ROOT)
        system.write(node, 0, b"b" * 4 * PAGE)
        system.cut(seed)
        left = content(system, b"f") or b""
        pages = [left[at : at + PAGE] for at in range(0, 4 * PAGE, PAGE)]
        assert set(pages) <= {b"a" * PAGE, b"b" * PAGE}
        found.add(tuple(page[:1] for page in pages))
    assert len(found) > 3


def test_a_name_needs_a_sync_of_its_folder_and_a_rename_is_whole() -> None:
    found = set()
    for seed in CUTS:
        system = Forgetful()
        for name in (b"old", b"new"):
            node = system.create(ROOT, name, FILE)
            system.write(node, 0, name)
            system.sync(node)
            if name == b"old":
                system.sync(ROOT)
        system.rename(ROOT, b"new", ROOT, b"old", replace=True)
        system.cut(seed)
        assert content(system, b"old") in (b"old", b"new")
        found.add((content(system, b"old"), content(system, b"new")))
    assert found == {(b"old", None), (b"old", b"new"), (b"new", None)}


def test_a_hole_and_a_cut_off_end_read_as_zeros() -> None:
    system = Forgetful()
    node = system.create(ROOT, b"f", FILE)
    data = os.urandom(3 * PAGE)
    system.write(node, 0, data)
    system.allocate(node, 3, 100, PAGE)  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
    expected = data[:100] + bytes(PAGE) + data[100 + PAGE :]
    assert content(system, b"f") == expected
    system.truncate(node, 2 * PAGE + 10)
    system.truncate(node, 3 * PAGE)
    assert content(system, b"f") == expected[: 2 * PAGE + 10].ljust(3 * PAGE, b"\0")

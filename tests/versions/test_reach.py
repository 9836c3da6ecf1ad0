"""Which own objects are needed, and that the others go."""

from __future__ import annotations

from pathlib import Path

import pytest

from horcrux_nbd.repository.objects import Kind, kind_of
from horcrux_nbd.units import KiB
from horcrux_nbd.versions.reach import reach, sweep
from horcrux_nbd.versions.session import Session
from tests.versions.support import BLOCK, Disk, clear_cache, small_repository
from tests.volume.support import noise

CHUNK = 64 * KiB


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk("v", small_repository(tmp_path / "repo"))


def test_nothing_comes_before_what_it_names(disk: Disk) -> None:
    for number in range(3):
        clear_cache()  # so that patches lie over patches
        disk.write((CHUNK, noise(BLOCK * (number + 1), number)), (5 * CHUNK, noise(CHUNK, number)))
        disk.commit(f"{number}")
    with Session("v") as session:
        found = reach(session.local, session.own_commits())
        steps = found.steps()
        assert found.all() | {bytes.fromhex(disk.state.upstream or "")} == set(disk.own())
        kinds = [{kind_of(oid) for oid in step} for step in steps]
        assert kinds[0] <= {Kind.CHUNK, Kind.PATCH}
        assert kinds[1] == {Kind.NODE}
        assert kinds[2:] == [{Kind.COMMIT}] * 3
        # The oldest commit first.
        messages = [session.commit(step[0]).message for step in steps[2:]]
        assert messages == ["0", "1", "2"]


def test_what_nobody_needs_goes(disk: Disk) -> None:
    disk.write((0, noise(BLOCK, 1)))
    disk.commit()
    needed = disk.own().keys() - {bytes.fromhex(disk.state.upstream or "")}
    with Session("v") as session:
        from horcrux_nbd.repository.repository import Repository

        own = Repository(session.local.store, "", CHUNK)
        own.write_object(Kind.CHUNK, noise(CHUNK, "garbage"))
        own.store.sync()
        assert sweep(session.local, session.state) > CHUNK
        assert sweep(session.local, session.state) == 0
    assert disk.own().keys() == needed
    disk.check()

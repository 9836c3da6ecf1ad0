"""fsx on a mounted volume: the page cache, ext4, the loop device and us between call and answer."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from horcrux_nbd import host, versions
from horcrux_nbd.chunkstore import open_store
from horcrux_nbd.generate import generate
from horcrux_nbd.names import Version
from horcrux_nbd.native import build
from horcrux_nbd.source.raw import RawSource
from tests.attach.conftest import needs_fuse
from tests.servers.nbdkit import MISSING, available
from tests.versions.support import AUTHOR
from tests.volume.support import IMAGE

from .fsx import Exerciser

SEEDS = 10
CALLS = int(os.environ.get("HORCRUX_FSX_CALLS", "1000"))  # for each seed

pytestmark = [pytest.mark.skipif(not available(), reason=MISSING), needs_fuse]


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A repository with an empty ext4."""
    disk = tmp_path / "disk.img"
    disk.touch()
    os.truncate(disk, 128 << 20)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", disk], check=True)
    found = f"cp://{tmp_path}/repo"
    with open_store(found, create=True) as store, RawSource(str(disk)) as source:
        generate(source, store, IMAGE, author="test", message="empty")
    return found


@pytest.fixture
def target(tmp_path: Path, url: str) -> Iterator[Path]:
    folder = tmp_path / "mnt"
    folder.mkdir()
    host.create("v", url, Version(IMAGE))
    yield folder
    if host.mounts("v"):
        host.umount("v", force=True)


@pytest.mark.slow
@pytest.mark.timeout(300 + CALLS)
@pytest.mark.parametrize("native", ["1", "0"], ids=["native", "python"])
def test_files_on_a_mounted_volume(
    target: Path, native: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten seeds, half of them each way; HORCRUX_FSX_CALLS says how many calls each makes."""
    monkeypatch.setenv(build.SWITCH, native)
    if native == "1" and build.found() is None:
        pytest.skip("there is no native filter for this nbdkit: horcrux-cli native build")
    seeds = range(SEEDS)[int(native) :: 2]
    host.mount("v", target)
    files = [Exerciser(target / f"file-{seed}", str(seed)) for seed in seeds]
    for number, one in enumerate(files):
        one.run(CALLS // 2)
        if number % 2:
            versions.commit(["v"], f"after seed {number}", author=AUTHOR)
        one.run(CALLS // 2)
        one.check()
    host.umount("v")
    host.mount("v", target)
    for one in files:
        one.check()

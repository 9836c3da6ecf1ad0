"""An nbdkit over a small image, and a connection to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.servers.fixtures import ssh, sshd_server  # noqa: F401 - fixtures
from tests.servers.nbdkit import Nbdkit, connected
from tests.volume.support import make_image

from .support import DATA, SIZE, serve


@pytest.fixture
def url(tmp_path: Path) -> str:
    return make_image(tmp_path / "repo", DATA, size=SIZE)


@pytest.fixture
def served(tmp_path: Path, url: str) -> Iterator[Nbdkit]:
    with serve(tmp_path, url) as server:
        yield server


@pytest.fixture
def client(served: Nbdkit) -> Iterator[Any]:
    with connected(served) as handle:
        yield handle

"""An nbdkit over a small image, and a connection to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.servers import nbdkit as servers
from tests.servers.fixtures import ssh, sshd_server  # noqa: F401 - fixtures
from tests.servers.nbdkit import Nbdkit, connected
from tests.volume.support import make_image

from .support import DATA, SIZE, serve

# These go through both: served by Python alone, and with the native filter before it.
BOTH = {"test_durable", "test_requests", "test_served", "test_large"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.module.__name__.rsplit(".", 1)[-1] in BOTH:
        metafunc.parametrize("part", ["python", "native"], indirect=True, scope="module")


@pytest.fixture(scope="module", autouse=True)
def part(request: pytest.FixtureRequest) -> Iterator[str]:
    """Which part serves what is local."""
    name = getattr(request, "param", "python")
    if name == "native":
        servers.FILTERS.append(f"--filter={request.getfixturevalue('shared_object')}")
    yield name
    servers.FILTERS.clear()


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

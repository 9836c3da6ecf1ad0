"""The overlay and what it is made of, with the native part and without: the same tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from horcrux_nbd.native import build, library

BOTH = {"test_blockmap", "test_layer", "test_overlay", "test_recent", "test_sealing", "test_native"}


@pytest.fixture(scope="session")
def shared_object(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The filter, built from the sources as they are."""
    if reason := build.why_not():
        pytest.skip(reason)
    return build.compiled(tmp_path_factory.mktemp("native") / library.NAME)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.module.__name__.rsplit(".", 1)[-1] in BOTH:
        metafunc.parametrize("part", ["python", "native"], indirect=True, scope="module")


@pytest.fixture(scope="module", autouse=True)
def part(request: pytest.FixtureRequest) -> Iterator[str]:
    """Which part keeps the state of layers and volumes."""
    name = getattr(request, "param", "python")
    native = name == "native"
    path = request.getfixturevalue("shared_object") if native else None
    with library.forced(library.Library(path) if path else None):
        yield name

"""The overlay and what it is made of, with the native part and without: the same tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from horcrux_nbd.native import library

BOTH = {"test_blockmap", "test_layer", "test_overlay", "test_recent", "test_sealing", "test_volume"}


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

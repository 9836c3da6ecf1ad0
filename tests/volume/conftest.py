"""The overlay and what it is made of, with the native part and without: the same tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from horcrux_nbd.native import library
from horcrux_nbd.volume import journal

BOTH = {"test_blockmap", "test_layer", "test_overlay", "test_recent", "test_sealing", "test_volume"}

WITH_A_JOURNAL = {
    "test_block_device_model",
    "test_after_a_power_cut_what_was_flushed_is_there_and_what_was_not_is_not",
    "test_after_the_death_of_the_process_all_is_there_and_the_next_flush_means_it",
    "test_what_is_frozen_is_durable",
    "test_after_each_flush_the_disk_has_what_was_written",
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.module.__name__.rsplit(".", 1)[-1] in BOTH:
        parts = ["python", "native"]
        if metafunc.function.__name__ in WITH_A_JOURNAL:
            parts += ["python+journal", "native+journal"]
        metafunc.parametrize("part", parts, indirect=True, scope="module")


@pytest.fixture(scope="module", autouse=True)
def part(request: pytest.FixtureRequest) -> Iterator[str]:
    """Which part keeps the state of layers and volumes."""
    name = getattr(request, "param", "python")
    native = name.startswith("native")
    path = request.getfixturevalue("shared_object") if native else None
    found = library.Library(path) if path else None
    if found is not None:  # what takes the place of os.fdatasync does so natively, too
        found.sync_with(lambda fd: os.fdatasync(fd))  # noqa: PLW0108 - it is patched later
    with library.forced(found), pytest.MonkeyPatch.context() as m:
        if name.endswith("journal"):  # from the first small flush on
            m.setattr(journal, "AFTER", 0)
        yield name

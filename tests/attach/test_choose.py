from __future__ import annotations

import pytest

from horcrux_nbd.attach import choose, fuse_loop, kernel_nbd, ublk
from horcrux_nbd.errors import EnvironmentProblem, UsageError

LACK = ("the thing is not there", "get the thing")


@pytest.fixture
def lacking(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names in this set are missing; the others are there."""
    names: set[str] = set()
    for module in (kernel_nbd, ublk, fuse_loop):
        driver = module.DRIVER
        monkeypatch.setattr(
            type(driver), "missing", lambda self: LACK if self.NAME in names else None
        )
    return names


def test_the_best_that_is_there_is_taken(lacking: set[str]) -> None:
    for name in ("nbd", "ublk", "fuse"):
        taken = choose.choose().NAME
        assert taken == name
        lacking.add(name)
    with pytest.raises(
        EnvironmentProblem, match=r"no way .*nbd: the thing.*\(get the thing\).*serve"
    ):
        choose.choose()


def test_one_can_be_asked_for(lacking: set[str]) -> None:
    assert choose.choose("fuse").NAME == "fuse"
    lacking.add("fuse")
    with pytest.raises(EnvironmentProblem, match="fuse: the thing is not there") as caught:
        choose.choose("fuse")
    assert "ublk" not in str(caught.value)
    with pytest.raises(UsageError, match="use nbd, ublk, fuse"):
        choose.choose("nbdfuse")


def test_ways_tells_all_of_them(lacking: set[str]) -> None:
    lacking.add("nbd")
    first, *rest = choose.ways()
    assert (first.name, first.available, first.missing, first.mend) == ("nbd", False, *LACK)
    assert all(way.available and not way.missing for way in rest)


def test_what_this_machine_has_is_told_in_one_line_each() -> None:
    for way in choose.ways():
        assert way.available == (not way.missing)
        assert bool(way.missing) == bool(way.mend)
        assert "\n" not in way.missing + way.mend + way.warning

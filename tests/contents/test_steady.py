"""A look at what changes meanwhile counts only if nothing did."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from horcrux_nbd.contents import Content, reading, steadily, steady
from horcrux_nbd.errors import Busy, Damaged, UsageError


class Volume:
    """A content whose pulse is told beforehand."""

    name = volume = "v"

    def __init__(self, pulses: list[object], targets: list[Path]) -> None:
        self.pulses, self.targets, self.refreshed = iter(pulses), targets, 0

    def refresh(self) -> None:
        self.refreshed += 1

    def pulse(self) -> object:
        return next(self.pulses)

    def mounts(self) -> list[Path]:
        return self.targets


class Frozen:
    """Notes what is asked of it."""

    said: list[str]

    def __init__(self, targets: list[Path]) -> None:
        self.targets = targets

    def freeze(self) -> None:
        assert self.targets
        self.said.append("freeze")

    def thaw(self) -> None:
        self.said.append("thaw")

    def __enter__(self) -> Frozen:
        Frozen.said = []
        return self

    def __exit__(self, *exc: object) -> None:
        self.said.append("end")


@pytest.fixture(autouse=True)
def no_mount(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(steady, "Freezer", Frozen)
    monkeypatch.setattr(steady, "write_out", lambda target: None)
    return


def look(volume: Volume, results: list[object]) -> tuple[object, list[bool]]:
    said: list[bool] = []

    def looking(is_frozen: bool) -> object:
        said.append(is_frozen)
        result = results.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    return steadily([cast(Content, volume)], looking), said


MOUNT = [Path("/mnt")]


def test_nothing_happened() -> None:
    assert look(Volume([1, 1], MOUNT), ["right"]) == ("right", [False])
    assert Frozen.said == ["end"]


def test_written_meanwhile() -> None:
    volume = Volume([1, 2, 2], MOUNT)
    assert look(volume, ["mixed", "right"]) == ("right", [False, True])
    assert Frozen.said == ["freeze", "thaw", "end"]
    assert volume.refreshed == 2


def test_it_cannot_be_told_at_first() -> None:
    """Files that were written a moment ago: after a moment it can be told."""
    assert look(Volume([None, 1, 1], MOUNT), ["right"]) == ("right", [False])


def test_a_mixture_looks_damaged() -> None:
    assert look(Volume([1, 2, 2], MOUNT), [Damaged("mixed"), "right"]) == ("right", [False, True])


def test_real_damage_is_told() -> None:
    with pytest.raises(Damaged, match="real"):
        look(Volume([1, 1], MOUNT), [Damaged("real")])
    with pytest.raises(Damaged, match="real"):
        look(Volume([1, 2, 2], MOUNT), [Damaged("mixed"), Damaged("real")])
    assert Frozen.said == ["freeze", "end"]


def test_other_errors_are_told_at_once() -> None:
    with pytest.raises(UsageError):
        look(Volume([1, 1], MOUNT), [UsageError("no ext4")])


def test_a_vm_that_writes_without_a_pause() -> None:
    """It cannot be frozen from here: the last look counts, unless it shows damage."""
    assert look(Volume([1, 2, 3, 4, 5, 6], []), ["a", "b", "c"])[0] == "c"
    with pytest.raises(Busy, match="pause the VM"):
        look(Volume([1, 2, 3, 4, 5, 6], []), [Damaged("mixed")] * 3)


def test_versions_do_not_change() -> None:
    version = Volume([], [])
    version.volume = None  # type: ignore[assignment]
    assert look(version, ["right"]) == ("right", [False])


@pytest.mark.parametrize(
    ("pulses", "error"), [([1, 1, 1, 1], Damaged), ([1, 1, 1, 2], Busy), ([1, 1, None, 1], Busy)]
)
def test_reading_what_changes(
    pulses: list[object], error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damage that shows in a volume which was written to meanwhile is not told as damage."""
    monkeypatch.setattr(steady, "files_of", lambda content: "reader")
    with pytest.raises(error), reading(cast(Content, Volume(pulses, MOUNT))):
        raise Damaged("does not fit")
    with reading(cast(Content, Volume([1] * 4, MOUNT))) as reader:
        assert cast(object, reader) == "reader"

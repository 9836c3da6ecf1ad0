"""Sizes: what people write is what is meant."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from horcrux_nbd.errors import UsageError
from horcrux_nbd.units import GiB, KiB, MiB, PiB, TiB, format_size, parse_size, round_up


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("512K", 512 * KiB),
        ("512k", 512 * KiB),
        ("64M", 64 * MiB),
        ("64MB", 64 * MiB),
        ("64MiB", 64 * MiB),
        ("1.5G", GiB + GiB // 2),
        ("10 GiB", 10 * GiB),
        (" 2T ", 2 * TiB),
        ("1P", PiB),
        ("100B", 100),
        (4096, 4096),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        "K",
        "-1",
        "-1K",
        "1.5",
        "1,5G",
        "1e6",
        "1X",
        "1KK",
        "0x10",
        "٣K",
        "1 K M",
        "9" * 19,
        "1.K",
    ],
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="--free"):
        parse_size(text, "--free")


@pytest.mark.parametrize("value", [True, None, 1.5, b"1K"])
def test_what_is_no_text(value: object) -> None:
    with pytest.raises(UsageError):
        parse_size(value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (MiB, "1.0 MiB"),
        (10 * GiB, "10.0 GiB"),
        (64 * TiB, "64.0 TiB"),
        (2048 * PiB, "2048.0 PiB"),
        (-2048, "-2.0 KiB"),
    ],
)
def test_shown(size: int, text: str) -> None:
    assert format_size(size) == text


@given(st.integers(0, 10**18 - 1))
def test_bytes_stay_what_they_are(size: int) -> None:
    assert parse_size(str(size)) == size


@given(st.integers(0, 1 << 40))
def test_what_is_shown_can_be_written(size: int) -> None:
    """Off by half of the last digit at most."""
    text = format_size(size)
    unit = {"B": 1, "KiB": KiB, "MiB": MiB, "GiB": GiB, "TiB": TiB}[text.split()[1]]
    assert abs(parse_size(text) - size) <= unit // 20 + 1


@given(st.integers(0, 1 << 62), st.integers(1, 1 << 30))
def test_round_up(value: int, step: int) -> None:
    result = round_up(value, step)
    assert result % step == 0
    assert value <= result < value + step

"""Records: what is written comes back, any damage is found, and nothing else is."""

from __future__ import annotations

import contextlib
import json

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from horcrux_nbd.errors import Damaged, EnvironmentProblem, UsageError
from horcrux_nbd.repository.records import (
    MAX_RECORD,
    canonical,
    decode_record,
    encode_record,
    integer,
    parse,
    text,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
MEMBERS = st.dictionaries(
    TEXT.filter(lambda name: name not in ("check", "version")),
    st.one_of(TEXT, st.integers(-(2**62), 2**62), st.none(), st.lists(TEXT, max_size=3)),
    max_size=8,
)


@given(MEMBERS, st.sampled_from([None, 2]))
def test_what_is_written_comes_back(members: dict[str, object], indent: int | None) -> None:
    data = encode_record(members, indent=indent)
    assert decode_record(data, "it") == members
    assert data.isascii()
    # White space and order are nobody's business.
    again = json.dumps(dict(reversed(json.loads(data).items())), indent=7).encode()
    assert decode_record(again, "it") == members


@settings(max_examples=50, deadline=None)
@given(MEMBERS, st.data())
def test_damage(members: dict[str, object], data: st.DataObject) -> None:
    sound = encode_record(members)
    at = data.draw(st.integers(0, len(sound) - 1))
    bad = bytearray(sound)
    bad[at] ^= 1 << data.draw(st.integers(0, 7))
    with contextlib.suppress(Damaged):
        assert decode_record(bytes(bad), "it") == members  # another white space, another escape
    if at < len(sound) - 1:
        with pytest.raises(Damaged):
            decode_record(sound[:at], "it")


@given(st.binary(max_size=100))
def test_noise(noise: bytes) -> None:
    with pytest.raises(Damaged):
        decode_record(noise, "it")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"null",
        b"[" * 60_000,
        b'{"a":' * 10_000,
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": 1, "a": 1}',
        b'{"a": 1' + b"0" * 5000 + b"}",
        b'{"a": "\\ud800"}',
        b"\xff\xfe{}",
        b" " * (MAX_RECORD + 1),
        b'{"check": 5}',
        b'{"version": 1}',
    ],
)
def test_what_is_no_record(data: bytes) -> None:
    with pytest.raises(Damaged):
        decode_record(data, "it")


def test_a_later_format_is_told_from_damage() -> None:
    value = {"a": 1, "version": 2}
    value["check"] = blake3(canonical(value)).hexdigest()[:32]  # type: ignore[assignment]
    with pytest.raises(EnvironmentProblem, match="format 2, newer than this program: upgrade"):
        decode_record(json.dumps(value).encode(), "it")
    value["version"] = 3
    with pytest.raises(Damaged):
        decode_record(json.dumps(value).encode(), "it")


def test_the_canonical_form() -> None:
    value = {"b": [1, None, True], "a": 'ä😀\n\x7f/<"\\'}
    expected = r'{"a":"\u00e4\ud83d\ude00\n\u007f/<\"\\","b":[1,null,true]}'
    assert canonical(value) == expected.encode()
    with pytest.raises(UsageError, match="no valid text"):
        canonical({"a": "\udcff"})  # what a file name in another encoding becomes


def test_too_long() -> None:
    with pytest.raises(UsageError, match="shorten"):
        encode_record({"why": "x" * MAX_RECORD})


def test_a_member_that_is_there_twice() -> None:
    """Which one counts would depend on the reader."""
    for data in (b'{"a": 1, "a": 1}', b'{"a": {"b": 1, "b": 2}}'):
        with pytest.raises(ValueError, match="twice"):
            parse(data)


def test_types_are_strict() -> None:
    assert parse(b'{"a": 1}') == {"a": 1}
    for value in (True, 1.0, "1", None):
        with pytest.raises(ValueError, match="whole number"):
            integer(value)
    for value in (1, None, b"x", ["x"]):
        with pytest.raises(ValueError, match="no text"):
            text(value)
    with pytest.raises(ValueError, match="surrogates"):
        text("\ud800")

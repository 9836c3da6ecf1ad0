"""Names can never escape a folder, need quoting, or be taken for something else."""

from __future__ import annotations

import shlex
from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from horcrux_nbd.chunkstore.base import is_key
from horcrux_nbd.errors import UsageError
from horcrux_nbd.names import (
    MAX_NAME,
    Version,
    check_name,
    check_ref,
    is_name,
    looks_like_id,
    parse_version,
)

BAD = [
    "", ".", "..", "../x", "a/b", "/a", "a b", "a\n", "\na", "a\0b", "-a", "_a", ".a", "a@b", "a~1",
    "a:b", "ä", "a'b", "$a", "a*", "x" * (MAX_NAME + 1), "a\u2028", "٣",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_names(name: str) -> None:
    assert not is_name(name)
    with pytest.raises(UsageError, match="cannot name a volume") as caught:
        check_name("volume", name)
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a", "A", "0", "AMCC", "a.b-c_d", "v1.0", "x" * MAX_NAME])
def test_good_names(name: str) -> None:
    assert check_name("image", name) == name


def test_the_message_has_grammar() -> None:
    with pytest.raises(UsageError, match="cannot name an image"):
        check_name("image", "..")


def test_no_text() -> None:
    with pytest.raises(UsageError):
        check_name("image", None)  # type: ignore[arg-type]


@given(st.text(max_size=12))
def test_a_name_is_safe_everywhere(name: str) -> None:
    if not is_name(name):
        return
    assert PurePosixPath("/folder", name).parent == PurePosixPath("/folder")
    assert shlex.quote(name) == name
    assert is_key(f"refs/{name}/heads/main")
    assert not name.startswith("-")


@pytest.mark.parametrize(
    ("text", "version", "base", "steps"),
    [
        ("AMCC", Version("AMCC", "main"), "main", 0),
        ("AMCC@v3", Version("AMCC", "v3"), "v3", 0),
        ("AMCC@main~2", Version("AMCC", "main~2"), "main", 2),
        ("AMCC@main~", Version("AMCC", "main~"), "main", 1),
        ("AMCC@main^", Version("AMCC", "main^"), "main", 1),
        ("AMCC@main^^~3", Version("AMCC", "main^^~3"), "main", 5),
        ("AMCC@1f3a9c", Version("AMCC", "1f3a9c"), "1f3a9c", 0),
    ],
)
def test_versions(text: str, version: Version, base: str, steps: int) -> None:
    found = parse_version(text)
    assert found == version
    assert found.base_and_steps == (base, steps)
    assert parse_version(str(found)) == found


@pytest.mark.parametrize(
    "text",
    ["@main", "AMCC@", "AMCC@a b", "AMCC@a@b", "A/B@x", "AMCC@../x", "AMCC@~1", "AMCC@main~٣"],
)
def test_no_versions(text: str) -> None:
    with pytest.raises(UsageError):
        parse_version(text)


def test_refs() -> None:
    assert check_ref("main~2") == "main~2"
    with pytest.raises(UsageError, match="no ref"):
        check_ref("-main")


@pytest.mark.parametrize(
    ("text", "yes"),
    [("1f3a", True), ("1f3", False), ("1F3A", False), ("f" * 64, True), ("f" * 65, False)],
)
def test_ids(text: str, yes: bool) -> None:
    assert looks_like_id(text) is yes

"""Pictures of histories."""

from __future__ import annotations

from horcrux_nbd.versions.graph import draw


def picture(*versions: str) -> list[str]:
    """Lines for versions like `c:b` (c after b) and `a` (the first)."""
    parsed = []
    for one in versions:
        name, _, parents = one.partition(":")
        parsed.append((name.encode(), [parent.encode() for parent in parents.split(",") if parent]))
    return [line if oid is None else f"{line} {oid.decode()}" for oid, line in draw(parsed)]


def test_one_line() -> None:
    assert picture("c:b", "b:a", "a") == ["* c", "* b", "* a"]


def test_two_branches() -> None:
    assert picture("d:a", "c:b", "b:a", "a") == ["* d", "| * c", "| * b", "|/", "* a"]


def test_a_branch_from_the_middle() -> None:
    assert picture("d:c", "e:b", "c:b", "b:a", "a") == [
        "* d",
        "| * e",
        "* | c",
        "|/",
        "* b",
        "* a",
    ]


def test_three_branches_of_one() -> None:
    assert picture("d:a", "c:a", "b:a", "a") == [
        "* d",
        "| * c",
        "| | * b",
        "| |/",
        "|/",
        "* a",
    ]


def test_two_images_without_a_common_beginning() -> None:
    assert picture("d:c", "b:a", "c", "a") == ["* d", "| * b", "* | c", "|/", "* a"]


def test_every_version_shows_once() -> None:
    lines = picture("h:g,f", "g:e", "f:e", "e:a", "a")
    assert [line[-1] for line in lines if "*" in line] == list("hgfea")

"""Commits: encoding, equal commits have equal ids, and what cannot be is refused both ways."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from horcrux_nbd.errors import Damaged, EnvironmentProblem, UsageError
from horcrux_nbd.repository.commits import (
    MAX_COMMIT,
    MAX_IMAGE,
    Commit,
    block_count,
    check_chunk_size,
    now,
)
from horcrux_nbd.repository.objects import NULL_ID, Kind, kind_of, object_id
from horcrux_nbd.repository.records import canonical

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
NODE_ID = object_id(Kind.NODE, b"root")
PARENTS = [object_id(Kind.COMMIT, b"%d" % n) for n in range(4)]
TIME = "2026-01-02T03:04:05.678901Z"
COMMITS = st.builds(
    Commit,
    image=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,20}", fullmatch=True),
    size=st.integers(0, 1 << 50),
    chunk_size=st.sampled_from([1 << bits for bits in range(16, 27)]),
    index=st.sampled_from([NULL_ID, NODE_ID]),
    parents=st.lists(st.sampled_from(PARENTS), max_size=3).map(tuple),
    author=TEXT,
    time=st.sampled_from([TIME, "1999-12-31T23:59:59Z"]),
    message=TEXT,
    tags=st.dictionaries(TEXT, TEXT, max_size=3),
    filesystem=st.one_of(st.none(), TEXT),
    new=st.dictionaries(TEXT, st.integers(0, 1 << 50), max_size=2),
)
SOUND = Commit("AMCC", 1_000_000, 65536, NODE_ID, (PARENTS[0],), "a <a@b>", TIME, "m", {"k": "v"})


@given(COMMITS)
def test_encode_and_decode(commit: Commit) -> None:
    plain = commit.encode()
    assert Commit.decode(plain) == commit
    assert kind_of(object_id(Kind.COMMIT, plain)) is Kind.COMMIT
    assert plain == canonical(json.loads(plain))


@given(COMMITS, COMMITS)
def test_equal_commits_have_equal_ids(a: Commit, b: Commit) -> None:
    assert (a.encode() == b.encode()) == (a == b)
    assert dataclasses.replace(a, tags=dict(reversed(a.tags.items()))).encode() == a.encode()


def test_sizes() -> None:
    commit = dataclasses.replace(SOUND, size=65536 * 256 + 1)
    assert (commit.chunks, commit.levels) == (257, 2)
    assert (dataclasses.replace(SOUND, size=0).chunks, SOUND.levels) == (0, 1)
    huge = dataclasses.replace(SOUND, size=MAX_IMAGE)
    assert huge.levels == 6
    assert Commit.decode(huge.encode()) == huge
    assert [block_count(size) for size in (0, 1, 4096, 4097)] == [0, 1, 1, 2]


BAD: list[dict[str, Any]] = [
    {"image": "../x"},
    {"image": ""},
    {"image": None},
    {"size": -1},
    {"size": MAX_IMAGE + 1},
    {"size": 1.5},
    {"size": "12"},
    {"size": True},
    {"chunk_size": 65535},
    {"chunk_size": 32768},
    {"chunk_size": 1 << 27},
    {"chunk_size": 0},
    {"index": "00"},
    {"index": "zz" * 32},
    {"index": PARENTS[0].hex()},
    {"index": NODE_ID.hex().upper()},
    {"index": f" {NODE_ID.hex()}"},
    {"parents": None},
    {"parents": ["00" * 32]},
    {"parents": [NODE_ID.hex()]},
    {"author": 5},
    {"time": "yesterday"},
    {"time": ""},
    {"time": "٢026-01-02T03:04:05Z"},
    {"message": None},
    {"tags": []},
    {"tags": {"a": 1}},
    {"filesystem": 1},
    {"new": {"bytes": 1.5}},
    {"new": ["bytes"]},
    {"new": None},
    {"version": "1"},
]


@pytest.mark.parametrize("change", BAD, ids=[json.dumps(bad) for bad in BAD])
def test_what_cannot_be(change: dict[str, Any]) -> None:
    value = json.loads(SOUND.encode()) | change
    with pytest.raises(Damaged) as caught:
        Commit.decode(json.dumps(value).encode())
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("member", sorted(json.loads(SOUND.encode())))
def test_every_member_is_needed(member: str) -> None:
    value = json.loads(SOUND.encode())
    del value[member]
    with pytest.raises(Damaged):
        Commit.decode(json.dumps(value).encode())


@given(st.binary(max_size=200))
def test_noise(noise: bytes) -> None:
    with pytest.raises(Damaged):
        Commit.decode(noise)


@pytest.mark.parametrize("plain", [b"[" * 1_000_000, b'{"a":' * 200_000, b"1" * 100_000])
def test_deep_and_long(plain: bytes) -> None:
    with pytest.raises(Damaged):
        Commit.decode(plain)


def test_a_later_format_is_no_damage() -> None:
    value = json.loads(SOUND.encode()) | {"version": 2}
    with pytest.raises(EnvironmentProblem, match="upgrade"):
        Commit.decode(json.dumps(value).encode())


def test_what_a_later_release_adds_is_left_alone() -> None:
    value = json.loads(SOUND.encode()) | {"set": ["other"]}
    assert Commit.decode(json.dumps(value).encode()) == SOUND


@pytest.mark.parametrize(
    "change",
    [
        {"time": ""},
        {"image": "a/b"},
        {"size": -1},
        {"chunk_size": 1},
        {"message": "\udcff"},
        {"index": PARENTS[0]},
        {"parents": (NULL_ID,)},
        {"message": "x" * MAX_COMMIT},
    ],
)
def test_a_writer_is_refused_what_a_reader_would_not_take(change: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        dataclasses.replace(SOUND, **change).encode()


def test_chunk_sizes() -> None:
    for bits in range(16, 27):
        assert check_chunk_size(1 << bits) == 1 << bits
    for size in (0, -65536, 1, 32768, 65537, 3 << 16, 1 << 27):
        with pytest.raises(UsageError, match="take a power of two from 64K to 64M"):
            check_chunk_size(size)


def test_now() -> None:
    assert Commit.decode(dataclasses.replace(SOUND, time=now()).encode())

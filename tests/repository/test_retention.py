"""Retention: what rules keep, that it stays reachable, and that the rest is given up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from horcrux_nbd.errors import NotFound, UsageError
from horcrux_nbd.names import Version
from horcrux_nbd.repository.commits import Commit
from horcrux_nbd.repository.objects import NULL_ID, Kind
from horcrux_nbd.repository.removal import Collector
from horcrux_nbd.repository.repository import Repository
from horcrux_nbd.repository.retention import Rules, branch_of, kept_tag, select
from horcrux_nbd.repository.verify import verify
from horcrux_nbd.repository.writer import ObjectWriter, publish_commit, write_index

from .images import CHUNK, content, repository_in
from .memory_store import MemoryStore


def add(repository: Repository, day: int, hour: int = 3, branch: str = "main") -> bytes:
    """A version of January (or later) `day` 2026, with a chunk that only it has."""
    head = repository.refs.head("A", branch)
    parent = head.commit if head else None
    month, day = 1 + (day - 1) // 28, 1 + (day - 1) % 28
    time = f"2026-{month:02}-{day:02}T{hour:02}:00:00Z"
    commit = Commit("A", 4 * CHUNK, CHUNK, NULL_ID, (parent,) if parent else (), "T", time)
    with ObjectWriter(repository) as writer:
        oid = writer.submit(Kind.CHUNK, content(f"{branch} {time}")).result()
        shared = writer.submit(Kind.CHUNK, content("shared")).result()
        root = write_index(writer, None, commit.levels, [(0, shared), (1, oid)])
        record = publish_commit(writer, replace(commit, index=root), branch, parent, "test")
    assert record.commit is not None
    return record.commit


def collect(repository: Repository, rules: Rules, **more: object) -> Collector:
    collector = Collector(repository, **more)  # type: ignore[arg-type]
    collector.run(rules, grace=False)
    assert verify(repository.store, data=True).ok
    assert not collector.plan(rules).unreachable
    return collector


def there(repository: Repository, line: list[bytes]) -> list[int]:
    return [
        n
        for n, oid in enumerate(line)
        if repository.store.exists(f"objects/{oid.hex()[:2]}/{oid.hex()}")
    ]


@pytest.fixture
def repository() -> Repository:
    return repository_in(MemoryStore())


def test_rules() -> None:
    times = ["2026-01-12T09", "2026-01-12T01", "2026-01-11T23", "2026-01-05T10", "2025-12-31T10"]
    line = {
        bytes([n]): Commit("A", 0, CHUNK, NULL_ID, time=f"{time}:00:00Z")
        for n, time in enumerate(times)
    }

    def kept(**rules: Any) -> str:
        return "".join(str(oid[0]) for oid in sorted(select(line, Rules(**rules))))

    assert kept(last=2) == "01"
    assert kept(last=99) == "01234"
    assert kept(daily=2) == "02"
    assert kept(daily=9) == "0234"
    assert kept(weekly=2) == "02"  # ISO weeks begin on Monday, the 12th
    assert kept(weekly=3) == "024"
    assert kept(last=1, daily=1, weekly=3) == "024"
    with pytest.raises(UsageError, match="keep 0"):
        Rules(last=0)


def test_keep_last(repository: Repository) -> None:
    line = [add(repository, day) for day in range(1, 8)]
    plan = Collector(repository).plan(Rules(last=3), versions=True)
    assert list(plan.choice.dropped) == line[3::-1]
    assert len(plan.unreachable) == 3 * 4  # commit, node, chunk of each
    sizes = {oid: version.only_objects for oid, version in plan.versions.items()}
    assert sizes == dict.fromkeys(reversed(line), 3)
    assert there(repository, line) == list(range(7)), "a plan changes nothing"
    collect(repository, Rules(last=3))
    assert there(repository, line) == [4, 5, 6]
    assert repository.resolve(Version("A", "main~2")).id == line[4]
    with pytest.raises(NotFound, match="was removed"):
        repository.resolve(Version("A", "main~3"))


def test_what_is_kept_below_a_gap_has_a_tag(repository: Repository) -> None:
    """And as time goes on it is let go by the same rules."""
    rules = Rules(last=2, weekly=3)
    line: list[bytes] = []
    for day in range(1, 29):
        line.append(add(repository, day))
        collect(repository, rules)
    # 2026-01-28 is a Wednesday: the newest of its week, of the one to Sunday 25, of that to 18.
    assert there(repository, line) == [17, 24, 26, 27]
    tags = repository.refs.tags("A")
    assert tags == sorted(kept_tag("main", line[n]) for n in (17, 24))
    tag = repository.refs.tag("A", tags[0])
    assert tag is not None
    assert branch_of(tag) == "main"


def test_branches_tags_and_pinned_versions_stay(repository: Repository) -> None:
    line = [add(repository, day) for day in range(1, 8)]
    repository.refs.make_tag("A", "v1", line[1], author="", message="")
    repository.refs.move("A", "old", line[2], None, author="", why="")
    rules = Rules(last=1)
    collect(repository, rules, pinned={line[4]: "volume v"})
    assert there(repository, line) == [1, 2, 4, 6]
    collect(repository, rules)
    assert there(repository, line) == [1, 2, 6]
    collect(repository, Rules(last=1, tags=False))
    assert there(repository, line) == [2, 6]
    assert repository.refs.tags("A") == []


def test_a_pinned_version_that_no_ref_reaches_stays(repository: Repository) -> None:
    line = [add(repository, day) for day in (1, 2)]
    repository.refs.move("A", "main", line[0], line[1], author="", why="reset")
    collect(repository, Rules(), pinned={line[1]: "volume v"})
    assert there(repository, line) == [0, 1]
    collect(repository, Rules())
    assert there(repository, line) == [0]


def test_one_image(repository: Repository) -> None:
    line = [add(repository, day) for day in range(1, 4)]
    with pytest.raises(NotFound):
        Collector(repository).run(Rules(last=1), "B")
    repository.refs.make_tag("B", "v", line[1], author="", message="")
    Collector(repository).run(Rules(last=1), "A", grace=False)
    assert there(repository, line) == [0, 1, 2]  # B has no rules, and what it has is a line of A
    Collector(repository).run(Rules(last=1), grace=False)
    assert there(repository, line) == [1, 2]


def test_without_rules_no_version_goes(repository: Repository) -> None:
    line = [add(repository, day) for day in range(1, 4)]
    assert Collector(repository).plan(Rules()).choice.nothing
    collect(repository, Rules())
    assert there(repository, line) == [0, 1, 2]

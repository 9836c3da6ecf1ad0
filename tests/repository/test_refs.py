"""Refs: one writer wins each number, whatever the store does to its answers."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from horcrux_nbd.chunkstore import open_store
from horcrux_nbd.chunkstore.retry import RetryStore
from horcrux_nbd.errors import Busy, Damaged, NotFound, StoreUnavailable, UsageError
from horcrux_nbd.repository.objects import Kind, object_id
from horcrux_nbd.repository.records import encode_record
from horcrux_nbd.repository.refs import BranchMoved, Refs, suggest
from horcrux_nbd.repository.sweeps import announcement

from ..chunkstore.faulty import Fails, LosesAnswers
from .memory_store import MemoryStore

PROJECT = Path(__file__).resolve().parents[2]
WHO = {"author": "me <m@e>", "why": "because"}


def commit_id(number: int) -> bytes:
    return object_id(Kind.COMMIT, b"%d" % number)


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def refs(store: MemoryStore) -> Refs:
    return Refs(store)


def test_a_branch_is_a_series(refs: Refs, store: MemoryStore) -> None:
    assert refs.head("A", "main") is None
    assert refs.images() == []
    previous = None
    for number in range(1, 13):
        record = refs.move("A", "main", commit_id(number), previous, **WHO)
        assert record.number == number
        assert refs.head("A", "main") == record
        previous = record.commit
    assert [r.number for r in refs.records("A", "main")] == list(range(12, 0, -1))
    assert [r.commit for r in refs.records("A", "main")] == [commit_id(n) for n in range(12, 0, -1)]
    assert refs.images() == ["A"]
    assert refs.branches("A") == ["main"]
    assert min(store.objects) == "refs/A/heads/main/99999999999999999987"  # the newest is first
    assert all(call[0] == "exclusive" for call in store.calls)


def test_the_head_costs_one_listing_and_one_read(refs: Refs, store: MemoryStore) -> None:
    previous = None
    for number in range(30):
        previous = refs.move("A", "main", commit_id(number), previous, **WHO).commit
    store.reads.clear()
    refs.head("A", "main")
    assert [what for what, _ in store.reads] == ["list", "get"]
    store.reads.clear()
    assert refs.head("A", "other") is None
    assert [what for what, _ in store.reads] == ["list"]


def test_deleted_and_made_again(refs: Refs) -> None:
    refs.move("A", "b", commit_id(1), None, **WHO)
    gone = refs.move("A", "b", None, commit_id(1), **WHO)
    assert gone.commit is None
    assert refs.head("A", "b") == gone
    assert refs.branches("A") == ["b"]
    assert refs.heads("A") == {}
    assert refs.known("A") == []
    with pytest.raises(
        BranchMoved, match=r"was deleted by me <m@e> at .* choose another"
    ) as caught:
        refs.move("A", "b", commit_id(2), commit_id(1), **WHO)
    assert caught.value.record == gone
    again = refs.move("A", "b", commit_id(2), None, **WHO)
    assert again.number == 3
    assert refs.heads("A") == {"b": again}


def test_who_comes_too_late_learns_who_was_first(refs: Refs) -> None:
    refs.move("A", "main", commit_id(1), None, author="Ann <a@x>", why="push: prices")
    for expected in (None, commit_id(2)):
        with pytest.raises(BranchMoved) as caught:
            refs.move("A", "main", commit_id(3), expected, **WHO)
        message = str(caught.value)
        assert "Ann <a@x>" in message
        assert "push: prices" in message
        assert commit_id(1).hex()[:12] in message
        assert caught.value.record
        assert caught.value.record.commit == commit_id(1)
    with pytest.raises(BranchMoved, match="there is no branch 'x'"):
        refs.move("A", "x", commit_id(3), commit_id(2), **WHO)


def test_a_long_reason_is_refused_before_anything_moves(refs: Refs, store: MemoryStore) -> None:
    with pytest.raises(UsageError, match="shorten"):
        refs.move("A", "main", commit_id(1), None, author="", why="x" * 70_000)
    with pytest.raises(UsageError, match="no valid text"):
        refs.move("A", "main", commit_id(1), None, author="\udcff", why="")
    assert store.calls == []


@pytest.mark.parametrize("bad", ["../x", "", "a/b", ".x", "x" * 101, "a b"])
def test_names(refs: Refs, store: MemoryStore, bad: str) -> None:
    for operation in (
        lambda: refs.head(bad, "main"),
        lambda: refs.head("A", bad),
        lambda: refs.tag(bad, "t"),
        lambda: refs.tag("A", bad),
        lambda: refs.branches(bad),
        lambda: refs.tags(bad),
        lambda: refs.move(bad, "main", commit_id(1), None, **WHO),
        lambda: refs.move("A", bad, commit_id(1), None, **WHO),
        lambda: refs.make_tag("A", bad, commit_id(1), author="", message=""),
        lambda: refs.delete_tag("A", bad),
        lambda: refs.require_image(bad),
    ):
        with pytest.raises(UsageError, match="cannot name"):
            operation()
    assert store.calls == store.reads == []


# ---- races and lost answers

RACER = """
import sys
from horcrux_nbd.chunkstore import open_store
from horcrux_nbd.repository.objects import Kind, object_id
from horcrux_nbd.repository.refs import BranchMoved, Refs
refs = Refs(open_store(sys.argv[1]))
me, rounds = sys.argv[2], int(sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
for turn in range(rounds):
    mine = object_id(Kind.COMMIT, f"{me}-{turn}".encode())
    head = refs.head("A", "main")
    try:
        record = refs.move("A", "main", mine, head.commit if head else None, author=me, why="race")
        print(record.number, mine.hex(), flush=True)
    except BranchMoved as moved:
        assert moved.record is not None
"""


def test_twenty_processes_race_for_one_branch(tmp_path: Path) -> None:
    """Each number has one winner, who knows it, and nobody else believes to have won."""
    url = str(tmp_path / "store")
    with open_store(url, create=True) as store:
        racers = [
            subprocess.Popen(
                [sys.executable, "-c", RACER, url, f"racer{who}", "10"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=PROJECT,
            )
            for who in range(20)
        ]
        try:
            for racer in racers:
                assert racer.stdout
                assert racer.stdout.readline() == "ready\n"
            won: dict[int, str] = {}
            for racer in racers:
                assert racer.stdin
                racer.stdin.write("go\n")
                racer.stdin.flush()
            for racer in racers:
                output, _ = racer.communicate(timeout=60)
                assert racer.returncode == 0
                for line in output.splitlines():
                    number, commit = line.split()
                    assert int(number) not in won, "two winners"
                    won[int(number)] = commit
        finally:
            for racer in racers:
                racer.kill()
                racer.wait(10)
        records = list(Refs(store).records("A", "main"))
    assert {r.number: r.commit.hex() for r in records if r.commit} == won
    assert sorted(won) == list(range(1, len(won) + 1))
    assert len(won) >= 10


def test_a_lost_answer_is_found_out(store: MemoryStore) -> None:
    """The store did it and the connection broke: the token in the record tells that we won."""
    flaky = LosesAnswers(store, matching="put refs/")
    record = Refs(flaky).move("A", "main", commit_id(1), None, **WHO)
    assert flaky.failures == 1
    assert Refs(store).head("A", "main") == record


def test_a_lost_answer_behind_retries(store: MemoryStore) -> None:
    flaky = LosesAnswers(store, times=3, matching="put refs/")
    retrying = RetryStore(flaky, 5, first_pause=0.001, longest_pause=0.002)
    record = Refs(retrying).move("A", "main", commit_id(1), None, **WHO)
    assert flaky.failures >= 2
    assert list(Refs(store).records("A", "main")) == [record]


def test_a_store_that_stays_away(store: MemoryStore) -> None:
    """It did it, and is not there to be asked: the error says unavailable, the truth comes out."""
    flaky = LosesAnswers(store, times=None, matching="put refs/")
    away = Fails(flaky, times=None, matching="get refs/")
    with pytest.raises(StoreUnavailable):
        Refs(away).move("A", "main", commit_id(1), None, **WHO)
    head = Refs(store).head("A", "main")
    assert head
    assert head.commit == commit_id(1)


def test_an_operation_that_failed_and_did_nothing(store: MemoryStore) -> None:
    flaky = Fails(store, matching="put refs/")
    with pytest.raises(StoreUnavailable):
        Refs(flaky).move("A", "main", commit_id(1), None, **WHO)
    assert Refs(store).head("A", "main") is None
    assert Refs(flaky).move("A", "main", commit_id(1), None, **WHO).number == 1


class SlipsIn(MemoryStore):
    """Somebody else moves the branch between our look and our move, once."""

    def __init__(self, loses_answer: bool) -> None:
        super().__init__()
        self.loses_answer, self.armed = loses_answer, True

    def put_exclusive(self, key: str, data: bytes) -> None:
        if self.armed and key.startswith("refs/"):
            self.armed = False
            Refs(self).move("A", "main", commit_id(9), None, author="other", why="faster")
            if self.loses_answer:
                raise StoreUnavailable("test: no answer")
        super().put_exclusive(key, data)


@pytest.mark.parametrize("loses_answer", [False, True])
def test_another_writer_slips_in(loses_answer: bool) -> None:
    store = SlipsIn(loses_answer)
    with pytest.raises(BranchMoved, match="moved by other"):
        Refs(store).move("A", "main", commit_id(1), None, **WHO)
    records = list(Refs(store).records("A", "main"))
    assert [(r.number, r.commit, r.author) for r in records] == [(1, commit_id(9), "other")]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 6), st.booleans()), max_size=30))
def test_against_a_list(moves: list[tuple[int, int, bool]]) -> None:
    """Any writers with any expectations: a move succeeds if and only if the branch is as expected,
    and the records are the moves that succeeded."""
    refs = Refs(MemoryStore())
    history: list[bytes | None] = []
    for expected, new, right in moves:
        current = history[-1] if history else None
        wanted = current if right else (commit_id(expected) if expected else None)
        target = commit_id(new) if new else None
        try:
            refs.move("A", "main", target, wanted, **WHO)
        except BranchMoved:
            assert wanted != current
        else:
            assert wanted == current
            history.append(target)
    assert [r.commit for r in refs.records("A", "main")] == history[::-1]


# ---- tags


def test_tags(refs: Refs) -> None:
    assert refs.tag("A", "v1") is None
    refs.make_tag("A", "v1", commit_id(1), author="me", message="first")
    tag = refs.tag("A", "v1")
    assert tag
    assert (tag.commit, tag.author, tag.message) == (commit_id(1), "me", "first")
    refs.make_tag("A", "v1", commit_id(1), author="you", message="again")  # as a retry would
    assert refs.tag("A", "v1") == tag
    with pytest.raises(UsageError, match="'v1' of A exists already"):
        refs.make_tag("A", "v1", commit_id(2), author="", message="")
    refs.make_tag("A", "v2", commit_id(2), author="", message="")
    assert refs.tags("A") == ["v1", "v2"]
    refs.delete_tag("A", "v1")
    assert refs.tags("A") == ["v2"]
    with pytest.raises(NotFound, match="no tag 'v1': there is v2"):
        refs.delete_tag("A", "v1")


def test_require_image(refs: Refs) -> None:
    with pytest.raises(NotFound, match=r"no image 'AMC' \(there is none\)"):
        refs.require_image("AMC")
    refs.move("AMCC", "main", commit_id(1), None, **WHO)
    refs.require_image("AMCC")
    with pytest.raises(NotFound, match="no image 'AMC': did you mean AMCC"):
        refs.require_image("AMC")


def test_suggest() -> None:
    assert suggest("x", []) == " (there is none)"
    assert suggest("mian", ["main", "other"]) == ": did you mean main?"
    assert suggest("q", ["a", "b"]) == ": there is a, b"
    assert suggest("q", [f"n{i:02}" for i in range(20)]).endswith("n07 and 12 more")


def test_shallow(refs: Refs, store: MemoryStore) -> None:
    assert not refs.is_shallow("A", commit_id(1))
    store.put(f"refs/A/shallow/{commit_id(1).hex()}", b"{}")
    assert refs.is_shallow("A", commit_id(1))
    assert not refs.is_shallow("B", commit_id(1))


def test_no_ref_is_made_during_a_removal(refs: Refs, store: MemoryStore) -> None:
    refs.move("A", "main", commit_id(1), None, **WHO)
    store.objects[announcement(time.time() + 1800, "0")] = b""
    with pytest.raises(Busy, match="are being removed"):
        refs.move("A", "main", commit_id(2), commit_id(1), **WHO)
    with pytest.raises(Busy, match="are being removed"):
        refs.make_tag("A", "v1", commit_id(1), author="", message="")
    assert refs.move("A", "main", None, commit_id(1), **WHO).number == 2  # deleting needs nothing


# ---- damage, and what does not belong


@pytest.mark.parametrize("strays", [1, 7, 8, 30])
def test_what_copying_programs_leave_is_passed_over(
    refs: Refs, store: MemoryStore, strays: int
) -> None:
    refs.move("A", "main", commit_id(1), None, **WHO)
    head = refs.move("A", "main", commit_id(2), commit_id(1), **WHO)
    for number in range(strays):
        store.objects[f"refs/A/heads/main/9999999999999999999{number % 8}.{number}.partial"] = b"x"
        store.objects[f"refs/A/heads/main/0{number}"] = b"x"
    assert refs.head("A", "main") == head
    assert [r.number for r in refs.records("A", "main")] == [2, 1]
    assert refs.move("A", "main", commit_id(3), commit_id(2), **WHO).number == 3


def newest(store: MemoryStore) -> str:
    return min(key for key in store.objects if "/heads/main/" in key)


def test_every_bit_of_a_record(refs: Refs, store: MemoryStore) -> None:
    record = refs.move("A", "main", commit_id(1), None, **WHO)
    key = newest(store)
    sound = store.objects[key]
    found = 0
    for bit in range(len(sound) * 8):
        bad = bytearray(sound)
        bad[bit >> 3] ^= 1 << (bit & 7)
        store.objects[key] = bytes(bad)
        try:
            assert refs.head("A", "main") == record  # one that changes a blank, say
        except Damaged:
            found += 1
    assert found > len(sound) * 7
    for length in range(len(sound) - 1):
        store.objects[key] = sound[:length]
        with pytest.raises(Damaged):
            refs.head("A", "main")


def test_a_valid_record_in_the_wrong_place(refs: Refs, store: MemoryStore) -> None:
    """Swapped with one of another branch, or an old one put back as the newest."""
    refs.move("A", "main", commit_id(1), None, **WHO)
    refs.move("A", "other", commit_id(2), None, **WHO)
    refs.make_tag("A", "t1", commit_id(1), author="", message="")
    refs.make_tag("A", "t2", commit_id(2), author="", message="")
    for a, b in (("heads/main/99999999999999999998", "heads/other/99999999999999999998"),
                 ("tags/t1", "tags/t2")):  # fmt: skip
        a, b = f"refs/A/{a}", f"refs/A/{b}"
        store.objects[a], store.objects[b] = store.objects[b], store.objects[a]
    for read in (lambda: refs.head("A", "main"), lambda: refs.tag("A", "t1")):
        with pytest.raises(Damaged, match="it belongs at"):
            read()
    store.objects["refs/A/heads/other/99999999999999999997"] = store.objects[
        "refs/A/heads/main/99999999999999999998"
    ]
    with pytest.raises(Damaged, match="it belongs at"):
        refs.head("A", "other")


@pytest.mark.parametrize(
    "change",
    [
        {"commit": "00" * 32},
        {"commit": object_id(Kind.CHUNK, b"").hex()},
        {"commit": "xyz"},
        {"commit": 5},
        {"author": None},
        {"token": 7},
        {"why": ["x"]},
    ],
)
def test_members_that_cannot_be(refs: Refs, store: MemoryStore, change: dict[str, object]) -> None:
    refs.move("A", "main", commit_id(1), None, **WHO)
    key = newest(store)
    value = json.loads(store.objects[key])
    del value["check"], value["version"]
    store.objects[key] = encode_record(value | change)
    with pytest.raises(Damaged, match="ref refs/A/heads/main/"):
        refs.head("A", "main")
    for member in value:
        less = {name: value[name] for name in value if name not in (member, "number")}
        if member != "number":
            store.objects[key] = encode_record(less)
            with pytest.raises(Damaged):
                refs.head("A", "main")


def test_a_tag_without_a_commit(refs: Refs, store: MemoryStore) -> None:
    key = "refs/A/tags/t"
    members = {"author": "", "time": "", "message": "", "commit": None, "key": key}
    store.objects[key] = encode_record(members)
    with pytest.raises(Damaged, match="names no commit"):
        refs.tag("A", "t")
    refs.delete_tag("A", "t")  # which is how to get rid of it
    assert refs.tags("A") == []


def test_a_huge_record_is_not_read_whole(refs: Refs, store: MemoryStore) -> None:
    refs.move("A", "main", commit_id(1), None, **WHO)
    key = newest(store)
    store.objects[key] = store.objects[key] + b" " * 10_000_000
    asked: list[int | None] = []
    real = store.get

    def get(key: str, offset: int = 0, length: int | None = None) -> bytes:
        asked.append(length)
        return real(key, offset, length)

    store.get = get  # type: ignore[method-assign]
    with pytest.raises(Damaged, match="over 64 KiB"):
        refs.head("A", "main")
    assert asked == [(64 << 10) + 1]

"""Retention: which versions of an image stay, by rules such as "the last ten, and one a week".

Versions are a chain, and a dropped one breaks it. So a version that stays and that no branch or
tag reaches any more gets a tag of its own, `kept-BRANCH-ID`, and the one whose parents go is noted
as shallow (docs/format.md, "Removal"). That is all: what no ref reaches then is for `removal`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from ..errors import Busy, UsageError
from ..names import MAX_NAME
from .commits import Commit
from .marking import Roots, history
from .refs import TagRecord
from .repository import Repository
from .sweeps import Sweeps

KEPT = "kept by retention, of branch "  # the message of a tag that `apply` made, and the branch
_PREFIX = "kept-"
_DIGITS = 12


@dataclass(frozen=True)
class Rules:
    """What stays of each branch: its newest versions, and the newest of each day and week (UTC)
    that has any, so many days and weeks back. None: no such rule.
    """

    last: int | None = None
    daily: int | None = None
    weekly: int | None = None
    tags: bool = True  # tagged versions stay; else tags go with the versions that no rule keeps

    def __post_init__(self) -> None:
        for count in (self.last, self.daily, self.weekly):
            if count is not None and count < 1:
                raise UsageError(f"keep {count} is no rule: give a number from 1 on")

    @property
    def any(self) -> bool:
        return any(count is not None for count in (self.last, self.daily, self.weekly))


@dataclass
class Choice:
    """What retention keeps and drops. Versions are commit ids."""

    kept: dict[bytes, list[str]] = field(default_factory=dict)  # and why
    dropped: dict[bytes, Commit] = field(default_factory=dict)  # children first
    tags: dict[tuple[str, str], bytes] = field(default_factory=dict)  # to be made
    old_tags: list[tuple[str, str]] = field(default_factory=list)  # to be deleted
    shallow: list[tuple[str, bytes]] = field(default_factory=list)  # (image, commit) to be noted
    branches: dict[bytes, str] = field(default_factory=dict)  # for which a rule keeps a version

    @property
    def nothing(self) -> bool:
        """Whether it is so already."""
        return not (self.tags or self.old_tags or self.shallow)


def kept_tag(branch: str, oid: bytes) -> str:
    """The name of the tag that keeps a version whose branch does not reach it any more."""
    room = MAX_NAME - len(_PREFIX) - 1 - _DIGITS
    return f"{_PREFIX}{branch[:room]}-{oid.hex()[:_DIGITS]}"


def branch_of(tag: TagRecord) -> str | None:
    """The branch for which retention made a tag; None for a tag of somebody's own."""
    return tag.message.removeprefix(KEPT) if tag.message.startswith(KEPT) else None


def select(line: Mapping[bytes, Commit], rules: Rules) -> dict[bytes, list[str]]:
    """The versions of `line` (newest first) that rules keep, and why."""
    kept: dict[bytes, list[str]] = {}
    for oid in list(line)[: rules.last or 0]:
        kept.setdefault(oid, []).append("last")
    buckets: tuple[tuple[str, int | None, Callable[[datetime], tuple[int, ...]]], ...] = (
        ("daily", rules.daily, lambda when: (when.year, when.month, when.day)),
        ("weekly", rules.weekly, lambda when: tuple(when.isocalendar())[:2]),
    )
    for why, count, bucket in buckets:
        seen: set[tuple[int, ...]] = set()
        for oid, commit in line.items():
            when = bucket(datetime.fromisoformat(commit.time).astimezone(UTC))
            if when not in seen and len(seen) < (count or 0):
                seen.add(when)
                kept.setdefault(oid, []).append(why)
    return kept


def choose(
    roots: Roots,
    commits: Mapping[bytes, Commit],
    rules: Rules,
    *,
    image: str | None = None,
    pinned: Mapping[bytes, str] | None = None,
) -> Choice:
    """What `rules` keep of each image, or of one. `commits` are those that `roots` reach.

    The head of each branch always stays; so do `pinned` versions (and why), and, unless
    `rules.tags` is off, those with a tag. Of images without rules everything stays.
    """
    choice = Choice()
    for (name, branch), head in roots.heads.items():
        line = history(commits.get, [head], roots.shallow)
        if not _ruled(name, image, rules):
            _keep_all(choice, line)
            continue
        first = dict.fromkeys(_first_parents(head, commits, roots))
        older = {
            tag.commit: None
            for (where, _), tag in roots.tags.items()
            if where == name and branch_of(tag) == branch
        }
        apart = sorted(older.keys() - first.keys(), key=lambda oid: commits[oid].time, reverse=True)
        ordered = {oid: commits[oid] for oid in [*first, *apart]}
        choice.kept.setdefault(head, []).append(f"branch {branch}")
        for oid, reasons in select(ordered, rules).items():
            choice.kept.setdefault(oid, []).extend(reasons)
            choice.branches.setdefault(oid, branch)
    for (name, label), tag in roots.tags.items():
        if not _ruled(name, image, rules):
            _keep_all(choice, history(commits.get, [tag.commit], roots.shallow))
        elif branch_of(tag) is None and rules.tags:
            choice.kept.setdefault(tag.commit, []).append(f"tag {label}")
    for oid, why in (pinned or {}).items():
        if oid in commits:
            choice.kept.setdefault(oid, []).append(why)
            choice.branches.setdefault(oid, "")
    choice.dropped = {oid: made for oid, made in commits.items() if oid not in choice.kept}
    _settle(choice, roots, commits)
    return choice


def _ruled(name: str, image: str | None, rules: Rules) -> bool:
    return rules.any and image in (None, name)


def _keep_all(choice: Choice, line: Mapping[bytes, Commit]) -> None:
    for oid in line:
        choice.kept.setdefault(oid, [])


def _first_parents(head: bytes, commits: Mapping[bytes, Commit], roots: Roots) -> list[bytes]:
    line = [head]
    while line[-1] not in roots.shallow and commits[line[-1]].parents:
        line.append(commits[line[-1]].parents[0])
    return line


def _settle(choice: Choice, roots: Roots, commits: Mapping[bytes, Commit]) -> None:
    """Which tags and notes it takes for `kept` to be all that is reached."""
    for where, tag in roots.tags.items():
        if tag.commit not in choice.kept:
            choice.old_tags.append(where)
    for oid in choice.kept:
        commit = commits[oid]
        if oid not in roots.shallow and any(p in choice.dropped for p in commit.parents):
            choice.shallow.append((commit.image, oid))
    cut = {oid for _, oid in choice.shallow} | set(roots.shallow)
    reached = history(commits.get, roots.heads.values(), cut)
    # Also where another tag reaches it: that one may go before the rule lets go of this.
    for oid, branch in choice.branches.items():
        where = commits[oid].image, kept_tag(branch or "version", oid)
        if oid not in reached and where not in roots.tags:
            choice.tags[where] = oid


def apply(repository: Repository, choice: Choice, sweeps: Sweeps, *, author: str, why: str) -> None:
    """Make it so. Nothing is removed; broken off anywhere, less is dropped and all that stays is
    reached. `sweeps` was made before the refs were read. Raises Busy during a removal.
    """
    if sweeps.must_look_again():
        raise Busy(f"{repository.url}: a removal came in between: run it again")
    refs = repository.refs
    for (image, name), oid in choice.tags.items():
        message = KEPT + choice.branches.get(oid, "")
        refs.make_tag(image, name, oid, author=author, message=message)
    for image, oid in choice.shallow:
        refs.make_shallow(image, oid, author=author, why=why)
    for image, name in choice.old_tags:
        repository.store.delete(f"refs/{image}/tags/{name}")

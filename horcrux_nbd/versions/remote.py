"""Fetch and pull: what others pushed."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from ..errors import NotFound, UsageError
from ..repository.commits import Commit, now
from ..repository.refs import BranchRecord, suggest
from ..volume.state import Seen
from ..volume.volume import STORE_LIMIT
from . import move
from .history import Commits
from .move import Changes, Moved
from .push import Diverged
from .session import Session, follows_branch

MOST = 10_000  # versions counted; beyond, the count says so


@dataclass(frozen=True)
class Fetched:
    """How a volume and its branch in the repository are to each other.

    `new` are versions that only the branch has, `own` those that only the volume has, newest first;
    `fork` is the newest that both have.
    """

    branch: str
    record: BranchRecord
    new: tuple[tuple[bytes, Commit], ...]
    own: tuple[tuple[bytes, Commit], ...]
    fork: bytes | None

    @property
    def diverged(self) -> bool:
        return bool(self.new and self.own)


def fetch(name: str, *, limit: float = STORE_LIMIT) -> Fetched:
    """Look what the volume's branch has now, and bring its new versions' commits here (no data).

    Changes nothing of the volume but what it knows of the branch. Raises StoreError, NotFound.
    """
    with Session(name, limit) as session:
        return _fetch(session)


def _fetch(session: Session) -> Fetched:
    state, repository = session.state, session.repository
    if not follows_branch(state):
        raise UsageError(
            f"volume {session.name} follows no branch: `horcrux-cli checkout {session.name} "
            "BRANCH` first"
        )
    record = repository.refs.head(state.image, state.ref)
    if record is None or record.commit is None:
        why = "there is no branch" if record is None else f"{record.author} deleted branch"
        raise NotFound(
            f"{why} {state.ref!r} of {state.image} in {state.repository}"
            f"{suggest(state.ref, list(repository.refs.heads(state.image)))}"
        )
    own = session.own_commits()
    line = {oid for oid, _ in own} | {session.base}
    if state.upstream is not None:
        line.add(bytes.fromhex(state.upstream))
    commits = Commits(repository, session.cache, session.local, keep=True)
    new, fork = [], None
    for oid, commit in itertools.islice(commits.line(record.commit, state.ref), MOST):
        if oid in line:
            fork = oid
            break
        new.append((oid, commit))
    if fork is None:
        fork, new = _common(session, commits, new)
    session.save(
        seen=Seen(record.commit.hex(), record.author, record.time, record.why, now()),
    )
    return Fetched(state.ref, record, tuple(new), _since(own, fork), fork)


def _common(
    session: Session, commits: Commits, new: list[tuple[bytes, Commit]]
) -> tuple[bytes | None, list[tuple[bytes, Commit]]]:
    """The newest version of the volume's line that is among `new`, and those above it."""
    numbers = {oid: number for number, (oid, _) in enumerate(new)}
    for oid, _ in itertools.islice(commits.line(session.base), MOST):
        if oid in numbers:
            return oid, new[: numbers[oid]]
    return None, new


def _since(own: list[tuple[bytes, Commit]], fork: bytes | None) -> tuple[tuple[bytes, Commit], ...]:
    return tuple(itertools.takewhile(lambda found: found[0] != fork, own))


def pull(
    name: str,
    *,
    changes: Changes = Changes.REFUSE,
    remount: bool = False,
    limit: float = STORE_LIMIT,
) -> tuple[Fetched, Moved | None]:
    """`fetch`, then lay the volume on the branch's newest version, if it has none of its own.

    Raises Diverged, which says what both have, and nothing has changed then; and as `checkout`.
    """
    fetched = fetch(name, limit=limit)
    if not fetched.new:
        return fetched, None
    if fetched.own:
        raise Diverged(account(name, fetched), fetched.record)
    assert fetched.record.commit is not None
    moved = move.forward(name, fetched.record.commit, changes=changes, remount=remount)
    return fetched, moved


def account(name: str, fetched: Fetched) -> str:
    """One line that says what diverged, and what can be done."""
    mine, theirs = fetched.own, fetched.new
    newest = theirs[0][1]
    return (
        f"volume {name} and branch {fetched.branch!r} have diverged since "
        f"{fetched.fork.hex()[:12] if fetched.fork else 'the beginning'}: the volume has "
        f"{_versions(len(mine))} of its own ({mine[0][1].message!r}), the branch "
        f"{_versions(len(theirs))} (the newest by {newest.author}, {newest.message!r}). Disks "
        f"cannot be merged: `horcrux-cli push {name} --branch NAME` keeps both, `horcrux-cli reset "
        f"{name} origin/{fetched.branch}` takes theirs"
    )


def _versions(count: int) -> str:
    return f"{count} version{'' if count == 1 else 's'}"

"""Where a volume is: how it and its branch are to each other, told without asking the store."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from ..volume.state import Seen
from .session import Session, follows_branch

MOST = 1000  # versions counted


@dataclass(frozen=True)
class Position:
    """`ahead` commits were never pushed. `behind` is what the branch had when it was looked at
    last, None where that is not known. `branch` is None where the volume follows none.
    """

    branch: str | None
    ahead: int
    behind: int | None
    seen: Seen | None
    pending: str | None  # message of a commit that was broken off
    stashes: int
    left: tuple[str, ...]  # branches that were left with commits that were never pushed
    kept: int  # commits that were never pushed and that no branch of the volume has


def position(name: str) -> Position:
    """Where the volume is. Takes no lock. Raises NotFound, Damaged."""
    with Session(name, lock=False) as session:
        state = session.state
        own = session.own_commits()
        kept = {
            oid
            for line in state.kept
            for oid, _ in session.local.commits(bytes.fromhex(line.tip), line.upstream)
        }
        return Position(
            state.ref if follows_branch(state) else None,
            len(own),
            _behind(session, {oid.hex() for oid, _ in own} | {state.base, state.upstream or ""}),
            state.seen,
            state.pending.message if state.pending is not None else None,
            len(state.stash),
            tuple(sorted(state.heads)),
            len(kept - {oid for oid, _ in own}),
        )


def _behind(session: Session, line: set[str]) -> int | None:
    """How many versions are above the volume's line on the branch as it was last seen."""
    seen = session.state.seen
    if seen is None:
        return 0 if session.state.upstream is not None else None
    oid: bytes | None = bytes.fromhex(seen.commit)
    for count in itertools.islice(itertools.count(), MOST):
        if oid is None or oid.hex() in line:
            return count
        commit = session.local.commit(oid)  # fetched with the rest, unless the cache let it go
        if commit is None:
            return None
        oid = commit.parents[0] if commit.parents else None
    return MOST

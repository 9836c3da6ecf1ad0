"""Versions of a volume: commit, push, and going to another one.

A commit is local first. It freezes what was written in milliseconds, then packs it beside the
running workload; a push brings to the store what it lacks and moves the branch. Each step leaves
the state before or after it, and one that was broken off is taken up by the next.
"""

from .branches import check_free, delete_branch, make_branch, tag_volumes
from .commit import Committed, NothingToCommit, commit
from .move import (
    Changes,
    HasChanges,
    Moved,
    checkout,
    expire,
    reset,
    revert,
    stash,
    stash_drop,
    stash_pop,
    stashes,
)
from .pin import Pinned, pin, pinned_bytes
from .position import Position, position
from .push import Diverged, Pushed, push
from .remote import Fetched, fetch, pull
from .session import ServerGone, Session

__all__ = [
    "Changes",
    "Committed",
    "Diverged",
    "Fetched",
    "HasChanges",
    "Moved",
    "NothingToCommit",
    "Pinned",
    "Position",
    "Pushed",
    "ServerGone",
    "Session",
    "check_free",
    "checkout",
    "commit",
    "delete_branch",
    "expire",
    "fetch",
    "make_branch",
    "pin",
    "pinned_bytes",
    "position",
    "pull",
    "push",
    "reset",
    "revert",
    "stash",
    "stash_drop",
    "stash_pop",
    "stashes",
    "tag_volumes",
]

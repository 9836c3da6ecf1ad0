"""Versions of a volume: commit, push, and going to another one.

A commit is local first. It freezes what was written in milliseconds, then packs it beside the
running workload; a push brings to the store what it lacks and moves the branch. Each step leaves
the state before or after it, and one that was broken off is taken up by the next.
"""

from .commit import Committed, NothingToCommit, commit
from .push import Diverged, Pushed, push
from .session import ServerGone, Session

__all__ = [
    "Committed",
    "Diverged",
    "NothingToCommit",
    "Pushed",
    "ServerGone",
    "Session",
    "commit",
    "push",
]

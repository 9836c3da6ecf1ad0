"""What `status` says of a volume's versions."""

from __future__ import annotations

from typing import Any

from ..errors import HorcruxError
from . import output


def versions_line(name: str) -> str:
    """How the volume and its branch are to each other, as it is known without asking the store."""
    from ..versions import position

    try:
        found = position(name)
    except HorcruxError as error:
        return str(error)
    parts = []
    if found.pending is not None:
        parts.append(f"a commit was broken off ({found.pending}): the next command finishes it")
    if found.ahead:
        parts.append(f"{output.plural(found.ahead, 'version')} to push")
    if found.behind:
        parts.append(f"branch {found.branch} has {output.plural(found.behind, 'new version')}")
    if found.branch is None:
        parts.append("on no branch")
    if found.stashes:
        parts.append(f"{found.stashes} in the stash")
    parts += [f"branch {left} was left with versions to push" for left in found.left]
    if found.kept:
        parts.append(f"{output.plural(found.kept, 'version')} kept aside (reflog)")
    when = f" (as of {output.when(found.seen.at)})" if found.seen is not None else ""
    return "; ".join(parts) + when if parts else f"nothing to push{when}"


def versions_json(name: str) -> dict[str, Any]:
    """The same as JSON."""
    from ..versions import position

    try:
        found = position(name)
    except HorcruxError:  # its status says so as well
        return {}
    return {
        "branch": found.branch,
        "ahead": found.ahead,
        "behind": found.behind,
        "seen": found.seen.at if found.seen is not None else None,
        "pending_commit": found.pending,
        "stashes": found.stashes,
        "left_branches": list(found.left),
        "kept_versions": found.kept,
    }

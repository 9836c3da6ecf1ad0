"""What REF means for a volume: its own commits first, then the repository's branches, tags, ids.

HEAD, @        the version that the volume lies on
main           the branch: as this volume has it, if it has commits of its own on it
origin/main    the branch as it is in the repository now
v3, 1f3a9c     a tag; the beginning of an id
…~2, …^        first parents back
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import Damaged, NotFound, UsageError
from ..names import Version, looks_like_id
from ..repository.commits import Commit
from ..repository.objects import ID_SIZE
from .history import Commits
from .session import Session

_REF = re.compile(r"(?P<origin>origin/)?(?P<name>@|[A-Za-z0-9][A-Za-z0-9_.-]{0,99})(?P<steps>.*)")
_STEPS = re.compile(r"(?:~\d{0,9}|\^)*")
_HEAD = ("HEAD", "@")


@dataclass(frozen=True)
class Found:
    """A version that exists. `branch` is set where REF is just a branch's name.

    `upstream` (hex) is the newest commit on its line that the repository has.
    """

    id: bytes
    commit: Commit
    branch: str | None
    upstream: str | None


def find(session: Session, ref: str) -> Found:
    """The version that `ref` names. Raises NotFound, which names near ones, UsageError."""
    image = session.state.image
    text = ref.removeprefix(f"{image}@") or "HEAD"
    match = _REF.fullmatch(text)
    if not match or not _STEPS.fullmatch(match["steps"]):
        raise UsageError(
            f"{ref[:60]!r} is no ref: write a branch, a tag, a commit id or HEAD, with ~N to go "
            "back N"
        )
    name, steps = match["name"], _count(match["steps"])
    branch: str | None = None
    found = None if match["origin"] else _here(session, name)
    if found is None:
        found, branch = _there(session, name)
    elif name == session.state.ref or name in session.state.heads:
        branch = name
    commits = Commits(session.remote, session.cache, session.local)
    oid, commit = found, session.commit(found)
    for step in range(steps):
        if not commit.parents:
            raise NotFound(
                f"{ref}: {name} has only {step} version{'' if step == 1 else 's'} before it"
            )
        oid = commit.parents[0]
        try:
            commit = commits.get(oid, (image, branch) if branch else None)
        except Damaged as error:
            raise NotFound(f"{ref}: what was before {name}~{step} is gone ({error})") from None
    return Found(oid, commit, None if steps or match["origin"] else branch, _upstream(session, oid))


def _count(steps: str) -> int:
    return sum(int(count or 1) if mark else 1 for mark, count in re.findall(r"(~)(\d*)|\^", steps))


def _here(session: Session, name: str) -> bytes | None:
    """What `name` is among the volume's own."""
    state = session.state
    if name in _HEAD:
        return session.base
    if name in state.heads:
        return bytes.fromhex(state.heads[name].tip)
    if name == state.ref:
        return session.base
    if not looks_like_id(name):
        return None
    found = {oid for oid in own(session) if oid.hex().startswith(name)}
    if len(found) > 1:
        several = ", ".join(sorted(oid.hex()[: len(name) + 4] for oid in found)[:4])
        raise UsageError(f"id {name} is ambiguous ({several}): write more digits")
    if found:
        return found.pop()
    if len(name) == 2 * ID_SIZE and session.local.commit(bytes.fromhex(name)) is not None:
        return bytes.fromhex(name)
    return None


def _there(session: Session, name: str) -> tuple[bytes, str | None]:
    """What `name` is in the repository, and the branch that it names."""
    image, repository = session.state.image, session.repository
    head = repository.refs.head(image, name)
    if head is not None and head.commit is not None:
        return head.commit, name
    return repository.resolve(Version(image, name)).id, None


def own(session: Session) -> dict[bytes, str | None]:
    """Every commit of the volume that was never pushed, and the upstream (hex) of its line."""
    found: dict[bytes, str | None] = {}
    for line in session.state.lines:
        for oid, _ in session.local.commits(bytes.fromhex(line.tip), line.upstream):
            found.setdefault(oid, line.upstream)
    return found


def _upstream(session: Session, oid: bytes) -> str | None:
    return own(session).get(oid, oid.hex())

"""Branches and tags of an image in its repository."""

from __future__ import annotations

import itertools

from ..errors import Busy, NotFound, UsageError
from ..names import check_name
from ..repository.refs import BranchRecord, suggest
from ..repository.repository import Repository
from ..volume.cache import Cache
from .history import Commits
from .session import Session

MOST = 100_000  # versions looked at, to see whether a branch's own would be lost


def make_branch(
    repository: Repository, image: str, name: str, commit: bytes, *, author: str
) -> BranchRecord:
    """A branch that begins at a version of the repository. Raises UsageError, BranchMoved."""
    check_name("branch", name)
    head = repository.refs.head(image, name)
    if head is not None and head.commit is not None:
        raise UsageError(
            f"branch {name!r} of {image} exists already, at {head.commit.hex()[:12]}: choose "
            "another name"
        )
    return repository.refs.move(image, name, commit, None, author=author, why="branch: made")


def delete_branch(
    repository: Repository, cache: Cache, image: str, name: str, *, author: str, force: bool = False
) -> BranchRecord:
    """Delete a branch; its records stay, and say who did it. Raises NotFound, BranchMoved, and Busy
    where versions would then belong to no branch and no tag, unless `force`.
    """
    refs = repository.refs
    head = refs.head(image, name)
    if head is None or head.commit is None:
        refs.require_image(image)
        raise NotFound(f"{image} has no branch {name!r}{suggest(name, list(refs.heads(image)))}")
    if not force and not _reached_otherwise(repository, cache, image, name, head.commit):
        raise Busy(
            f"branch {name!r} of {image} has versions that are on no other branch and under no "
            f"tag: -D deletes it all the same (undo: `horcrux-cli branch {image} {name} "
            f"{head.commit.hex()[:12]}`, until gc removes them)"
        )
    return refs.move(image, name, None, head.commit, author=author, why="branch: deleted")


def _reached_otherwise(
    repository: Repository, cache: Cache, image: str, name: str, commit: bytes
) -> bool:
    refs = repository.refs
    tips = [
        record.commit
        for other, record in refs.heads(image).items()
        if other != name and record.commit is not None
    ]
    tips += [tag.commit for one in refs.tags(image) if (tag := refs.tag(image, one)) is not None]
    commits = Commits(repository, cache)
    return any(
        oid == commit for tip in tips for oid, _ in itertools.islice(commits.line(tip), MOST)
    )


def tag_volume(name: str, tag: str, *, author: str, message: str = "") -> bytes:
    """Name the version that a volume lies on with a tag in its repository; its id.

    Raises UsageError where it was never pushed, or the tag is taken.
    """
    check_name("tag", tag)
    with Session(name, lock=False) as session:
        if session.own_commits():
            raise UsageError(f"volume {name} lies on a version that was never pushed: push it")
        base = session.base
        session.repository.refs.make_tag(
            session.state.image, tag, base, author=author, message=message
        )
        return base

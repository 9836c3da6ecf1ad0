"""Branches and tags of an image in its repository."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence

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


def check_free(names: Sequence[str], tag: str) -> None:
    """That the versions of all these volumes can be named with one tag. Raises UsageError."""
    check_name("tag", tag)
    images: dict[tuple[str, str], str] = {}
    for name in names:
        with Session(name, lock=False) as session:
            state = session.state
            other = images.setdefault((state.repository_id, state.image), name)
            if other != name:
                raise UsageError(
                    f"volumes {other} and {name} are both of image {state.image}: a tag names one "
                    "version of it"
                )
            if state.unborn:  # the push that follows makes its repository
                continue
            refs = session.primary.refs
            there = refs.tag(state.image, tag)
            if there is not None and there.commit != session.base:
                raise UsageError(
                    f"tag {tag!r} of {state.image} is {there.commit.hex()[:12]} already: choose "
                    "another name; nothing was done"
                )
            head = refs.head(state.image, tag)
            if head is not None and head.commit is not None:
                raise UsageError(f"{state.image} has a branch {tag!r}: choose another name")


def tag_volumes(names: Sequence[str], tag: str, *, author: str) -> dict[str, bytes]:
    """Name the versions that volumes lie on with one tag, each in its image; their ids. The tag's
    message names the others of a set.

    Raises UsageError where one was never pushed, or the tag is taken: before any is made.
    """
    check_free(names, tag)
    with contextlib.ExitStack() as stack:
        sessions = [stack.enter_context(Session(name, lock=False)) for name in names]
        for session in sessions:
            if session.own_commits():
                raise UsageError(
                    f"volume {session.name} lies on a version that was never pushed: push it"
                )
        images = {session.name: session.state.image for session in sessions}
        for session in sessions:
            others = [f"{image}@{tag}" for name, image in images.items() if name != session.name]
            refs, image = session.primary.refs, images[session.name]
            if refs.tag(image, tag) is None:  # there after a run that was broken off
                message = f"together with {', '.join(others)}" if others else ""
                refs.make_tag(image, tag, session.base, author=author, message=message)
        return {session.name: session.base for session in sessions}

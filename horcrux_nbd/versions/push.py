"""Push: bring a volume's commits to its repository and move a branch to them.

What is missing there is sent in the order of writing (docs/format.md); the branch moves last, by an
exclusive create, so of any number of pushes at once one wins and the others learn who did. Broken
off at any moment, the next push sends only what is still missing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from ..errors import Damaged, NotFound, UsageError
from ..names import check_name
from ..progress import Progress
from ..repository.commits import Commit
from ..repository.objects import Kind
from ..repository.refs import BranchMoved, BranchRecord
from ..repository.repository import Repository, check_exclusive_create
from ..repository.writer import ObjectWriter
from ..units import KiB
from ..volume.local import LocalObjects
from ..volume.state import VolumeState
from ..volume.volume import STORE_LIMIT
from . import reflog
from .commit import settled
from .reach import Reached, reach, sweep
from .session import Session, follows_branch

# A store that takes less than this for a small object gains nothing from threads, which wait for
# Python's lock in turns: seconds.
NEAR = 0.001
MOST, LARGE = 64, 256 * KiB  # objects, and bytes, that are handed to a thread at once


@dataclass(frozen=True)
class Pushed:
    """What a push did; sizes as stored. `record` is None where there was nothing to push."""

    branch: str
    tip: bytes
    commits: int
    objects: int
    bytes: int
    known_objects: int
    record: BranchRecord | None


class Diverged(BranchMoved):
    """The branch has versions that the volume's line does not have, or the other way round."""


def push(
    name: str,
    *,
    branch: str | None = None,
    force: bool = False,
    to: str | None = None,
    author: str,
    limit: float = STORE_LIMIT,
    progress: Progress | None = None,
) -> Pushed:
    """Bring a volume's commits to its repository and move `branch` (its own by default) to them.

    A `branch` of another name must be a new one; the volume follows it from then on. `force` moves
    the branch back as well, after a `reset`; it still has to be where this volume saw it last.
    `to` is the URL of the repository for an image that is in none yet; it is made if need be.
    Raises BranchMoved, which says who moved it and when, and nothing has changed then; UsageError,
    StoreError after `limit` seconds without a store.
    """
    progress = progress or Progress()
    if branch is not None:
        check_name("branch", branch)
    with Session(name, limit) as session:
        if session.state.pending is not None:
            with settled(session, progress):
                pass
        if to is not None:
            _goes_to(session, to)
        return _push(session, branch, force, author, progress)


def _goes_to(session: Session, url: str) -> None:
    state = session.state
    if state.repository == url:
        return
    if not state.unborn:
        raise UsageError(
            f"volume {session.name} is of {state.repository}: --to is for an image that was never "
            "pushed; `horcrux-cli clone` copies to another repository"
        )
    session.save(repository=url)


def _push(
    session: Session, branch: str | None, force: bool, author: str, progress: Progress
) -> Pushed:
    repository = session.make_repository()
    state, tip = session.state, session.base
    commits = session.own_commits()
    target = _target(session.name, state, branch)
    record = repository.refs.head(state.image, target)
    if not commits and branch is None and not force:
        return Pushed(target, tip, 0, 0, 0, 0, None)
    expected = _expected(session, target, record, commits, force)
    if expected == tip:  # also after a push that was broken off when the branch had moved
        _moved(session, target, tip, reach(session.local, commits))
        return Pushed(target, tip, 0, 0, 0, 0, None)
    check_exclusive_create(repository.store)
    needed = reach(session.local, commits)
    ids = needed.all()
    below = commits[-1][1].parents[:1] if commits else (tip,)
    with ObjectWriter(repository, expected=len(ids)) as writer:
        if below:  # a new image has nothing below it
            _rely_on(repository, writer, session, below[0])
        _send(session.local, needed, writer, progress)
        writer.confirm()
        why = commits[0][1].message if commits else f"branch {target}"
        moved = repository.refs.move(
            state.image, target, tip, expected, author=author, why=f"push: {why}"[:200]
        )
        written = writer.written
    _moved(session, target, tip, needed)
    return Pushed(
        target,
        tip,
        len(commits),
        written.objects,
        written.bytes,
        max(0, len(ids) - written.objects),
        moved,
    )


def _target(name: str, state: VolumeState, branch: str | None) -> str:
    if branch is not None:
        return branch
    if not follows_branch(state):
        raise _no_branch(name, state)
    return state.ref


def _no_branch(name: str, state: VolumeState) -> UsageError:
    shown = state.ref if follows_branch(state) else state.ref[:12]
    return UsageError(
        f"volume {name} is on {state.image}@{shown}, which is no branch: say where to push with "
        f"`horcrux-cli push {name} --branch NAME`"
    )


def _expected(
    session: Session,
    target: str,
    record: BranchRecord | None,
    commits: Sequence[tuple[bytes, Commit]],
    force: bool,
) -> bytes | None:
    """The commit that the branch has to point to for the push to be right; None: there is none."""
    state = session.state
    head = record.commit if record else None
    if head in {oid for oid, _ in commits} | {session.base}:
        return head  # an earlier push of ours, of which we did not hear
    if state.unborn:
        if session.repository.refs.branches(state.image):
            raise UsageError(
                f"{state.repository} has an image {state.image} already, which volume "
                f"{session.name} knows nothing of: push to another repository with --to REPO"
            )
        return None
    if target != state.ref:
        if head is not None:
            raise UsageError(
                f"branch {target!r} of {state.image} exists already: choose a new name, or "
                f"`horcrux-cli checkout` it first"
            )
        return None
    if record is None:
        raise _no_branch(session.name, state)
    if head is not None and (force or not commits) and head.hex() in _looked_at(state):
        return head
    if head is None or head.hex() not in _looked_at(state):
        raise session.primary.refs.moved(state.image, target, record)
    if head.hex() != state.upstream or commits[-1][1].parents[:1] != (head,):
        raise Diverged(
            f"{head.hex()[:12]} on branch {target!r} of {state.image} is not below the versions "
            f"of volume {session.name}: push them to a new branch with --branch NAME, or give up "
            "what the branch has with --force",
            record,
        )
    return head


def _looked_at(state: VolumeState) -> set[str | None]:
    """Where the branch was when this volume saw it."""
    return {state.upstream, state.seen.commit if state.seen else None}


def _rely_on(repository: Repository, writer: ObjectWriter, session: Session, below: bytes) -> None:
    """The version below ours has to be there, and to stay until the branch has moved.

    Where its commit is, all below it is: removal takes commits first. The writer looks at it again
    in `confirm`.
    """
    try:
        plain = repository.read_object(below, (Kind.COMMIT,))[1]
    except Damaged as error:
        raise NotFound(
            f"the versions of volume {session.name} lie on {below.hex()[:12]}, which is not sound "
            f"in its repository any more ({error}): they cannot be pushed there"
        ) from None
    writer.write(Kind.COMMIT, plain, below)


def _send(local: LocalObjects, needed: Reached, writer: ObjectWriter, progress: Progress) -> None:
    sizes = needed.sizes
    steps = needed.steps()
    progress.start("push", sum(sizes[oid] for step in steps for oid in step))
    commits = set(needed.commits)
    durable = False
    near = True  # until it has taken its time

    def send(some: Sequence[bytes]) -> None:
        for oid in some:
            writer.write_stored(oid, local.own_stored(oid))
        progress.advance(sum(sizes[oid] for oid in some))

    for step in steps:
        if not durable and commits.intersection(step):
            writer.barrier()
            durable = True
        for some in _parts(step, sizes, writer.workers):
            if near:
                began = time.monotonic()
                send(some)
                near = time.monotonic() - began < NEAR * len(some)
            else:
                writer.run(sum(sizes[oid] for oid in some), partial(send, some))
        writer.drain()  # nobody may find an object before all that it names
    writer.barrier()


def _parts(
    step: Sequence[bytes], sizes: Mapping[bytes, int], workers: int
) -> Iterator[list[bytes]]:
    """Objects that one thread sends in a row: small ones together, and enough for all threads."""
    most = max(1, min(MOST, len(step) // (4 * workers)))
    part: list[bytes] = []
    size = 0
    for oid in step:
        part.append(oid)
        size += sizes[oid]
        if len(part) >= most or size >= LARGE:
            yield part
            part, size = [], 0
    if part:
        yield part


def _moved(session: Session, target: str, tip: bytes, needed: Reached) -> None:
    """The branch has our commits. What follows is tidying up, and may be broken off anywhere."""
    before, commits = session.state, session.own_commits()
    if (before.ref, before.upstream) != (target, tip.hex()):
        gone = {oid.hex() for oid, _ in commits}
        heads = {n: line for n, line in before.heads.items() if n != target}
        kept = tuple(line for line in before.kept if line.tip not in gone)
        session.save(
            ref=target,
            upstream=tip.hex(),
            heads=heads,
            kept=kept,
            seen=None,
            unborn=False,
            repository_id=session.repository.id,
        )
        reflog.append(session.folder, "push", before.base, before.base, f"to {target}")
    # All but the commit that the volume lies on: it is opened with the store away.
    session.local.release(needed.all() - {tip})
    if session.state.pending is None:
        sweep(session.local, session.state)

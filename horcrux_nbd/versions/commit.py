"""Commit: what volumes hold at one moment becomes a version of each, local first.

Freeze (milliseconds), pack (beside the running workload), seal. Broken off by a crash after the
freeze, the next command on the volume goes on; failed for another reason, it is as if it had never
begun. Either way nothing that was written is lost.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .. import host
from ..attach.freeze import Freezer, write_out
from ..errors import HorcruxError, NotFound, UsageError
from ..progress import Progress
from ..repository.commits import Commit, now
from ..repository.objects import Kind
from ..repository.repository import Repository
from ..repository.writer import LIST_FROM, ObjectWriter, write_index
from ..volume import state as states
from ..volume.layer import Layer
from ..volume.local import remote_node
from ..volume.pack import Packed, Packer
from ..volume.state import Pending
from . import reflog
from .reach import sweep
from .session import Holder, ServerGone, Session, holder

GROUP_TAG = "group"  # commits of several volumes that were made together have its value in common

WRITE_OUTS = 5  # of a file system that is written to, before it is frozen
MOMENT = 0.005  # seconds that such a sync takes where next to nothing was dirty
LOOK_BACK = 64  # versions among which the commit of a set is looked for after a crash


class NothingToCommit(UsageError):
    """Nothing differs from the version below."""


@dataclass(frozen=True)
class Committed:
    """A new local version. `frozen_seconds` is how long writers were held up.

    `bytes` in `objects` were stored for it on this host; a push will send them.
    """

    id: bytes
    commit: Commit
    packed: Packed
    objects: int
    bytes: int
    frozen_seconds: float = 0.0


def commit(
    names: Sequence[str],
    message: str,
    *,
    author: str,
    tags: Mapping[str, str] | None = None,
    allow_empty: bool = False,
    before: Callable[[], None] | None = None,
    after: Callable[[], None] | None = None,
    progress: Progress | None = None,
) -> dict[str, Committed]:
    """Make what volumes hold now a version of each, at one moment for all of them.

    Mounted file systems are frozen meanwhile; `before` runs before that and `after` when writes go
    on. Works with the store away. A volume without changes gets no version, unless `allow_empty`.
    Raises NothingToCommit where none of them has any, Busy, NoSpace; then the volumes are as they
    were, each of several also.
    """
    progress = progress or Progress()
    names = sorted(set(names))
    group = secrets.token_hex(8) if len(names) > 1 else ""
    pending = Pending(
        message, author, now(), dict(tags or {}), allow_empty, group, tuple(names if group else ())
    )
    with contextlib.ExitStack() as stack:
        sessions = [stack.enter_context(Session(name)) for name in names]
        for session in sessions:
            stack.enter_context(host.locked(session.name))
            _check(session, pending)
        holders = [stack.enter_context(holder(session)) for session in sessions]
        finished = {}
        for session, held in zip(sessions, holders, strict=True):
            done = finish_pending(session, held, progress)
            if done is not None:
                finished[session.name] = done
        if before is not None:
            before()
        try:
            seconds = _freeze(sessions, holders, pending)
        finally:
            if after is not None:
                after()
        made = _finish(sessions, holders, progress, seconds)
    if not made and not finished:
        raise NothingToCommit(
            f"nothing to commit: {', '.join(names)} "
            f"{'has' if len(names) == 1 else 'have'} no changes (--allow-empty makes one anyway)"
        )
    return {**finished, **made}


def _check(session: Session, pending: Pending) -> None:
    """Refuse before anything is frozen what could not be written after."""
    state = session.state
    if state.read_only:
        raise UsageError(f"volume {session.name} was made read-only: it never has changes")
    for key, value in pending.tags.items():
        if not key or key == GROUP_TAG or len(key) + len(value) > 4096:
            raise UsageError(f"tag {key[:80]!r} cannot be: write KEY=VALUE, KEY not {GROUP_TAG!r}")
    _commit_of(session, states.base_commit(session.folder, state), pending, bytes(32), {}).encode()


def _freeze(sessions: Sequence[Session], holders: Sequence[Holder], pending: Pending) -> float:
    """Freeze all volumes at one moment, or none; seconds that writers were held up."""
    # One mount of each file system: a second freeze of the same would be refused.
    mounts = [mounts[0] for session in sessions if (mounts := host.mounts(session.name))]
    targets = [Path(one.target) for one in mounts if "ro" not in one.super_options]
    with Freezer(targets) as freezer, ThreadPoolExecutor(len(holders)) as pool:
        list(pool.map(lambda held: held.prepare(), holders))
        for target in targets:
            _write_out(target)
        list(pool.map(lambda held: held.prepare(), holders))
        freezer.ready()
        began = time.monotonic()
        try:
            freezer.freeze()
            list(pool.map(lambda held: held.freeze(pending), holders))
            freezer.thaw()
            return time.monotonic() - began
        except BaseException:
            freezer.__exit__(None, None, None)
            for session, held in zip(sessions, holders, strict=True):
                _abandon(session, held)
            raise


def _write_out(target: Path) -> None:
    """Leave little for the freeze to write: what is dirtied while one sync goes on is written by
    the next, which takes less time, down to what the workload dirties in a moment.
    """
    for _ in range(WRITE_OUTS):
        began = time.monotonic()
        write_out(target)
        if time.monotonic() - began < MOMENT:
            return


def _abandon(session: Session, held: Holder) -> None:
    """Let the volume be as if no commit had begun. What cannot be done now, the next command does:
    it finds the commit begun and finishes it.
    """
    with contextlib.suppress(HorcruxError, OSError):
        if session.state.pending is not None:
            held.abandon()
            sweep(session.local, session.state)


# ---- after the freeze


@dataclass(frozen=True)
class _Made:
    id: bytes | None  # None where nothing changed
    commit: Commit
    packed: Packed
    objects: int
    bytes: int


def _finish(
    sessions: Sequence[Session],
    holders: Sequence[Holder],
    progress: Progress,
    seconds: float = 0.0,
) -> dict[str, Committed]:
    """Pack all frozen volumes, then put each on its commit. What fails abandons all of them."""
    pairs = list(zip(sessions, holders, strict=True))
    try:
        made = [_pack(session, progress) for session in sessions]
    except ServerGone:
        raise
    except Exception:
        for session, held in pairs:
            _abandon(session, held)
        raise
    done = {}
    # Those with changes first: a crash between them must find that the set was completed.
    for (session, held), one in sorted(
        zip(pairs, made, strict=True), key=lambda found: found[1].id is None
    ):
        old = session.base
        held.seal(one.id or old)
        if one.id is not None:
            reflog.append(session.folder, "commit", old.hex(), one.id.hex(), one.commit.message)
            done[session.name] = Committed(
                one.id, one.commit, one.packed, one.objects, one.bytes, seconds
            )
    return done


def _pack(session: Session, progress: Progress) -> _Made:
    """Store what the frozen layers of a volume change, and the commit over it, durably."""
    state, local = session.state, session.local
    assert state.pending is not None
    base = states.base_commit(session.folder, state)
    with contextlib.ExitStack() as stack:
        layers = []
        for name in state.layers[1:]:
            folder = states.layer_folder(session.folder, name)
            layer = Layer(folder, bytes.fromhex(name.id), state.size).open(read_only=True)
            stack.callback(layer.close)
            layers.append(layer)
        index = local.index(base, remote_node(session.remote))
        own = Repository(local.store, state.repository_id, state.chunk_size, local.form)
        local.store.sweep()
        writer = stack.enter_context(ObjectWriter(own, LIST_FROM))

        def fetch(oid: bytes) -> bytes:
            return session.remote.read_chunk(oid, state.chunk_size, local.part)

        packed = Packer(layers, base, index, local, writer, fetch).pack(progress)
        if packed.nothing and not state.pending.allow_empty:
            return _Made(None, base, packed, 0, 0)
        root = write_index(writer, index, base.levels, packed.changes)
        writer.drain()
        written = writer.written
        new = {
            "bytes": written.bytes,
            "objects": written.objects,
            "changed": packed.changed_bytes,
        }
        made = _commit_of(session, base, state.pending, root, new)
        oid = writer.write(Kind.COMMIT, made.encode())
        writer.barrier()
        return _Made(oid, made, packed, new["objects"], new["bytes"])


def _commit_of(
    session: Session, base: Commit, pending: Pending, root: bytes, new: dict[str, int]
) -> Commit:
    return Commit(
        image=base.image,
        size=base.size,
        chunk_size=base.chunk_size,
        index=root,
        parents=(session.base,),
        author=pending.author,
        time=pending.time,
        message=pending.message,
        tags={**pending.tags, **({GROUP_TAG: pending.group} if pending.group else {})},
        filesystem=base.filesystem,
        new=new,
    )


# ---- commits that were broken off


def finish_pending(
    session: Session, held: Holder, progress: Progress | None = None
) -> Committed | None:
    """Go on with a commit of the volume that a crash broke off, if there is one; what it made.

    Under the host's lock. One of several volumes that were not all frozen is undone: it was to be
    all or none of them. Raises what a commit raises; then it is undone as well.
    """
    progress = progress or Progress()
    pending = session.state.pending
    if pending is None:
        return None
    if pending.group and not all(
        _takes_part(session, name, pending.group) for name in pending.members
    ):
        held.abandon()
        sweep(session.local, session.state)
        progress.note(
            f"{session.name}: a commit of {', '.join(pending.members)} that was broken off before "
            "all of them were frozen is undone; the changes are there"
        )
        return None
    made = _finish([session], [held], progress).get(session.name)
    if made is not None:
        progress.note(
            f"{session.name}: finished the commit that was broken off, {made.id.hex()[:12]} "
            f"({made.commit.message})"
        )
    return made


def _takes_part(session: Session, name: str, group: str) -> bool:
    """Whether the volume `name` is frozen for the commit of a set, or has its commit already."""
    if name == session.name:
        return True
    try:
        state = host.load(name)
    except (NotFound, UsageError):
        return False
    if state.pending is not None and state.pending.group == group:
        return True
    with contextlib.closing(session.local_of(name)) as local:
        oid: bytes | None = bytes.fromhex(state.base)
        for _ in range(LOOK_BACK):
            made = None if oid is None else local.commit(oid)
            if made is None:
                return False
            if made.tags.get(GROUP_TAG) == group:
                return True
            oid = made.parents[0] if made.parents else None
    return False


@contextlib.contextmanager
def settled(session: Session, progress: Progress | None = None) -> Iterator[None]:
    """The volume under the host's lock, with no commit begun: who is to move it starts here."""
    with host.locked(session.name):
        if session.state.pending is not None:
            with holder(session) as held:
                finish_pending(session, held, progress)
        yield

"""Going to another version: checkout, reset, revert, and the stash. Nothing is copied or fetched.

A volume moves when nobody has it open. Its changes are in no version, so they are dropped only when
that was asked for; commits that were never pushed stay on this host until `reflog --expire`.

**Invariant:** a move is one replacement of volume.json, after all that it names is durable.
"""

from __future__ import annotations

import contextlib
import enum
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from .. import host, server
from ..attach.base import Attachment
from ..errors import Busy, HorcruxError, NotFound, UsageError
from ..repository.commits import Commit, now
from ..repository.objects import Kind, object_key
from ..units import format_size
from ..volume import state as states
from ..volume.blockmap import BASE
from ..volume.layer import BLOCK_SIZE, Layer
from ..volume.pack import only_bookkeeping, written_blocks
from ..volume.state import LayerName, Line, Seen, Stash, VolumeState
from . import reflog
from .commit import NothingToCommit, settled
from .find import Found, find, own
from .reach import sweep
from .session import Session, follows_branch


class Changes(enum.Enum):
    """What happens to changes that are in no version."""

    REFUSE = "refuse"
    DISCARD = "discard"
    STASH = "stash"


class HasChanges(Busy):
    """The volume has changes that the move would drop."""


@dataclass(frozen=True)
class Moved:
    """Where a volume was and is. `stashed` and `dropped` are bytes of changes."""

    before: bytes
    after: bytes
    commit: Commit
    ref: str
    stashed: int = 0
    dropped: int = 0
    kept: tuple[bytes, ...] = ()  # commits that no branch of the volume has any more


# ---- what a volume has to lose


def changed_bytes(session: Session) -> int:
    """Bytes of the image that were written or zeroed since the version below, whole blocks.

    What ext4 notes in its superblock when it is only mounted and unmounted counts as nothing.
    """
    state = session.state
    with contextlib.ExitStack() as stack:
        layers = []
        for name in state.layers:
            folder = states.layer_folder(session.folder, name)
            layer = Layer(folder, bytes.fromhex(name.id), state.size).open(read_only=True)
            stack.callback(layer.close)
            layers.append(layer)
        total = sum(sum(layer.blocks.count()) for layer in layers)
        if 0 < total <= len(layers) and _only_bookkeeping(session, layers):
            return 0
    return total * BLOCK_SIZE


def _only_bookkeeping(session: Session, layers: list[Layer]) -> bool:
    if any(layer.blocks.state(0) == BASE and sum(layer.blocks.count()) for layer in layers):
        return False  # another block than the first
    base = session.commit(session.base)
    try:
        old = session.local.content(session.local.index(base).lookup(0))
    except NotFound:  # its index is not on this host: nobody knows what was there
        return False
    written = written_blocks(layers, base, 0)
    return old is not None and only_bookkeeping(old[:BLOCK_SIZE], written[0])


@contextlib.contextmanager
def at_rest(session: Session, remount: bool) -> Iterator[None]:
    """Nobody has the volume open inside. A mounted one is refused with the reason, or, with
    `remount`, unmounted, and mounted again as it was, whatever happens inside.
    """
    mounted = host.mounts(session.name)
    if not mounted or not remount:
        with _closed(session):
            yield
        return
    again = host.remounter(session.name)
    host.umount(session.name)
    try:
        with _closed(session):
            yield
    except BaseException as error:
        try:
            again()
        except (HorcruxError, OSError) as second:
            raise HorcruxError(
                f"{error}; and {session.name} could not be mounted again: {second}"
            ) from error
        raise
    again()


@contextlib.contextmanager
def _closed(session: Session) -> Iterator[None]:
    name = session.name
    if mounts := host.mounts(name):
        raise Busy(
            f"volume {name} is mounted on {mounts[0].target}: `horcrux-cli umount {name}` first, "
            "or say --remount"
        )
    attachment = Attachment.load(server.folder_of(name) / "attach")
    if attachment is not None:
        raise Busy(
            f"volume {name} is attached as {attachment.device}: `horcrux-cli detach {name}` first"
        )
    if found := server.running(name):
        raise Busy(
            f"volume {name} is served by process {found.pid}: `horcrux-cli detach {name}` first"
        )
    with settled(session), states.lock_of(session.folder, name):
        yield


# ---- the move


def _go(
    session: Session,
    oid: bytes,
    plain: bytes,
    action: str,
    message: str,
    changes: Changes,
    **members: Any,
) -> Moved:
    """Lay the volume on the commit `oid`, whose plaintext is `plain`, without changes."""
    state = session.state
    commit = Commit.decode(plain)
    if commit.chunk_size != state.chunk_size:
        raise UsageError(
            f"{oid.hex()[:12]} has chunks of {format_size(commit.chunk_size)}, volume "
            f"{session.name} of {format_size(state.chunk_size)}: make a new volume of it with "
            "`horcrux-cli create`"
        )
    size = changed_bytes(session)
    if size and changes is Changes.REFUSE:
        raise HasChanges(
            f"volume {session.name} has {format_size(size)} of changes that are in no version: "
            "commit them, or say --stash to put them aside, or --discard to drop them"
        )
    if size and changes is Changes.STASH:
        members["stash"] = (_stash_of(state, message), *state.stash)
    local = session.local
    local.store.put(object_key(oid), local.form.encode(Kind.COMMIT, plain, oid))
    session.local.store.sync()
    line = {found.hex() for found, _ in session.local.commits(oid)}
    members["kept"] = tuple(
        kept for kept in members.get("kept", state.kept) if kept.tip not in line
    )
    layer = _empty_layer(session, state, commit.size)
    session.save(base=oid.hex(), size=commit.size, layers=(layer,), **members)
    reflog.append(session.folder, action, state.base, oid.hex(), message)
    tidy(session)
    new = session.state
    return Moved(
        bytes.fromhex(state.base),
        oid,
        commit,
        new.ref,
        stashed=size if changes is Changes.STASH else 0,
        dropped=size if changes is Changes.DISCARD else 0,
        kept=tuple(bytes.fromhex(line.tip) for line in new.kept if line not in state.kept),
    )


def _empty_layer(session: Session, state: VolumeState, size: int) -> LayerName:
    name = state.fresh_layer()
    folder = states.layer_folder(session.folder, name)
    states.sweep_layers(session.folder, state)
    Layer.create(folder, bytes.fromhex(name.id), size).close()
    return name


def tidy(session: Session) -> None:
    """Remove what no longer belongs to the volume. Its lock is held."""
    states.sweep_layers(session.folder, session.state)
    sweep(session.local, session.state)


def _left(session: Session, target: bytes) -> Line | None:
    """The line of commits that were never pushed and that the volume leaves behind when it goes to
    `target`; None where there are none, or `target` is on top of them.
    """
    state = session.state
    above = {oid for oid, _ in session.local.commits(target)}
    if not session.own_commits() or session.base in above:
        return None
    return Line(state.base, state.upstream)


def checkout(
    name: str,
    ref: str,
    *,
    changes: Changes = Changes.REFUSE,
    remount: bool = False,
) -> Moved:
    """Let a volume lie on another version of its image.

    On a branch's name it follows that branch from then on; on anything else it follows none, and a
    push has to name a new branch. Raises HasChanges, Busy while it is in use, NotFound.
    """
    with Session(name) as session:
        found = find(session, ref)
        plain = session.commit_plain(found.id)
        with at_rest(session, remount):
            state = session.state
            left = _left(session, found.id) if found.branch != state.ref else None
            heads, kept = dict(state.heads), state.kept
            if left is not None and follows_branch(state):
                heads[state.ref] = left
            elif left is not None:
                kept = (left, *kept)
            if found.branch is not None:
                heads.pop(found.branch, None)
            return _go(
                session,
                found.id,
                plain,
                "checkout",
                f"to {ref}",
                changes,
                ref=found.branch or found.id.hex(),
                upstream=found.upstream,
                seen=state.seen if found.branch == state.ref else None,
                heads=heads,
                kept=kept,
            )


def forward(name: str, oid: bytes, *, changes: Changes, remount: bool) -> Moved:
    """Lay a volume without commits of its own on a newer version of the branch that it follows."""
    with Session(name) as session:
        plain = session.commit_plain(oid)
        with at_rest(session, remount):
            if session.own_commits():
                raise Busy(f"volume {name} was committed meanwhile: pull again")
            return _go(session, oid, plain, "pull", "", changes, upstream=oid.hex())


def reset(
    name: str,
    ref: str,
    *,
    changes: Changes = Changes.REFUSE,
    remount: bool = False,
) -> Moved:
    """Let a volume's branch point to another version, and lay the volume on it.

    Commits that were never pushed and are not below it are kept on this host, without a branch. To
    move the branch in the repository back takes a push with `force`. Raises as `checkout`.
    """
    with Session(name) as session:
        found = find(session, ref)
        plain = session.commit_plain(found.id)
        with at_rest(session, remount):
            state = session.state
            left = _left(session, found.id)
            return _go(
                session,
                found.id,
                plain,
                "reset",
                f"to {ref}",
                changes,
                upstream=found.upstream,
                seen=state.seen or _as_seen(state),
                kept=state.kept if left is None else (left, *state.kept),
            )


def _as_seen(state: VolumeState) -> Seen | None:
    """Where the branch was when the volume last met it, for a push that moves it back."""
    return None if state.upstream is None else Seen(state.upstream, "", "", "", now())


def revert(
    name: str,
    ref: str | None = None,
    *,
    to: str | None = None,
    author: str,
    message: str | None = None,
    changes: Changes = Changes.REFUSE,
    remount: bool = False,
) -> Moved:
    """Make a new version on top whose content is that of an older one.

    Without `to` it undoes the newest version; `ref`, if given, has to name that: of a disk only the
    newest can be undone, what came after an older one lies on it. Raises as `checkout`.
    """
    with Session(name) as session:
        head = find(session, "HEAD")
        if ref is not None and (undone := find(session, ref)).id != head.id:
            raise UsageError(
                f"only the newest version of a disk can be undone, and {undone.id.hex()[:12]} is "
                f"not: `horcrux-cli revert {name} --to REF` makes a new one that is like REF"
            )
        target = find(session, to if to is not None else "HEAD~1")
        if (target.commit.index, target.commit.size) == (head.commit.index, head.commit.size):
            raise NothingToCommit(f"{name} has the content of {target.id.hex()[:12]} already")
        made = replace(
            target.commit,
            parents=(head.id,),
            author=author,
            time=now(),
            message=message or _revert_message(head, target, to is None),
            tags={},
            new={},
        )
        plain = made.encode()
        with at_rest(session, remount):
            oid = session.local.form.object_id(Kind.COMMIT, plain)
            return _go(session, oid, plain, "revert", made.message, changes)


def _revert_message(head: Found, target: Found, newest: bool) -> str:
    if newest:
        return f"Revert {head.id.hex()[:12]} ({head.commit.message})"
    return f"Go back to {target.id.hex()[:12]} ({target.commit.message})"


# ---- stash


def _stash_of(state: VolumeState, message: str) -> Stash:
    return Stash(
        state.layers, state.base, state.ref, state.upstream, state.size, now(), message[:1000]
    )


def stash(name: str, message: str = "", *, remount: bool = False) -> Stash:
    """Put a volume's changes aside; it is as its version then. Raises UsageError without any."""
    with Session(name) as session, at_rest(session, remount):
        state = session.state
        if not changed_bytes(session):
            raise UsageError(f"volume {name} has no changes to put aside")
        made = _stash_of(state, message)
        layer = _empty_layer(session, state, state.size)
        session.save(layers=(layer,), stash=(made, *state.stash))
        reflog.append(session.folder, "stash", state.base, state.base, message)
        return made


def stash_pop(name: str, number: int = 0, *, remount: bool = False) -> Stash:
    """Take changes back. Raises HasChanges where there are others; UsageError where the volume
    lies on another version than they were made on.
    """
    with Session(name) as session, at_rest(session, remount):
        state = session.state
        found = _stashed(session, number)
        if found.base != state.base:
            raise UsageError(
                f"the changes in stash {number} fit onto {found.base[:12]} only: `horcrux-cli "
                f"checkout {name} {found.base[:12]}` first"
            )
        if size := changed_bytes(session):
            raise HasChanges(
                f"volume {name} has {format_size(size)} of changes already: commit or stash them "
                "first"
            )
        session.save(layers=found.layers, stash=_without(state, number))
        states.sweep_layers(session.folder, session.state)
        reflog.append(session.folder, "stash", state.base, state.base, f"pop: {found.message}")
        return found


def stash_drop(name: str, number: int = 0) -> Stash:
    """Remove changes that were put aside."""
    with Session(name) as session, settled(session):
        found = _stashed(session, number)
        state = session.save(stash=_without(session.state, number))
        # The volume may be served: only what the stash alone had goes.
        used = {states.layer_folder(session.folder, layer) for layer in state.all_layers}
        for layer in found.layers:
            if (folder := states.layer_folder(session.folder, layer)) not in used:
                shutil.rmtree(folder, ignore_errors=True)
        return found


def stashes(name: str) -> tuple[Stash, ...]:
    """What was put aside, newest first."""
    return host.load(name).stash


def _stashed(session: Session, number: int) -> Stash:
    there = session.state.stash
    if not 0 <= number < len(there):
        raise NotFound(
            f"volume {session.name} has no stash {number} (there "
            f"{'are' if len(there) != 1 else 'is'} {len(there)})"
        )
    return there[number]


def _without(state: VolumeState, number: int) -> tuple[Stash, ...]:
    return (*state.stash[:number], *state.stash[number + 1 :])


# ---- letting go


def expire(name: str) -> tuple[int, int]:
    """Let go of commits that were never pushed and that no branch of the volume has: how many
    that were, and the bytes that came back.
    """
    with Session(name) as session, settled(session):
        before = own(session)
        session.save(kept=())
        return len(before) - len(own(session)), sweep(session.local, session.state)

"""Versions of a volume: commit, push, and going to another one.

A commit is local first. It freezes what was written in milliseconds, then packs it beside the
running workload; a push brings to the store what it lacks and moves the branch. Each step leaves
the state before or after it, and one that was broken off is taken up by the next.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

from . import control, host, paths, server
from .attach.freeze import frozen
from .chunkstore import open_store
from .errors import UsageError
from .names import check_name
from .progress import Progress
from .repository.commits import Commit, now
from .repository.index import check_node, table_ids
from .repository.objects import Kind, kind_of
from .repository.refs import BranchRecord
from .repository.repository import Repository, check_exclusive_create
from .repository.writer import ObjectWriter, write_index
from .volume import state as states
from .volume.cache import Cache
from .volume.layer import Layer
from .volume.local import LocalObjects, remote_node
from .volume.pack import Packed, Packer
from .volume.state import Pending, VolumeState
from .volume.volume import STORE_LIMIT, Volume


class NothingToCommit(UsageError):
    """Nothing differs from the version below."""


@dataclass(frozen=True)
class Committed:
    """A new local version. `frozen_seconds` is how long writers were held up."""

    id: bytes
    commit: Commit
    packed: Packed
    frozen_seconds: float


@dataclass(frozen=True)
class Pushed:
    """What a push did. `record` is None where there was nothing to push."""

    commits: int
    objects: int
    bytes: int
    record: BranchRecord | None
    branch: str


class _Holder(Protocol):
    """Whoever has the volume open: a server, or ourselves."""

    def freeze(self, pending: Pending) -> object: ...

    def seal(self, commit_id: bytes) -> object: ...


class _Served:
    def __init__(self, name: str) -> None:
        self._socket = server.folder_of(name) / server.CONTROL

    def freeze(self, pending: Pending) -> None:
        control.ask(self._socket, "freeze", timeout=60, pending=asdict(pending))

    def seal(self, commit_id: bytes) -> None:
        control.ask(self._socket, "seal", timeout=60, commit=commit_id.hex())


@contextlib.contextmanager
def _holder(name: str) -> Iterator[_Holder]:
    if server.running(name) is not None:
        yield _Served(name)
        return
    volume = Volume.open(host.folder_of(name), name=name)
    try:
        yield volume
    finally:
        volume.close()


# ---- commit


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
    on. Works with the store away. Raises NothingToCommit where nothing changed in any of them
    (unless `allow_empty`), Busy, NoSpace; then the volumes are as they were.
    """
    progress = progress or Progress()
    group = secrets.token_hex(8) if len(names) > 1 else ""
    pending = Pending(message, author, now(), dict(tags or {}), allow_empty, group)
    with contextlib.ExitStack() as stack:
        for name in sorted(set(names)):
            host.load(name)
            stack.enter_context(host.locked(name))
        holders = {name: stack.enter_context(_holder(name)) for name in names}
        for name, holder in holders.items():
            if host.load(name).pending is not None:
                with contextlib.suppress(NothingToCommit):
                    _finish(name, holder, progress)  # of a commit that was broken off
        if before is not None:
            before()
        try:
            seconds = _freeze(holders, pending)
        finally:
            if after is not None:
                after()
        found = {}
        for name, holder in holders.items():
            with contextlib.suppress(NothingToCommit):
                found[name] = replace(_finish(name, holder, progress), frozen_seconds=seconds)
    if not found:
        raise NothingToCommit(
            f"nothing to commit: {', '.join(names)} "
            f"{'has' if len(names) == 1 else 'have'} no changes (--allow-empty makes one anyway)"
        )
    return found


def _freeze(holders: Mapping[str, _Holder], pending: Pending) -> float:
    """Freeze all volumes at one moment; seconds that writers were held up."""
    mounts = [mount.target for name in holders for mount in host.status(name).mounts]
    for target in mounts:
        # What is dirty is written before, so that the freeze has little left to do.
        fd = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        for target in mounts:
            stack.enter_context(frozen(Path(target)))
        began = time.monotonic()
        for holder in holders.values():
            holder.freeze(pending)
    return time.monotonic() - began


def _finish(name: str, holder: _Holder, progress: Progress) -> Committed:
    """Pack the frozen layer and put the volume on the new commit."""
    folder = host.folder_of(name)
    state = VolumeState.load(folder)
    assert state.pending is not None
    base = states.base_commit(folder, state)
    with contextlib.ExitStack() as stack:
        cache = Cache(paths.cache())
        stack.callback(cache.close)
        local = LocalObjects(folder, cache, state.chunk_size)
        stack.callback(local.close)
        remote = Repository(
            stack.enter_context(open_store(state.repository, limit=STORE_LIMIT, check=False)),
            state.repository_id,
            state.chunk_size,
        )
        frozen_layer = state.layers[1]
        layer = Layer(
            states.layer_folder(folder, frozen_layer), bytes.fromhex(frozen_layer.id), state.size
        ).open(read_only=True)
        stack.callback(layer.close)
        index = local.index(base, remote_node(remote))
        own = Repository(local.store, state.repository_id, state.chunk_size)
        writer = stack.enter_context(ObjectWriter(own))

        def fetch(oid: bytes) -> bytes:
            return remote.read_chunk(oid, state.chunk_size, local.part)

        packed = Packer(layer, base, index, local, writer, fetch).pack(progress)
        if not packed.changes and not state.pending.allow_empty:
            holder.seal(bytes.fromhex(state.base))
            raise NothingToCommit(f"nothing to commit: {name} has no changes")
        root = write_index(writer, index, base.levels, packed.changes)
        made = Commit(
            image=state.image,
            size=state.size,
            chunk_size=state.chunk_size,
            index=root,
            parents=(bytes.fromhex(state.base),),
            author=state.pending.author,
            time=state.pending.time,
            message=state.pending.message,
            tags=_tags(state.pending),
            filesystem=base.filesystem,
        )
        writer.barrier()
        oid = writer.write(Kind.COMMIT, made.encode())
        writer.barrier()
        holder.seal(oid)
    return Committed(oid, made, packed, 0.0)


def _tags(pending: Pending) -> dict[str, str]:
    return {**pending.tags, **({"group": pending.group} if pending.group else {})}


# ---- push


def local_commits(name: str) -> list[tuple[bytes, Commit]]:
    """The commits of a volume that were never pushed, newest first."""
    folder = host.folder_of(name)
    state = host.load(name)
    with contextlib.ExitStack() as stack:
        cache = Cache(paths.cache())
        stack.callback(cache.close)
        local = LocalObjects(folder, cache, state.chunk_size)
        stack.callback(local.close)
        found = []
        for oid, made in local.commits(bytes.fromhex(state.base)):
            if oid.hex() == state.upstream:
                break
            found.append((oid, made))
        return found


def push(
    name: str,
    *,
    branch: str | None = None,
    author: str,
    progress: Progress | None = None,
) -> Pushed:
    """Bring a volume's commits to its repository and move `branch` (its own by default) to them.

    Sends only what is missing there; broken off, it goes on where it was. Raises BranchMoved, which
    says who moved the branch and when, and then nothing has changed; UsageError, StoreError.
    """
    progress = progress or Progress()
    state = host.load(name)
    if branch is not None:
        check_name("branch", branch)
    with host.locked(name):
        commits = local_commits(name)
        folder = host.folder_of(name)
        with contextlib.ExitStack() as stack:
            repository = Repository.open(stack.enter_context(open_store(state.repository)))
            if repository.id != state.repository_id:
                raise UsageError(
                    f"{state.repository} is another repository now than {name} was made from"
                )
            target, expected = _target(repository, state, branch)
            if not commits and (branch is None or expected == bytes.fromhex(state.base)):
                return Pushed(0, 0, 0, None, target)
            check_exclusive_create(repository.store)
            cache = Cache(paths.cache())
            stack.callback(cache.close)
            local = LocalObjects(folder, cache, state.chunk_size)
            stack.callback(local.close)
            writer = stack.enter_context(ObjectWriter(repository))
            sent = _send(local, commits, writer, progress)
            tip = bytes.fromhex(state.base)
            why = commits[0][1].message if commits else f"branch {target}"
            writer.barrier()
            writer.confirm()
            record = repository.refs.move(
                state.image, target, tip, expected, author=author, why=f"push: {why}"[:200]
            )
            # From here on the branch has it; what follows is tidying up.
            state = replace(host.load(name), ref=target, upstream=state.base)
            state.save(folder)
            local.release(sent - {tip})
            return Pushed(
                len(commits), writer.written.objects, writer.written.bytes, record, target
            )


def _target(
    repository: Repository, state: VolumeState, branch: str | None
) -> tuple[str, bytes | None]:
    """The branch to move, and what it has to point to."""
    if branch is not None and branch != state.ref:
        head = repository.refs.head(state.image, branch)
        if head is not None and head.commit is not None:
            raise UsageError(
                f"branch {branch!r} of {state.image} exists already: choose a new name, or "
                f"`horcrux-cli checkout` it first"
            )
        return branch, None
    if repository.refs.head(state.image, state.ref) is None:
        raise UsageError(f"{state.asked} names no branch: say where to push with --branch NAME")
    return state.ref, bytes.fromhex(state.upstream) if state.upstream else None


def _send(
    local: LocalObjects,
    commits: Sequence[tuple[bytes, Commit]],
    writer: ObjectWriter,
    progress: Progress,
) -> set[bytes]:
    """Store chunks and patches, then nodes from the leaves up, then commits, oldest first; ids."""
    data, levels = _reachable(local, commits)
    steps: list[list[bytes]] = [sorted(data), *(levels[level] for level in sorted(levels))]
    steps += [[oid] for oid, _ in reversed(commits)]
    sizes = local.sizes()
    progress.start("push", sum(sizes[oid] for step in steps for oid in step))
    for step in steps:
        for oid in step:
            kind = kind_of(oid)
            assert kind is not None
            writer.submit_from(
                kind,
                max(sizes[oid], 1),
                lambda oid=oid: local.own_plain(oid),  # type: ignore[misc]
                lambda oid: progress.advance(sizes[oid]),
            )
        writer.barrier()  # nobody may find an object before all that it names
    return {oid for step in steps for oid in step}


def _reachable(
    local: LocalObjects, commits: Sequence[tuple[bytes, Commit]]
) -> tuple[set[bytes], dict[int, list[bytes]]]:
    """The volume's own objects that its commits need: chunks and patches, and nodes by level."""
    own = set(local.sizes())
    data: set[bytes] = set()
    levels: dict[int, list[bytes]] = {}
    seen: set[bytes] = set()
    for _, made in commits:
        pending = [(made.index, made.levels - 1)]
        while pending:
            oid, level = pending.pop()
            if oid not in own or oid in seen:
                continue  # what is not ours is in the store already, and all below it
            seen.add(oid)
            levels.setdefault(level, []).append(oid)
            children = table_ids(check_node(local.own_plain(oid), level))
            if level:
                pending += [(child, level - 1) for child in children]
            else:
                data.update(child for child in children if child in own)
    chains = [oid for oid in data if kind_of(oid) is Kind.PATCH]
    while chains:
        patch = local.patch(chains.pop())
        for part in patch.chain if patch is not None else ():
            if part in own and part not in data:
                data.add(part)
                if kind_of(part) is Kind.PATCH:
                    chains.append(part)
    return data, levels

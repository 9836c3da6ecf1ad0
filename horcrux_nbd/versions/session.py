"""One volume while somebody works on its versions: its lock, its state, and what it reads from.

Two locks. The versions lock (in the volume's folder) is held for as long as a command on versions
takes: one push or commit of a volume at a time. The host's lock of the volume is held only while it
must not be mounted, unmounted or served: a push of hours keeps nobody from unmounting.

**Invariant:** whoever takes both takes the versions lock first, and of several volumes in the order
of their names.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from types import TracebackType
from typing import Any, Protocol

from .. import config, control, files, host, paths, server
from ..chunkstore import open_mirrored, open_store
from ..errors import HorcruxError, UsageError
from ..names import is_name
from ..repository.commits import Commit
from ..repository.objects import ID_SIZE, Kind
from ..repository.repository import Repository
from ..volume.cache import Cache
from ..volume.local import LocalObjects
from ..volume.state import Pending, VolumeState
from ..volume.volume import STORE_LIMIT, Volume


class Session:
    """Use it in a `with` block. Raises NotFound, Busy on entry."""

    def __init__(self, name: str, limit: float = STORE_LIMIT, *, lock: bool = True) -> None:
        """`limit` seconds is how long the store is waited for. Who only looks needs no `lock`."""
        self.name, self.limit, self._locked = name, limit, lock
        self.folder = host.folder_of(name)
        self._stack = contextlib.ExitStack()
        self._offline: Repository | None = None
        self._online: Repository | None = None
        self._primary: Repository | None = None

    def __enter__(self) -> Session:
        host.load(self.name)
        with contextlib.ExitStack() as stack:
            if self._locked:
                lock = files.FileLock(self.folder / host.VERSIONS_LOCK, f"volume {self.name}")
                lock.acquire(host.LOCK_WAIT)
                stack.callback(lock.release)
            state = host.load(self.name)  # it may have been removed while we waited
            self.cache = stack.enter_context(opened_cache())
            self.local = LocalObjects(self.folder, self.cache, state.chunk_size, state.form)
            stack.callback(self.local.close)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    # ---- state

    @property
    def state(self) -> VolumeState:
        """volume.json as it is now: a server changes it when we ask it to."""
        return VolumeState.load(self.folder)

    def save(self, **changes: Any) -> VolumeState:
        """Replace members of volume.json, all at once, durably."""
        state = replace(self.state, **changes)
        state.save(self.folder)
        return state

    @property
    def base(self) -> bytes:
        """The id of the commit that the volume lies on."""
        return bytes.fromhex(self.state.base)

    # ---- what it reads from

    def local_of(self, name: str) -> LocalObjects:
        """What another volume has on this host; to be closed by the caller."""
        state = host.load(name)
        return LocalObjects(host.folder_of(name), self.cache, state.chunk_size, state.form)

    @property
    def remote(self) -> Repository:
        """The volume's repository, of which nothing is asked until it is needed. Reads fall over to
        its mirrors.
        """
        if self._offline is None:
            state = self.state
            store = open_mirrored(state.repository, state.mirrors, limit=self.limit, check=False)
            self._stack.callback(store.close)
            self._offline = Repository(
                store, state.repository_id, state.chunk_size, self.local.form
            )
        return self._offline

    @property
    def repository(self) -> Repository:
        """The volume's repository, which answers, and is the one that the volume was made from.
        Where it is away its mirrors answer: for reading.

        Raises StoreError, UsageError.
        """
        if self._online is None:
            self._online = self._open(self.state.mirrors)
        return self._online

    @property
    def primary(self) -> Repository:
        """As `repository`, without mirrors: for whoever writes, or has to know what it has."""
        if self._primary is None:
            self._primary = self._open(())
        return self._primary

    def _open(self, mirrors: Sequence[str]) -> Repository:
        state = self.state
        if state.unborn:
            raise UsageError(
                f"image {state.image} is in no repository yet: `horcrux-cli push {self.name}` first"
            )
        store = open_mirrored(state.repository, mirrors, limit=self.limit)
        self._stack.callback(store.close)
        found = Repository.open(store)
        if found.form.encrypted != state.encrypted or found.id != state.repository_id:
            raise UsageError(
                f"{state.repository} is another repository now than volume {self.name} was "
                "made from: put the right one there"
            )
        return found

    def make_repository(self) -> Repository:
        """`primary`; for an image that is in none yet it is made if it is not there."""
        state = self.state
        if self._primary is None and state.unborn:
            store = open_store(state.repository, limit=self.limit, create=True)
            self._stack.callback(store.close)
            made = Repository.create(store, state.chunk_size)
            if made.form.encrypted != state.encrypted or (
                made.form.encrypted and made.id != state.repository_id
            ):
                raise UsageError(
                    f"{made.url} is encrypted with another key than the image {state.image} was "
                    "made with, if with any: push it elsewhere with --to, or make the volume anew "
                    "with that repository named"
                )
            self._primary = self._online = made
        return self.primary

    def commit(self, oid: bytes) -> Commit:
        """A commit: the volume's own, from the cache, or from the store, and then kept."""
        return Commit.decode(self.commit_plain(oid))

    def commit_plain(self, oid: bytes) -> bytes:
        """The plaintext of a commit, which may say more than this release knows."""
        plain = self.local.commit_plain(oid)
        if plain is None:
            plain = self.remote.read_object(oid, (Kind.COMMIT,))[1]
            self.cache.insert(oid, plain, meta=True)
        return plain

    def own_commits(self) -> list[tuple[bytes, Commit]]:
        """Those on the volume's line that were never pushed, newest first."""
        state = self.state
        return list(self.local.commits(bytes.fromhex(state.base), state.upstream))


def follows_branch(state: VolumeState) -> bool:
    """Whether what the volume follows can be a branch: no id, and nothing with steps back."""
    return is_name(state.ref) and len(state.ref) != 2 * ID_SIZE


@contextlib.contextmanager
def opened_cache() -> Iterator[Cache]:
    """This host's cache, as large as the configuration says."""
    folder = paths.cache()
    files.make_folder(folder, 0o700)
    cache = Cache(folder, config.load().cache_size)
    try:
        yield cache
    finally:
        cache.close()


# ---- who has it open


class Holder(Protocol):
    """Whoever has the volume open: a server, or ourselves. See volume/sealing.py."""

    def prepare(self) -> object:
        """Make ready what a freeze needs."""

    def freeze(self, pending: Pending) -> object: ...

    def seal(self, commit_id: bytes) -> object: ...

    def abandon(self) -> object: ...


class _Served:
    TIMEOUT = 60.0  # seconds; a disk under the overlay that is busy needs some

    def __init__(self, name: str) -> None:
        self._name = name
        self._socket = server.folder_of(name) / server.CONTROL

    def _ask(self, command: str, **arguments: Any) -> None:
        try:
            control.ask(self._socket, command, self.TIMEOUT, **arguments)
        except (OSError, ValueError) as error:
            raise ServerGone(
                f"the server of volume {self._name} does not answer ({error}): see "
                f"`horcrux-cli status {self._name}`; what was written is safe"
            ) from error

    def prepare(self) -> None:
        self._ask("prepare")

    def freeze(self, pending: Pending) -> None:
        self._ask("freeze", pending=asdict(pending))

    def seal(self, commit_id: bytes) -> None:
        self._ask("seal", commit=commit_id.hex())

    def abandon(self) -> None:
        self._ask("abandon")


class _Opened:
    def __init__(self, volume: Volume) -> None:
        self._volume = volume

    def prepare(self) -> None:
        self._volume.fresh.make()

    def freeze(self, pending: Pending) -> None:
        self._volume.freeze(pending)

    def seal(self, commit_id: bytes) -> None:
        self._volume.seal(commit_id)

    def abandon(self) -> None:
        self._volume.abandon()


class ServerGone(HorcruxError):
    """The volume's server ended or hangs: what it was asked for has happened or not."""


@contextlib.contextmanager
def holder(session: Session) -> Iterator[Holder]:
    """Who to ask. Call it under the host's lock of the volume, so that this stays so."""
    if server.running(session.name) is not None:
        yield _Served(session.name)
        return
    volume = Volume.open(session.folder, name=session.name, cache_size=config.load().cache_size)
    try:
        yield _Opened(volume)
    finally:
        volume.close()

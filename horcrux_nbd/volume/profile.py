"""The profile of the version that a volume was opened on: looked for, and recorded."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from ..chunkstore import open_store
from ..errors import HorcruxError, StoreError, UsageError
from ..repository import profiles
from ..repository.commits import Commit
from ..repository.profiles import Profile
from ..repository.repository import Repository
from .base import Base

if TYPE_CHECKING:
    from .volume import Volume

log = logging.getLogger(__name__)

LAST_LIMIT = 5.0  # seconds that a server which ends gives to a store that is slow


def find_profile(volume: Volume) -> tuple[int, ...]:
    """The chunks that a start reads, by the profile of the volume's version, or of the nearest
    version before it. Raises StoreError.
    """
    base = volume.base
    found = profiles.find(
        base.repository, base.commit.image, volume.opened, lambda oid: _commit(base, oid)
    )
    if found is None:
        return ()
    commit_id, profile = found
    log.info("profile of %s: %d chunks", commit_id.hex()[:12], len(profile.chunks))
    if profile.chunk_size != base.commit.chunk_size:
        return ()
    return profile.chunks


def _commit(base: Base, oid: bytes) -> Commit:
    return base.local_commit(oid) or base.repository.read_commit(oid)


def recorded(volume: Volume) -> Profile:
    """What was read since the volume was opened. Raises UsageError where that is nothing."""
    touched = volume.base.demand.touched()
    if not touched:
        raise UsageError(f"nothing of {volume.name} was read yet: use it first")
    return Profile(volume.base.commit.chunk_size, tuple(touched))


class Recorder:
    """Stores what was read as the profile of the volume's version, once, if it has none: after
    `seconds`, or when the server ends before.
    """

    def __init__(self, volume: Volume, seconds: float) -> None:
        self._volume, self._seconds = volume, seconds
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="record", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        ended = self._stopped.wait(self._seconds)
        base = self._volume.base
        try:
            profile = recorded(self._volume)
            with open_store(base.repository.url, limit=LAST_LIMIT if ended else 60.0) as store:
                repository = Repository(store, "", base.commit.chunk_size, base.repository.form)
                image, commit_id = base.commit.image, self._volume.opened
                there = {one.commit for one in profiles.listed(repository, image)}
                if commit_id not in there and repository.has_commit(commit_id):
                    profiles.save(repository, image, commit_id, profile)
                    log.info("profile recorded: %d chunks", len(profile.chunks))
        except (StoreError, UsageError) as error:
            log.info("no profile was recorded: %s", error)
        except HorcruxError as error:
            log.warning("no profile was recorded: %s", error)

    def stop(self) -> None:
        """Record now, unless that is done."""
        self._stopped.set()
        self._thread.join(2 * LAST_LIMIT)

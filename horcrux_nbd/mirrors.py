"""Mirrors of a repository have to be of that repository."""

from __future__ import annotations

from collections.abc import Sequence

from .chunkstore import open_store
from .errors import Damaged, NotFound, StoreError, UsageError
from .repository.repository import Repository


def check_mirrors(repository: Repository, url: str, mirrors: Sequence[str]) -> None:
    """Raises UsageError where a mirror, or `url`, is of another repository. One that is away may
    be what mirrors are for.
    """
    for one in (url, *mirrors) if mirrors else ():
        try:
            with open_store(one, limit=2.0) as store:
                found = Repository.open(store).id
        except (StoreError, NotFound, Damaged):
            continue
        if found != repository.id:
            raise UsageError(
                f"{url} and its mirrors are not the same repository ({one} is another): mend the "
                "remote, or make the mirror with `horcrux-cli clone`"
            )

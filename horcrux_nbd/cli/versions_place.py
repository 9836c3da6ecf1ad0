"""TARGET of the commands about versions: a volume, an image, or a repository and what is in it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .. import config
from ..errors import HorcruxError, NotFound, UsageError
from ..names import DEFAULT_BRANCH, Version, is_name, parse_version
from .words import find_version, volume_state, where

if TYPE_CHECKING:
    from ..repository.commits import Commit
    from ..repository.repository import Repository
    from ..versions.history import Commits
    from ..versions.session import Session
    from ..volume.cache import Cache

TARGET_HELP = """TARGET is a VOLUME, an IMAGE or IMAGE@REF of a repository that this host knows,
or a REPO; then REF is IMAGE@REF, or left out where there is one image only."""


@dataclass(frozen=True)
class Place:
    """What TARGET names. `ref` is what it says itself, as in IMAGE@REF."""

    url: str
    image: str | None = None
    ref: str | None = None
    volume: str | None = None


def place(text: str) -> Place:
    """What `text` names: a remote, a volume, an image, a repository's URL or path, in this order.

    Raises NotFound, UsageError.
    """
    remotes = config.load().remotes
    if text in remotes:
        return Place(remotes[text])
    if is_name(text):
        state = volume_state(text)
        if state is not None:
            return Place(state.repository, state.image, None, text)
    image, at, _ = text.partition("@")
    if is_name(image) and "/" not in text:
        version = parse_version(text)
        found = repositories_of(version.image)
        if len(found) > 1:
            raise UsageError(
                f"image {version.image} is in several repositories ({', '.join(found)}): name the "
                f"repository, then {text}"
            )
        if found:
            return Place(found[0], version.image, version.ref if at else None)
        if at:
            raise NotFound(f"no repository that this host knows has an image {version.image!r}")
    return Place(where(text).url)


def repositories_of(image: str) -> list[str]:
    """URLs of the repositories that have `image`: those of this host's volumes, else the remotes.

    One that does not answer counts as one that has it not.
    """
    from .. import host
    from ..chunkstore import open_mirrored
    from ..repository.repository import Repository

    states = (volume_state(name) for name in host.names())
    urls = sorted({state.repository for state in states if state and state.image == image})
    if urls:
        return urls
    settings = config.load()
    for url in sorted(set(settings.remotes.values())):
        mirrors = settings.mirrors_of(url)
        with contextlib.suppress(HorcruxError), open_mirrored(url, mirrors, limit=5) as store:
            if image in Repository.open(store).refs.images():
                urls.append(url)
    return urls


@dataclass
class Opened:
    """An open TARGET. `session` is that of a volume, which has versions of its own."""

    repository: Repository
    cache: Cache
    commits: Commits
    image: str
    place: Place
    session: Session | None = None

    def find(self, ref: str | None) -> tuple[bytes, Commit]:
        """The version that REF names; without it what the volume lies on, or the main branch."""
        if self.session is not None:
            from ..versions.find import find

            found = find(self.session, ref or self.place.ref or "HEAD")
            return found.id, found.commit
        resolved = self.repository.resolve(
            Version(self.image, ref or self.place.ref or DEFAULT_BRANCH)
        )
        return resolved.id, resolved.commit

    def own(self) -> dict[bytes, Commit]:
        """The volume's commits that were never pushed."""
        return dict(self.session.own_commits()) if self.session is not None else {}


@contextlib.contextmanager
def opened(target: str, ref: str | None = None) -> Iterator[tuple[Opened, str | None]]:
    """An open TARGET, and REF without the image's name. Raises NotFound, StoreError."""
    from ..chunkstore import open_mirrored
    from ..repository.repository import Repository
    from ..versions.history import Commits
    from ..versions.session import Session, opened_cache

    found = place(target)
    with contextlib.ExitStack() as stack:
        if found.volume is not None:
            session = stack.enter_context(Session(found.volume, lock=False))
            assert found.image is not None
            commits = Commits(session.remote, session.cache, session.local)
            yield (
                Opened(session.remote, session.cache, commits, found.image, found, session),
                ref,
            )
            return
        mirrors = config.load().mirrors_of(found.url)
        repository = Repository.open(stack.enter_context(open_mirrored(found.url, mirrors)))
        cache = stack.enter_context(opened_cache())
        image = found.image
        if image is None:
            image, ref = _image_of(repository, ref)
        yield Opened(repository, cache, Commits(repository, cache), image, found), ref


def _image_of(repository: Repository, ref: str | None) -> tuple[str, str | None]:
    """The image, and the ref in it, that are meant in a repository."""
    images = repository.refs.images()
    if ref is not None and (ref in images or ref.partition("@")[0] in images):
        version = parse_version(ref)
        return version.image, version.ref if "@" in ref else None
    if len(images) == 1:
        return images[0], None if ref is None else ref.removeprefix("@")
    from .words import Where

    # It has none, or several, or not this one: the message is the same everywhere.
    return find_version(repository, Where(repository.url), ref).version.image, None

"""The words of the command line as click types: what they are, and how a shell completes them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from .. import config, paths
from ..errors import HorcruxError, NotFound, UsageError
from ..names import Version, check_name, is_name, parse_version
from ..units import parse_size

if TYPE_CHECKING:
    from ..repository.repository import Repository, Resolved
    from ..volume.state import VolumeState

WORDS = """\
\b
REPO     a repository: a URL (cp:///path, scp://user@host:/path,
         s3://bucket@region, minio://host:port/bucket), a path, or the
         name of a remote (horcrux-cli remote add)
VERSION  IMAGE or IMAGE@REF: AMCC, AMCC@main, AMCC@v3, AMCC@main~2,
         AMCC@1f3a9c; without @REF it is the branch main
VOLUME   the local name of a writable copy of a version"""


class Size(click.ParamType):  # type: ignore[type-arg]
    """Bytes: 4096, 512K, 1.5G."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        what = param.opts[-1] if param is not None and param.opts else "size"
        return parse_size(value, what)


class VolumeName(click.ParamType):  # type: ignore[type-arg]
    """A volume of this host, completed from those that there are."""

    name = "volume"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return [CompletionItem(name) for name in _volumes() if name.startswith(incomplete)]


class Place(click.ParamType):  # type: ignore[type-arg]
    """A repository (remote, URL or path), completed from remotes and folders; or a volume."""

    name = "repo"

    def __init__(self, volumes: bool = False) -> None:
        self._volumes = volumes

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        try:
            names = sorted(config.load().remotes)
        except HorcruxError:  # a broken file is told when a command runs
            names = []
        names += _volumes() if self._volumes else []
        found = [CompletionItem(name) for name in names if name.startswith(incomplete)]
        return found or [CompletionItem(incomplete, type="dir")]


def _volumes() -> list[str]:
    try:
        return sorted(name for name in os.listdir(paths.volumes()) if is_name(name))
    except OSError:
        return []


SIZE = Size()
VOLUME = VolumeName()
REPO = Place()
REPO_OR_VOLUME = Place(volumes=True)


@dataclass(frozen=True)
class Where:
    """A repository, and the version in it that a volume is of, if it was named by one."""

    url: str
    version: Version | None = None
    volume: str | None = None


def where(text: str) -> Where:
    """What REPO or VOLUME names. A remote wins over a volume of the same name.

    Raises UsageError, NotFound, which name what there is.
    """
    settings = config.load()
    if text not in settings.remotes and is_name(text):
        state = volume_state(text)
        if state is not None:
            return Where(state.repository, Version(state.image, state.base), text)
    try:
        return Where(settings.url(text))
    except UsageError:
        if not is_name(text):
            raise
        remotes, volumes = ", ".join(sorted(settings.remotes)), ", ".join(_volumes())
        raise NotFound(
            f"{text!r} is no remote (there is {remotes or 'none'}) and no volume (there is "
            f"{volumes or 'none'}); a folder here is written ./{text}"
        ) from None


def volume_state(name: str) -> VolumeState | None:
    """The state of the volume called `name`, None if there is none."""
    from ..volume.state import VolumeState

    try:
        return VolumeState.load(paths.volumes() / check_name("volume", name))
    except NotFound:
        return None


def find_version(repository: Repository, place: Where, text: str | None) -> Resolved:
    """The version `text` of a repository; without it that of the volume, or of the only image.

    `@REF` alone is a version of the volume's image. Raises NotFound, UsageError.
    """
    if text is not None and text.startswith("@") and place.version is not None:
        text = place.version.image + text
    if text is not None:
        return repository.resolve(parse_version(text))
    if place.version is not None:
        return repository.resolve(place.version)
    images = repository.refs.images()
    if len(images) == 1:
        return repository.resolve(Version(images[0]))
    if not images:
        raise NotFound(f"{repository.url} has no image yet: make one with `horcrux-cli generate`")
    raise UsageError(
        f"{repository.url} has {len(images)} images: say which: {', '.join(images[:8])}"
        f"{', …' if len(images) > 8 else ''}"
    )


def existing_folder(text: str) -> Path:
    """`text` as an absolute path of a folder, made if it is missing."""
    from .. import files

    path = Path(os.path.abspath(text))
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is no folder: choose another, or remove it")
    files.make_folder(path)
    return path

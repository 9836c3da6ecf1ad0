"""Names that users choose. The one place that decides which are allowed.

One strict pattern for images, branches, tags, volumes and remotes: a name is part of file paths,
store keys, socket paths and Docker volume names, so it can never escape a folder or need quoting.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .errors import UsageError

DEFAULT_BRANCH = "main"
MAX_NAME = 100  # a socket path has 107 bytes on Linux; a file name 255

_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9_.-]{{0,{MAX_NAME - 1}}}")
_REF = re.compile(rf"([A-Za-z0-9][A-Za-z0-9_.-]{{0,{MAX_NAME - 1}}})((?:~\d{{0,9}}|\^)*)", re.ASCII)
_HEX_ID = re.compile(r"[0-9a-f]{4,64}")


def check_name(kind: str, name: str) -> str:
    """`name` itself, if it may name a `kind` ("image", "volume", …); raises UsageError else."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        shown = name if len(str(name)) <= 60 else str(name)[:57] + "…"
        raise UsageError(
            f"{shown!r} cannot name {'an' if kind[0] in 'aeiou' else 'a'} {kind}: use 1 to "
            f"{MAX_NAME} of A-Z a-z 0-9 _ . - and begin with a letter or digit"
        )
    return name


def is_name(name: str) -> bool:
    """Whether `check_name` would take it; for names that a store lists."""
    return bool(_NAME.fullmatch(name))


def looks_like_id(text: str) -> bool:
    """Whether `text` can be a commit id or the beginning of one (4 to 64 hex digits)."""
    return bool(_HEX_ID.fullmatch(text))


@dataclass(frozen=True)
class Version:
    """`IMAGE@REF`: an image and a ref in it. The ref is as written, `main~2` included."""

    image: str
    ref: str = DEFAULT_BRANCH

    def __str__(self) -> str:
        return f"{self.image}@{self.ref}"

    @property
    def base_and_steps(self) -> tuple[str, int]:
        """The name or id that the ref begins with, and how many first parents to go back."""
        match = _REF.fullmatch(self.ref)
        assert match
        steps = 0
        for mark, count in re.findall(r"(~)(\d*)|\^", match.group(2)):
            steps += (int(count) if count else 1) if mark else 1
        return match.group(1), steps


def parse_version(text: str) -> Version:
    """A version as people write it, `IMAGE` or `IMAGE@REF`. Raises UsageError."""
    image, at, ref = text.partition("@")
    check_name("image", image)
    if not at:
        return Version(image)
    return Version(image, check_ref(ref))


def check_ref(ref: str) -> str:
    """`ref` itself if it can be one: a branch, tag or id, with `~N` or `^` behind it."""
    if not _REF.fullmatch(ref):
        raise UsageError(
            f"{ref[:60]!r} is no ref: write a branch, a tag or a commit id, with ~N to go back N"
        )
    return ref

"""What a Docker volume is made from: its name, its options, and the defaults of this host.

Keys may have leading dashes (`-o --name=AMCC`), as the original Horcrux wrote them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

from horcrux_nbd.config import KNOWN as CONFIGURED
from horcrux_nbd.config import MIN_CACHE, Config
from horcrux_nbd.errors import UsageError
from horcrux_nbd.names import DEFAULT_BRANCH, MAX_NAME, check_name, check_ref
from horcrux_nbd.units import parse_size
from horcrux_nbd.volume.options import PREFETCH, FillOptions, parse_record

KNOWN = CONFIGURED["docker"]
ON_REMOVE = ("refuse", "keep", "delete")
FILESYSTEMS = ("ext4", "xfs")
MAX_DOCKER_NAME = 200  # it names a file of ours, where `/` takes three bytes
_FLAGS = {"": True, "true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_MAKES = ("access", "name", "ref", "size")  # what says which volume, the others say how


@dataclass(frozen=True)
class Options:
    """What a volume is to be. Where `size` is given it is a new, empty one."""

    access: str = ""  # URL of the repository; empty where a new volume has none yet
    image: str = ""
    ref: str = DEFAULT_BRANCH
    size: int | None = None  # bytes
    fs: str = "ext4"
    read_only: bool = False
    on_remove: str = "refuse"
    cache: int | None = None  # bytes
    prefetch: str = PREFETCH[0]
    fill_rate: int = 0  # bytes per second; 0: no limit
    record: float = 0.0  # seconds; 0: no profile is recorded
    adopt: bool = False  # nothing was said: a volume of this host that has the name

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def for_server(self) -> dict[str, str]:
        """Keys of the nbdkit plugin."""
        return {} if self.cache is None else {"cache_size": str(self.cache)}

    @property
    def fill(self) -> FillOptions:
        """What the volume is made with."""
        return FillOptions(self.prefetch, self.fill_rate, self.record)


def check_docker_name(name: object) -> str:
    """`name` itself if a volume of Docker may be called so. Raises UsageError.

    A name of ours, or a version with or without its remote: `AMCC@main`, `team/AMCC@v3`. Docker
    does not check the names of a plugin's volumes.
    """
    if not isinstance(name, str) or not name:
        raise UsageError("the request names no volume: its body was empty")
    if len(name) > MAX_DOCKER_NAME:
        raise UsageError(
            f"volume name {name[:40]!r}… has {len(name)} characters: use {MAX_DOCKER_NAME} or less"
        )
    if "@" not in name:
        return check_name("volume", name)
    remote, image, ref = split_version(name)
    if remote:
        check_name("remote", remote)
    check_name("image", image)
    check_ref(ref)
    return name


def split_version(name: str) -> tuple[str, str, str]:
    """Remote (or empty), image and ref of a name that has an @."""
    image, _, ref = name.partition("@")
    remote, slash, rest = image.partition("/")
    return (remote, rest, ref) if slash else ("", image, ref)


def host_name(docker_name: str) -> str:
    """What the volume is called on this host (`horcrux-cli status`): has no @ and no slash.

    Two names of Docker never have the same one.
    """
    if "@" not in docker_name:
        return docker_name
    plain = re.sub(r"[^A-Za-z0-9_.-]", ".", docker_name)
    # `a@b` and a volume that is really called `a.b` are two: the digest keeps them apart.
    digest = sha256(docker_name.encode()).hexdigest()[:8]
    return f"{plain[: MAX_NAME - 9]}-{digest}"


def parse(name: str, given: Mapping[str, Any] | None, config: Config) -> Options:
    """What the volume `name` is to be. Raises UsageError, which names the option.

    A default counts where nothing was said, and those of `name`, `access`, `ref` and `size` only
    where none of them contradicts.
    """
    said = _plain(given or {})
    asked = dict(said)
    defaults = dict(config.docker)
    if "@" in name:
        remote, asked["name"], asked["ref"] = split_version(name)
        if remote:
            asked["access"] = remote
        for key in ("name", "ref", "access"):
            if key in said and said[key] != asked[key]:
                raise UsageError(
                    f"volume {name} says {key} {asked[key]!r}, and -o {key} says {said[key]!r}: "
                    "leave one out"
                )
    if "size" in asked and "ref" in asked:
        raise UsageError("-o size makes a new volume, which has no ref yet: leave out one of them")
    made = {key: asked[key] for key in _MAKES if key in asked}
    if not made:
        wanted = ("size",) if "size" in defaults and "name" not in defaults else _MAKES[:3]
        made = {key: defaults[key] for key in wanted if key in defaults}
        made = made if {"name", "size"} & set(made) else {}
    elif "size" not in made:
        made = {**{key: defaults[key] for key in _MAKES[:3] if key in defaults}, **made}
    how = {key: value for key, value in {**defaults, **asked}.items() if key not in _MAKES}
    common: dict[str, Any] = {
        "read_only": _flag(how.get("readonly", "false")),
        "on_remove": _one_of("on-remove", how.get("on-remove", "refuse"), ON_REMOVE),
        "cache": _cache(how.get("cache")),
        "prefetch": _one_of("prefetch", how.get("prefetch", PREFETCH[0]), PREFETCH),
        "fill_rate": parse_size(how.get("fill-rate", "0"), "-o fill-rate"),
        "record": parse_record(how.get("record", "false")),
    }
    if not made:
        return Options(adopt=True, **common)
    if "size" in made:
        return _new(name, made, how, common, config)
    if "fs" in asked:
        raise UsageError("-o fs is for a new volume: say its size with -o size, or leave out fs")
    if "name" not in made:
        raise UsageError(f"-o name is missing: say which image of {made.get('access', 'it')}")
    return Options(
        access=_access(made.get("access"), config),
        image=check_name("image", made["name"]),
        ref=check_ref(made.get("ref", DEFAULT_BRANCH)),
        **common,
    )


def _new(
    name: str,
    made: Mapping[str, str],
    how: Mapping[str, str],
    common: Mapping[str, Any],
    config: Config,
) -> Options:
    size = parse_size(made["size"], "-o size")
    if common["read_only"]:
        raise UsageError("-o readonly and -o size contradict each other: a new volume is empty")
    return Options(
        access=_place(made.get("access", config.docker.get("access")), config),
        image=check_name("image", made.get("name", name)),
        size=size,
        fs=_one_of("fs", how.get("fs", "ext4"), FILESYSTEMS),
        **common,
    )


def _plain(given: Mapping[str, Any]) -> dict[str, str]:
    """`given` without leading dashes. Raises UsageError for a key that is unknown or there twice.

    Values of unknown keys are not repeated: they may be secrets.
    """
    found: dict[str, str] = {}
    for written, value in given.items():
        key = written.lstrip("-").replace("_", "-")
        if key not in KNOWN:
            raise UsageError(
                f"unknown option {written[:60]!r}: the known ones are {', '.join(KNOWN)}"
            )
        if value is None:
            value = ""
        if not isinstance(value, str):
            raise UsageError(f"-o {key} has to be text")
        if found.get(key, value) != value:
            raise UsageError(f"-o {key} is there twice, with two values: leave one out")
        if not value and key != "readonly":
            raise UsageError(f"-o {key} is empty: write {key}=VALUE, or leave it out")
        found[key] = value
    return found


def _access(text: str | None, config: Config) -> str:
    """The URL of a repository. Without a word it is the only remote of the configuration."""
    if text is not None:
        return config.url(text)
    if len(config.remotes) == 1:
        return next(iter(config.remotes.values()))
    known = ", ".join(sorted(config.remotes)) or "none yet"
    raise UsageError(
        f"-o access is missing: say which repository, or give {config.file} a default "
        f'([docker] access = "REMOTE"; remotes: {known})'
    )


def _place(text: str | None, config: Config) -> str:
    """Where a new volume is to be pushed; empty for this host's own repository."""
    return "" if text is None else config.url(text)


def _flag(text: str) -> bool:
    if text.lower() not in _FLAGS:
        raise UsageError(f"-o readonly={text}: say true or false")
    return _FLAGS[text.lower()]


def _one_of(key: str, text: str, known: tuple[str, ...]) -> str:
    if text not in known:
        raise UsageError(f"-o {key}={text}: use one of {', '.join(filter(None, known))}")
    return text


def _cache(text: str | None) -> int | None:
    if text is None:
        return None
    size = parse_size(text, "-o cache")
    if size < MIN_CACHE:
        raise UsageError(f"-o cache={text} is too small: give at least 64M")
    return size

"""The configuration file: names for repositories, and what to do unless told otherwise.

    [remotes.team]
    url = "scp://images@nas:/srv/horcrux"
    mirrors = ["s3://bucket/horcrux"]

    [cache]
    size = "20G"

    [store]
    timeout = 60
    aws_credentials = "/etc/horcrux/aws-credentials"
    ssh_config = "/etc/horcrux/ssh_config"

    [attach]
    via = "nbd"

    [docker]
    access = "team"

TOML, at `paths.config_file()`. Strict: an unknown key is an error that names the known ones. It
holds no secret, and URLs cannot (chunkstore/url.py refuses them), so it may be shown and copied.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from . import files, paths
from .chunkstore.url import parse_store_url
from .errors import NotFound, UsageError
from .names import check_name, is_name
from .units import MiB, parse_size

# Files with what lets us in, and the variables that name them where the configuration does not.
ENVIRONMENT = {
    "aws_credentials": "AWS_SHARED_CREDENTIALS_FILE",
    "ssh_config": "HORCRUX_SSH_CONFIG",
}
KNOWN: dict[str, tuple[str, ...]] = {
    "remotes": (),  # names of the user's own, each with the keys of REMOTE
    "cache": ("size",),
    "store": ("timeout", *ENVIRONMENT),
    "attach": ("via",),
    # Options of `docker volume create` where it says nothing; horcrux_driver/options.py reads them.
    "docker": (
        "access",
        "name",
        "ref",
        "size",
        "fs",
        "readonly",
        "on-remove",
        "cache",
        "prefetch",
        "fill-rate",
        "record",
    ),
}
REMOTE = ("url", "mirrors")
WAYS = ("nbd", "ublk", "fuse")  # attach.choose.DRIVERS; a test compares them
MIN_CACHE = 64 * MiB  # the largest chunk: with less, nothing of such an image could be kept
_HEADER = re.compile(r"\s*\[")


@dataclass(frozen=True)
class Config:
    """What the file says, checked. `None` means: not said, the built-in default holds."""

    file: Path
    exists: bool = False
    remotes: Mapping[str, str] = field(default_factory=dict)  # name → URL
    mirrors: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # name → URLs of copies
    cache_size: int | None = None  # bytes
    store_timeout: int | None = None  # seconds
    credentials: Mapping[str, Path] = field(default_factory=dict)  # key of ENVIRONMENT → file
    attach_via: str | None = None
    docker: Mapping[str, str] = field(default_factory=dict)  # option → value, not parsed

    def plugin_options(self) -> dict[str, str]:
        """What the server of a volume is told of it."""
        told = {"cache_size": self.cache_size, "timeout": self.store_timeout}
        return {key: str(value) for key, value in told.items() if value is not None}

    def environment(self) -> dict[str, str]:
        """Variables for this process and its servers; what its environment says goes first.

        Raises UsageError where a file is missing, or others may read the keys in it.
        """
        found = {}
        for key, path in self.credentials.items():
            if ENVIRONMENT[key] in os.environ:
                continue
            try:
                mode = path.stat().st_mode
            except OSError as error:
                raise UsageError(f"{self.file}: store.{key} {path}: {error.strerror}") from None
            if key == "aws_credentials" and mode & 0o077:
                raise UsageError(f"{path} can be read by others: chmod 600 {path}")
            found[ENVIRONMENT[key]] = str(path)
        return found

    def mirrors_of(self, url: str) -> tuple[str, ...]:
        """Other places that hold the repository at `url`, as the remotes with that URL say."""
        found = [
            mirror
            for name, known in self.remotes.items()
            if known == url
            for mirror in self.mirrors.get(name, ())
        ]
        return tuple(dict.fromkeys(found))

    def url(self, repository: str) -> str:
        """The URL of `repository`: a remote's name, a URL, or a path. Raises UsageError."""
        if repository in self.remotes:
            return self.remotes[repository]
        try:
            return str(parse_store_url(repository))
        except UsageError as error:
            if not is_name(repository):
                raise
            known = ", ".join(sorted(self.remotes)) or "none"
            raise UsageError(f"{error} (remotes of {self.file}: {known})") from None


def load(file: Path | None = None) -> Config:
    """The configuration in `file`, by default this user's; built-in defaults where there is none.

    Raises UsageError, which names file and key.
    """
    file = file or paths.config_file()
    try:
        text = file.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return Config(file)
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is no UTF-8 text ({error.reason}): save it as such") from None
    return parse(text, file)


def parse(text: str, file: Path) -> Config:
    """`text` of `file` as configuration. Raises UsageError."""
    try:
        value = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # TOMLDecodeError is one, and there are more
        raise UsageError(f"{file} is no TOML: {error}") from None
    _check_keys(value, tuple(KNOWN), file, "")
    tables = {name: _table(value, name, file) for name in KNOWN}
    for name in ("cache", "store", "attach", "docker"):
        _check_keys(tables[name], KNOWN[name], file, f"{name}.")
    return Config(
        file=file,
        exists=True,
        remotes=_remotes(tables["remotes"], file),
        mirrors=_mirrors(tables["remotes"], file),
        cache_size=_cache_size(tables["cache"], file),
        store_timeout=_store_timeout(tables["store"], file),
        credentials=_credentials(tables["store"], file),
        attach_via=_via(tables["attach"], file),
        docker=_docker(tables["docker"], file),
    )


def _check_keys(found: Mapping[str, Any], known: tuple[str, ...], file: Path, where: str) -> None:
    for key in found:
        if key not in known:
            names = ", ".join(where + name for name in known)
            raise UsageError(f"{file}: unknown key {where + key!r}: the known ones are {names}")


def _table(value: Mapping[str, Any], name: str, file: Path) -> Mapping[str, Any]:
    table = value.get(name, {})
    if not isinstance(table, dict):
        raise UsageError(f"{file}: {name} is no table: write [{name}] and its keys below")
    return table


def _remotes(table: Mapping[str, Any], file: Path) -> dict[str, str]:
    found = {}
    for name in table:
        if not is_name(name):
            raise UsageError(f"{file}: {name!r} cannot name a remote: use A-Z a-z 0-9 _ . -")
        remote = _table(table, name, file)
        _check_keys(remote, REMOTE, file, f"remotes.{name}.")
        if not isinstance(remote.get("url"), str):
            raise UsageError(f'{file}: remotes.{name} needs a URL: url = "scp://user@host:/path"')
        try:
            found[name] = str(parse_store_url(remote["url"]))
        except UsageError as error:
            raise UsageError(f"{file}: remotes.{name}: {error}") from None
    return found


def _mirrors(table: Mapping[str, Any], file: Path) -> dict[str, tuple[str, ...]]:
    found = {}
    for name, remote in table.items():
        urls = remote.get("mirrors", [])
        if not isinstance(urls, list) or not all(isinstance(url, str) for url in urls):
            raise UsageError(
                f'{file}: remotes.{name}.mirrors is no list of URLs: mirrors = ["cp:///path"]'
            )
        try:
            kept = tuple(str(parse_store_url(url)) for url in urls)
        except UsageError as error:
            raise UsageError(f"{file}: remotes.{name}: {error}") from None
        if kept:
            found[name] = kept
    return found


def _cache_size(table: Mapping[str, Any], file: Path) -> int | None:
    size = table.get("size")
    if size is None:
        return None
    if isinstance(size, bool) or not isinstance(size, str | int):
        raise UsageError(f'{file}: cache.size {size!r} is no size: write size = "20G"')
    found = parse_size(size, f"{file}: cache.size")
    if found < MIN_CACHE:
        raise UsageError(f"{file}: cache.size {size!r} is too small: give at least 64M")
    return found


def _store_timeout(table: Mapping[str, Any], file: Path) -> int | None:
    timeout = table.get("timeout")
    if timeout is not None and (
        isinstance(timeout, bool) or not isinstance(timeout, int) or not 1 <= timeout <= 3600
    ):
        raise UsageError(f"{file}: store.timeout {timeout!r}: give whole seconds, 1 to 3600")
    return timeout


def _via(table: Mapping[str, Any], file: Path) -> str | None:
    via = table.get("via")
    if via is not None and via not in WAYS:
        raise UsageError(f"{file}: attach.via {via!r} is unknown: use one of {', '.join(WAYS)}")
    return via


def _credentials(table: Mapping[str, Any], file: Path) -> dict[str, Path]:
    found = {}
    for key in ENVIRONMENT:
        path = table.get(key)
        if path is None:
            continue
        if not isinstance(path, str) or not path.startswith("/"):
            raise UsageError(f'{file}: store.{key} {path!r}: write a whole path, "/etc/…"')
        found[key] = Path(path)
    return found


def _docker(table: Mapping[str, Any], file: Path) -> dict[str, str]:
    found = {}
    for key, value in table.items():
        if isinstance(value, bool):
            value = str(value).lower()
        if not isinstance(value, str | int):
            raise UsageError(f'{file}: docker.{key} {value!r} is no value: write {key} = "…"')
        found[key] = str(value)
    return found


# ---- changes ------------------------------------------------------------------------------------


def add_remote(
    name: str, url: str, file: Path | None = None, *, mirrors: Sequence[str] = ()
) -> str:
    """Let `name` stand for the repository at `url`, of which there are `mirrors`; the URL as it is
    kept.

    The rest of the file stays as it is, comments included. Raises UsageError where the name is
    taken by another URL.
    """
    check_name("remote", name)
    kept = str(parse_store_url(url))
    others = tuple(str(parse_store_url(mirror)) for mirror in mirrors)
    if len({kept, *others}) != 1 + len(others):
        raise UsageError(f"remote {name}: a URL is there twice: give each place once")
    with _editing(file or paths.config_file()) as (old, text, write):
        if name in old.remotes:
            there = old.remotes[name], *old.mirrors.get(name, ())
            if there == (kept, *others):
                return kept
            raise UsageError(
                f"remote {name} is {' '.join(there)} already: `horcrux-cli remote rm {name}` "
                "first, or choose another name"
            )
        gap = "" if not text else "\n" if text.endswith("\n") else "\n\n"
        # JSON's strings are TOML's basic strings, for what URLs consist of.
        table = f"[remotes.{_key(name)}]\nurl = {json.dumps(kept, ensure_ascii=False)}\n"
        if others:
            table += f"mirrors = {json.dumps(others, ensure_ascii=False)}\n"
        now = {**old.mirrors, name: others} if others else old.mirrors
        write(text + gap + table, {**old.remotes, name: kept}, now)
    return kept


def remove_remote(name: str, file: Path | None = None) -> None:
    """Forget a remote; what is stored there stays. Raises NotFound."""
    with _editing(file or paths.config_file()) as (old, text, write):
        if name not in old.remotes:
            known = ", ".join(sorted(old.remotes)) or "none"
            raise NotFound(f"there is no remote {name!r} in {old.file}: there is {known}")
        remotes = {other: url for other, url in old.remotes.items() if other != name}
        mirrors = {other: urls for other, urls in old.mirrors.items() if other != name}
        write(_without_table(text, name), remotes, mirrors)


class _Write:
    """Replaces the file, once what it would say then is what was meant."""

    def __init__(self, old: Config) -> None:
        self._old = old

    def __call__(
        self, text: str, remotes: Mapping[str, str], mirrors: Mapping[str, tuple[str, ...]]
    ) -> None:
        file = self._old.file
        by_hand = f"{file} is written in a way that cannot be changed from here: edit it by hand"
        try:
            new = parse(text, file)
        except UsageError:
            raise UsageError(by_hand) from None
        meant = replace(self._old, exists=True, remotes=remotes, mirrors=mirrors)
        if new != meant:
            raise UsageError(by_hand)
        # Through a link, so that a file kept elsewhere (a repository of settings) stays there.
        files.publish(file.resolve(), text.encode())


@contextlib.contextmanager
def _editing(file: Path) -> Iterator[tuple[Config, str, _Write]]:
    """The configuration, its text, and what writes it; one editor at a time."""
    files.make_folder(file.parent)
    with files.opened(file.parent, os.O_RDONLY | os.O_DIRECTORY) as folder:
        fcntl.flock(folder, fcntl.LOCK_EX)
        old = load(file)
        text = file.read_text(encoding="utf-8") if old.exists else ""
        yield old, text, _Write(old)


def _key(name: str) -> str:
    """`name` as a TOML key: a dot has to be quoted."""
    return f'"{name}"' if "." in name else name


def _without_table(text: str, name: str) -> str:
    """`text` without the table [remotes.NAME]; comments above the next one stay with that."""
    header = re.compile(rf"\s*\[\s*remotes\s*\.\s*[\"']?{re.escape(name)}[\"']?\s*\]\s*(#.*)?")
    lines = text.splitlines(keepends=True)
    starts = [n for n, line in enumerate(lines) if header.fullmatch(line.rstrip("\r\n"))]
    if not starts:
        return text
    stop = starts[0] + 1
    while stop < len(lines) and not _HEADER.match(lines[stop]):
        stop += 1
    if stop < len(lines):
        while lines[stop - 1].lstrip().startswith("#"):
            stop -= 1
    return "".join(lines[: starts[0]] + lines[stop:])

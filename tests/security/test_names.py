"""100,000 names and 100,000 URLs: what is taken stays in its folder, all else is one clear line."""

from __future__ import annotations

import os
import random
import secrets
from pathlib import Path, PurePosixPath

import pytest

from horcrux_driver import options as driver_options
from horcrux_nbd import host, paths, server
from horcrux_nbd.chunkstore import base
from horcrux_nbd.chunkstore.url import parse_store_url
from horcrux_nbd.errors import HorcruxError, UsageError
from horcrux_nbd.names import check_name, check_ref, is_name, parse_version
from horcrux_nbd.repository import keyring
from horcrux_nbd.repository.refs import Refs

from ..repository.memory_store import MemoryStore

COUNT = 100_000
PIECES = [
    "..", ".", "/", "//", "\\", "~", "~1", "^", "@", ":", "%2e", "%2F", "%00", "\0", "\n", "\r",
    " ", "\t", "a", "AMCC", "main", "-", "--", "_", "é", "ｅ", "．．", "／", "\u202e", "\ud800",
    "\udc80", "😀", "$(id)", "`id`", ";", "|", "&", "*", "?", "#", "'", '"', "[", "]", "{",
    "x" * 99, "x" * 101, "etc", "passwd", "horcrux.json", "refs", "objects", ".tmp-", "con",
    "9", "²", "٣",
]  # fmt: skip
SCHEMES = [
    "cp://", "scp://", "s3://", "minio://", "CP://", "cp:", "file://", "http://", "", "s3:/", "s3:///",
    "scp://u@", "scp://u:p@", "s3://k:s@",
]  # fmt: skip
HOSTS = ["h", "h:22", "h:0", "h:99999", "[::1]", "[::1]:22", "-oProxyCommand=id", "a b", "h:", ""]


def words(rng: random.Random, most: int = 5) -> str:
    return "".join(rng.choice(PIECES) for _ in range(rng.randrange(most + 1)))


def inside(path: Path, folder: Path) -> bool:
    """Whether `path` is a name directly in `folder`, by the rules of the file system."""
    return os.path.normpath(path) == str(path) and path.parent == folder and "\0" not in str(path)


def test_names() -> None:
    seed = secrets.token_hex(4)
    rng = random.Random(seed)
    taken, said = 0, list[str]()
    store = MemoryStore()
    refs = Refs(store)
    for number in range(COUNT):
        name = words(rng)
        what = f"{name!r}, number {number} of seed {seed}"
        ok = is_name(name)
        try:
            assert check_name("volume", name) == name
        except UsageError as error:
            said.append(str(error))
            assert not ok, what
            for use in (server.folder_of, host.folder_of, refs.tags) if number % 20 == 0 else ():
                with pytest.raises(UsageError):
                    use(name)
        else:
            assert ok, what
            taken += 1
            assert inside(server.folder_of(name), paths.run()), what
            assert inside(host.folder_of(name), paths.volumes()), what
            refs.tag(name, name)  # a key that the store takes
        for parse in (check_ref, parse_version, driver_options.check_docker_name):
            try:
                parse(name)  # type: ignore[operator]
            except UsageError as error:
                said.append(str(error))
        if keyring.is_id(name):
            assert inside(keyring._path(paths.run(), name), paths.run()), what
        try:
            base.check_key(name)
        except HorcruxError:
            pass
        else:
            joined = os.path.normpath(f"/store/{name}")
            assert joined == f"/store/{name}", what
            assert ".." not in PurePosixPath(joined).parts, what
    assert not any("\n" in line or len(line) > 1000 for line in said)
    assert taken > COUNT // 100  # or nothing was tested


def test_urls() -> None:
    seed = secrets.token_hex(4)
    rng = random.Random(seed)
    taken, said = 0, list[str]()
    for number in range(COUNT):
        scheme = rng.choice(SCHEMES)
        authority = rng.choice(HOSTS) if rng.random() < 0.7 else words(rng, 3)
        tail = "/" + words(rng) if rng.random() < 0.8 else words(rng, 2)
        url = scheme + ("" if scheme == "cp://" else authority) + (":" * rng.randrange(2)) + tail
        if rng.random() < 0.3:
            key = rng.choice(["region", "endpoint", "x", "password"])
            url += f"?{key}={rng.choice(['eu-west-1', 'http://h', words(rng, 2)])}"
        what = f"{url!r}, number {number} of seed {seed}"
        try:
            found = parse_store_url(url)
        except UsageError as error:
            said.append(str(error))
            continue
        taken += 1
        again = parse_store_url(str(found))
        assert again == found, what
        assert "\0" not in str(found), what
        assert "\n" not in str(found), what
        if scheme in ("scp://u:p@", "s3://k:s@"):
            raise AssertionError(f"a secret was taken: {what}")
        if found.scheme == "cp":
            assert os.path.isabs(found.path), what
            assert os.path.normpath(found.path) == found.path, what
        if found.scheme == "scp":
            assert not found.host.startswith("-"), what  # an option of ssh
    assert not any("\n" in line or len(line) > 1000 for line in said)
    assert taken > COUNT // 100


def test_what_a_store_lists_is_no_path(tmp_path: Path) -> None:
    """Whoever can write to a store chooses names: those that are none are passed over."""
    store = MemoryStore()
    for name in ("..", ".", "a\nb", "-x", "x" * 101):
        store.objects[f"refs/{name}/heads/main/99999999999999999998"] = b"{}"
    assert Refs(store).images() == []

"""The configuration file: strict, without secrets, and changed without losing a comment."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

import pytest

from horcrux_nbd import config
from horcrux_nbd.attach.choose import DRIVERS
from horcrux_nbd.errors import NotFound, UsageError
from horcrux_nbd.units import GiB

FULL = """\
# Ours, since 2024.
[remotes.team]
url = "scp://images@nas:/srv/horcrux"  # the big one

# The other one.
[remotes."with.dot"]
# it has a note
url = "s3://bucket/prefix?region=eu-west-1"

# How much.
[cache]
size = "20G"

[store]
timeout = 20

[attach]
via = "fuse"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(FULL)
    return path


def test_all_keys(file: Path) -> None:
    found = config.load(file)
    assert found.exists
    assert dict(found.remotes) == {
        "team": "scp://images@nas:/srv/horcrux",
        "with.dot": "s3://bucket/prefix?region=eu-west-1",
    }
    assert (found.cache_size, found.attach_via) == (20 * GiB, "fuse")
    assert found.store_timeout == 20
    assert found.plugin_options() == {"cache_size": str(20 * GiB), "timeout": "20"}


def test_none(tmp_path: Path) -> None:
    found = config.load(tmp_path / "none.toml")
    assert not found.exists
    assert (dict(found.remotes), found.cache_size, found.attach_via) == ({}, None, None)
    assert found.plugin_options() == {}


def test_ways_are_those_that_there_are() -> None:
    assert set(config.WAYS) == set(DRIVERS)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[cash]", "unknown key 'cash': the known ones are remotes, cache, store, attach, docker"),
        ('[cache]\nsice = "1G"', "unknown key 'cache.sice': the known ones are cache.size"),
        ('[attach]\nhow = "nbd"', "attach.via"),
        ('[remotes.x]\nurl = "cp:///x"\nkey = "1"', "unknown key 'remotes.x.key'"),
        ("[remotes.x]", "remotes.x needs a URL"),
        ("[remotes.x]\nurl = 5", "remotes.x needs a URL"),
        ("[remotes]\nx = 5", "x is no table"),
        ("remotes = 5", "remotes is no table"),
        ('[remotes."../x"]\nurl = "cp:///x"', "cannot name a remote"),
        ('[remotes.x]\nurl = "ftp://x"', "remotes.x: ftp:// is no store"),
        ('[remotes.x]\nurl = "scp://me:hunter2@nas:/x"', "password"),
        ('[remotes.x]\nurl = "s3://b?secret_key=hunter2"', "no secret"),
        ('[cache]\nsize = "much"', "cache.size 'much' is no size"),
        ("[cache]\nsize = true", "cache.size True is no size"),
        ('[cache]\nsize = "1M"', "too small"),
        ('[attach]\nvia = "magic"', "use one of nbd, ublk, fuse"),
        ("[cache", "is no TOML"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "config.toml"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        config.load(file)
    assert said in str(caught.value)
    assert str(file) in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_no_text(tmp_path: Path) -> None:
    (tmp_path / "c").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="no UTF-8"):
        config.load(tmp_path / "c")


def test_repositories(file: Path, tmp_path: Path) -> None:
    found = config.load(file)
    assert found.url("team") == "scp://images@nas:/srv/horcrux"
    assert found.url(str(tmp_path)) == f"cp://{tmp_path}"
    assert found.url("s3://bucket@eu-west-1") == "s3://bucket?region=eu-west-1"
    with pytest.raises(UsageError, match=r"tema.*remotes of .*: team, with\.dot"):
        found.url("tema")


# ---- changes


def test_add_keeps_the_rest(file: Path) -> None:
    assert config.add_remote("new", "scp://me@nas:22/x", file) == "scp://me@nas:22/x"
    text = file.read_text()
    assert text.startswith(FULL)
    assert config.load(file).remotes["new"] == "scp://me@nas:22/x"


def test_add_to_none(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "config.toml"
    config.add_remote("a", "cp:///a", file)
    config.add_remote("b.c", 'cp:///odd "name" \\ ü', file)
    assert dict(config.load(file).remotes) == {"a": "cp:///a", "b.c": 'cp:///odd "name" \\ ü'}


def test_add_twice(file: Path) -> None:
    before = file.read_text()
    config.add_remote("team", "scp://images@nas:/srv/horcrux", file)
    with pytest.raises(UsageError, match="team is scp://images@nas"):
        config.add_remote("team", "cp:///other", file)
    assert file.read_text() == before


@pytest.mark.parametrize(
    ("name", "url"), [("../x", "cp:///x"), ("x", "ftp://x"), ("x", "scp://me:hunter2@nas:/x")]
)
def test_add_nothing_wrong(file: Path, name: str, url: str) -> None:
    with pytest.raises(UsageError):
        config.add_remote(name, url, file)
    assert file.read_text() == FULL


def test_remove_keeps_the_rest(file: Path) -> None:
    config.remove_remote("with.dot", file)
    text = file.read_text()
    assert "it has a note" not in text
    assert "# How much.\n[cache]" in text
    assert "# Ours" in text
    config.remove_remote("team", file)
    assert "# The other one." in file.read_text()
    found = config.load(file)
    assert (dict(found.remotes), found.cache_size) == ({}, 20 * GiB)


def test_remove_the_last(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    config.add_remote("a", "cp:///a", file)
    config.remove_remote("a", file)
    assert file.read_text() == ""
    with pytest.raises(NotFound, match="there is none"):
        config.remove_remote("a", file)


@pytest.mark.parametrize(
    "text",
    [
        '[remotes]\nx = {url = "cp:///x"}\n',
        'remotes.x.url = "cp:///x"\n',
        '[remotes.x]\nurl = "cp:///x"\n[remotes."y"]\nurl = """cp:///y"""\n[cache] # [remotes.x]\n',
    ],
)
def test_remove_or_say_by_hand(tmp_path: Path, text: str) -> None:
    """However it is written, the file says what was meant afterwards, or is what it was."""
    file = tmp_path / "config.toml"
    file.write_text(text)
    meant, done = dict(config.load(file).remotes), False
    with contextlib.suppress(UsageError):
        config.remove_remote("x", file)
        done = bool(meant.pop("x"))
    assert dict(config.load(file).remotes) == meant
    assert done or file.read_text() == text


def test_a_broken_file_is_not_changed(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text("[cash]")
    with pytest.raises(UsageError, match="cash"):
        config.add_remote("x", "cp:///x", file)
    assert file.read_text() == "[cash]"


def test_a_link_stays_one(file: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.toml"
    link.symlink_to(file)
    config.add_remote("new", "cp:///x", link)
    assert link.is_symlink()
    assert "new" in config.load(file).remotes


def test_two_editors_lose_nothing(file: Path) -> None:
    threads = [
        threading.Thread(target=config.add_remote, args=(f"n{n}", f"cp:///{n}", file))
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(config.load(file).remotes) == 10


# ---- credentials


def test_files_with_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in config.ENVIRONMENT.values():
        monkeypatch.delenv(name, raising=False)
    keys = tmp_path / "keys"
    found = config.parse(f'[store]\naws_credentials = "{keys}"\n', Path("/etc/horcrux/config.toml"))
    with pytest.raises(UsageError, match="No such file"):
        found.environment()
    keys.touch(0o644)
    with pytest.raises(UsageError, match="chmod 600"):
        found.environment()
    keys.chmod(0o600)
    assert found.environment() == {"AWS_SHARED_CREDENTIALS_FILE": str(keys)}
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/mine")
    assert found.environment() == {}
    ssh = config.parse(f'[store]\nssh_config = "{keys}"\n', Path("/etc/horcrux/config.toml"))
    assert ssh.environment() == {"HORCRUX_SSH_CONFIG": str(keys)}
    with pytest.raises(UsageError, match="whole path"):
        config.parse('[store]\nssh_config = "keys"\n', Path("/etc/horcrux/config.toml"))

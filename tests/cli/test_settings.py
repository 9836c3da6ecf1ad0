"""`config` and `remote`."""

from __future__ import annotations

from pathlib import Path

from .support import fails, run


def test_config(horcrux_host: Path) -> None:
    found = run("config", "--json").json
    assert found == {
        "file": str(horcrux_host / "config.toml"),
        "exists": False,
        "root": str(horcrux_host / "root"),
        "run": str(horcrux_host / "run"),
        "cache": {"folder": str(horcrux_host / "root" / "cache"), "size": None},
        "store": {"timeout": None},
        "attach": {"via": None},
        "remotes": {},
        "mirrors": {},
    }
    assert "not there: defaults" in run("config").out
    run("remote", "add", "team", "scp://me@nas:/srv")
    with open(horcrux_host / "config.toml", "a") as file:
        file.write('[cache]\nsize = "20G"\n')
    found = run("config", "--json").json
    assert found["exists"]
    assert found["cache"]["size"] == 20 << 30
    assert found["remotes"] == {"team": "scp://me@nas:/srv"}
    assert "remotes.team" in run("config").out


def test_a_wrong_file(horcrux_host: Path) -> None:
    """Told by every command that needs it, and by none that does not."""
    horcrux_host.mkdir()
    (horcrux_host / "config.toml").write_text("[cash]")
    for words in (["config"], ["ls"], ["remote", "ls"], ["remote", "add", "x", "cp:///x"]):
        said = fails(2, *words)
        assert "unknown key 'cash': the known ones are remotes, cache, store, attach" in said
        assert str(horcrux_host / "config.toml") in said
    run("plugin-path")


def test_remotes() -> None:
    assert "no remote yet" in run("remote", "ls").err
    assert run("remote", "add", "team", "scp://me@nas:/srv").out == "team is scp://me@nas:/srv\n"
    assert run("remote", "ls", "--json").json == {"team": "scp://me@nas:/srv"}
    assert run("remote", "ls").out.splitlines()[1].split() == ["team", "scp://me@nas:/srv"]
    assert "team is scp" in fails(2, "remote", "add", "team", "cp:///other")
    assert "team is forgotten" in run("remote", "rm", "team").out
    assert "there is none" in fails(3, "remote", "rm", "team")


def test_no_secrets(horcrux_host: Path) -> None:
    said = fails(2, "remote", "add", "x", "scp://me:hunter2@nas:/srv")
    assert "hunter2" not in said
    assert not (horcrux_host / "config.toml").exists()

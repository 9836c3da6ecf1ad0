"""The keys that a host keeps: where, for whom to read, and what happens without."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from horcrux_nbd import paths
from horcrux_nbd.errors import KeyRequired, UsageError
from horcrux_nbd.repository import keyring, keys
from horcrux_nbd.repository.objects import PLAIN

MASTER = bytes(range(32))
ID = "0123456789abcdef"


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyring, "_known", {})
    monkeypatch.delenv(keyring.KEY_FILE, raising=False)


@pytest.mark.parametrize("for_good", [False, True])
def test_a_key_is_kept_for_its_owner_only(for_good: bool) -> None:
    previous = os.umask(0)
    try:
        path = keyring.keep(ID, MASTER, for_good=for_good)
    finally:
        os.umask(previous)
    assert path.parent.parent == (paths.root() if for_good else paths.run())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert keyring.find(ID) == MASTER
    assert keyring.is_known(ID)
    assert keyring.keep(ID, bytes(32), for_good=for_good) == path  # another one
    assert keyring.find(ID) == bytes(32)
    assert keyring.forget(ID)
    assert not keyring.forget(ID)
    assert keyring.find(ID) is None
    assert not keyring.is_known(ID)


def test_without_a_key() -> None:
    assert keyring.form_of_host(ID, "cp:///r", encrypted=False) is PLAIN
    with pytest.raises(KeyRequired, match="horcrux-cli key unlock cp:///r"):
        keyring.form_of_host(ID, "cp:///r")
    keyring.remember(ID, MASTER)
    assert keyring.form_of_host(ID, "cp:///r").encrypted


def test_an_exported_key_needs_no_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys.export_master(tmp_path / "k", ID, MASTER)
    monkeypatch.setenv(keyring.KEY_FILE, str(tmp_path / "k"))
    assert keyring.form_of_host(ID, "cp:///r").encrypted
    with pytest.raises(KeyRequired):
        keyring.form_of_host("other", "cp:///r")


@pytest.mark.parametrize("bad", ["../../etc/x", "a/b", "", "a" * 65, "a\0b", "é", "."])
def test_an_id_from_a_store_is_no_path(bad: str) -> None:
    assert not keyring.is_id(bad)
    assert not keyring.is_known(bad)
    with pytest.raises(UsageError):
        keyring.keep(bad, MASTER)
    with pytest.raises(UsageError):
        keyring.find(bad)


def test_a_file_that_is_another_key() -> None:
    keyring.keep(ID, MASTER)
    path = keyring.keep("other", MASTER)
    path.with_name(f"{ID}.key").write_bytes(path.read_bytes())
    with pytest.raises(UsageError, match="not the key that it is named after"):
        keyring.find(ID)

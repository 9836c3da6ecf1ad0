"""Lets tests that were written for plain repositories run on encrypted ones (`--encrypted`)."""

from __future__ import annotations

from typing import Any

import pytest

from horcrux_nbd.chunkstore.base import ChunkStore
from horcrux_nbd.repository import configuration, keyring
from horcrux_nbd.repository.keys import KEY_FILE, Secret
from horcrux_nbd.repository.repository import Repository

SECRET = Secret(KEY_FILE, bytes(range(32)))


def encrypt_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every repository that is made from now on is encrypted, and this host has its key."""
    create = Repository.create.__func__  # type: ignore[attr-defined]
    first_key = configuration.first_key

    def create_encrypted(
        cls: type[Repository], store: ChunkStore, *args: Any, **kwargs: Any
    ) -> Repository:
        if kwargs.get("copy_of") is None:
            kwargs.setdefault("secret", SECRET)
        made: Repository = create(cls, store, *args, **kwargs)
        return made

    def kept(store: ChunkStore, config: dict[str, Any], secret: Secret) -> str:
        slot = first_key(store, config, secret)
        master = keyring.find(config["id"])
        assert master is not None
        keyring.keep(config["id"], master)  # for the processes that the test starts
        return slot

    monkeypatch.setattr(Repository, "create", classmethod(create_encrypted))
    monkeypatch.setattr("horcrux_nbd.repository.repository.first_key", kept)

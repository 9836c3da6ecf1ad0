"""The golden encrypted repository: this release opens it by each of its keys.

As in test_golden.py: it was made once, and is never made again.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from horcrux_nbd.chunkstore import open_store
from horcrux_nbd.errors import KeyRequired
from horcrux_nbd.names import parse_version
from horcrux_nbd.repository import keyring, keys
from horcrux_nbd.repository.configuration import read_config
from horcrux_nbd.repository.repository import Repository
from horcrux_nbd.repository.verify import verify

from ..repository.second_reader import Reader
from .make import PASSPHRASE

GOLDEN = Path(__file__).parent / "v1-encrypted"
KEY = GOLDEN.with_suffix(".key")
VERSIONS: dict[str, dict[str, Any]] = json.loads(GOLDEN.with_suffix(".json").read_text())


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyring, "_known", {})


def test_it_opens_by_each_of_its_keys() -> None:
    with open_store(str(GOLDEN)) as store:
        with pytest.raises(KeyRequired):
            Repository.open(store)
        repository_id = read_config(store).id
        masters = {
            keys.unlock(store, repository_id, secret)[0]
            for secret in (keys.read_key_file(KEY), keys.passphrase(PASSPHRASE))
        }
        (master,) = masters
        keyring.remember(repository_id, master)
        report = verify(store, data=True)
        assert report.problems == []
        assert (report.images, report.versions) == (6, len(VERSIONS))
        repository = Repository.open(store)
        for commit, expected in VERSIONS.items():
            version = parse_version(f"{expected['image']}@{commit}")
            found = repository.resolve(version).commit
            assert found.size == expected["size"]
            chunks = {
                str(number): hashlib.sha256(repository.read_chunk(oid, found.chunk_size))
                for number, oid in repository.index(found).entries()
            }
            assert {n: h.hexdigest() for n, h in chunks.items()} == expected["chunks"]


@pytest.mark.parametrize("secret", [KEY.read_bytes(), PASSPHRASE.encode()])
def test_the_second_reader_reads_it_too(secret: bytes) -> None:
    reader = Reader(GOLDEN, secret)
    assert reader.resolve("AMCC", "v1")
    assert reader.head("AMCC", "main")
    for commit, expected in VERSIONS.items():
        value = reader.commit(bytes.fromhex(commit))
        assert value["size"] == expected["size"]
        chunks = {
            str(number): hashlib.sha256(reader.chunk(oid, value["chunk_size"])).hexdigest()
            for number, oid in reader.entries(value)
        }
        assert chunks == expected["chunks"]

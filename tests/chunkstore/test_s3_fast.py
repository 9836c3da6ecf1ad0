"""Fast GETs give what boto3 gives, and leave every trouble to it."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator

import pytest

from horcrux_nbd.chunkstore import ChunkStore, open_store
from horcrux_nbd.chunkstore import s3_fast as fast
from horcrux_nbd.chunkstore.s3 import S3Store
from horcrux_nbd.errors import KeyNotFound, StoreUnavailable

from ..servers.fixtures import moto_server, s3
from ..servers.moto_s3 import S3Server
from ..servers.proxy import Network, proxy

__all__ = ["moto_server", "s3"]

KEY = "objects/ab/abcd"
DATA = random.Random(1).randbytes(300_000)


@pytest.fixture
def network(s3: S3Server) -> Iterator[Network]:
    with proxy(s3.port) as network:
        yield network


@pytest.fixture
def store(s3: S3Server, network: Network) -> Iterator[ChunkStore]:
    with open_store(s3.url(s3.make_bucket(), "p", network.port), limit=8) as store:
        store.put(KEY, DATA)
        for _ in range(fast.AFTER):
            assert store.get(KEY) == DATA
        yield store


def opened(store: ChunkStore) -> fast.FastGets:
    inner = store.store  # type: ignore[attr-defined]
    assert isinstance(inner, S3Store)
    return inner._fast


def test_the_first_are_not_its_affair_and_the_rest_are(store: ChunkStore) -> None:
    assert opened(store)._store is None
    assert store.get(KEY) == DATA
    assert opened(store)._store is not None


def test_ranges(store: ChunkStore) -> None:
    for offset, length in ((0, 10), (5, None), (299_990, 100), (0, 400_000), (299_999, 1)):
        stop = None if length is None else offset + length
        assert store.get(KEY, offset, length) == DATA[offset:stop]
    assert store.get(KEY, 300_000, 10) == b"", "behind the end"
    assert store.get(KEY, 7, 0) == b""
    assert opened(store)._resting_until == 0 or store.get(KEY) == DATA


def test_what_is_missing(store: ChunkStore) -> None:
    with pytest.raises(KeyNotFound):
        store.get("objects/ab/abce")
    assert opened(store)._resting_until == 0, "no trouble of its own"


def test_a_cut_in_the_middle(store: ChunkStore, network: Network) -> None:
    assert store.get(KEY) == DATA
    network.cut()
    network.cut_after(100_000)
    assert store.get(KEY) == DATA
    assert network._cut_after is None, "it was cut"
    assert store.get(KEY) == DATA, "by boto3, for a while"
    assert opened(store)._resting_until > 0


def test_a_server_that_is_away(store: ChunkStore, network: Network) -> None:
    assert store.get(KEY) == DATA
    network.refuse()
    with pytest.raises(StoreUnavailable, match=r"cannot connect|broke"):
        store.get(KEY)
    network.accept()
    assert store.get(KEY) == DATA


def test_a_fork_loses_its_threads_and_does_without(store: ChunkStore) -> None:
    assert store.get(KEY) == DATA
    child = os.fork()
    if not child:
        signal.alarm(20)
        with open_store(store.url) as other:
            good = all(other.get(KEY) == DATA for _ in range(fast.AFTER + 2))
            os._exit(0 if good and opened(other)._store is None else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_credentials_are_asked_for_as_they_change(
    store: ChunkStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = opened(store)._credentials()
    assert (found["access_key_id"], found["secret_access_key"]) == ("test", "test")
    assert found["expires_at"].timestamp() > 0


def test_a_ca_of_ones_own_is_left_to_boto3(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", "/etc/ssl/certs/ca-certificates.crt")
    secure = "s3://bucket?region=us-east-1&endpoint=https://127.0.0.1:1"
    with open_store(secure, check=False) as store:
        assert not opened(store)._usable
    with open_store(s3.url("bucket"), check=False) as store:
        assert opened(store)._usable

"""The contract of a chunk store over every kind of store."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from horcrux_nbd.chunkstore import ChunkStore, open_store
from horcrux_nbd.chunkstore.wrapper import WrapperStore

from ..servers.moto_s3 import S3Server
from ..servers.sshd import Sshd
from .conformance import Conformance, Place


class Folder(Place):
    def __init__(self, folder: Path, url: str, missing_url: str) -> None:
        self._folder, self.url, self.missing_url = folder, url, missing_url

    def plant(self, name: str, data: bytes) -> None:
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


class Bucket(Place):
    def __init__(self, server: S3Server, bucket: str, client: Any) -> None:
        self._client, self._bucket = client, bucket
        self._prefix = f"some/{secrets.token_hex(4)}"
        # Another store's neighbour, whose name begins alike, must not show.
        self.plant("-other/object", b"")
        self.url = server.url(bucket, self._prefix)
        self.missing_url = server.url("there-is-no-such-bucket", self._prefix)

    def plant(self, name: str, data: bytes) -> None:
        between = "" if name.startswith("-other") else "/"
        self._client.put_object(
            Bucket=self._bucket, Key=f"{self._prefix}{between}{name}", Body=data
        )


class TestLocal(Conformance):
    @pytest.fixture
    def place(self, tmp_path: Path) -> Place:
        folder = tmp_path / "deep" / "store with spaces"
        return Folder(folder, f"cp://{folder}", f"cp://{tmp_path}/nowhere/store")


class SyncsEachPut(WrapperStore):
    """So that what is found is found under its name, not among what waits for a sync."""

    def put(self, key: str, data: bytes) -> None:
        super().put(key, data)
        self.sync()


class TestLocalOnDisk(TestLocal):
    """The folder as another process sees it."""

    @pytest.fixture
    def store(self, place: Place) -> Iterator[ChunkStore]:
        with SyncsEachPut(open_store(place.url, create=True)) as store:
            yield store


class TestSftp(Conformance):
    @pytest.fixture
    def place(self, ssh: Sshd, tmp_path: Path) -> Place:
        folder = tmp_path / "deep" / "store with spaces"
        return Folder(folder, ssh.url(folder), ssh.url(tmp_path / "nowhere" / "store"))


@pytest.fixture(scope="module")
def moto_bucket(moto_server: S3Server) -> tuple[str, Any]:
    return moto_server.make_bucket(), moto_server.client()


@pytest.fixture(scope="module")
def ceph_bucket(ceph_server: S3Server) -> tuple[str, Any]:
    return ceph_server.make_bucket(), ceph_server.client()


class TestMoto(Conformance):
    @pytest.fixture
    def place(self, s3: S3Server, moto_bucket: tuple[str, Any]) -> Place:
        return Bucket(s3, *moto_bucket)


class TestCeph(Conformance):
    """radosgw, a real S3 server. Set HORCRUX_TEST_CEPH=1."""

    @pytest.fixture
    def place(
        self,
        ceph_server: S3Server,
        ceph_bucket: tuple[str, Any],
        monkeypatch: pytest.MonkeyPatch,
    ) -> Place:
        ceph_server.enter(monkeypatch)
        return Bucket(ceph_server, *ceph_bucket)

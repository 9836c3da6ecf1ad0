"""The servers as pytest fixtures, one each for a whole run. Import them in a conftest.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from . import ceph
from .moto_s3 import S3Server, moto
from .sshd import MISSING, Sshd, available, sshd


@pytest.fixture(scope="session")
def sshd_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    """An sshd. Use `ssh` to let this process's stores in."""
    if not available():
        pytest.skip(MISSING)
    with sshd(tmp_path_factory.mktemp("sshd")) as server:
        yield server


@pytest.fixture
def ssh(sshd_server: Sshd, monkeypatch: pytest.MonkeyPatch) -> Sshd:
    """The sshd, with HORCRUX_SSH_CONFIG set so that `scp://` stores get in, and no agent."""
    monkeypatch.setenv("HORCRUX_SSH_CONFIG", str(sshd_server.write_config()))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    return sshd_server


@pytest.fixture(scope="session")
def moto_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with moto(tmp_path_factory.mktemp("moto")) as server:
        yield server


@pytest.fixture
def s3(moto_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """moto, with this process's AWS settings replaced by those that get in."""
    moto_server.enter(monkeypatch)
    return moto_server


@pytest.fixture(scope="session")
def ceph_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server, where the run asks for it."""
    if reason := ceph.missing():
        pytest.skip(reason)
    # Not below pytest's folder: a Unix socket's path has 107 bytes at most.
    with ceph.ceph(Path(tmp_path_factory.mktemp("ceph"))) as server:
        yield server

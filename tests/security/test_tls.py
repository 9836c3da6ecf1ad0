"""S3 over TLS: a certificate that is not good ends it before a byte of a request is sent."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from horcrux_nbd.chunkstore import open_store
from horcrux_nbd.errors import StoreRefused, UsageError

from ..servers.certificates import Authority
from ..servers.moto_s3 import REGION, S3Server, write_credentials
from ..servers.process import free_port, server


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ca")


def serve(folder: Path, certificate: Path, key: Path) -> Iterator[S3Server]:
    port = free_port()
    command = [
        sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port),
        "-s", "-c", certificate, "-k", key,
    ]  # fmt: skip
    with server(command, port, folder / "moto.log"):
        yield S3Server(
            f"https://127.0.0.1:{port}", write_credentials(folder / "aws", "test", "secret")
        )


CASES = {
    "good": ("127.0.0.1", 1, True, None),
    "unknown authority": ("127.0.0.1", 1, False, "cannot be trusted"),
    "expired": ("127.0.0.1", -1, True, "cannot be trusted"),
    "of another host": ("other.example", 1, True, "cannot be trusted"),
}


@pytest.mark.parametrize("case", CASES)
def test_certificates(
    case: str, authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, days, trusted, problem = CASES[case]
    monkeypatch.delenv("AWS_CA_BUNDLE", raising=False)
    for s3 in serve(tmp_path, *authority.sign("server", host, days)):
        s3.enter(monkeypatch)
        if trusted:
            monkeypatch.setenv("AWS_CA_BUNDLE", str(authority.certificate))
        url = f"s3://bucket/p?region={REGION}&endpoint={s3.endpoint}"
        if problem is None:
            import boto3

            client = boto3.client("s3", endpoint_url=s3.endpoint, region_name=REGION)
            client.create_bucket(Bucket="bucket")
            client.close()
            with open_store(url, create=True) as store:
                store.put("a/b", b"x")
                assert store.get("a/b") == b"x"
        else:
            with pytest.raises(StoreRefused, match=problem) as caught, open_store(url, limit=5):
                pass
            assert caught.value.exit_code == 7
            log = (tmp_path / "moto.log").read_text()
            assert "GET /" not in log  # nothing was asked
            assert "HEAD /" not in log


def test_plain_http_only_where_the_url_says_so() -> None:
    """`s3://` without an endpoint is TLS; a plain one is written out."""
    from horcrux_nbd.chunkstore.url import parse_store_url

    assert "http://" not in str(parse_store_url("s3://bucket@eu-west-1"))
    with pytest.raises(UsageError):
        parse_store_url("s3://bucket/p?endpoint=ftp://h")

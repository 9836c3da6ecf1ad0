"""moto's S3 server: a test double that speaks real HTTP, in a process of its own."""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .process import free_port, server

REGION = "us-east-1"


@dataclass
class S3Server:
    """A running S3 server. `credentials` is a file for AWS_SHARED_CREDENTIALS_FILE."""

    endpoint: str  # http://127.0.0.1:port
    credentials: Path

    @property
    def port(self) -> int:
        return int(self.endpoint.rpartition(":")[2])

    def environment(self) -> dict[str, str]:
        """What a client's process needs to be let in; nothing of it is the host's own."""
        return {
            "AWS_SHARED_CREDENTIALS_FILE": str(self.credentials),
            "AWS_CONFIG_FILE": "/dev/null",
            # Without it a client that finds no credentials asks 169.254.169.254 for some.
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def enter(self, monkeypatch: Any) -> None:
        """Let this process's clients in (pytest's monkeypatch undoes it)."""
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        for name, value in self.environment().items():
            monkeypatch.setenv(name, value)

    def client(self) -> Any:
        """A boto3 client of its own for what a store does not do, such as making buckets."""
        import boto3
        import botocore.config

        access, secret = _read_credentials(self.credentials)
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=REGION,
            aws_access_key_id=access,
            aws_secret_access_key=secret,
            config=botocore.config.Config(s3={"addressing_style": "path"}),
        )

    def make_bucket(self) -> str:
        """A new bucket's name."""
        name = f"test-{secrets.token_hex(6)}"
        client = self.client()
        client.create_bucket(Bucket=name)
        client.close()
        return name

    def url(self, bucket: str, prefix: str = "", port: int | None = None) -> str:
        """The store URL of a bucket; by another `port` where a proxy stands in front."""
        endpoint = f"http://127.0.0.1:{port}" if port else self.endpoint
        place = f"{bucket}/{prefix}" if prefix else bucket
        return f"s3://{place}?region={REGION}&endpoint={endpoint}"


def write_credentials(path: Path, access: str, secret: str) -> Path:
    path.write_text(f"[default]\naws_access_key_id = {access}\naws_secret_access_key = {secret}\n")
    path.chmod(0o600)
    return path


def _read_credentials(path: Path) -> tuple[str, str]:
    import configparser

    parser = configparser.ConfigParser()
    parser.read(path)
    section = parser["default"]
    return section["aws_access_key_id"], section["aws_secret_access_key"]


@contextlib.contextmanager
def moto(folder: Path | None = None) -> Iterator[S3Server]:
    """A moto server with an empty account. It checks no signatures."""
    with contextlib.ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="horcrux-moto-")))
        folder.mkdir(parents=True, exist_ok=True)
        port = free_port()
        credentials = write_credentials(folder / "credentials", "test", "test")
        # A process of its own: in a thread it would take turns with the client for one GIL.
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        stack.enter_context(server(command, port, folder / "moto.log"))
        yield S3Server(f"http://127.0.0.1:{port}", credentials)

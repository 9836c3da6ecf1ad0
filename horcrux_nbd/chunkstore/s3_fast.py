"""GETs of S3 objects without Python's cost for each.

boto3 takes 1.3 ms of CPU for a GET, under the lock that all threads share, so 300 to 700 a second
are its limit; obstore (Rust, the `object_store` crate) takes 0.16 ms and no lock
(docs/performance.md). It serves the reads of objects, of which there are many; boto3 does all else,
and says what is wrong where a GET fails.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import threading
import time
from datetime import UTC, datetime, timedelta
from typing import Any

log = logging.getLogger("horcrux_nbd.chunkstore")

# The first GETs of a store are boto3's: a command that reads two objects imports nothing for them,
# and nbdkit, which forks after such, has no threads of obstore to lose.
AFTER = 4
REST = 60.0  # seconds without it, once it failed
CREDENTIALS = 60.0  # seconds until botocore is asked for them again, which renews them in time
_SAFE = re.compile(r"[A-Za-z0-9._/-]+")

_lock = threading.Lock()
_process = 0  # the one that has obstore's threads


class Failed(Exception):
    """Ask boto3; where `again`, it is worth a new attempt as much as any broken connection."""

    def __init__(self, error: Exception, *, again: bool) -> None:
        super().__init__(str(error).strip().split("\n")[0][:200])
        self.again = again


class FastGets:
    """GETs from `bucket` as the botocore `client` would make them."""

    def __init__(self, client: Any, bucket: str, service: str, timeout: float) -> None:
        """`service` is the server's URL, empty for AWS itself."""
        self._client, self._bucket, self._service = client, bucket, service
        self._timeout = timeout
        self._count = itertools.count()
        self._resting_until = 0.0
        self._store: Any = None
        self._usable = self._can_be_used()

    def _can_be_used(self) -> bool:
        client = self._client
        session = client._endpoint.http_session
        if session._verify is not True and not self._service.startswith("http://"):
            return False  # a CA of one's own is botocore's affair
        if session._proxy_config._proxies:
            return False
        return bool(self._service) or str(client.meta.endpoint_url).endswith(".amazonaws.com")

    def wanted(self, name: str) -> bool:
        """Whether `get` is to be used for the object `name`."""
        if not self._usable or next(self._count) < AFTER or not _SAFE.fullmatch(name):
            return False
        return time.monotonic() >= self._resting_until and _process in (0, os.getpid())

    def get(self, name: str, offset: int, length: int | None) -> bytes:
        """The bytes of an object from `offset` on. Raises Failed."""
        store = self._store or self._open()
        if store is None:
            raise Failed(ImportError("obstore"), again=False)
        import obstore
        from obstore import exceptions

        try:
            if length is None and not offset:
                return bytes(obstore.get(store, name).bytes())
            end = offset + length if length is not None else (1 << 62)
            return bytes(obstore.get_range(store, name, start=offset, end=end))
        except (
            FileNotFoundError,
            PermissionError,
            exceptions.NotFoundError,
            exceptions.PermissionDeniedError,
            exceptions.UnauthenticatedError,
        ) as error:
            raise Failed(error, again=False) from error
        except (exceptions.BaseError, OSError, ValueError) as error:
            self._resting_until = time.monotonic() + REST
            log.debug("a fast GET failed: %s", error)
            raise Failed(error, again=True) from error

    def _open(self) -> Any:
        global _process
        with _lock:
            if self._store is None and self._usable:
                try:
                    from obstore.store import S3Store
                except ImportError:  # an architecture without wheels: boto3 does it all
                    self._usable = False
                    return None
                _process = os.getpid()
                self._store = S3Store(
                    self._bucket,
                    region=self._client.meta.region_name,
                    credential_provider=self._credentials,  # type: ignore[arg-type]
                    virtual_hosted_style_request=not self._service,
                    client_options={
                        "allow_http": self._service.startswith("http://"),
                        "connect_timeout": timedelta(seconds=self._timeout),
                        "timeout": timedelta(seconds=self._timeout),
                    },
                    retry_config={"max_retries": 0},
                    **({"endpoint": self._service} if self._service else {}),  # type: ignore[arg-type]
                )
            return self._store

    def _credentials(self) -> dict[str, Any]:
        found = self._client._request_signer._credentials
        if found is None:
            raise ValueError("no credentials")
        frozen = found.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + timedelta(seconds=CREDENTIALS),
        }

"""`s3://` and `minio://`: a chunk store in a bucket of AWS or of any server that speaks its API.

Credentials, proxies and CA bundles come from boto3's default chain (environment, ~/.aws, instance
roles); nothing of it is in the URL. A store that ignores `If-None-Match` is found by the probe
that the repository makes, not here.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterator
from typing import Any

import boto3
import botocore.config
import botocore.exceptions
import botocore.handlers
import botocore.parsers
import urllib3.exceptions
from urllib3.util.ssl_match_hostname import CertificateError as WrongHost

from ..errors import (
    KeyExists,
    KeyNotFound,
    StoreError,
    StoreFull,
    StoreMissing,
    StoreRefused,
    StoreUnavailable,
)
from . import base
from .base import ChunkStore, Stat
from .s3_fast import Failed, FastGets
from .url import StoreURL

CONCURRENCY = 64  # one connection each: 64 GETs in 20 ms are 3,200 a second
TIMEOUT = 15.0  # seconds for a connection, and between two pieces of an answer
MANY = "objects/"  # keys of which many are read, one after the other
PAGE = 1000  # keys; S3 gives no more at once
SEEN = 60.0  # seconds that a bucket which answered is taken to be there

_CREDENTIALS = "put them into ~/.aws/credentials or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
_REFUSED = {
    "AccessDenied": "these credentials may not do that: check the bucket's policy",
    "403": "these credentials may not do that, or are wrong",  # HEAD has no body that says more
    "InvalidAccessKeyId": "the server does not know this access key",
    "SignatureDoesNotMatch": "the secret key is wrong",
    "ExpiredToken": "the session token has expired: log in again",
    "ExpiredTokenException": "the session token has expired: log in again",
    "InvalidToken": "the session token is wrong",
    "TokenRefreshRequired": "the session token must be renewed",
    "RequestTimeTooSkewed": "this host's clock is wrong: set it",
    "AccountProblem": "there is a problem with the account",
    "AllAccessDisabled": "all access to the bucket is disabled",
    "InvalidObjectState": "the object is archived: bring it back to a readable storage class",
}
_LATER = {
    "SlowDown", "ServiceUnavailable", "InternalError", "RequestTimeout", "Throttling",
    "ThrottlingException", "RequestLimitExceeded", "TooManyRequests", "OperationAborted",
    # AWS answers so when two conditional writes meet, and asks for the request to be made again.
    "ConditionalRequestConflict",
}  # fmt: skip
_FULL = {"QuotaExceeded", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded"}
_REGION = {
    "PermanentRedirect",
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
}


class S3Store(ChunkStore):
    """Objects are S3 objects below a prefix; an exclusive put is `If-None-Match: *`.

    botocore's own retries are off (retry.py is the one place that retries), so each attempt is
    signed afresh: a signature that is sent again later is refused with 403 (s3backer #214).
    """

    def __init__(
        self, url: StoreURL, *, timeout: float = TIMEOUT, concurrency: int | None = None
    ) -> None:
        self.url = str(url)
        self.timeout = timeout
        self.concurrency = concurrency or CONCURRENCY
        self._bucket = url.bucket
        self._prefix = f"{url.prefix}/" if url.prefix else ""
        self._where = url.service or "AWS"
        self._seen = -SEEN
        try:
            session = boto3.session.Session()
            self._client: Any = session.client(
                "s3",
                region_name=url.region or session.region_name or "us-east-1",
                endpoint_url=url.service or None,
                config=botocore.config.Config(
                    connect_timeout=timeout,
                    read_timeout=timeout,
                    max_pool_connections=self.concurrency,
                    tcp_keepalive=True,
                    retries={"total_max_attempts": 1},
                    # A name below the endpoint's needs DNS that servers of one's own do not have.
                    s3={"addressing_style": "path" if url.service else "auto"},
                    # Checksum trailers cost time, and servers other than AWS refuse them; every
                    # object is checked against its id when it is read.
                    request_checksum_calculation="when_required",
                    response_checksum_validation="when_required",
                ),
            )
        except (botocore.exceptions.BotoCoreError, ValueError) as error:
            raise self._error(error, "") from error
        # `Expect: 100-continue` costs every put a round trip.
        self._client.meta.events.unregister("before-call.s3", botocore.handlers.add_expect_header)
        self._fast = FastGets(self._client, self._bucket, url.service, timeout)

    def _key(self, key: str) -> str:
        return self._prefix + base.check_key(key)

    # ---- errors ---------------------------------------------------------------------------------

    def _error(self, error: Exception, key: str) -> StoreError:
        """What an exception of botocore means for the caller."""
        if isinstance(error, botocore.exceptions.ClientError):
            return self._refusal(error, key)
        if isinstance(
            error,
            botocore.exceptions.NoCredentialsError
            | botocore.exceptions.PartialCredentialsError
            | botocore.exceptions.CredentialRetrievalError,
        ):
            return StoreRefused(f"{self.url}: no usable credentials found: {_CREDENTIALS}")
        if isinstance(
            error, botocore.exceptions.ProfileNotFound | botocore.exceptions.ConfigParseError
        ):
            return StoreRefused(f"{self.url}: {error}: check AWS_PROFILE and ~/.aws")
        if _is_certificate_error(error):
            return StoreRefused(
                f"{self.url}: the certificate of {self._where} cannot be trusted: give its CA in "
                "AWS_CA_BUNDLE"
            )
        if isinstance(error, botocore.exceptions.SSLError):
            return StoreUnavailable(f"{self.url}: TLS with {self._where} failed: does it speak it?")
        if isinstance(
            error,
            botocore.exceptions.ConnectTimeoutError | botocore.exceptions.ReadTimeoutError,
        ):
            return StoreUnavailable(
                f"{self.url}: no answer from {self._where} in {self.timeout:.3g} s"
            )
        if isinstance(error, botocore.exceptions.EndpointConnectionError):
            return StoreUnavailable(
                f"{self.url}: cannot connect to {self._where}: check host, port and region"
            )
        if isinstance(
            error,
            botocore.exceptions.HTTPClientError
            | botocore.exceptions.IncompleteReadError
            | botocore.exceptions.ResponseStreamingError
            | botocore.parsers.ResponseParserError
            | urllib3.exceptions.HTTPError
            | OSError,
        ):
            return StoreUnavailable(f"{self.url}: the connection to {self._where} broke")
        return StoreError(f"{self.url}: {error}")

    def _refusal(self, error: botocore.exceptions.ClientError, key: str) -> StoreError:
        """What an answer with an error status means."""
        answer: dict[str, Any] = error.response  # type: ignore[assignment]
        detail = answer.get("Error", {})
        code = str(detail.get("Code", ""))
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        at = f"{self.url}: {key}" if key else self.url
        if code in ("NoSuchKey", "404") and key:
            return KeyNotFound(self.url, key)
        if code in ("NoSuchBucket", "404"):
            return StoreMissing(
                f"{self.url}: {self._where} has no bucket {self._bucket!r}: check it or make it"
            )
        if code in _REGION or status == 301:
            region = detail.get("Region") or answer.get("ResponseMetadata", {}).get(
                "HTTPHeaders", {}
            ).get("x-amz-bucket-region")
            return StoreError(
                f"{self.url}: the bucket is in another region"
                + (f": write s3://{self._bucket}@{region}" if region else ": name it behind @")
            )
        if code in _FULL or status == 507:
            return StoreFull(f"{at}: no space or quota left ({code or status})")
        if code in _LATER or status in (429, 500, 502, 503, 504):
            return StoreUnavailable(
                f"{at}: {self._where} asks to come back later: {code or status}"
            )
        if code in _REFUSED or status in (401, 403):
            why = _REFUSED.get(code, "these credentials may not do that")
            return StoreRefused(f"{at}: {why} ({code or status})")
        if status == 501:
            return StoreError(f"{at}: {self._where} cannot do that ({code or status})")
        return StoreError(
            f"{at}: {self._where} answers {code} {detail.get('Message', '')}".rstrip()
        )

    def _call(self, operation: str, key: str = "", **arguments: Any) -> dict[str, Any]:
        """One request; raises what its failure means."""
        try:
            answer: dict[str, Any] = getattr(self._client, operation)(
                Bucket=self._bucket, **arguments
            )
        except (
            botocore.exceptions.BotoCoreError,
            botocore.exceptions.ClientError,
            botocore.parsers.ResponseParserError,
            urllib3.exceptions.HTTPError,
            OSError,
        ) as error:
            raise self._error(error, key) from error
        except RecursionError:  # botocore asks a server that redirects where it redirects to
            raise StoreError(
                f"{self.url}: {self._where} redirects in circles: check bucket and region"
            ) from None
        self._seen = time.monotonic()
        return answer

    # ---- the contract ---------------------------------------------------------------------------

    def check(self) -> None:
        # A listing, as the refusal of a HEAD has no body that says why.
        self._call("list_objects_v2", Prefix=self._prefix, MaxKeys=1)

    def prepare(self) -> None:
        self.check()

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        base.check_range(offset, length)
        name = self._key(key)
        if length == 0:
            self.stat(key)
            return b""
        if key.startswith(MANY) and self._fast.wanted(name):
            try:
                return self._fast.get(name, offset, length)
            except Failed as error:
                if error.again:
                    raise StoreUnavailable(
                        f"{self.url}: the connection to {self._where} broke"
                    ) from error
        arguments = {}
        if offset or length is not None:
            last = "" if length is None else offset + length - 1
            arguments["Range"] = f"bytes={offset}-{last}"
        try:
            answer = self._call("get_object", key, Key=name, **arguments)
        except StoreError as error:
            if _code(error) == "InvalidRange":
                return b""  # 416: it is there and ends before `offset`
            raise
        try:
            # Raises for fewer bytes than the answer's head promised, and for a last chunk missing.
            # Where less was asked for than comes, what is too much is not taken into memory.
            body = answer["Body"]
            data: bytes = body.read() if length is None else _read_most(body, offset + length)
        except (
            botocore.exceptions.BotoCoreError,
            urllib3.exceptions.HTTPError,
            OSError,
        ) as error:
            raise self._error(error, key) from error
        if arguments and answer["ResponseMetadata"]["HTTPStatusCode"] != 206:
            # A server may ignore the range and send all (RFC 9110 §14.2).
            data = data[offset:] if length is None else data[offset : offset + length]
        return data

    def put(self, key: str, data: bytes) -> None:
        self._call("put_object", key, Key=self._key(key), Body=data)

    def put_exclusive(self, key: str, data: bytes) -> None:
        try:
            self._call("put_object", key, Key=self._key(key), Body=data, IfNoneMatch="*")
        except StoreError as error:
            if _code(error) in ("PreconditionFailed", "412"):
                raise KeyExists(self.url, key) from None
            raise

    def stat(self, key: str) -> Stat:
        try:
            answer = self._call("head_object", key, Key=self._key(key))
        except KeyNotFound:
            # 404 to a HEAD does not say whether the object or the bucket is missing.
            if time.monotonic() - self._seen > SEEN:
                self.check()
            raise
        return Stat(key, answer["ContentLength"], answer["LastModified"].timestamp())

    def delete(self, key: str) -> None:
        try:
            self._call("delete_object", key, Key=self._key(key))
        except KeyNotFound:
            return  # some servers answer 404 where AWS answers 204

    def children(self, prefix: str) -> list[str]:
        start = self._prefix + base.check_folder(prefix)
        found: set[str] = set()
        more: dict[str, Any] = {}
        while True:
            page = self._call("list_objects_v2", Prefix=start, Delimiter="/", **more)
            found.update(item["Prefix"][len(start) : -1] for item in page.get("CommonPrefixes", []))
            found.update(item["Key"][len(start) :] for item in page.get("Contents", []))
            if not page.get("IsTruncated"):
                return sorted(name for name in found if base.is_part(name))
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def list(self, prefix: str = "", after: str = "", limit: int | None = None) -> Iterator[Stat]:
        return self._list(base.check_prefix(prefix), after, limit)

    def _list(self, prefix: str, after: str, limit: int | None) -> Iterator[Stat]:
        while limit is None or limit > 0:
            more: dict[str, Any] = {"StartAfter": self._prefix + after} if after else {}
            page = self._call(
                "list_objects_v2",
                Prefix=self._prefix + prefix,
                MaxKeys=PAGE if limit is None else min(limit, PAGE),
                **more,
            )
            contents = page.get("Contents", [])
            for item in contents:
                name = item["Key"][len(self._prefix) :]
                after = max(after, name)
                if base.is_key(name):
                    yield Stat(name, item["Size"], item["LastModified"].timestamp())
                    if limit is not None:
                        limit -= 1
            if not page.get("IsTruncated") or not contents:
                return

    def close(self) -> None:
        self._client.close()


def _read_most(body: Any, most: int) -> bytes:
    """Up to `most` bytes of an answer; the connection of a longer one is given up."""
    parts: list[bytes] = []
    while most > 0 and (part := body.read(min(most, 1 << 20))):
        parts.append(part)
        most -= len(part)
    if most <= 0 and body.read(1):
        body.close()
    return b"".join(parts)


def _code(error: StoreError) -> str:
    """The S3 error code that led to `error`."""
    cause = error.__cause__
    if isinstance(cause, botocore.exceptions.ClientError):
        return str(cause.response.get("Error", {}).get("Code", ""))
    return ""


def _is_certificate_error(error: BaseException | None) -> bool:
    """Whether a certificate that does not verify is behind `error`, however deep."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        # urllib3 looks at the host's name itself.
        if isinstance(error, ssl.SSLCertVerificationError | WrongHost):
            return True
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False

"""Where a store is, as people write it. The one place that parses and prints store URLs.

| written | means |
|---|---|
| `cp:///path`, or just a path | a local folder |
| `scp://[user@]host[:port]:/path`, `scp://[user@]host:port/path` | a folder, by SFTP |
| `s3://bucket@region[/prefix]`, `s3://bucket[/prefix]?region=…&endpoint=…` | an S3 bucket |
| `minio://host[:port]/bucket[/prefix]`, `?tls=off` for plain HTTP | the same on a server of yours |

Paths of `cp` and `scp` are taken as they stand: no `%` escapes, no query. A URL never holds a
secret, so it may be logged, stored and shown; one that does is refused without repeating it.
"""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass
from urllib.parse import parse_qsl, quote, urlsplit

from ..errors import UsageError
from .base import check_key

KNOWN = "cp:///path, scp://user@host:/path, s3://bucket@region or minio://host:port/bucket"
SCHEMES = ("cp", "scp", "s3", "minio")

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
# A host or user never begins with a dash: both may end in the arguments of a ProxyCommand.
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,252}")
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+-]{0,99}")
_HOST_PORT = re.compile(r"(?:\[([^\]]*)\]|([^:\[\]]*))(?::(\d{1,5}))?(:?)")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,253}[A-Za-z0-9]")
_REGION = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,63}")
_SECRET_KEY = re.compile(r"pass|secret|token|key|credential|auth|sign", re.IGNORECASE)

_CREDENTIALS = {
    "scp": "use an SSH key, ssh-agent or ~/.ssh/config",
    "s3": "put credentials into ~/.aws/credentials or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
}
_CREDENTIALS["minio"] = _CREDENTIALS["s3"]


@dataclass(frozen=True)
class StoreURL:
    """A parsed store URL. `str()` gives the canonical text, which parses to an equal value."""

    scheme: str  # one of SCHEMES
    path: str = ""  # cp, scp: absolute
    user: str = ""  # scp: empty where ~/.ssh/config or the login name decides
    host: str = ""  # scp, minio: without the brackets of an IPv6 address
    port: int | None = None
    bucket: str = ""
    prefix: str = ""  # s3, minio: no slash at either end
    region: str = ""
    endpoint: str = ""  # s3: empty for AWS itself
    tls: bool = True  # minio

    @property
    def service(self) -> str:
        """The base URL of the S3 service; empty for AWS itself."""
        if self.scheme != "minio":
            return self.endpoint
        return f"{'https' if self.tls else 'http'}://{self._host_port()}"

    def _host_port(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port is None else f"{host}:{self.port}"

    def __str__(self) -> str:
        if self.scheme == "cp":
            return f"cp://{self.path}"
        if self.scheme == "scp":
            user = f"{self.user}@" if self.user else ""
            colon = ":" if self.port is None else ""
            return f"scp://{user}{self._host_port()}{colon}{self.path}"
        place = f"{self.bucket}/{self.prefix}" if self.prefix else self.bucket
        if self.scheme == "minio":
            place = f"{self._host_port()}/{place}"
        query = []
        if self.region:
            query.append(f"region={quote(self.region)}")
        if self.endpoint:
            query.append(f"endpoint={quote(self.endpoint, safe='/:[]')}")
        if not self.tls:
            query.append("tls=off")
        return f"{self.scheme}://{place}{'?' if query else ''}{'&'.join(query)}"


_PATHS = ("cp", "scp")


def parse_store_url(text: str) -> StoreURL:
    """`text` as a StoreURL; raises UsageError, whose message never holds a secret.

    A bare path is a local folder where it has a slash, begins with a dot or exists.
    """
    match = _SCHEME.match(text)
    if _CONTROL.search(text):
        raise UsageError("a store URL holds no control characters: check how it was quoted")
    try:
        # Paths may have any bytes, as os.fsdecode gives them; names of buckets may not.
        text.encode(errors="surrogateescape" if not match or match[1] in _PATHS else "strict")
    except UnicodeEncodeError:
        raise UsageError("a store URL is no valid text: write it in UTF-8") from None
    if not match:
        if text and ("/" in text or text.startswith(".") or os.path.exists(text)):
            return StoreURL("cp", path=_local_path(os.path.expanduser(text)))
        raise UsageError(
            f"{_shown(text)} is neither a store nor a path: write ./NAME for a folder here, or "
            f"{KNOWN}"
        )
    scheme, rest = match.group(1).lower(), text[match.end() :]
    if scheme == "cp":
        if not rest.startswith("/"):
            raise UsageError(
                f"{_shown(text)}: cp:// takes an absolute path, as in cp:///srv/images"
            )
        return StoreURL("cp", path=_local_path(rest))
    if scheme not in SCHEMES:
        raise UsageError(f"{scheme}:// is no store that Horcrux knows: use {KNOWN}")
    _refuse_password(scheme, rest)
    if scheme == "scp":
        return _parse_scp(text, rest)
    return _parse_s3(text, rest) if scheme == "s3" else _parse_minio(text, rest)


def _shown(text: str) -> str:
    """`text` for a message, without anything that can be a secret."""
    head, query, _ = text.partition("?")
    scheme = _SCHEME.match(head)
    if scheme and "@" in head:
        head = f"{scheme.group()}…@{head.rpartition('@')[2]}"
    return repr(f"{head[:120]}{'?…' if query else ''}")


def _refuse_password(scheme: str, rest: str) -> None:
    """Raise for `user:secret@`; a secret may hold slashes, so this looks beyond the first one."""
    before, at, _ = rest.partition("@")
    name, colon, after = before.partition(":")
    # `host:/path@x` and `host:22/path@x` are paths with an @ in them. So might be a password that
    # begins like one; then the rest is no host, and the message of that shows only what follows @.
    if at and colon and "/" not in name and "[" not in name and not re.match(r"\d*:?/", after):
        raise UsageError(
            f"{scheme}:// URL with a password: Horcrux takes none there, as URLs end in logs and "
            f"process lists; {_CREDENTIALS[scheme]}"
        )


def _local_path(path: str) -> str:
    absolute = os.path.abspath(path)
    return "/" + absolute.lstrip("/")  # POSIX lets exactly two leading slashes stand


def _host_and_port(text: str, authority: str, *, colon: bool) -> tuple[str, int | None]:
    """Host and port of `authority`; `colon`: whether one may follow, as scp writes it."""
    match = _HOST_PORT.fullmatch(authority)
    if not match or (match.group(4) and not colon):
        raise UsageError(f"{_shown(text)}: no host and port that can be understood: use {KNOWN}")
    six, host, port = match.group(1), match.group(2), match.group(3)
    if six is not None:
        try:
            ipaddress.IPv6Address(six)
        except ValueError:
            raise UsageError(f"{_shown(text)}: no IPv6 address between the brackets") from None
        host = six
    elif not _HOST.fullmatch(host):
        raise UsageError(f"{_shown(text)}: the host is missing or has a character it cannot have")
    if port is not None and not 0 < int(port) < 65536:
        raise UsageError(f"{_shown(text)}: ports are 1 to 65535")
    return host, int(port) if port is not None else None


def _parse_scp(text: str, rest: str) -> StoreURL:
    authority, slash, path = rest.partition("/")
    user, at, place = authority.rpartition("@")
    if not slash or not path.strip("/"):
        raise UsageError(
            f"{_shown(text)}: an absolute path is missing, as in scp://user@host:/srv/images"
        )
    if at and not _USER.fullmatch(user):
        raise UsageError(f"{_shown(text)}: the user has a character it cannot have")
    host, port = _host_and_port(text, place, colon=True)
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise UsageError(f"{_shown(text)}: write the path without '..'")
    if not parts:
        raise UsageError(f"{_shown(text)}: the path is that of the whole server: name a folder")
    return StoreURL("scp", path="/" + "/".join(parts), user=user, host=host, port=port)


def _query(text: str, query: str, known: tuple[str, ...]) -> dict[str, str]:
    """The options behind `?`; each once, each known."""
    scheme = text.partition(":")[0].lower()
    found: dict[str, str] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name in known:
            if name in found:
                raise UsageError(f"{_shown(text)}: option {name!r} is there twice")
            if not value:
                raise UsageError(f"{_shown(text)}: option {name!r} is empty")
            found[name] = value
        elif _SECRET_KEY.search(name):
            raise UsageError(
                f"{scheme}:// URL with option {name[:40]!r}: Horcrux takes no secret there, as "
                f"URLs end in logs and process lists; {_CREDENTIALS[scheme]}"
            )
        else:
            raise UsageError(
                f"{_shown(text)}: unknown option {name[:40]!r}: known are {', '.join(known)}"
            )
    return found


def _bucket_and_prefix(text: str, bucket: str, prefix: str) -> tuple[str, str]:
    if not _BUCKET.fullmatch(bucket) or ".." in bucket:
        raise UsageError(f"{_shown(text)}: {bucket[:70]!r} cannot name a bucket")
    prefix = prefix.strip("/")
    if prefix:
        try:
            check_key(prefix)
        except UsageError:
            raise UsageError(
                f"{_shown(text)}: prefix {prefix[:70]!r}: use A-Z a-z 0-9 . _ - and single "
                "slashes, and no part that begins with a dot"
            ) from None
        if len(prefix) > 700:  # S3 keys have 1,024 bytes; ours are below 300
            raise UsageError(f"{_shown(text)}: the prefix is longer than 700 characters")
    return bucket, prefix


def _check_region(text: str, region: str) -> str:
    if region and not _REGION.fullmatch(region):
        raise UsageError(f"{_shown(text)}: {region[:70]!r} is no region")
    return region


def _parse_s3(text: str, rest: str) -> StoreURL:
    place, _, query = rest.partition("?")
    options = _query(text, query, ("region", "endpoint"))
    authority, _, prefix = place.partition("/")
    bucket, at, region = authority.partition("@")
    if at and not region:
        raise UsageError(f"{_shown(text)}: the region behind @ is missing")
    if region and options.get("region", region) != region:
        raise UsageError(f"{_shown(text)}: two regions: write it once")
    bucket, prefix = _bucket_and_prefix(text, bucket, prefix)
    return StoreURL(
        "s3",
        bucket=bucket,
        prefix=prefix,
        region=_check_region(text, region or options.get("region", "")),
        endpoint=_check_endpoint(text, options.get("endpoint", "")),
    )


def _check_endpoint(text: str, endpoint: str) -> str:
    if not endpoint:
        return ""
    try:
        parts = urlsplit(endpoint)
        port = parts.port
    except ValueError:
        raise UsageError(f"{_shown(text)}: the endpoint is no URL") from None
    if "@" in parts.netloc:
        raise UsageError(
            "s3:// URL whose endpoint holds a user or password: Horcrux takes none there; "
            f"{_CREDENTIALS['s3']}"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise UsageError(
            f"{_shown(text)}: write the endpoint as https://host:port, or http:// for a server "
            "without TLS"
        )
    host, _ = _host_and_port(text, parts.netloc, colon=False)
    host = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{host}{'' if port is None else f':{port}'}{parts.path.rstrip('/')}"


def _parse_minio(text: str, rest: str) -> StoreURL:
    place, _, query = rest.partition("?")
    options = _query(text, query, ("region", "tls"))
    tls = options.get("tls", "on")
    if tls not in ("on", "off"):
        raise UsageError(f"{_shown(text)}: tls is on or off")
    authority, _, path = place.partition("/")
    if "@" in authority:
        raise UsageError(
            f"minio:// URL with a user: write minio://host:port/bucket; {_CREDENTIALS['minio']}"
        )
    host, port = _host_and_port(text, authority, colon=False)
    bucket, _, prefix = path.partition("/")
    if not bucket:
        raise UsageError(f"{_shown(text)}: the bucket is missing: minio://host:port/bucket")
    bucket, prefix = _bucket_and_prefix(text, bucket, prefix)
    return StoreURL(
        "minio",
        host=host,
        port=port,
        bucket=bucket,
        prefix=prefix,
        region=_check_region(text, options.get("region", "")),
        tls=tls == "on",
    )

"""Which host keys are trusted: OpenSSH's known_hosts files, read and never written.

Source of the format: sshd(8), SSH_KNOWN_HOSTS FILE FORMAT. Own reading, as paramiko's knows neither
patterns nor `@revoked` lines, and drops keys of types that it cannot use. `@cert-authority` lines
are passed over: host certificates are not supported.
"""

from __future__ import annotations

import base64
import binascii
import fnmatch
import hashlib
import hmac
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

SSH_PORT = 22


@dataclass(frozen=True)
class HostKeys:
    """What the files say of one host: (type, public key as on the wire) each."""

    name: str  # as known_hosts spells it: `host`, or `[host]:port` off port 22
    trusted: frozenset[tuple[str, bytes]]
    revoked: frozenset[bytes]

    @property
    def types(self) -> list[str]:
        return sorted({kind for kind, _ in self.trusted})


def host_name(host: str, port: int) -> str:
    """The name under which OpenSSH files the keys of `host` (lower case)."""
    host = host.lower()
    return host if port == SSH_PORT else f"[{host}]:{port}"


def read(paths: Iterable[Path], name: str) -> HostKeys:
    """What `paths` say of `name`. Missing files and other lines say nothing."""
    trusted: set[tuple[str, bytes]] = set()
    revoked: set[bytes] = set()
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            continue
        for line in text.splitlines():
            fields = line.split()
            if not fields or fields[0].startswith("#"):
                continue
            marker = fields.pop(0) if fields[0].startswith("@") else ""
            if len(fields) < 3 or marker not in ("", "@revoked") or not _matches(fields[0], name):
                continue
            try:
                key = base64.b64decode(fields[2], validate=True)
            except (binascii.Error, ValueError):
                continue
            if marker:
                revoked.add(key)
            else:
                trusted.add((fields[1], key))
    return HostKeys(name, frozenset(trusted), frozenset(revoked))


def _matches(patterns: str, name: str) -> bool:
    if patterns.startswith("|1|"):
        return _matches_hash(patterns, name)
    found = False
    for pattern in patterns.lower().split(","):
        negated = pattern.startswith("!")
        # Only * and ? are special there; brackets belong to names with a port.
        shell = re.sub(r"[\[]", "[[]", pattern.removeprefix("!"))
        if fnmatch.fnmatchcase(name, shell):
            if negated:
                return False
            found = True
    return found


def _matches_hash(text: str, name: str) -> bool:
    """`|1|salt|hash`: HMAC-SHA1 of the name, keyed with the salt, both in base64."""
    parts = text.split("|")
    if len(parts) != 4:
        return False
    try:
        salt, digest = base64.b64decode(parts[2]), base64.b64decode(parts[3])
    except (binascii.Error, ValueError):
        return False
    return hmac.compare_digest(hmac.new(salt, name.encode(), hashlib.sha1).digest(), digest)


def fingerprint(key: bytes) -> str:
    """`SHA256:…` of a public key as on the wire, as ssh and ssh-keygen show it."""
    return "SHA256:" + base64.b64encode(hashlib.sha256(key).digest()).decode().rstrip("=")

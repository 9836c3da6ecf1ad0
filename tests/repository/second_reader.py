"""A second reader of the repository format, written from docs/format.md alone.

It shares no code with horcrux_nbd and imports nothing of it (a test sees to that), so what it reads
right is what the document says, and not what the code happens to do. Slow and small on purpose.

    python second_reader.py FOLDER IMAGE@REF OUTPUT [PASSPHRASE-FILE | KEY-FILE]
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import struct
import sys
from pathlib import Path
from typing import Any

import zstandard
from blake3 import blake3
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

CHUNK, PATCH, NODE, COMMIT = 1, 2, 3, 4
NULL = bytes(32)


class Wrong(Exception):
    """The repository is not as the document says."""


def must(condition: object, what: str) -> None:
    if not condition:
        raise Wrong(what)


def derived(purpose: str, secret: bytes) -> bytes:
    context = f"horcrux-nbd 2026 repository {purpose}"
    return blake3(secret, derive_key_context=context).digest()


def unseal(key: bytes, sealed: bytes, bound: bytes) -> bytes:
    try:
        return AESGCM(key).decrypt(sealed[:12], sealed[12:], bound)
    except Exception as error:
        raise Wrong(f"it does not open ({error!r})") from None


class Reader:
    """A repository of format 1 in a folder."""

    def __init__(self, folder: str | Path, secret: bytes | None = None) -> None:
        """`secret` is what is in a key file, or a passphrase."""
        self.folder = Path(folder)
        self.keys: dict[str, bytes] = {}  # section 15
        config = self.record("horcrux.json")
        must(config["format"] == 1, "another format")  # section 12
        self.encrypted = config["hash"] == "blake3-248-kind-keyed"
        if not self.encrypted:
            must(config["hash"] == "blake3-248-kind", "another hash")
            must(config["features"] == [], "unknown features")
            return
        must(config["features"] == ["encryption"], "unknown features")
        must(config["encryption"]["cipher"] == "aes-256-gcm", "another cipher")
        assert secret is not None
        master = self.master(config["id"], secret)
        check = derived("key check", master + config["id"].encode())
        must(check.hex()[:32] == config["encryption"]["check"], "another key")
        for purpose in ("object ids", "object keys", "record keys"):
            self.keys[purpose] = derived(purpose, master)

    # ---- section 15

    def master(self, repository: str, secret: bytes) -> bytes:
        found = re.fullmatch(rb"horcrux-master-1 (\w+) ([0-9a-f]{64})\n?", secret)
        if found:
            must(found[1].decode() == repository, "the key of another repository")
            return bytes.fromhex(found[2].decode())
        file = re.fullmatch(rb"horcrux-key-1 ([0-9a-f]{64})\n?", secret)
        for path in (self.folder / "keys").iterdir():
            slot = self.record(f"keys/{path.name}")
            kdf, salt = slot["kdf"], bytes.fromhex(slot["kdf"]["salt"])
            must(slot["key"] == f"keys/{path.name}", "a key of another place")
            if file and slot["kind"] == "file":
                wrapping = blake3(salt, key=bytes.fromhex(file[1].decode())).digest()
            elif not file and slot["kind"] == "passphrase":
                n, r, p = kdf["n"], kdf["r"], kdf["p"]
                must(n <= 1 << 20 and n & (n - 1) == 0 and r <= 8 and p <= 4, "kdf")
                wrapping = hashlib.scrypt(
                    secret.rstrip(b"\n"), salt=salt, n=n, r=r, p=p, maxmem=(1 << 31) - 2, dklen=32
                )
            else:
                continue
            bound = f"{repository}\n{slot['key']}".encode()
            try:
                return unseal(wrapping, bytes.fromhex(slot["wrapped"]), bound)
            except Wrong:
                continue
        raise Wrong("no key opens")

    # ---- section 7

    def record(self, key: str) -> dict[str, Any]:
        data = (self.folder / key).read_bytes()
        must(len(data) <= 65536, f"{key} is too long")
        value = json.loads(data)
        must(value["version"] == 1, f"{key} has another version")
        check = value.pop("check")
        canonical = json.dumps(value, sort_keys=True, separators=(",", ":"))
        must(check == blake3(canonical.encode()).hexdigest()[:32], f"{key} is damaged")
        if self.keys:
            must(set(value) == {"version", "sealed"}, f"{key} is not sealed")
            sealing = blake3(key.encode(), key=self.keys["record keys"]).digest()
            value = json.loads(unseal(sealing, base64.b64decode(value["sealed"]), key.encode()))
        return dict(value)

    # ---- section 2

    def read(self, oid: bytes, kind: int, most: int) -> bytes:
        """The plaintext of an object, of at most so many bytes."""
        name = oid.hex()
        must(len(oid) == 32 and oid[31] & 15 == kind, f"{name} has another kind")
        must((oid[31] >> 4 > 0) == (kind == PATCH), f"{name} has wrong layers")
        with open(self.folder / "objects" / name[:2] / name, "rb") as file:
            data = file.read(16 + most + 28 + 1)
        must(len(data) >= 16, f"{name} is short")
        magic, version, stored_kind, codec, flags, n, m = struct.unpack("<4sBBBBII", data[:16])
        expected = (b"HRCX", 1, kind, int(self.encrypted))
        must((magic, version, stored_kind, flags) == expected, f"{name}: header")
        more = 28 if self.encrypted else 0
        must(n <= most and m <= n + more and len(data) == 16 + m, f"{name}: lengths")
        plain = data[16:]
        if self.encrypted:
            plain = unseal(
                blake3(oid, key=self.keys["object keys"]).digest(), plain, data[:16] + oid
            )
        if codec == 1:
            must(zstandard.frame_content_size(plain) == n, f"{name}: frame")
            plain = zstandard.ZstdDecompressor().decompress(plain, allow_extra_data=False)
        else:
            must(codec == 0, f"{name}: codec")
        must(len(plain) == n, f"{name}: length")
        ids = {"key": self.keys["object ids"]} if self.encrypted else {}
        hashed = blake3(bytes([kind]) + plain, **ids).digest()[:31]
        layers = plain[1] if kind == PATCH else 0
        must(oid == hashed + bytes([kind | layers << 4]), f"{name} is damaged")
        return plain

    # ---- sections 6 and 8

    def commit(self, oid: bytes) -> dict[str, Any]:
        value = json.loads(self.read(oid, COMMIT, 1 << 20))
        must(value["version"] == 1, "a newer commit")
        return dict(value)

    def head(self, image: str, branch: str) -> bytes | None:
        folder = self.folder / "refs" / image / "heads" / branch
        names = (
            [n for n in os.listdir(folder) if re.fullmatch("[0-9]{20}", n)]
            if folder.is_dir()
            else []
        )
        if not names:
            return None
        key = f"refs/{image}/heads/{branch}/{min(names)}"
        record = self.record(key)
        must(record["key"] == key, f"{key} belongs elsewhere")
        must(record["number"] == 99999999999999999999 - int(min(names)), f"{key}: number")
        return bytes.fromhex(record["commit"]) if record["commit"] else None

    def tag(self, image: str, tag: str) -> bytes | None:
        key = f"refs/{image}/tags/{tag}"
        if not (self.folder / key).is_file():
            return None
        record = self.record(key)
        must(record["key"] == key, f"{key} belongs elsewhere")
        return bytes.fromhex(record["commit"])

    def resolve(self, image: str, ref: str = "main") -> bytes:
        oid = self.head(image, ref) or self.tag(image, ref)
        if oid is None and re.fullmatch("[0-9a-f]{4,64}", ref):
            found = [
                bytes.fromhex(path.name)
                for path in (self.folder / "objects" / ref[:2]).glob(f"{ref}*")
                if len(path.name) == 64 and path.name.endswith("04")
            ]
            found = [commit for commit in found if self.commit(commit)["image"] == image]
            must(len(found) == 1, f"{len(found)} commits begin with {ref}")
            return found[0]
        must(oid, f"no {image}@{ref}")
        assert oid is not None
        return oid

    # ---- section 5

    def entries(self, commit: dict[str, Any]) -> list[tuple[int, bytes]]:
        """(chunk number, id) of all that is not zeros."""
        chunks = -(-commit["size"] // commit["chunk_size"])
        height = 1
        while 256**height < chunks:
            height += 1
        found: list[tuple[int, bytes]] = []

        def walk(oid: bytes, level: int, first: int) -> None:
            if oid == NULL:
                return
            plain = self.read(oid, NODE, 8200)
            must(
                len(plain) == 8200 and plain[:8] == bytes([level, 8]) + bytes(6), "a node's header"
            )
            ids = [plain[8 + 32 * i : 40 + 32 * i] for i in range(256)]
            must(any(entry != NULL for entry in ids), "a node of zeros")
            for i, entry in enumerate(ids):
                number = first + i * 256**level
                if level:
                    walk(entry, level - 1, number)
                elif entry != NULL:
                    must(number < chunks, "an entry behind the end")
                    found.append((number, entry))

        walk(bytes.fromhex(commit["index"]), height - 1, 0)
        return found

    # ---- sections 3 and 4

    def chunk(self, oid: bytes, c: int) -> bytes:
        if oid == NULL:
            return bytes(c)
        if oid[31] & 15 == CHUNK:
            plain = self.read(oid, CHUNK, c)
            must(len(plain) == c, "a chunk of another size")
            must(any(plain), "a chunk of zeros")
            return plain
        plain = self.read(oid, PATCH, 8 + 15 * 32 + c // 32768 + c)
        log, layers, k, zero, b = struct.unpack("<BBBBI", plain[:8])
        must((log, zero, b) == (12, 0, c // 4096), "a patch's header")
        must(1 <= k <= layers <= 15, "layers")
        chain = [plain[8 + 32 * i : 40 + 32 * i] for i in range(k)]
        for i, below in enumerate(chain[:-1]):
            must(below[31] == (layers - 1 - i) << 4 | PATCH, "a chain that does not count down")
        last = chain[-1]
        if last[31] & 15 == PATCH:
            must(k < layers and last[31] >> 4 == layers - k, "an open chain")
        else:
            must(k == layers and (last == NULL or last[31] == CHUNK), "a whole chain")
        bitmap = plain[8 + 32 * k : 8 + 32 * k + b // 8]
        here = [i for i in range(b) if bitmap[i // 8] >> (i % 8) & 1]
        blocks = plain[8 + 32 * k + b // 8 :]
        must(here and len(blocks) == 4096 * len(here), "blocks")
        content = bytearray(self.chunk(chain[0], c))
        for at, i in enumerate(here):
            content[4096 * i : 4096 * (i + 1)] = blocks[4096 * at : 4096 * (at + 1)]
        return bytes(content)

    # ---- all of it

    def extract(self, oid: bytes, output: str | Path) -> None:
        """Write the image of a commit to a raw file, sparse where it is zeros."""
        commit = self.commit(oid)
        size, c = commit["size"], commit["chunk_size"]
        must(65536 <= c <= 1 << 26 and c & (c - 1) == 0, "a chunk size")
        with open(output, "wb") as file:
            file.truncate(size)
            for number, entry in self.entries(commit):
                content = self.chunk(entry, c)
                must(not any(content[max(0, size - number * c) :]), "data behind the end")
                file.seek(number * c)
                file.write(content[: size - number * c])


def main() -> None:
    folder, version, output = sys.argv[1:4]
    image, _, ref = version.partition("@")
    reader = Reader(folder, *(Path(file).read_bytes() for file in sys.argv[4:5]))
    reader.extract(reader.resolve(image, ref or "main"), output)


if __name__ == "__main__":
    main()

"""Makes the golden repository: one of everything that format 1 has. Run once for each format.

    python -m tests.golden.make tests/golden/v1
    python -m tests.golden.make tests/golden/v1-encrypted       # and its key beside it

What is in `tests/golden/v1` was made by the first release and is never made again: later releases
must open it. `v1.json` says what each version holds, from the plaintexts below and not from what a
reader made of the objects. test_golden.py makes the objects anew in memory, and compares their ids.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blake3 import blake3

from horcrux_nbd.chunkstore import open_store
from horcrux_nbd.chunkstore.base import ChunkStore
from horcrux_nbd.repository import keyring, keys
from horcrux_nbd.repository.commits import Commit
from horcrux_nbd.repository.index import levels_for
from horcrux_nbd.repository.keys import Secret
from horcrux_nbd.repository.objects import NULL_ID, Kind
from horcrux_nbd.repository.patch import BLOCK_SIZE, Patch, chain_over
from horcrux_nbd.repository.repository import Repository
from horcrux_nbd.repository.writer import ObjectWriter, publish_commit, write_index

KiB, MiB, TiB = 1 << 10, 1 << 20, 1 << 40
PASSPHRASE = "Übergröße of a horse"
AUTHOR = "Ada Lovelace <ada@example.org>"


def prose(seed: str, size: int) -> bytes:
    """Bytes that compress well; `size` of them."""
    line = f"{seed}: {blake3(seed.encode()).hexdigest()}\n".encode()
    return (line * (size // len(line) + 1))[:size]


def noise(seed: str, size: int) -> bytes:
    """Bytes that do not compress."""
    return blake3(seed.encode()).digest(length=size)


@dataclass
class Image:
    """One line of versions, and beside it what each chunk's plaintext is by plain arithmetic."""

    repository: Repository
    name: str
    chunk_size: int
    entries: dict[int, bytes] = field(default_factory=dict)
    plain: dict[int, bytes] = field(default_factory=dict)
    patches: dict[bytes, Patch] = field(default_factory=dict)
    versions: dict[str, dict[str, Any]] = field(default_factory=dict)  # by commit id
    turn: int = 0

    def chunk(self, number: int, plain: bytes) -> None:
        plain = plain.ljust(self.chunk_size, b"\0")
        self.entries[number] = self.repository.write_object(Kind.CHUNK, plain)
        self.plain[number] = plain

    def zeros(self, number: int) -> None:
        self.entries.pop(number, None)
        self.plain.pop(number, None)

    def patch(self, number: int, blocks: Mapping[int, bytes], *, at_hand: bool = True) -> None:
        below = self.entries.get(number, NULL_ID)
        patch = Patch(chain_over(below, self.patches.get(below) if at_hand else None), blocks)
        oid = self.repository.write_object(Kind.PATCH, patch.encode(self.chunk_size))
        self.patches[oid] = patch
        content = bytearray(self.plain.get(number, bytes(self.chunk_size)))
        for block, data in blocks.items():
            content[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE] = data
        self.entries[number], self.plain[number] = oid, bytes(content)

    def commit(
        self,
        size: int,
        message: str,
        branch: str = "main",
        extra_parents: tuple[bytes, ...] = (),
        **members: Any,
    ) -> bytes:
        head = self.repository.refs.head(self.name, branch)
        parent = head.commit if head else None
        self.turn += 1
        levels = levels_for(-(-size // self.chunk_size))
        with ObjectWriter(self.repository) as writer:
            root = write_index(writer, None, levels, sorted(self.entries.items()))
            commit = Commit(
                image=self.name,
                size=size,
                chunk_size=self.chunk_size,
                index=root,
                parents=((parent,) if parent else ()) + extra_parents,
                author=AUTHOR,
                time=f"2026-01-{self.turn:02}T12:00:00.000{self.turn:03}Z",
                message=message,
                **members,
            )
            record = publish_commit(writer, commit, branch, parent, f"commit: {message}")
        assert record.commit is not None
        self.versions[record.commit.hex()] = {
            "image": self.name,
            "size": size,
            "chunks": {
                str(number): hashlib.sha256(plain).hexdigest()
                for number, plain in sorted(self.plain.items())
            },
        }
        return record.commit


def make(store: ChunkStore, secret: Secret | None = None) -> dict[str, Any]:
    """The golden repository in `store`, which is empty; what its versions hold, by commit id.

    With a `secret` it is encrypted.
    """
    repository = Repository.create(store, 64 * KiB, secret=secret)
    refs = repository.refs

    # An image whose size is no multiple of the chunk, with two levels of index.
    amcc = Image(repository, "AMCC", 64 * KiB)
    size = 300 * 64 * KiB + 12345
    amcc.chunk(0, prose("first", 64 * KiB))
    amcc.chunk(1, noise("does not compress", 64 * KiB))
    amcc.chunk(255, prose("the last of a leaf", 64 * KiB))
    amcc.chunk(256, prose("the first of the next", 64 * KiB))
    amcc.chunk(300, prose("a part of a chunk", 12345))
    first = amcc.commit(size, "first version", filesystem="ext4")
    amcc.patch(0, {3: prose("patch over a chunk", 4096)})
    amcc.patch(7, {0: prose("patch over zeros", 4096), 15: prose("its last block", 4096)})
    second = amcc.commit(
        size,
        "patches",
        tags={"ticket": "4711", "wer": "Jürgen 😀"},
        new={"bytes": 500, "objects": 3},
    )
    refs.make_tag("AMCC", "v1", first, author=AUTHOR, message="the first")
    refs.make_tag("AMCC", "release-1.0", second, author=AUTHOR, message="")

    amcc.patch(0, {3: bytes(4096), 4: prose("second layer", 4096)})
    amcc.patch(7, {1: prose("over a patch over zeros", 4096)})
    for layer in range(15):  # as many as there can be
        amcc.patch(20, {layer % 16: prose(f"layer {layer}", 4096)})
    amcc.zeros(255)
    third = amcc.commit(size, "Übergröße: « chains »\n\nand a second line")
    # Made with the patch below out of reach: its chain is open.
    amcc.patch(0, {5: prose("open chain", 4096)}, at_hand=False)
    amcc.patch(0, {6: prose("over an open chain", 4096)})
    amcc.commit(size, "an open chain")

    side = Image(repository, "AMCC", 64 * KiB, dict(amcc.entries), dict(amcc.plain), turn=10)
    refs.move("AMCC", "side", third, None, author=AUTHOR, why="branch: side")
    side.chunk(2, prose("on the side", 64 * KiB))
    other = side.commit(size, "on another branch", branch="side")
    refs.move("AMCC", "gone", second, None, author=AUTHOR, why="branch: gone")
    refs.move("AMCC", "gone", None, second, author=AUTHOR, why="branch: deleted")
    refs.move("AMCC", "again", first, None, author=AUTHOR, why="branch: again")
    refs.move("AMCC", "again", None, first, author=AUTHOR, why="branch: deleted")
    refs.move("AMCC", "again", second, None, author=AUTHOR, why="branch: made again")

    amcc.chunk(2, prose("on the side", 64 * KiB))
    amcc.chunk(70_000, prose("after it grew to three levels", 64 * KiB))
    amcc.commit(70_001 * 64 * KiB, "merged and grown", extra_parents=(other,))

    # 64 TiB, of which three chunks are something.
    huge = Image(repository, "huge.64TiB", 512 * KiB)
    huge.chunk(0, prose("the beginning", 512 * KiB))
    huge.chunk(64 * MiB, prose("the middle", 512 * KiB))
    huge.chunk(128 * MiB - 1, prose("the end", 512 * KiB))
    huge.commit(64 * TiB, "sparse")
    huge.patch(64 * MiB, {127: prose("a patch in the middle", 4096)})
    huge.commit(64 * TiB, "still sparse")

    # The largest chunks, the largest number of levels, nothing at all.
    wide = Image(repository, "wide", 64 * MiB)
    wide.chunk(1, prose("64 MiB", 64 * MiB))
    wide.patch(1, {0: prose("its first block", 4096), 16383: prose("its last block", 4096)})
    wide.commit(2 * 64 * MiB, "64 MiB chunks")
    deep = Image(repository, "deep", 64 * KiB)
    deep.chunk((1 << 46) - 1, prose("at 4 EiB", 64 * KiB))
    deep.commit(1 << 62, "six levels")
    empty = Image(repository, "empty", 1 * MiB)
    empty.commit(1 << 30, "zeros")
    empty.commit(0, "nothing")

    # History that was removed: the parent of this version is told to be gone on purpose.
    cut = Image(repository, "cut", 64 * KiB)
    removed = Commit("cut", 0, 64 * KiB, NULL_ID, author=AUTHOR, time="2025-12-31T23:59:59Z")
    gone = repository.form.object_id(Kind.COMMIT, removed.encode())
    cut.chunk(0, prose("after the cut", 64 * KiB))
    oid = cut.commit(64 * KiB, "the oldest that is left", extra_parents=(gone,))
    key = f"refs/cut/shallow/{oid.hex()}"
    members = {"author": AUTHOR, "key": key, "time": "2026-01-03T00:00:00Z", "why": "gc"}
    store.put_exclusive(key, repository.form.encode_record(key, members))
    # A removal that is announced for the year 2100 hinders nobody.
    store.put_exclusive("gc/21000101T000000Z-00", b"")
    store.sync()

    found: dict[str, Any] = {}
    for image in (amcc, side, huge, wide, deep, empty, cut):
        found |= image.versions
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    secret = None
    if folder.name.endswith("-encrypted"):
        key = folder.with_suffix(".key")
        keys.make_key_file(key)
        secret = keys.read_key_file(key)
    with open_store(str(folder), create=True) as store:
        versions = make(store, secret)
        if secret is not None:
            opened = Repository.open(store)
            master = keyring.find(opened.id)
            assert master is not None
            words = keys.passphrase(PASSPHRASE)
            keys.add_slot(store, keys.make_slot(words, master, opened.id, "Ada"))
    (folder / ".tmp-puts").rmdir()
    text = json.dumps(versions, indent=1, sort_keys=True)
    folder.with_suffix(".json").write_text(text + "\n")


if __name__ == "__main__":
    main()

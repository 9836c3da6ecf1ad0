"""Patches: a chain of them against plain bytes, in every shape that a writer may make."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from horcrux_nbd.errors import Damaged
from horcrux_nbd.repository.objects import (
    ID_SIZE,
    MAX_LAYERS,
    NULL_ID,
    Kind,
    kind_of,
    layers_of,
    object_id,
)
from horcrux_nbd.repository.patch import (
    BLOCK_SIZE,
    PATCH_HEADER,
    Patch,
    chain_over,
    max_patch_size,
    resolve,
)

from .images import CHUNK, block, content

COUNT = CHUNK // BLOCK_SIZE
CHUNK_ID = object_id(Kind.CHUNK, content("base"))


class Objects:
    """Objects in memory, and how often one had to wait for some."""

    def __init__(self) -> None:
        self.objects: dict[bytes, tuple[Kind, bytes]] = {}
        self.fetches: list[int] = []

    def add(self, kind: Kind, plain: bytes) -> bytes:
        oid = object_id(kind, plain)
        self.objects[oid] = (kind, plain)
        return oid

    def add_patch(self, chain: tuple[bytes, ...], blocks: Mapping[int, bytes]) -> bytes:
        return self.add(Kind.PATCH, Patch(chain, blocks).encode(CHUNK))

    def patch(self, oid: bytes) -> Patch | None:
        if kind_of(oid) is not Kind.PATCH:
            return None
        return Patch.decode(self.objects[oid][1], CHUNK)

    def fetch(self, ids: Sequence[bytes]) -> dict[bytes, tuple[Kind, bytes]]:
        assert len(set(ids)) == len(ids) > 0
        self.fetches.append(len(ids))
        return {oid: self.objects[oid] for oid in ids}

    def resolve(self, oid: bytes) -> bytes:
        return resolve(oid, CHUNK, self.fetch)


BLOCKS = st.dictionaries(
    st.integers(0, COUNT - 1), st.integers(0, 9).map(lambda n: block(str(n)) if n else bytes(4096)),
    min_size=1, max_size=COUNT,
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.booleans(), st.lists(st.tuples(BLOCKS, st.booleans()), min_size=1, max_size=MAX_LAYERS))
def test_chains_against_bytes(
    over_zeros: bool, layers: list[tuple[dict[int, bytes], bool]]
) -> None:
    """Each writer has the patch below at hand, or only its id: readers see the same bytes."""
    objects = Objects()
    model = bytearray(CHUNK) if over_zeros else bytearray(content("base"))
    top = NULL_ID if over_zeros else objects.add(Kind.CHUNK, bytes(model))
    open_ends = 0
    for depth, (blocks, at_hand) in enumerate(layers):
        patch = objects.patch(top) if at_hand else None
        open_ends += depth > 0 and not at_hand
        top = objects.add_patch(chain_over(top, patch), blocks)
        for number, data in blocks.items():
            model[number * BLOCK_SIZE : (number + 1) * BLOCK_SIZE] = data
        assert layers_of(top) == depth + 1
        objects.fetches.clear()
        assert objects.resolve(top) == model
        # The patch itself, what it names, and once more for each chain that goes on in another.
        assert len(objects.fetches) <= 2 + open_ends
    if open_ends == 0:
        assert (
            objects.fetches == [1, len(layers) - over_zeros][: 1 + bool(len(layers) - over_zeros)]
        )


@given(BLOCKS, st.sampled_from([CHUNK, 2 * CHUNK, 64 * CHUNK]))
def test_encode_and_decode(blocks: dict[int, bytes], chunk_size: int) -> None:
    patch = Patch((CHUNK_ID,), blocks)
    plain = patch.encode(chunk_size)
    assert Patch.decode(plain, chunk_size) == Patch((CHUNK_ID,), dict(sorted(blocks.items())))
    assert len(plain) <= max_patch_size(chunk_size)


def test_a_chunk_and_zeros_need_no_patch() -> None:
    objects = Objects()
    oid = objects.add(Kind.CHUNK, content("x"))
    assert objects.resolve(oid) == content("x")
    assert objects.resolve(NULL_ID) == bytes(CHUNK)
    assert objects.fetches == [1]


def test_the_largest_patch_fits() -> None:
    objects = Objects()
    chain: tuple[bytes, ...] = (NULL_ID,)
    for _ in range(MAX_LAYERS):
        full = {number: block(str(number)) for number in range(COUNT)}
        plain = Patch(chain, full).encode(CHUNK)
        oid = objects.add(Kind.PATCH, plain)
        chain = (oid, *chain)
    assert len(plain) == max_patch_size(CHUNK)
    assert objects.resolve(oid) == b"".join(full.values())
    with pytest.raises(ValueError, match="takes no patch more"):
        chain_over(oid, objects.patch(oid))
    with pytest.raises(ValueError, match="chain"):
        Patch(chain, full).encode(CHUNK)
    with pytest.raises(ValueError, match="layers"):
        Patch((oid,), full).encode(CHUNK)


# ---- what a writer cannot make


def layered(layers: int) -> bytes:
    """The id of some patch with so many layers."""
    return object_id(Kind.PATCH, bytes([12, layers]) + b"x")


NODE_ID = object_id(Kind.NODE, b"")
BROKEN_CHAINS: list[tuple[bytes, ...]] = [
    (),
    (NODE_ID,),
    (CHUNK_ID, CHUNK_ID),
    (NULL_ID, CHUNK_ID),
    (layered(1), NULL_ID, CHUNK_ID),
    (layered(2), CHUNK_ID),  # one is missing
    (layered(1), layered(1), CHUNK_ID),
    (layered(1), layered(2), CHUNK_ID),
    (layered(3), layered(1)),
    (CHUNK_ID, layered(1)),
    (layered(MAX_LAYERS),),
    (*(layered(n) for n in range(15, 0, -1)), CHUNK_ID),
    (bytes(31) + b"\x02",),  # no id at all
]


@pytest.mark.parametrize("chain", BROKEN_CHAINS)
def test_broken_chains(chain: tuple[bytes, ...]) -> None:
    with pytest.raises(ValueError, match=r"chain|layers"):
        Patch(chain, {0: block("x")}).encode(CHUNK)
    top = layers_of(chain[0]) + 1 if chain else 1
    header = PATCH_HEADER.pack(12, top & 255, len(chain), 0, COUNT)
    plain = header + b"".join(chain) + b"\1\0" + block("x")
    with pytest.raises(Damaged, match="chain"):
        Patch.decode(plain, CHUNK)


@pytest.mark.parametrize("blocks", [{}, {-1: block("x")}, {COUNT: block("x")}, {0: b"short"}])
def test_blocks_that_cannot_be(blocks: dict[int, bytes]) -> None:
    with pytest.raises(ValueError, match="block"):
        Patch((CHUNK_ID,), blocks).encode(CHUNK)


# ---- damage


def test_every_truncation_and_length() -> None:
    plain = Patch((layered(1), CHUNK_ID), {1: block("a"), 9: block("b")}).encode(CHUNK)
    for length in [*range(200), len(plain) - BLOCK_SIZE, len(plain) - 1]:
        with pytest.raises(Damaged):
            Patch.decode(plain[:length], CHUNK)
    with pytest.raises(Damaged):
        Patch.decode(plain + b"\0", CHUNK)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((0, value) for value in (11, 13)),
        *((1, value) for value in (0, 1, 3, 18)),
        *((2, value) for value in (0, 1, 3, 255)),
        (3, 1),
        *((4, value) for value in (0, COUNT - 1, COUNT * 2, 2**32 - 1)),
    ],
)
def test_every_header_field(field: int, value: int) -> None:
    plain = Patch((layered(1), CHUNK_ID), {1: block("a")}).encode(CHUNK)
    fields = list(PATCH_HEADER.unpack_from(plain))
    fields[field] = value
    with pytest.raises(Damaged):
        Patch.decode(PATCH_HEADER.pack(*fields) + plain[PATCH_HEADER.size :], CHUNK)


@settings(max_examples=300)
@given(st.binary(max_size=300), st.booleans())
def test_noise(noise: bytes, behind_a_header: bool) -> None:
    plain = struct.pack("<BBBBI", 12, 1, 1, 0, COUNT) + noise if behind_a_header else noise
    with pytest.raises(Damaged):
        Patch.decode(plain, CHUNK)


def test_a_patch_of_another_chunk_size() -> None:
    plain = Patch((CHUNK_ID,), {0: block("x")}).encode(CHUNK)
    with pytest.raises(Damaged, match="does not fit chunks"):
        Patch.decode(plain, 2 * CHUNK)


def test_parts_that_do_not_make_a_chunk() -> None:
    objects = Objects()
    base = objects.add(Kind.CHUNK, content("base"))
    other = objects.add(Kind.CHUNK, content("other"))
    first = objects.add_patch((base,), {0: block("1")})
    liar = objects.add_patch((first, other), {0: block("2")})
    with pytest.raises(Damaged, match="another chain"):
        objects.resolve(liar)
    short = objects.add(Kind.CHUNK, content("short", CHUNK - 1))
    with pytest.raises(Damaged, match="65535 bytes"):
        objects.resolve(short)
    with pytest.raises(Damaged, match="65535 bytes"):
        objects.resolve(objects.add_patch((short,), {0: block("1")}))
    with pytest.raises(Damaged, match="no chunk"):
        objects.resolve(NODE_ID)
    with pytest.raises(Damaged, match="no chunk"):
        objects.resolve(b"\0" * (ID_SIZE - 1) + b"\x77")


def test_a_missing_part_says_so() -> None:
    objects = Objects()
    base = objects.add(Kind.CHUNK, content("base"))
    first = objects.add_patch((base,), {0: block("1")})
    top = objects.add_patch(chain_over(first, objects.patch(first)), {1: block("2")})
    for gone in (base, first, top):
        kept = objects.objects.pop(gone)
        with pytest.raises(KeyError):
            objects.resolve(top)
        objects.objects[gone] = kept

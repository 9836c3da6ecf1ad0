"""Which versions need an object: from a bad object back to what people call by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ..errors import Damaged
from .commits import Commit
from .index import check_node, table_ids
from .objects import NULL_ID, Kind, kind_of
from .patch import Patch
from .repository import Repository


def version_name(image: str, commit: bytes) -> str:
    """What people call a commit: `IMAGE@` and the 12 digits that `log` shows."""
    return f"{image}@{commit.hex()[:12]}"


def read_table(repository: Repository, level: int, oid: bytes) -> bytes:
    """The table of the index node `oid`. Raises Damaged, which names the object."""
    try:
        return check_node(repository.read_object(oid, (Kind.NODE,))[1], level)
    except Damaged as error:
        if oid.hex() in str(error):
            raise
        raise Damaged(f"{error}: object {oid.hex()}") from None


def affected(
    repository: Repository, commits: Mapping[bytes, Commit], bad: Collection[bytes]
) -> dict[bytes, list[bytes]]:
    """For each of the objects `bad`, the commits whose image needs it, the newest first.

    Reads the index of all `commits` from the store, each node once. Raises StoreError.
    """
    search = _Search(repository, frozenset(bad))
    found: dict[bytes, list[bytes]] = {oid: [] for oid in bad}
    for oid, commit in sorted(commits.items(), key=lambda item: item[1].time, reverse=True):
        for needed in search.below(commit.index, commit.levels - 1, commit.chunk_size):
            found[needed].append(oid)
    return found


_NONE: frozenset[bytes] = frozenset()


class _Search:
    def __init__(self, repository: Repository, bad: frozenset[bytes]) -> None:
        self._repository, self._bad = repository, bad
        self._known: dict[tuple[bytes, int], frozenset[bytes]] = {}

    def below(self, oid: bytes, level: int, chunk_size: int) -> frozenset[bytes]:
        """Bad objects that a subtree of an index needs."""
        if oid == NULL_ID:
            return _NONE
        key = (oid, chunk_size)
        if key not in self._known:
            found = self._bad & {oid}
            try:
                table = read_table(self._repository, level, oid)
            except Damaged:
                table = b""
            for child in table_ids(table):
                if level:
                    found |= self.below(child, level - 1, chunk_size)
                else:
                    found |= self._parts(child, chunk_size)
            self._known[key] = found or _NONE
        return self._known[key]

    def _parts(self, oid: bytes, chunk_size: int) -> frozenset[bytes]:
        """Bad objects among those that one index entry names."""
        found = self._bad & {oid}
        while kind_of(oid) is Kind.PATCH:
            try:
                plain = self._repository.read_object(oid, (Kind.PATCH,), chunk_size)[1]
                chain = Patch.decode(plain, chunk_size).chain
            except Damaged:
                break
            found |= self._bad.intersection(chain)
            oid = chain[-1]
        return found

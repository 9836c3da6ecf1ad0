"""Which of a volume's own objects are needed, in the order in which they may be stored."""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass, field

from ..repository.commits import Commit
from ..repository.index import check_node, table_ids
from ..repository.objects import Kind, kind_of, object_key
from ..volume.local import LocalObjects
from ..volume.state import VolumeState


@dataclass
class Reached:
    """Ids of a volume's own objects: chunks and patches, nodes by level (0: leaves), commits."""

    data: set[bytes] = field(default_factory=set)
    nodes: dict[int, set[bytes]] = field(default_factory=dict)
    commits: list[bytes] = field(default_factory=list)  # oldest first
    sizes: dict[bytes, int] = field(default_factory=dict)  # of all own objects, bytes as stored

    def steps(self) -> list[list[bytes]]:
        """In the order of writing: nothing comes before what it names."""
        levels = [sorted(self.nodes[level]) for level in sorted(self.nodes)]
        return [sorted(self.data), *levels, *([oid] for oid in self.commits)]

    def all(self) -> set[bytes]:
        return {oid for step in self.steps() for oid in step}


def reach(local: LocalObjects, commits: Iterable[tuple[bytes, Commit]]) -> Reached:
    """The own objects that `commits` (newest first) need, themselves included. Raises Damaged.

    What is not the volume's own is in its repository, and so is all below it.
    """
    found = Reached(sizes=local.sizes())
    own = found.sizes.keys()
    for oid, made in commits:
        if oid in own:
            found.commits.insert(0, oid)
        _nodes(local, own, made, found)
    _chains(local, own, found.data)
    return found


def _nodes(local: LocalObjects, own: Set[bytes], made: Commit, found: Reached) -> None:
    pending = [(made.index, made.levels - 1)]
    while pending:
        oid, level = pending.pop()
        nodes = found.nodes.setdefault(level, set())
        if oid not in own or oid in nodes:
            continue
        nodes.add(oid)
        children = table_ids(check_node(local.own_plain(oid), level))
        if level:
            pending += [(child, level - 1) for child in children]
        else:
            found.data.update(child for child in children if child in own)


def _chains(local: LocalObjects, own: Set[bytes], data: set[bytes]) -> None:
    """Add the own parts below the patches in `data`."""
    if not any(kind_of(oid) in (Kind.CHUNK, Kind.PATCH) for oid in own - data):
        return  # there is nothing that could be below
    pending = [oid for oid in data if kind_of(oid) is Kind.PATCH]
    while pending:
        patch = local.patch(pending.pop())
        for part in patch.chain if patch is not None else ():
            if part in own and part not in data:
                data.add(part)
                if kind_of(part) is Kind.PATCH:
                    pending.append(part)


def sweep(local: LocalObjects, state: VolumeState) -> int:
    """Remove own objects that no commit which was never pushed needs; bytes removed. Raises
    Damaged. Of what was pushed, only the commits stay that the volume lies on, or may lie on.

    Under the versions lock, and not between a freeze and its seal.
    """
    sizes = local.sizes()
    if len(sizes) == 1:  # the base's commit: a volume that has nothing of its own
        return 0
    lines = {
        oid: made
        for line in state.lines
        for oid, made in local.commits(bytes.fromhex(line.tip), line.upstream)
    }
    needed = reach(local, lines.items()).all() | state.tips
    gone = 0
    for oid, size in sizes.items():
        if oid not in needed:
            local.store.delete(object_key(oid))
            gone += size
    return gone

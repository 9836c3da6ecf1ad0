"""Where the files of an image lie, so that the next version can leave them there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from .ext4_inode import Extent
from .ext4_make import Geometry


@dataclass(frozen=True, slots=True)
class Place:
    """Of one file, directory or long symbolic link."""

    inode: int
    extents: tuple[Extent, ...]  # in blocks of 4 KiB; what is no hole
    tree: tuple[int, ...] = ()  # blocks of its extent tree, beside the inode
    xattr_block: int = 0  # block of its extended attributes, 0 for none; several may share it


@dataclass
class Layout:
    """Of a whole file system. Paths are relative to its root, which is `.`."""

    geometry: Geometry
    places: dict[bytes, Place] = field(default_factory=dict)


def follow_moves(places: Mapping[bytes, Place], paths: Sequence[bytes]) -> dict[bytes, Place]:
    """`places` by the `paths` that there are now: what has another path keeps its place.

    Of what is gone and what is new, two belong together whose paths end alike where no others do,
    the longest ends first: a folder that was renamed takes along what is in it. A wrong guess costs
    room in the store and nothing else.
    """
    now = set(paths)
    found = {path: place for path, place in places.items() if path in now}
    gone = [path for path in places if path not in now]
    new = [path for path in paths if path not in places]
    deepest = max((path.count(b"/") for path in new), default=0) + 1
    for parts in range(deepest, 0, -1):
        if not gone or not new:
            break
        before, after = _by_end(gone, parts), _by_end(new, parts)
        moved = {
            was: is_now
            for end, was in before.items()
            if was is not None and (is_now := after.get(end)) is not None
        }
        found |= {is_now: places[was] for was, is_now in moved.items()}
        gone = [path for path in gone if path not in moved]
        taken = set(moved.values())
        new = [path for path in new if path not in taken]
    return found


def _by_end(paths: Iterable[bytes], parts: int) -> dict[bytes, bytes | None]:
    """The last `parts` parts of a path: the path that ends so, None where several do."""
    ends: dict[bytes, bytes | None] = {}
    for path in paths:
        split = path.rsplit(b"/", parts)
        if len(split) > parts or path.count(b"/") == parts - 1:
            end = b"/".join(split[-parts:])
            ends[end] = None if end in ends else path
    return ends

"""A history of several branches, drawn with lines of text as git does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence


def draw(versions: Iterable[tuple[bytes, Sequence[bytes]]]) -> Iterator[tuple[bytes | None, str]]:
    """(id, picture) for each version, (None, picture) for lines that join or leave a lane.

    `versions` are ids and their parents, each before its parents.
    """
    lanes: list[bytes] = []  # the version that each lane leads to next
    for oid, parents in versions:
        if oid not in lanes:
            lanes.append(oid)
        at = lanes.index(oid)
        # Other lanes that lead here end here.
        while (other := _last(lanes, oid)) != at:
            yield None, _bend(len(lanes), other)
            del lanes[other]
        yield oid, " ".join("*" if lane == at else "|" for lane in range(len(lanes)))
        if not parents:
            if at < len(lanes) - 1:
                yield None, _bend(len(lanes), at + 1)
            del lanes[at]
            continue
        lanes[at] = parents[0]
        for parent in parents[1:]:
            if parent not in lanes:
                lanes.insert(at + 1, parent)
                yield (
                    None,
                    " ".join("|" for _ in range(at + 1)) + "\\" + " |" * (len(lanes) - at - 2),
                )


def _last(lanes: list[bytes], oid: bytes) -> int:
    return len(lanes) - 1 - lanes[::-1].index(oid)


def _bend(count: int, lane: int) -> str:
    """Lane `lane` goes one to the left, and those behind it with it."""
    return " ".join("|" for _ in range(lane)) + "/" + " /" * (count - lane - 1)

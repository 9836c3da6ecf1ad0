"""One of several processes that race for a branch: a turn for each line that it reads.

    python -m tests.faults.racer URL NAME

Says `won NUMBER COMMIT` or `lost` for each. A turn stores a commit over the branch's head and moves
the branch to it, as a push does.
"""

from __future__ import annotations

import sys

from horcrux_nbd.chunkstore import open_store
from horcrux_nbd.repository.commits import Commit, now
from horcrux_nbd.repository.objects import NULL_ID, Kind
from horcrux_nbd.repository.refs import BranchMoved
from horcrux_nbd.repository.repository import Repository

from ..repository.images import CHUNK


def main() -> None:
    url, name = sys.argv[1:3]
    with open_store(url, limit=60) as store:
        repository = Repository.open(store)
        print("ready", flush=True)
        for turn, _ in enumerate(sys.stdin):
            head = repository.refs.head("A", "main")
            parent = head.commit if head else None
            commit = Commit(
                "A", CHUNK, CHUNK, NULL_ID, (parent,) if parent else (), name, now(), f"{turn}"
            )
            oid = repository.write_object(Kind.COMMIT, commit.encode())
            store.sync()
            try:
                record = repository.refs.move("A", "main", oid, parent, author=name, why="race")
                print(f"won {record.number} {oid.hex()}", flush=True)
            except BranchMoved:
                print("lost", flush=True)


if __name__ == "__main__":
    main()

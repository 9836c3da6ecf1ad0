"""`scripts/bench`: runs benchmarks and prints their tables."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

from . import first_query, generate_speed, history_size, open_size, page_updates, warm
from .common import Missing, Table

ALL = {
    "open": open_size,
    "warm": warm,
    "generate": generate_speed,
    "first-query": first_query,
    "pages": page_updates,
    "history": history_size,
}


def main() -> int:
    names = sys.argv[1:] or list(ALL)
    unknown = [name for name in names if name not in ALL]
    if unknown:
        print(f"bench: no benchmark {unknown[0]!r}: there is {', '.join(ALL)}", file=sys.stderr)
        return 2
    scratch = Path(
        tempfile.mkdtemp(prefix="horcrux-bench-", dir=os.environ.get("TMPDIR", "/var/tmp"))
    )
    scratch.chmod(0o755)  # PostgreSQL runs as a user of its own
    os.environ["HORCRUX_ROOT"] = str(scratch / "root")
    os.environ["HORCRUX_RUN"] = str(scratch / "run")
    try:
        for name in names:
            try:
                table: Table = ALL[name].main(scratch)
            except Missing as error:
                print(f"### {name}\n\nnot measured: {error}\n")
                continue
            print(table.markdown(), flush=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

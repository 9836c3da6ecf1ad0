"""`horcrux-dv`: says that the Docker volume driver is not part of this release."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from horcrux_nbd import __version__

HELP = f"""\
Usage: horcrux-dv [--version] [--help]

The Docker volume driver of Horcrux NBD comes with a later release. This one ({__version__}) has the
repository, the block device and the command line. Until then, mount a volume on the host and give
the folder to the container:

    horcrux-cli create amcc cp:///opt/horcrux-amcc AMCC
    horcrux-cli mount amcc /mnt/amcc
    docker run -v /mnt/amcc:/var/lib/postgresql/data …
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0 for --version and --help, 9 (this program lacks something) else."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--help" in arguments or "-h" in arguments:
        print(HELP, end="")
        return 0
    if "--version" in arguments:
        print(f"horcrux-dv {__version__}")
        return 0
    print(
        "horcrux-dv: the Docker volume driver comes with a later release: use `horcrux-cli mount` "
        "and `docker run -v` until then",
        file=sys.stderr,
    )
    return 9

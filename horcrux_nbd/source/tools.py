"""Programs of the system that image sources use: mke2fs, e2fsck, qemu-img, mkfs.xfs …"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence

from ..errors import EnvironmentProblem

# mke2fs and its like are in sbin, which is not on a user's PATH on Debian.
_SBIN = "/usr/local/sbin:/usr/sbin:/sbin"


def find_tool(name: str, package: str) -> str:
    """The path of program `name`. Raises EnvironmentProblem, which names Debian's `package`."""
    path = shutil.which(name, path=f"{os.environ.get('PATH', '/usr/bin:/bin')}:{_SBIN}")
    if path is None:
        raise EnvironmentProblem(f"{name} is not installed: apt-get install {package}")
    return path


def run_tool(
    argv: Sequence[str],
    *,
    pass_fds: Sequence[int] = (),
    environment: Mapping[str, str] | None = None,
    timeout: float | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run to the end, in the C locale, with standard input empty; the caller looks at the code."""
    return subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="backslashreplace",
        check=False,
        pass_fds=pass_fds,
        env={**os.environ, "LC_ALL": "C", **(environment or {})},
        timeout=timeout,
    )


def last_line(result: subprocess.CompletedProcess[str]) -> str:
    """What a failed program said, for an error message: the last line that says something.

    mke2fs and its like begin with a line that only gives their version.
    """
    lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"exit code {result.returncode}"

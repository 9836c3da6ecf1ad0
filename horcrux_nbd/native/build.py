"""Building the filter: from the C files of this package, for the nbdkit that is installed.

nbdkit takes a filter only from its own version, so a record beside the shared object says which
nbdkit and which sources it was made for; what does not fit is not used.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from .. import files, paths
from ..errors import Damaged, EnvironmentProblem
from .library import NAME

SOURCES = Path(__file__).parent
VERSION_HEADER = Path("/usr/include/nbdkit-version.h")
RECORD = "built.json"
SWITCH = "HORCRUX_NATIVE"  # "0": as if it were not there
LIMIT = 120.0  # seconds for the compiler
FLAGS = (
    "-std=gnu11", "-O2", "-g", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden",
    "-Wall", "-Wextra", "-Werror", "-Wconversion", "-Wno-sign-conversion",
)  # fmt: skip
PACKAGES = "apt-get install gcc libc6-dev nbdkit-plugin-dev"


@dataclass(frozen=True)
class Built:
    """What a shared object was made from."""

    nbdkit: str  # version
    sources: str  # digest of the C files and of how they are compiled


def places() -> list[Path]:
    """Folders where it may be: of this installation, and of this host's root or user."""
    return [SOURCES / "built", paths.root() / "native"]


def nbdkit_version(nbdkit: str | Path = "nbdkit") -> str | None:
    """As `nbdkit --version` has it, None where there is none."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        said = subprocess.run(
            [nbdkit, "--version"], capture_output=True, text=True, timeout=10, check=True
        )
        if match := re.match(r"nbdkit (\S+)", said.stdout):
            return match.group(1)
    return None


@functools.cache
def sources_digest() -> str:
    """Changes with the C files and the flags."""
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for path in _sources():
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _sources() -> list[Path]:
    return sorted([*SOURCES.glob("*.c"), *SOURCES.glob("*.h")])


def found(nbdkit: str | Path = "nbdkit") -> Path | None:
    """The shared object that this nbdkit takes, None if there is none, or it is switched off."""
    if os.environ.get(SWITCH) == "0":
        return None
    wanted: Built | None = None
    for place in places():
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError, Damaged):
            record = files.read_json(place / RECORD)
            wanted = wanted or Built(nbdkit_version(nbdkit) or "", sources_digest())
            if record == asdict(wanted) and (place / NAME).exists():
                return place / NAME
    return None


def why_not(nbdkit: str | Path = "nbdkit") -> str | None:
    """Why it cannot be built here, None if it can, in one line."""
    version = nbdkit_version(nbdkit)
    if version is None:
        return "nbdkit is not installed: apt-get install nbdkit nbdkit-plugin-python"
    if _compiler() is None:
        return f"there is no C compiler: {PACKAGES}"
    try:
        headers = VERSION_HEADER.read_text()
    except OSError:
        return f"nbdkit's headers are not there ({VERSION_HEADER}): {PACKAGES}"
    if f'NBDKIT_VERSION_STRING "{version}"' not in headers:
        return (
            f"{VERSION_HEADER} is not of nbdkit {version}, which is installed: "
            "apt-get install --only-upgrade nbdkit nbdkit-plugin-dev"
        )
    return None


def not_there() -> EnvironmentProblem:
    """The error that says what to do where `found` finds none."""
    if os.environ.get(SWITCH) == "0":
        return EnvironmentProblem(f"the native filter is switched off ({SWITCH}=0)")
    reason = why_not() or "horcrux-cli native build"
    return EnvironmentProblem(f"there is no native filter for this nbdkit: {reason}")


def _compiler() -> str | None:
    return next(filter(None, map(shutil.which, ("gcc", "cc", "clang"))), None)


def build(nbdkit: str | Path = "nbdkit") -> Path:
    """Build it, where it can be put; the shared object. Raises EnvironmentProblem."""
    if reason := why_not(nbdkit):
        raise EnvironmentProblem(f"the native filter cannot be built: {reason}")
    version = nbdkit_version(nbdkit)
    assert version is not None
    with _somewhere() as place, tempfile.TemporaryDirectory() as scratch:
        made = compiled(Path(scratch) / NAME)
        (place / RECORD).unlink(missing_ok=True)
        # By rename: a server that runs goes on with the one that it has.
        files.publish(place / NAME, made.read_bytes(), mode=0o755)
        files.publish_json(place / RECORD, asdict(Built(version, sources_digest())), mode=0o644)
        return place / NAME


@contextlib.contextmanager
def _somewhere() -> Iterator[Path]:
    """The first of the places that can be written to."""
    errors = []
    for place in places():
        try:
            files.make_folder(place)
        except OSError as error:
            errors.append(f"{place}: {error.strerror}")
            continue
        if os.access(place, os.W_OK):
            yield place
            return
        errors.append(f"{place}: may not be written to")
    raise EnvironmentProblem(f"the native filter has no place ({'; '.join(errors)})")


def compiled(path: Path, flags: Sequence[str] = (), sources: Sequence[Path] = ()) -> Path:
    """Compile the C files (and more of them) into `path`. Raises EnvironmentProblem."""
    command = [
        str(_compiler()), *FLAGS, *flags, "-o", str(path),
        *(str(source) for source in [*SOURCES.glob("*.c"), *sources]),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    if done.returncode:
        raise EnvironmentProblem(f"the native filter does not compile: {done.stderr[-1000:]}")
    return path

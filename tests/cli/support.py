"""The installed horcrux-cli as a process, and small sources to generate from."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.servers.process import PATIENCE

PROGRAM = Path(sys.executable).with_name("horcrux-cli")
LIMIT = 60.0 * PATIENCE  # seconds for one command


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def run(*words: str | Path, env: Mapping[str, str] | None = None, ok: bool = True) -> Result:
    """Run horcrux-cli as a user does; asserts that it ends well unless `ok` is False."""
    done = subprocess.run(
        [PROGRAM, *map(str, words)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        env={**os.environ, **(env or {})},
        check=False,
    )
    if ok:
        assert done.returncode == 0, f"{words}: {done.returncode}: {done.stderr}"
    return Result(done.returncode, done.stdout, done.stderr)


def fails(code: int, *words: str | Path, env: Mapping[str, str] | None = None) -> str:
    """The line that a command fails with: one, on standard error, and nothing else anywhere."""
    result = run(*words, env=env, ok=False)
    assert result.code == code, f"exit code {result.code}: {result.err}"
    lines = result.err.splitlines()
    assert len(lines) == 1, result.err
    assert lines[0].startswith("horcrux-cli: "), result.err
    assert "Traceback" not in result.err
    assert result.out == ""
    return lines[0].removeprefix("horcrux-cli: ")


def make_directory(folder: Path) -> Path:
    """A few files of every size that matters."""
    (folder / "sub").mkdir(parents=True)
    (folder / "empty").touch()
    (folder / "small").write_text("hello\n")
    (folder / "sub" / "large").write_bytes(random.Random(1).randbytes(2 << 20))
    (folder / "link").symlink_to("small")
    return folder

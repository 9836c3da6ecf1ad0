"""paramiko comes without what only `Match exec` needs, and with it where that is used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CODE = """
import sys
from horcrux_nbd.chunkstore import parse_store_url, ssh
assert "invoke" not in sys.modules, "imported for nothing"
found = ssh.read_settings(parse_store_url("scp://box:/x"))
print(found.port, "invoke" in sys.modules)
"""


def port(config: Path, text: str) -> list[str]:
    config.write_text(text)
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env={"HORCRUX_SSH_CONFIG": str(config), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_without(tmp_path: Path) -> None:
    assert port(tmp_path / "config", "Host box\n Port 7\n") == ["7", "False"]


def test_match_exec(tmp_path: Path) -> None:
    text = 'Match host box exec "true"\n Port 8\nMatch exec "false"\n Port 9\n'
    assert port(tmp_path / "config", text) == ["8", "True"]

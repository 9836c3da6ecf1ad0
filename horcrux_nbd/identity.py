"""Who somebody is, for commits: what git would say, else user@host."""

from __future__ import annotations

import getpass
import os
import socket
import subprocess


def author() -> str:
    """`Name <mail>` from $HORCRUX_AUTHOR, git's environment or git's configuration."""
    if value := os.environ.get("HORCRUX_AUTHOR"):
        return value
    name = os.environ.get("GIT_AUTHOR_NAME") or _git("user.name")
    mail = os.environ.get("GIT_AUTHOR_EMAIL") or _git("user.email")
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a uid without an account, as in many containers
        user = str(os.geteuid())
    if not name:
        return mail or f"{user}@{socket.gethostname()}"
    return f"{name} <{mail}>" if mail else name


def _git(key: str) -> str:
    try:
        result = subprocess.run(
            ["git", "config", "--get", key], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip()

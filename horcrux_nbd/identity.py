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
    name, mail = os.environ.get("GIT_AUTHOR_NAME", ""), os.environ.get("GIT_AUTHOR_EMAIL", "")
    if not name or not mail:
        configured = _configured()
        name, mail = name or configured.get("name", ""), mail or configured.get("email", "")
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a uid without an account, as in many containers
        user = str(os.geteuid())
    if not name:
        return mail or f"{user}@{socket.gethostname()}"
    return f"{name} <{mail}>" if mail else name


def _configured() -> dict[str, str]:
    """What git's configuration says of `user`; the last value of a key counts."""
    command = ["git", "config", "--null", "--get-regexp", r"^user\.(name|email)$"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    pairs = (entry.partition("\n") for entry in result.stdout.split("\0") if entry)
    return {key.removeprefix("user."): value.strip() for key, _, value in pairs}

"""Where things are on this host (DESIGN §4). Created on use, not here."""

from __future__ import annotations

import os
from pathlib import Path


def root() -> Path:
    """State that lasts: `$HORCRUX_ROOT`, else /var/lib/horcrux for root, else ~/.local/share."""
    if value := os.environ.get("HORCRUX_ROOT"):
        return Path(value)
    if os.geteuid() == 0:
        return Path("/var/lib/horcrux")
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share") / "horcrux"


def run() -> Path:
    """Sockets and pids, gone after a reboot: `$HORCRUX_RUN`, else /run/horcrux, else the user's."""
    if value := os.environ.get("HORCRUX_RUN"):
        return Path(value)
    if os.geteuid() == 0:
        return Path("/run/horcrux")
    return Path(os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}") / "horcrux"


def config_file() -> Path:
    """`$HORCRUX_CONFIG`, else /etc/horcrux/config.toml for root, else ~/.config/horcrux."""
    if value := os.environ.get("HORCRUX_CONFIG"):
        return Path(value)
    if os.geteuid() == 0:
        return Path("/etc/horcrux/config.toml")
    return (
        Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "horcrux/config.toml"
    )


def volumes() -> Path:
    return root() / "volumes"


def cache() -> Path:
    return root() / "cache"

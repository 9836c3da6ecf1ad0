"""paramiko without invoke, which it imports for `Match exec` of ssh_config(5) alone.

That takes 55 ms of the 130 ms that paramiko's import does, of every first query.
"""

from __future__ import annotations

import importlib
import sys

if "invoke" in sys.modules:
    import paramiko
else:
    sys.modules["invoke"] = None  # type: ignore[assignment]  # "import invoke" fails meanwhile
    try:
        import paramiko
    finally:
        del sys.modules["invoke"]

__all__ = ["allow_exec", "paramiko"]


def allow_exec() -> None:
    """Import it now: a configuration has `Match exec`. Raises ImportError where it is missing."""
    paramiko.config.invoke = importlib.import_module("invoke")  # type: ignore[attr-defined]

"""A server process: started, waited for until it answers, and surely ended."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

# Limits on waiting are this much larger where an emulator runs the tests (scripts/vm).
PATIENCE = 5 if os.environ.get("HORCRUX_IN_VM") else 1

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


def free_port() -> int:
    """A TCP port on loopback that nobody uses now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def end_with_parent() -> None:
    # A test run that is killed must leave no server behind.
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def wait_for_port(port: int, process: subprocess.Popen[bytes] | None, limit: float = 20.0) -> None:
    """Return once something accepts connections on `port`; fail when `process` ends before."""
    end = time.monotonic() + limit
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        if process is not None and process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode} before it listened")
        if time.monotonic() > end:
            raise TimeoutError(f"nothing listens on port {port} after {limit} s")
        time.sleep(0.02)


def stop(process: subprocess.Popen[bytes], limit: float = 5.0) -> None:
    """End `process` and everything in its process group."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, kind)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(limit)
    process.wait(limit)


@contextlib.contextmanager
def server(
    command: Sequence[str | Path],
    port: int,
    log: Path,
    env: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """`command` as a process group of its own that listens on `port`; its output goes to `log`."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=None if env is None else {**os.environ, **env},
            start_new_session=True,
            preexec_fn=end_with_parent,  # noqa: PLW1509 - the tests start it from one thread
        )
    try:
        try:
            wait_for_port(port, process)
        except Exception as error:
            error.add_note(log.read_text(errors="replace")[-2000:])
            raise
        yield process
    finally:
        stop(process)

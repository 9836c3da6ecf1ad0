"""nbdkit with our plugin, or with any other, on a Unix socket; and libnbd to talk to it."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import pytest

from horcrux_nbd import serving
from horcrux_nbd.attach.sockets import listener

from .process import end_with_parent

PLUGIN = Path(serving.__file__).with_name("plugin.py")
MISSING = "needs nbdkit and libnbd: apt-get install nbdkit nbdkit-plugin-python python3-libnbd"
_DEBIAN = "/usr/lib/python3/dist-packages"


def available() -> bool:
    return bool(shutil.which("nbdkit")) and libnbd() is not None


def libnbd() -> ModuleType | None:
    """Debian's bindings, which fit whatever was made with Debian's Python; None where they do not.

    Nothing else is taken from there: its packages are older than ours.
    """
    if found := sys.modules.get("nbd"):
        return found
    sys.path.append(_DEBIAN)
    try:
        return importlib.import_module("nbd")
    except ImportError:
        return None
    finally:
        sys.path.remove(_DEBIAN)


# Before our plugin; the tests of the plugin go through both.
FILTERS: list[str] = []


class Nbdkit:
    """One nbdkit. `keys` are the plugin's; it starts with `start` or as a context manager."""

    def __init__(
        self,
        *arguments: str | Path,
        plugin: str | Path | None = None,
        env: Mapping[str, str] | None = None,
        options: tuple[str, ...] = (),
        **keys: object,
    ) -> None:
        self._folder = tempfile.mkdtemp(prefix="nbdkit-")  # short: a socket's path has 107 bytes
        self.socket = Path(self._folder, "s")
        self.log = Path(self._folder, "log")
        self._env = None if env is None else {**os.environ, **env}
        what = [*FILTERS, "python", PLUGIN, *arguments] if plugin is None else [plugin, *arguments]
        self._command = [
            "nbdkit", "--foreground", "--unix", self.socket, *options, *what,
            *(f"{key}={value}" for key, value in keys.items()),
        ]  # fmt: skip
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"nbd+unix:///?socket={self.socket}"

    @property
    def pid(self) -> int:
        assert self.process
        return self.process.pid

    def said(self) -> str:
        """What it has written so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def start(self, limit: float = 20) -> Nbdkit:
        """Start it and wait until it listens. Fails with what it said if it ends before."""
        with contextlib.suppress(FileNotFoundError):
            self.socket.unlink()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._env,
                preexec_fn=end_with_parent,  # noqa: PLW1509 - started from one thread
            )
        end = time.monotonic() + limit
        while True:
            if listener(self.socket):  # without connecting, which would show in its log
                return self
            if self.process.poll() is not None:
                raise RuntimeError(f"nbdkit ended: {self.said()[-2000:]}")
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(f"nbdkit does not listen: {self.said()[-2000:]}")
            time.sleep(0.005)

    def refused(self, limit: float = 30) -> str:
        """Start it where it cannot start; the lines it wrote. Fails if it does start."""
        done = subprocess.run(
            self._command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=self._env,
            timeout=limit,
            check=False,
        )
        assert done.returncode != 0
        assert done.stdout == ""
        return done.stderr

    def kill(self) -> None:
        """SIGKILL, and gone when this returns."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)

    def stop(self, limit: float = 20) -> int:
        """SIGTERM; the exit code."""
        assert self.process
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(limit)

    def connect(self, export: str = "") -> Any:
        """A libnbd handle that lets wrong requests through and knows base:allocation."""
        nbd = libnbd()
        assert nbd is not None
        handle = nbd.NBD()
        handle.set_strict_mode(0)
        handle.add_meta_context("base:allocation")
        handle.set_export_name(export)
        handle.connect_unix(str(self.socket))
        return handle

    def __enter__(self) -> Nbdkit:
        return self.start() if self.process is None else self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.process is not None and self.process.poll() is None:
            try:
                self.stop()
            except subprocess.TimeoutExpired:
                self.kill()
                if kind is None:
                    raise
        if value is not None:
            value.add_note(self.said()[-2000:])
        shutil.rmtree(self._folder, ignore_errors=True)


class Syncs(list[str]):
    """The names of the files that were synced, in this order, once the block has ended."""


@contextlib.contextmanager
def traced(server: Nbdkit) -> Iterator[Syncs]:
    """What the server syncs during a block. Process death cannot show it: the kernel lives on."""
    if not shutil.which("strace"):
        pytest.skip("needs strace: apt-get install strace")
    trace = server.log.with_name("trace")
    trace.unlink(missing_ok=True)
    command = ["strace", "-f", "-y", "-e", "trace=fdatasync,fsync", "-o", trace, "-p"]
    process = subprocess.Popen([*command, str(server.pid)], stderr=subprocess.PIPE)
    syncs = Syncs()
    try:
        assert process.stderr is not None
        said = process.stderr.readline().decode()
        if "attached" not in said:
            pytest.skip(f"strace may not attach here: {said.strip()}")
        yield syncs
    finally:
        process.terminate()
        process.wait(10)
        found = trace.read_text() if trace.exists() else ""
        # A call that another thread's interrupts is in two lines; the first has the name.
        syncs.extend(re.findall(r"f(?:data)?sync\(\d+<[^>]*/([^/>]+)>", found))
        assert "= -1" not in found


@contextlib.contextmanager
def connected(server: Nbdkit, export: str = "") -> Iterator[Any]:
    """A connection for the length of a block."""
    handle = server.connect(export)
    try:
        yield handle
    finally:
        with contextlib.suppress(Exception):
            handle.shutdown()

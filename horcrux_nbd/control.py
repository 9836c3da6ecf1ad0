"""The control socket of a served volume: one JSON line asked, one answered.

Root's own programs (the CLI, the Docker driver) ask a running server for its figures here. The
socket lies in a folder of mode 0700 beside the NBD socket.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .errors import HorcruxError, UsageError

log = logging.getLogger(__name__)

MAX_LINE = 1 << 20  # bytes of a request or an answer
TIMEOUT = 5.0  # seconds for the other side to say its line

Command = Callable[[Mapping[str, Any]], Any]


class ControlServer:
    """Answers requests `{"command": NAME, …}` with `{"result": …}` or `{"error": …}`."""

    def __init__(self, path: Path, commands: Mapping[str, Command]) -> None:
        self._path, self._commands = path, commands
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)  # of a server that was killed; the volume's lock is ours
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._socket.bind(str(path))
        os.chmod(path, 0o600)
        self._socket.listen(16)
        self._thread = threading.Thread(target=self._run, name="control", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:  # closed by `stop`
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                connection.settimeout(TIMEOUT)
                answer = self._answer(_read_line(connection))
                connection.sendall(json.dumps(answer).encode() + b"\n")
            except OSError as error:
                log.info("control connection: %s", error)

    def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
            command = self._commands.get(request["command"])
            if command is None:
                known = ", ".join(self._commands)
                raise UsageError(f"unknown command {request['command']!r}: there is {known}")
            return {"result": command(request)}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            return {"error": f"no request: {error!r}", "exit_code": 2}
        except (HorcruxError, OSError) as error:
            return {"error": str(error), "exit_code": getattr(error, "exit_code", 1)}

    def stop(self) -> None:
        """Stop listening and remove the socket."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)


def _read_line(connection: socket.socket) -> bytes:
    data = b""
    while not data.endswith(b"\n"):
        part = connection.recv(65536)
        if not part or len(data) > MAX_LINE:
            break
        data += part
    return data


def ask(path: Path, command: str, timeout: float = TIMEOUT, **arguments: Any) -> Any:
    """What the server behind `path` answers. Raises HorcruxError with what it said, OSError where
    none listens.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as connection:
        connection.settimeout(timeout)
        connection.connect(str(path))
        connection.sendall(json.dumps({"command": command, **arguments}).encode() + b"\n")
        answer = json.loads(_read_line(connection))
    if "error" in answer:
        error = HorcruxError(str(answer["error"]))
        error.exit_code = int(answer.get("exit_code", 1))
        raise error
    return answer["result"]

"""horcrux-dv as a process, and what Docker asks of it."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import json
import os
import secrets
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.servers.process import PATIENCE, end_with_parent

PROGRAM = Path(sys.executable).with_name("horcrux-dv")
# Where the tests' hosts are: short, since a socket's path has 107 bytes and an anonymous volume's
# name 64; and a mount that dockerd's own mount namespace follows (conftest.py).
FOLDER = Path(tempfile.gettempdir()) / f"dv{secrets.token_hex(3)}"
PLUGINS = FOLDER / "plugins"  # dockerd sees it as /run/docker/plugins
LIMIT = 60.0 * PATIENCE  # seconds for anything that a test waits for
# One for the whole run: a dockerd never forgets a driver, and its `volume ls` waits 15 s for each
# that is gone.
NAME = f"horcrux-{secrets.token_hex(4)}"


@contextlib.contextmanager
def shared_folder() -> Iterator[None]:
    """FOLDER, a shared mount: what is mounted in it appears in dockerd's mount namespace."""
    PLUGINS.mkdir(parents=True)
    if os.geteuid() == 0:
        subprocess.run(["mount", "--bind", FOLDER, FOLDER], check=True)
        subprocess.run(["mount", "--make-shared", FOLDER], check=True)
    yield
    if os.geteuid() == 0:
        subprocess.run(["umount", FOLDER], check=True)  # it fails if something is left in it
    shutil.rmtree(FOLDER)


def wait_for(done: Callable[[], object], what: str, limit: float = LIMIT) -> None:
    deadline = time.monotonic() + limit
    while not done():
        assert time.monotonic() < deadline, f"{what} did not come within {limit} s"
        time.sleep(0.02)


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float = LIMIT) -> None:
        super().__init__("plugin", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class DriverProcess:
    """A horcrux-dv of this test's host. `name` is what Docker calls it."""

    def __init__(
        self,
        folder: Path,
        docker_host: str = "unix:///nonexistent",
        socket: Path | None = None,
    ) -> None:
        self.socket = socket or PLUGINS / f"{NAME}.sock"
        self.name = self.socket.stem
        self.log = folder / f"{self.name}.log"
        self.words = ["--log-level", "debug", "--docker-host", docker_host]
        self.env: dict[str, str] = {}
        self.port = 0  # where it listens instead of the socket
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Returns when it listens."""
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                [PROGRAM, "--socket", self.socket, *self.words],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **self.env},
                start_new_session=True,
                preexec_fn=end_with_parent,  # noqa: PLW1509 - the tests start it from one thread
            )

        def listens() -> bool:
            assert self._process is not None
            assert self._process.poll() is None, self.log.read_text()
            with contextlib.suppress(OSError):
                if self.port:
                    socket.create_connection(("127.0.0.1", self.port), 5).close()
                    return True
                with socket.socket(socket.AF_UNIX) as connection:
                    connection.connect(str(self.socket))
                    return True
            return False

        wait_for(listens, "the driver")

    def stop(self) -> int:
        return self._end(signal.SIGTERM)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def _end(self, number: int) -> int:
        if self._process is None:
            return 0
        self._process.send_signal(number)
        code = self._process.wait(LIMIT)
        self._process = None
        return code

    def restart(self) -> None:
        self.stop()
        self.start()

    # ---- as Docker asks

    def post(
        self, path: str, body: bytes, headers: Mapping[str, str] | None = None
    ) -> tuple[http.client.HTTPResponse, bytes]:
        connection = UnixConnection(self.socket)
        try:
            connection.request("POST", path, body, dict(headers or {}))
            response = connection.getresponse()
            return response, response.read()
        finally:
            connection.close()

    def ask(self, command: str, **members: Any) -> dict[str, Any]:
        """The answer to a command of the protocol; what it says as `Err` is an AssertionError."""
        answer = self.try_to(command, **members)
        assert not answer.get("Err"), answer["Err"]
        return answer

    def try_to(self, command: str, **members: Any) -> dict[str, Any]:
        _, data = self.post(
            f"/VolumeDriver.{command}" if "." not in command else f"/{command}",
            json.dumps(members).encode(),
        )
        return dict(json.loads(data))

    def error(self, command: str, **members: Any) -> str:
        """The one line that a command is refused with."""
        answer = self.try_to(command, **members)
        assert answer.get("Err"), f"{command} {members} worked: {answer}"
        assert "\n" not in answer["Err"]
        assert "Traceback" not in answer["Err"]
        return str(answer["Err"])


@contextlib.contextmanager
def driver(
    folder: Path, docker_host: str = "unix:///nonexistent", socket: Path | None = None
) -> Iterator[DriverProcess]:
    """A running driver; its socket is gone at the end, its volumes are the caller's."""
    process = DriverProcess(folder, docker_host, socket)
    try:
        process.start()
        yield process
    finally:
        process.stop()
        process.socket.unlink(missing_ok=True)


class Recorder:
    """Stands between Docker and a driver, under the driver's name, and notes what was asked.

    `calls` are (command, body); `on` may be asked to answer in the driver's place.
    """

    def __init__(self, behind: Path) -> None:
        self.name = NAME
        self.socket = PLUGINS / f"{self.name}.sock"
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.on: Callable[[str, dict[str, Any]], dict[str, Any] | None] = lambda *_: None
        self._behind = behind
        self._server = _UnixServer(str(self.socket), self)
        os.chmod(self.socket, 0o600)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def count(self, command: str) -> int:
        return sum(one == command for one, _ in self.calls)

    def counts(self, *commands: str) -> tuple[int, ...]:
        return tuple(map(self.count, commands))

    def answer(self, path: str, body: bytes) -> tuple[int, bytes]:
        command = path.rsplit(".", 1)[-1]
        asked = json.loads(body or b"{}") or {}
        self.calls.append((command, asked))
        said = self.on(command, asked)
        if said is not None:
            return 200, json.dumps(said).encode()
        connection = UnixConnection(self._behind)
        try:
            connection.request("POST", path, body)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self.socket.unlink(missing_ok=True)


class _UnixServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, path: str, recorder: Recorder) -> None:
        self.recorder = recorder
        super().__init__(path, _Handler)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _UnixServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status, data = self.server.recorder.answer(self.path, body)
        self.send_response(status)
        self.send_header("Content-Type", "application/vnd.docker.plugins.v1.2+json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

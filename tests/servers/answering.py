"""An HTTP server in front of an S3 server that answers with any status instead of passing on.

Conditional puts go through one at a time: moto looks and then puts, so that of two at once both may
win, which no S3 server may let happen (Ceph does not).

with answering(s3.port) as server:
    server.status = 503      # 0: pass on to the real one
"""

from __future__ import annotations

import contextlib
import http.client
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# What S3 servers say with a status; a client looks at both.
CODES = {
    403: "AccessDenied",
    404: "NoSuchKey",
    429: "TooManyRequests",
    500: "InternalError",
    503: "SlowDown",
}


class Answering:
    """`status` is answered to every request while it is not 0."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.status = 0
        self.port = 0
        self.answered = 0
        self.conditional = threading.Lock()


@contextlib.contextmanager
def answering(target: int) -> Iterator[Answering]:
    """In threads of this process, in front of the S3 server on port `target`."""
    made = Answering(target)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if made.status:
                made.answered += 1
                code = CODES.get(made.status, "Unknown")
                text = f"<?xml version='1.0'?><Error><Code>{code}</Code></Error>".encode()
                self._answer(made.status, [("Content-Type", "application/xml")], text)
                return
            connection = http.client.HTTPConnection("127.0.0.1", made.target, timeout=30)
            alone = made.conditional if "If-None-Match" in self.headers else None
            with contextlib.closing(connection), alone or contextlib.nullcontext():
                connection.request(self.command, self.path, body or None, dict(self.headers))
                answer = connection.getresponse()
                self._answer(answer.status, answer.getheaders(), answer.read())

        def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
            self.send_response_only(status)
            length = str(len(body))
            for name, value in headers:
                if name.lower() == "content-length" and self.command == "HEAD":
                    length = value
                elif name.lower() not in ("transfer-encoding", "content-length", "connection"):
                    self.send_header(name, value)
            self.send_header("Content-Length", length)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = handle_any

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *args: Any) -> None:
            pass  # a client that was cut off

    server = Server(("127.0.0.1", 0), Handler)
    made.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield made
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)

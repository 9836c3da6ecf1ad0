"""What is special about S3: answers that moto does not give, credentials, a bad network."""

from __future__ import annotations

import contextlib
import http.server
import os
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from horcrux_nbd.chunkstore import ChunkStore, open_store, parse_store_url
from horcrux_nbd.chunkstore.s3 import S3Store
from horcrux_nbd.errors import (
    KeyExists,
    KeyNotFound,
    StoreError,
    StoreFull,
    StoreMissing,
    StoreRefused,
    StoreUnavailable,
)

from ..servers.moto_s3 import S3Server
from ..servers.process import free_port
from ..servers.proxy import Network, proxy

KiB, MiB = 1 << 10, 1 << 20

# ---- a bad network ------------------------------------------------------------------------------


@pytest.fixture
def network(s3: S3Server) -> Iterator[Network]:
    with proxy(s3.port) as network:
        yield network


@pytest.fixture
def store(s3: S3Server, network: Network) -> Iterator[ChunkStore]:
    with open_store(s3.url(s3.make_bucket(), "p", network.port), limit=8) as store:
        yield store


def test_a_connection_cut_in_the_middle_of_an_object(store: ChunkStore, network: Network) -> None:
    data = os.urandom(3 * MiB)
    store.put("a", data)
    for count in (100, 100 * KiB, 2 * MiB):
        network.cut()
        network.cut_after(count)
        assert store.get("a") == data
        assert network._cut_after is None  # it was cut


def test_a_dead_peer(s3: S3Server, network: Network) -> None:
    store = open_store(s3.url(s3.make_bucket(), "p", network.port), limit=4)
    store.put("a", b"1")
    network.stall()
    began = time.monotonic()
    with pytest.raises(StoreUnavailable, match="no answer from http://127"):
        store.get("a")
    assert time.monotonic() - began < 8  # a busy machine is given time
    network.resume()
    assert store.get("a") == b"1"
    store.close()


def test_a_server_that_comes_back(store: ChunkStore, network: Network) -> None:
    store.put("a", b"1")
    network.refuse()
    timer = threading.Timer(0.5, network.accept)
    timer.start()
    assert store.get("a") == b"1"
    timer.join()


@pytest.mark.parametrize("size", [1, 500 * KiB])
def test_round_trips(store: ChunkStore, network: Network, size: int) -> None:
    """One for each request; no wait for `100 Continue` before the body of a put."""
    store.put("a", b"x" * size)
    for operation in (
        lambda: store.get("a"),
        lambda: store.put("a", b"x" * size),
        lambda: store.stat("a"),
        lambda: store.children(""),
    ):
        # The best of some, as the machine may be busy.
        assert any(_seconds(network, operation) < 0.2 * 1.9 for _ in range(5))


def _seconds(network: Network, operation: Callable[[], object]) -> float:
    """How long it takes over 200 ms of round trip."""
    network.delay = 0.1
    began = time.monotonic()
    operation()
    network.delay = 0
    return time.monotonic() - began


# ---- a server that answers as told --------------------------------------------------------------

Answer = tuple[int, dict[str, str], bytes]


class Told:
    """An HTTP server whose answer to each request is what `answer` gives; it keeps `requests`."""

    def __init__(self) -> None:
        self.answer: Callable[[str, str], Answer] = lambda method, path: (200, {}, b"")
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.port = 0

    def fails(self, status: int, code: str = "", more: str = "") -> None:
        body = f"<Error><Code>{code}</Code><Message>told so</Message>{more}</Error>".encode()
        self.answer = lambda method, path: (status, {}, body if code and method != "HEAD" else b"")


@pytest.fixture
def told(s3: S3Server) -> Iterator[Told]:
    told = Told()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            told.requests.append((self.command, self.path, dict(self.headers)))
            status, headers, body = told.answer(self.command, self.path)
            self.send_response(status)
            chunked = "Transfer-Encoding" in headers
            if not chunked:
                headers = {"Content-Length": str(len(body)), **headers}
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(body)
            # Else a client that was promised more would wait for it.
            self.close_connection = chunked or int(headers["Content-Length"]) != len(body)

        do_GET = do_PUT = do_HEAD = do_DELETE = handle_any

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    told.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield told
    server.shutdown()
    server.server_close()
    thread.join(10)


@pytest.fixture
def bare(told: Told) -> Iterator[S3Store]:
    """A store on the told server, without retries."""
    url = parse_store_url(f"s3://bucket/p?endpoint=http://127.0.0.1:{told.port}&region=r")
    store = S3Store(url, timeout=5)
    yield store
    store.close()


@pytest.mark.parametrize(
    ("status", "code", "error", "says"),
    [
        (404, "NoSuchKey", KeyNotFound, "no object 'k'"),
        (404, "NoSuchBucket", StoreMissing, "has no bucket 'bucket'"),
        (403, "AccessDenied", StoreRefused, "may not do that"),
        (403, "InvalidAccessKeyId", StoreRefused, "does not know this access key"),
        (403, "SignatureDoesNotMatch", StoreRefused, "secret key is wrong"),
        (400, "ExpiredToken", StoreRefused, "has expired"),
        (403, "RequestTimeTooSkewed", StoreRefused, "clock is wrong"),
        (403, "SomethingNew", StoreRefused, "SomethingNew"),
        (403, "InvalidObjectState", StoreRefused, "archived"),
        (301, "PermanentRedirect", StoreError, "redirects in circles"),
        (503, "SlowDown", StoreUnavailable, "come back later: SlowDown"),
        (503, "", StoreUnavailable, "come back later"),
        (500, "InternalError", StoreUnavailable, "come back later"),
        (502, "", StoreUnavailable, "come back later"),
        (429, "TooManyRequests", StoreUnavailable, "come back later"),
        (400, "RequestTimeout", StoreUnavailable, "come back later"),
        (507, "XMinioStorageFull", StoreFull, "no space or quota left"),
        (403, "QuotaExceeded", StoreFull, "no space or quota left"),
        (400, "MalformedXML", StoreError, "answers MalformedXML told so"),
        (501, "NotImplemented", StoreError, "cannot do that"),
    ],
)
def test_answers(
    told: Told, bare: S3Store, status: int, code: str, error: type[StoreError], says: str
) -> None:
    told.fails(status, code)
    with pytest.raises(StoreError) as caught:
        bare.get("k")
    assert type(caught.value) is error
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert status == 301 or len(told.requests) == 1  # botocore's own retries are off


def test_the_region_is_named_where_the_server_tells(told: Told, bare: S3Store) -> None:
    told.fails(400, "AuthorizationHeaderMalformed", "<Region>eu-north-1</Region>")
    with pytest.raises(StoreError, match="write s3://bucket@eu-north-1"):
        bare.get("k")


@pytest.mark.parametrize(
    ("status", "code", "error"),
    [
        (412, "PreconditionFailed", KeyExists),
        (409, "ConditionalRequestConflict", StoreUnavailable),
        (501, "NotImplemented", StoreError),
    ],
)
def test_exclusive_put(
    told: Told, bare: S3Store, status: int, code: str, error: type[StoreError]
) -> None:
    told.fails(status, code)
    with pytest.raises(StoreError) as caught:
        bare.put_exclusive("k", b"1")
    assert type(caught.value) is error
    ((method, path, headers),) = told.requests
    assert (method, path) == ("PUT", "/bucket/p/k")
    assert headers["If-None-Match"] == "*"


def test_a_plain_put_has_no_condition(told: Told, bare: S3Store) -> None:
    bare.put("k", b"1")
    ((_, _, headers),) = told.requests
    assert "If-None-Match" not in headers
    assert "Expect" not in headers


def test_a_short_body_is_an_error(told: Told, bare: S3Store) -> None:
    told.answer = lambda method, path: (200, {"Content-Length": "10"}, b"12345")
    with pytest.raises(StoreUnavailable):
        bare.get("k")


CHUNKED = {"Transfer-Encoding": "chunked"}


def test_a_body_in_pieces(told: Told, bare: S3Store) -> None:
    told.answer = lambda method, path: (200, CHUNKED, b"5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n")
    assert bare.get("k") == b"hello world"
    told.answer = lambda method, path: (200, CHUNKED, b"5\r\nhello\r\n")
    with pytest.raises(StoreUnavailable):
        bare.get("k")


def test_a_server_that_ignores_ranges(told: Told, bare: S3Store) -> None:
    told.answer = lambda method, path: (200, {}, b"0123456789")
    assert bare.get("k", 3, 4) == b"3456"
    assert bare.get("k", 8) == b"89"


def test_an_answer_that_is_no_s3(told: Told, bare: S3Store) -> None:
    told.answer = lambda method, path: (200, {"Content-Type": "text/html"}, b"<html>welcome")
    with pytest.raises(StoreError) as caught:
        bare.children("")
    assert "\n" not in str(caught.value)


def test_each_attempt_is_signed_afresh(told: Told) -> None:
    times: list[str] = []

    def answer(method: str, path: str) -> Answer:
        times.append(told.requests[-1][2]["X-Amz-Date"])
        if len(times) < 3:
            time.sleep(1.01)  # dates have whole seconds
            return 503, {}, b""
        return 200, {}, b"data"

    told.answer = answer
    url = f"s3://bucket?endpoint=http://127.0.0.1:{told.port}&region=r"
    with open_store(url, check=False, limit=20) as store:
        assert store.get("k") == b"data"
    assert len(set(times)) == 3


def test_a_missing_object_asks_for_the_bucket_once(told: Told, bare: S3Store) -> None:
    """HEAD says 404 for both; but a push asks for thousands of objects that are not there."""
    told.fails(404, "NoSuchBucket")
    with pytest.raises(StoreMissing):
        bare.stat("k")
    listing = b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>"
    told.answer = lambda method, path: (404, {}, b"") if method == "HEAD" else (200, {}, listing)
    told.requests.clear()
    for _ in range(5):
        assert not bare.exists("k")
    assert [method for method, _, _ in told.requests] == ["HEAD", "GET", *["HEAD"] * 4]


# ---- credentials, addresses, TLS ----------------------------------------------------------------


def test_no_credentials(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = s3.make_bucket()
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "nothing"))
    with pytest.raises(StoreRefused, match=r"no usable credentials found: put them into ~/\.aws"):
        open_store(s3.url(bucket))


def test_no_such_profile(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "there-is-none")
    with pytest.raises(StoreRefused, match=r"there-is-none.*check AWS_PROFILE"):
        open_store(s3.url("bucket"))


def test_nobody_listens(s3: S3Server) -> None:
    port = free_port()
    with pytest.raises(StoreUnavailable, match=f"cannot connect to http://127.0.0.1:{port}"):
        open_store(s3.url("bucket", port=port), limit=1)


def test_secrets_stay_out_of_messages(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
    told.fails(403, "SignatureDoesNotMatch", "<AWSAccessKeyId>AKIAEXAMPLE</AWSAccessKeyId>")
    with pytest.raises(StoreRefused) as caught:
        open_store(f"s3://bucket?endpoint=http://127.0.0.1:{told.port}")
    assert "very-secret" not in str(caught.value)
    assert "AKIA" not in str(caught.value)


def test_minio_is_s3_by_path(told: Told) -> None:
    told.answer = lambda method, path: (200, {}, b"data")
    with open_store(f"minio://127.0.0.1:{told.port}/bucket/p?tls=off", check=False) as store:
        assert store.get("k") == b"data"
    assert told.requests[-1][:2] == ("GET", "/bucket/p/k")
    assert "/us-east-1/s3/aws4_request" in told.requests[-1][2]["Authorization"]


def test_a_certificate_that_is_not_trusted(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
         "-keyout", key, "-out", certificate, "-subj", "/CN=127.0.0.1",
         "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<ListBucketResult></ListBucketResult>")

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.handle_error = lambda request, client_address: None  # type: ignore[method-assign]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        url = f"minio://127.0.0.1:{server.server_address[1]}/bucket"
        with pytest.raises(StoreRefused, match=r"certificate.*AWS_CA_BUNDLE"):
            open_store(url)
        monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
        open_store(url).close()
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def test_plain_http_only_where_the_url_says_so(s3: S3Server) -> None:
    with pytest.raises(StoreUnavailable):
        open_store(f"minio://127.0.0.1:{s3.port}/bucket", limit=1)

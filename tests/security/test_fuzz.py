"""Every parser of what comes from a store, a network, a file or a user refuses what it must."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from horcrux_driver import options as driver_options
from horcrux_driver.protocol import Protocol
from horcrux_nbd import config, control, units
from horcrux_nbd.attach import handshake
from horcrux_nbd.chunkstore.base import check_key
from horcrux_nbd.chunkstore.sftp_wire import _Reader
from horcrux_nbd.chunkstore.url import parse_store_url
from horcrux_nbd.errors import HorcruxError
from horcrux_nbd.names import check_name, check_ref, parse_version
from horcrux_nbd.repository import keys
from horcrux_nbd.repository.commits import Commit
from horcrux_nbd.repository.configuration import CONFIG_KEY, read_config
from horcrux_nbd.repository.encryption import EncryptedForm
from horcrux_nbd.repository.index import check_node, encode_node
from horcrux_nbd.repository.keys import Secret
from horcrux_nbd.repository.objects import NULL_ID, PLAIN, Form, Kind, key_id
from horcrux_nbd.repository.patch import Patch
from horcrux_nbd.repository.profiles import Profile
from horcrux_nbd.repository.records import decode_record, encode_record
from horcrux_nbd.repository.refs import BranchRecord, Refs, TagRecord
from horcrux_nbd.volume.maplog import MapLog
from horcrux_nbd.volume.state import VolumeState

from ..repository.images import CHUNK, block, content
from ..repository.memory_store import MemoryStore
from .fuzz import Target, run

COUNT, LONG = 600, 50_000
SEALED = EncryptedForm(bytes(32))
COMMIT = Commit("A", 1 << 20, CHUNK, NULL_ID, author="a <b@c>", time="2026-01-02T03:04:05Z")
HEAD = "refs/A/heads/main/99999999999999999998"
KEY = "keys/0123456789abcdef"


def objects(form: Form) -> Target:
    chunk, zeros = content("a", 2000) + bytes(3000), bytes(5000)
    pairs = [(Kind.CHUNK, chunk), (Kind.CHUNK, zeros), (Kind.COMMIT, COMMIT.encode())]
    ids = {form.encode(kind, plain): form.object_id(kind, plain) for kind, plain in pairs}
    some = next(iter(ids.values()))

    def parse(data: bytes) -> None:
        oid = ids.get(data, some)
        kind, plain = form.decode(data, oid, tuple(Kind), 1 << 20)
        assert form.object_id(kind, plain) == oid  # never another one's bytes

    return Target(f"object{' sealed' * form.encrypted}", list(ids), parse)


def refs(form: Form) -> Target:
    oid = form.object_id(Kind.COMMIT, COMMIT.encode())
    record = BranchRecord(1, oid, "a", "t", "w", "k")
    samples = [form.encode_record(HEAD, record.members(HEAD))]
    tagged = TagRecord(oid, "a", "t", "m").members("refs/A/tags/v")
    tag = form.encode_record("refs/A/tags/v", tagged)
    store = MemoryStore()
    reader = Refs(store, form)

    def parse(data: bytes) -> None:
        store.objects = {HEAD: data, "refs/A/tags/v": data if data != samples[0] else tag}
        found = reader.head("A", "main")
        assert found is None or found.number == 1
        reader.tag("A", "v")

    return Target(f"ref{' sealed' * form.encrypted}", samples, parse)


def configuration(data: bytes) -> None:
    store = MemoryStore()
    store.objects[CONFIG_KEY] = data
    read_config(store)


def members(**more: Any) -> bytes:
    return encode_record(
        {"chunk_size": CHUNK, "created": "t", "features": [], "format": 1,
         "hash": "blake3-248-kind", "id": "a", **more}
    )  # fmt: skip


def text(parse: Callable[[str], object]) -> Callable[[bytes], object]:
    return lambda data: parse(data.decode("utf-8", "surrogateescape"))


def url(value: str) -> None:
    found = parse_store_url(value)
    assert parse_store_url(str(found)) == found


def map_log(folder: Path) -> Target:
    path = folder / "map"
    log = MapLog(path, bytes(range(16)), 1 << 30)
    log.create()
    opened = log.open()
    opened.mark_data(3, 9) if hasattr(opened, "mark_data") else None
    sample = path.read_bytes()

    def parse(data: bytes) -> None:
        path.write_bytes(data)
        (folder / "flushed").unlink(missing_ok=True)
        MapLog(path, bytes(range(16)), 1 << 30).open(read_only=True)

    return Target("map", [sample], parse)


def state(folder: Path) -> Target:
    value = {
        "repository": "cp:///r", "repository_id": "a", "image": "A", "ref": "main",
        "base": NULL_ID.hex(), "size": 1 << 20, "chunk_size": CHUNK,
        "layers": [{"number": 1, "id": "00" * 16}], "version": 1,
    }  # fmt: skip

    def parse(data: bytes) -> None:
        (folder / "volume.json").write_bytes(data)
        VolumeState.load(folder)

    VolumeState.decode(value, folder).save(folder)
    return Target("volume.json", [(folder / "volume.json").read_bytes()], parse)


def patch() -> Target:
    base = PLAIN.object_id(Kind.CHUNK, content("a"))
    samples = [
        Patch((base,), {0: block("1")}).encode(CHUNK),
        Patch((NULL_ID,), {n: block(str(n)) for n in range(16)}).encode(CHUNK),
    ]
    return Target("patch", samples, lambda data: Patch.decode(data, CHUNK))


def index_node() -> Target:
    table = PLAIN.object_id(Kind.CHUNK, content("a")) * 256
    return Target("node", [encode_node(0, table)], lambda data: check_node(data, 0))


def sftp(data: bytes) -> None:
    reader = _Reader(data)
    while reader.left:
        reader.text()
        reader.attributes()


SFTP = struct.pack(">I1sIQIIII", 1, b"a", 0xF, 5, 0, 0, 0o100644, 0) + struct.pack(">I", 0)
URLS = [
    b"cp:///opt/a", b"scp://me@nas:22/srv/x", b"scp://nas:/srv", b"s3://bucket@eu-west-1",
    b"s3://buck/p?region=x&endpoint=http://h:1", b"minio://h:9000/bucket/p", b"scp://[::1]:22/x",
]  # fmt: skip
TOML = b"""[remotes.team]
url = "scp://images@nas:/srv/horcrux"
mirrors = ["s3://bucket/horcrux"]
[cache]
size = "20G"
[attach]
via = "fuse"
"""


def targets(folder: Path) -> list[Target]:
    secret = Secret(keys.KEY_FILE, bytes(32))
    slot = keys.encode_slot(keys.make_slot(secret, bytes(32), "a"))
    kdf = {"name": "scrypt", "salt": "00" * 16, "n": 1024, "r": 8, "p": 1}
    words = {
        "created": "",
        "kdf": kdf,
        "key": KEY,
        "kind": "passphrase",
        "label": "",
        "wrapped": "",
    }
    name = json.loads(slot)["key"]
    key_file = folder / "key"

    def a_key_file(data: bytes) -> None:
        key_file.write_bytes(data)
        keys.read_key_file(key_file)

    encryption = {"cipher": "aes-256-gcm", "check": "0"}
    keyed = members(features=["encryption"], hash="blake3-248-kind-keyed", encryption=encryption)
    return [
        objects(PLAIN),
        objects(SEALED),
        index_node(),
        patch(),
        Target("commit", [COMMIT.encode()], Commit.decode),
        Target("profile", [Profile(CHUNK, (1, 2, 9)).encode()], Profile.decode),
        refs(PLAIN),
        refs(SEALED),
        Target("record", [encode_record({"a": 1})], lambda data: decode_record(data, "it")),
        Target("horcrux.json", [members(), keyed], configuration),
        Target("key", [slot], lambda data: keys.decode_slot(data, name)),
        Target("key 2", [encode_record(words)], lambda data: keys.decode_slot(data, KEY)),
        Target("key file", [b"horcrux-key-1 " + b"0" * 64], a_key_file),
        Target("url", URLS, text(url)),
        Target("version", [b"AMCC@main~2", b"A"], text(parse_version)),
        Target("name", [b"AMCC.x-1_"], text(lambda t: check_name("image", t))),
        Target("ref name", [b"main~2^", b"1f3a9c"], text(check_ref)),
        Target("store key", [b"objects/ab/cd", HEAD.encode()], text(check_key)),
        Target("object key", [f"objects/00/{'00' * 31}01".encode()], text(key_id), ()),
        Target("size", [b"512K", b"1.5G", b"12"], text(units.parse_size)),
        Target("config", [TOML], text(lambda t: config.parse(t, Path("c.toml")))),
        Target("docker name", [b"team/AMCC@v3", b"v"], text(driver_options.check_docker_name)),
        Target("sftp", [SFTP], sftp),
        map_log(folder),
        state(folder),
    ]


def test_the_parsers(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """A new seed each time; a failure tells it."""
    count = LONG if pytestconfig.getoption("--long") else COUNT
    seed = os.environ.get("HORCRUX_FUZZ_SEED", secrets.token_hex(4))
    found = []
    for target in targets(tmp_path):
        try:
            run(target, count, seed)
        except AssertionError as error:
            found.append(str(error))
    assert not found, "\n".join(found)


def test_the_fuzzer_finds_what_it_must() -> None:
    """A parser that trusts a length is caught."""

    def trusting(data: bytes) -> None:
        if len(data) >= 4:
            data[4 : 4 + data[0]][data[1] % 8]

    with pytest.raises(AssertionError, match="IndexError"):
        run(Target("trusting", [b"\x08\0\0\0abcdefgh"], trusting), 2000, "s")


# ---- what listens -------------------------------------------------------------------------------


@pytest.fixture
def asked(tmp_path: Path) -> Any:
    """A control server's socket, and what its commands were asked."""
    seen: list[Any] = []
    server = control.ControlServer(tmp_path / "c", {"figures": lambda ask: seen.append(ask) or {}})
    yield tmp_path / "c", seen
    server.stop()


def send(path: Path, data: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(30)
        connection.connect(str(path))
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError):
            return b""
        return connection.recv(1 << 20)


def test_control_messages(asked: Any, pytestconfig: pytest.Config) -> None:
    """Each gets an answer, one JSON line, and the server goes on."""
    path, seen = asked
    raised: list[Any] = []
    threading.excepthook, before = raised.append, threading.excepthook
    try:
        sample = b'{"command": "figures", "a": [1, {"b": null}]}\n'
        target = Target("control", [sample], lambda data: json.loads(send(path, data)))
        run(target, LONG // 10 if pytestconfig.getoption("--long") else 300, secrets.token_hex(4))
    finally:
        threading.excepthook = before
    assert not raised, raised[0].exc_value
    assert control.ask(path, "figures") == {}
    assert seen


def test_what_a_server_says_in_the_handshake(pytestconfig: pytest.Config) -> None:
    """Of NBD: whoever serves is another process, and need not be ours."""
    export = struct.pack(">HQH", 0, 1 << 30, 1)
    sizes = struct.pack(">HIII", 3, 1, 4096, 1 << 25)

    def reply(kind: int, payload: bytes) -> bytes:
        return struct.pack(">QIII", 0x3E889045565A9, 7, kind, len(payload)) + payload

    hello = b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3)
    sample = hello + reply(3, export) + reply(3, sizes) + reply(1, b"")

    def parse(data: bytes) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.settimeout(5)
            theirs.sendall(data)
            theirs.shutdown(socket.SHUT_WR)
            handshake._negotiate(ours)

    target = Target("handshake", [sample], parse, (HorcruxError, OSError))
    run(target, LONG if pytestconfig.getoption("--long") else 1000, secrets.token_hex(4))


class NoDriver:
    """Stands for the driver: what reaches it was taken for a request."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.asked.append((name, *arguments))
            if name == "create":
                driver_options.check_docker_name(arguments[0])
            return {} if name in ("get", "capabilities") else [] if name == "list" else ""

        return call


def test_driver_requests(pytestconfig: pytest.Config) -> None:
    """Over real HTTP: each gets an answer of the protocol, none is a 500."""
    from aiohttp.test_utils import TestClient, TestServer

    sample = b'{"Name": "v", "ID": "0123", "Opts": {"name": "AMCC", "size": "1G"}}'
    calls = ["Create", "Remove", "Mount", "Unmount", "Path", "Get", "List", "Capabilities"]
    driver = NoDriver()
    statuses: set[int] = set()

    async def all_of_them() -> None:
        protocol = Protocol(driver)  # type: ignore[arg-type]
        async with TestClient(TestServer(protocol.application())) as client:
            loop = asyncio.get_running_loop()

            async def post(data: bytes) -> None:
                path = f"/VolumeDriver.{calls[len(data) % len(calls)]}"
                response = await client.post(path, data=data)
                body = await response.read()
                statuses.add(response.status)
                assert response.status < 500, (path, body)
                if response.status == 200:
                    json.loads(body)

            def parse(data: bytes) -> None:
                asyncio.run_coroutine_threadsafe(post(data), loop).result(30)

            count = LONG // 10 if pytestconfig.getoption("--long") else 500
            target = Target("driver", [sample], parse)
            await asyncio.to_thread(run, target, count, secrets.token_hex(4))
        await protocol.close()

    asyncio.run(all_of_them())
    assert 200 in statuses
    assert driver.asked


# ---- by hypothesis, whose cases shrink ----------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(JSON, st.sampled_from(["commit", "state", "key", "record"]))
def test_json_of_any_shape(value: Any, what: str) -> None:
    data = json.dumps(value).encode()
    with_parser: dict[str, Callable[[bytes], object]] = {
        "commit": Commit.decode,
        "state": lambda _: VolumeState.decode(value, Path("/v")),
        "key": lambda found: keys.decode_slot(found, KEY),
        "record": lambda found: decode_record(found, "it"),
    }
    with pytest.raises(HorcruxError):
        with_parser[what](data)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(list(json.loads(members()))), JSON))
def test_a_configuration_with_any_member(changes: dict[str, Any]) -> None:
    """With a check that is right: who can write to a store can compute it."""
    try:
        configuration(members(**changes))
    except HorcruxError:
        pass
    except ValueError as error:
        if "JSON compliant" not in str(error):  # NaN cannot be written
            raise

"""The cold path at each network and chunk size: single reads, many at once, and a long scan."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.servers.moto_s3 import S3Server
from tests.servers.moto_s3 import moto as s3_server
from tests.servers.nbdkit import libnbd
from tests.servers.process import free_port, server

from .common import Bar, Missing, Table, cli, compressible, nbdkit, need, run
from .networks import BY_NAME, Far, Line, behind

TITLE = "Cold path"
SIZE = int(os.environ.get("COLD_MB", "512")) << 20
CHUNKS = [
    int(word) << 10 for word in os.environ.get("CHUNKS", "64,128,256,512,1024,2048,4096").split(",")
]
NETWORKS = os.environ.get("NETWORKS", "lan,metro,region,far").split(",")
SECONDS = float(os.environ.get("SECONDS", "3"))
CONNECTIONS, THREADS = 4, 32  # of nbdkit, for each connection
BUCKET = "cold-bench"
MOST = 4 * 32  # reads under way


@contextlib.contextmanager
def store(root: Path, folder: Path) -> Iterator[tuple[S3Server, int]]:
    """An S3 server whose GETs cost nothing much: nginx serves the objects, moto the listings."""
    program, port = need("nginx", "nginx-light"), free_port()
    folder.mkdir(exist_ok=True)
    with s3_server(folder / "moto") as moto:
        config = folder / "nginx.conf"
        config.write_text(
            f"daemon off; pid {folder}/pid; worker_processes 1; error_log {folder}/error.log;\n"
            "events { worker_connections 1024; }\n"
            "http { access_log off; sendfile on; tcp_nodelay on; keepalive_requests 1000000; "
            f"server {{ listen 127.0.0.1:{port}; location / {{ root {root}; "
            f'if ($args ~ "list-type") {{ proxy_pass {moto.endpoint}; }} }} }} }}\n'
        )
        with server([program, "-e", folder / "error.log", "-c", config], port, folder / "log"):
            yield moto, port


def make(root: Path, chunk: int, moto: S3Server, raw: Path) -> None:
    """A repository of `raw` in chunks of that size, in a folder of the bucket."""
    repository = root / BUCKET / f"c{chunk >> 10}"
    if not repository.exists():
        cli("generate", "-q", "-s", str(chunk), "COLD", raw, repository)
        for path in repository.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)  # nginx has a user of its own
    client = moto.client()
    for path in [*(repository / "refs").rglob("*"), repository / "horcrux.json"]:
        if path.is_file():
            client.upload_file(str(path), BUCKET, str(path.relative_to(root / BUCKET)))


@contextlib.contextmanager
def served(far: Far, chunk: int, work: Path) -> Iterator[Path]:
    """nbdkit with our plugin and an empty cache; its socket."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    plugin = cli("plugin-path").strip()
    url = f"s3://{BUCKET}/c{chunk >> 10}?region=us-east-1&endpoint=http://127.0.0.1:{far.port}"
    words = (f"repo={url}", "name=COLD", "readonly=true", f"cache={work}/cache", "cache_size=20G",
             "prefetch=none")  # fmt: skip
    with nbdkit(work / "s", "python", plugin, *words, threads=THREADS):
        yield work / "s"


def handles(socket: Path, count: int) -> list[Any]:
    nbd = libnbd()
    if nbd is None:
        raise Missing("needs libnbd: apt-get install python3-libnbd")
    found = []
    for _ in range(count):
        handle = nbd.NBD()
        handle.connect_unix(str(socket))
        found.append(handle)
    return found


def one_at_a_time(socket: Path, chunk: int) -> float:
    """Median milliseconds of a 4 KiB read that nobody has fetched, one after the other."""
    (handle,) = handles(socket, 1)
    chance, took = random.Random(1), []
    numbers = chance.sample(range(SIZE // chunk), min(SIZE // chunk, 40))
    for number in numbers:
        began = time.monotonic()
        handle.pread(4096, number * chunk + 4096 * chance.randrange(chunk // 4096))
        took.append(time.monotonic() - began)
    return statistics.median(took[5:]) * 1000


def all_at_once(socket: Path, chunk: int) -> float:
    """4 KiB reads a second over four connections, each in a chunk that nobody has fetched."""
    nbd = libnbd()
    assert nbd is not None
    chance = random.Random(2)
    numbers = list(range(SIZE // chunk))
    chance.shuffle(numbers)
    several = handles(socket, CONNECTIONS)
    for handle in several:  # connections to the store, index nodes
        handle.pread(4096, numbers.pop() * chunk)
    done, waiting = 0, dict.fromkeys(several, 0)
    began = time.monotonic()
    deadline = began + SECONDS
    while numbers or any(waiting.values()):
        for handle in several:
            while numbers and time.monotonic() < deadline and waiting[handle] < MOST // CONNECTIONS:
                buffer = nbd.Buffer(4096)
                handle.aio_pread(buffer, numbers.pop() * chunk)
                waiting[handle] += 1
            # To peek where nothing was asked is an error.
            while waiting[handle] and (cookie := handle.aio_peek_command_completed()) > 0:
                handle.aio_command_completed(cookie)
                waiting[handle] -= 1
                done += 1
        if time.monotonic() >= deadline and not any(waiting.values()):
            break
        for handle in several:
            if waiting[handle]:
                handle.poll(1)
    return done / (time.monotonic() - began)


def scan(socket: Path) -> float:
    """Bytes a second of one reader that goes through the image, 1 MiB at a time."""
    (handle,) = handles(socket, 1)
    began, at = time.monotonic(), 0
    while at < SIZE and time.monotonic() - began < 2 * SECONDS:
        handle.pread(1 << 20, at)
        at += 1 << 20
    return at / (time.monotonic() - began)


def bare(far: Far, root: Path, chunk: int, work: Path) -> float:
    """Bytes of the image a second that a bare parallel download of its objects brings."""
    folder = root / BUCKET / f"c{chunk >> 10}" / "objects"
    files = [path for path in sorted(folder.glob("*/*")) if path.stat().st_size > 4096]
    files = files[: int(len(files) * min(1.0, 160 * (1 << 20) / SIZE))]
    lines = [
        f'url = "http://127.0.0.1:{far.port}/{path.relative_to(root)}"\noutput = "/dev/null"\n'
        for path in files
    ]
    (work / "urls").write_text("".join(lines))
    began = time.monotonic()
    run("curl", "-sf", "-Z", "--parallel-max", "32", "-K", work / "urls")
    return len(files) * chunk / (time.monotonic() - began)


def cell(line: Line, root: Path, port: int, chunk: int, work: Path) -> dict[str, float]:
    with behind(line, port) as far:
        with served(far, chunk, work) as socket:
            one = one_at_a_time(socket, chunk)
        with served(far, chunk, work) as socket:
            many = all_at_once(socket, chunk)
        with served(far, chunk, work) as socket:
            long = scan(socket)
        plain = bare(far, root, chunk, work)
    return {"one": one, "many": many, "scan": long, "bare": plain}


def main(scratch: Path) -> Table:
    need("curl", "curl")
    root = scratch / "cold"
    (root / BUCKET).mkdir(parents=True, exist_ok=True)
    raw = scratch / "cold.raw"
    if not raw.exists():
        compressible(raw, SIZE)
    table = Table(
        "cold reads by network and chunk size",
        ["network", "chunk", "one 4 KiB read", "4 KiB reads, 4 connections", "scan", "scan / bare"],
    )
    with store(root, scratch / "cold-servers") as (moto, port):
        moto.client().create_bucket(Bucket=BUCKET)
        os.environ.update(moto.environment())
        os.environ.pop("AWS_CA_BUNDLE", None)
        for chunk in CHUNKS:
            make(root, chunk, moto, raw)
        for network in NETWORKS:
            line = BY_NAME[network]
            for chunk in CHUNKS:
                found = cell(line, root, port, chunk, scratch / "cold-work")
                print(f"  {line.name}, {chunk >> 10} KiB: {json.dumps(found)}", flush=True)
                ratio = found["scan"] / found["bare"]
                table.rows.append(
                    (
                        line.name,
                        f"{chunk >> 10} KiB",
                        f"{found['one']:.1f} ms",
                        f"{found['many']:,.0f} IOPS",
                        f"{found['scan'] / 1e6:,.0f} MB/s",
                        f"{ratio:.2f} ×",
                    )
                )
                if network == "region" and chunk == 64 << 10:
                    table.bars.append(
                        Bar("cold 4 KiB reads, 64 KiB chunks, 20 ms", 1, found["many"] / 3000)
                    )
                if network == "region" and chunk == 512 << 10:
                    table.bars.append(
                        Bar("cold 4 KiB reads, 512 KiB chunks, 20 ms", 1, found["many"] / 3000)
                    )
                    table.bars.append(
                        Bar("cold scan, against a bare download of the objects", 0.9, ratio)
                    )
    shutil.rmtree(scratch / "cold-work", ignore_errors=True)
    table.notes.append(
        f"An image of {SIZE >> 20} MiB that compresses 3 to 1, from S3 (nginx) behind the line; "
        "every read is a miss. Bare: `curl -Z`, 32 at once, of the same objects, which neither "
        "decompresses nor checks nor keeps them."
    )
    return table

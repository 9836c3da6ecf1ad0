"""Other programs that give a PostgreSQL directory from afar, lazily or by copying it.

Each is a function `peer(world, far, work)`: a context manager that yields the data directory, ready
for PostgreSQL to start on, and undoes everything at its end. `far` is what `world` of the same kind
(`http`, `ssh`, `s3`) serves, as it is reached over a line.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from tests.servers.moto_s3 import S3Server
from tests.servers.moto_s3 import moto as s3_server
from tests.servers.process import free_port, server, stop
from tests.servers.sshd import Sshd
from tests.servers.sshd import sshd as ssh_server

from .common import BIN, cli, nbdkit, need, postgres, query, run
from .networks import Far

CHUNK = 512 << 10  # of those peers that let one choose, as ours
BUCKET = "bench"


@dataclass
class World:
    """The servers, each with the same database in the form that its clients take."""

    root: Path  # served by HTTP: raw.img, and casync's index and store
    data: Path  # the directory itself
    repository: Path
    image_size: int
    http_port: int
    ssh: Sshd
    s3: S3Server

    def port(self, kind: str) -> int:
        return {"http": self.http_port, "ssh": self.ssh.port, "s3": self.s3.port}[kind]


@dataclass(frozen=True)
class Peer:
    """`kind` names the server it uses; `lazy` tells it from a full copy."""

    name: str
    kind: str
    lazy: bool
    mounted: Callable[[World, Far, Path], AbstractContextManager[Path]]


# ---- the servers ----------------------------------------------------------------------------


@contextlib.contextmanager
def nginx(root: Path, folder: Path) -> Iterator[int]:
    """Serves the files below `root` over HTTP; yields its port."""
    program, port = need("nginx", "nginx-light"), free_port()
    folder.mkdir(exist_ok=True)
    config = folder / "nginx.conf"
    config.write_text(
        f"daemon off; pid {folder}/pid; worker_processes 1; error_log {folder}/error.log;\n"
        "events { worker_connections 512; }\n"
        f"http {{ access_log off; sendfile on; keepalive_requests 1000000; "
        f"server {{ listen 127.0.0.1:{port}; root {root}; }} }}\n"
    )
    with server([program, "-e", folder / "error.log", "-c", config], port, folder / "log"):
        yield port


@contextlib.contextmanager
def world(scratch: Path, data: Path) -> Iterator[World]:
    """Makes what the servers serve, once for a scratch folder, and starts them."""
    root, repository = scratch / "http", scratch / "repo-lazy"
    done = scratch / "lazy-done"
    with contextlib.ExitStack() as stack:
        if not done.exists():
            for folder in (root, repository):
                shutil.rmtree(folder, ignore_errors=True)
            root.mkdir()
            cli("generate", "-q", "PG", data, repository)
            _record(repository, scratch)
            _make_raw(repository, root / "raw.img", scratch)
            casync = need("casync", "casync")
            run(casync, "make", f"--store={root}/default.castr", root / "pg.caidx", data)
            (root / "pg.caidx").chmod(0o644)  # nginx has a user of its own
            done.touch()
        for name in ("sshd", "moto"):
            shutil.rmtree(scratch / name, ignore_errors=True)
            (scratch / name).mkdir()
        port = stack.enter_context(nginx(root, scratch / "nginx"))
        ssh = stack.enter_context(ssh_server(scratch / "sshd"))
        s3 = stack.enter_context(s3_server(scratch / "moto"))
        client = s3.client()
        client.create_bucket(Bucket=BUCKET)
        for path in repository.rglob("*"):
            if path.is_file():
                client.upload_file(str(path), BUCKET, f"repo/{path.relative_to(repository)}")
        size = (root / "raw.img").stat().st_size
        made = World(root, data, repository, size, port, ssh, s3)
        _fill_s3backer(made, scratch)
        yield made


def _record(repository: Path, scratch: Path) -> None:
    """The profile of a start and of a query, other than the one that is measured."""
    target, socket = scratch / "record", scratch / "record-socket"
    for folder in (target, socket):
        folder.mkdir(exist_ok=True)
    shutil.chown(socket, "postgres")
    cli("mount", "PG", repository, target)
    try:
        with postgres(target, socket):
            query(socket, "SELECT abalance FROM pgbench_accounts WHERE aid = 1")
            cli("profile", "record", "PG")
    finally:
        cli("umount", "PG")
        cli("rm", "--force", "PG")
        cli("cache", "clear")


def _make_raw(repository: Path, target: Path, scratch: Path) -> None:
    """The same image, whole, as a plain sparse file."""
    socket = scratch / "raw.sock"
    plugin = run(BIN / "horcrux-cli", "plugin-path").strip()
    with nbdkit(socket, "python", plugin, f"repo=cp://{repository}", "name=PG", "readonly=true",
                f"cache={scratch / 'raw-cache'}"):  # fmt: skip
        run("nbdcopy", f"nbd+unix:///?socket={socket}", target)
    shutil.rmtree(scratch / "raw-cache")


# ---- what several peers do -------------------------------------------------------------------


@contextlib.contextmanager
def _process(argv: list[str | Path], ready: Callable[[], bool], log: Path) -> Iterator[None]:
    """A program in the foreground, from when `ready` says so."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            [str(word) for word in argv],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 120
        while not ready():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{argv[0]} did not start: {log.read_text()[-500:]}")
            time.sleep(0.005)
        yield
    finally:
        stop(process, 60)


@contextlib.contextmanager
def _mounted(work: Path, device: Path | str, *options: str) -> Iterator[Path]:
    target = work / "mnt"
    target.mkdir(exist_ok=True)
    run("mount", *options, device, target)
    try:
        yield target
    finally:
        run("umount", target)


@contextlib.contextmanager
def _loop(work: Path, file: Path) -> Iterator[Path]:
    """The file system in `file`, mounted as we mount ours."""
    device = run("losetup", "--find", "--show", "--direct-io=on", file).strip()
    try:
        with _mounted(work, device, "-o", "noatime") as target:
            yield target
    finally:
        run("losetup", "--detach", device)


@contextlib.contextmanager
def _nbd(work: Path, socket: Path) -> Iterator[Path]:
    """What an NBD server on `socket` serves, attached and mounted as we do it."""
    fuse = work / "fuse"
    fuse.mkdir(exist_ok=True)
    file = fuse / "nbd"
    argv = ["nbdfuse", "--connections=11", fuse, "--unix", socket]
    with _process(argv, file.exists, work / "nbdfuse.log"):
        try:
            with _loop(work, file) as target:
                yield target
        finally:
            run("umount", "-l", fuse)


# ---- the peers -------------------------------------------------------------------------------


def _horcrux(url: Callable[[World, Far], str], prefetch: str) -> Callable[..., object]:
    @contextlib.contextmanager
    def mounted(world: World, far: Far, work: Path) -> Iterator[Path]:
        world.ssh.trust(far.port)
        os.environ["HORCRUX_SSH_CONFIG"] = str(world.ssh.write_config())
        os.environ.update(world.s3.environment())
        os.environ["HORCRUX_ROOT"] = str(work / "root")
        target = work / "mnt"
        target.mkdir(exist_ok=True)
        cli("mount", "--prefetch", prefetch, "PG", url(world, far), target)
        try:
            yield target
        finally:
            cli("umount", "PG")

    return mounted


def _scp(world: World, far: Far) -> str:
    return world.ssh.url(world.repository, far.port)


def _s3(world: World, far: Far) -> str:
    return world.s3.url(BUCKET, "repo", far.port)


@contextlib.contextmanager
def _curl_cow(world: World, far: Far, work: Path) -> Iterator[Path]:
    words = ("--filter=cow", "curl", f"http://127.0.0.1:{far.port}/raw.img", "cow-on-read=true")
    with nbdkit(work / "nbd.sock", *words), _nbd(work, work / "nbd.sock") as target:
        yield target


@contextlib.contextmanager
def _qemu_nbd(world: World, far: Far, work: Path) -> Iterator[Path]:
    """qcow2 with copy-on-read over an image at an HTTP server."""
    overlay, socket = work / "overlay.qcow2", work / "nbd.sock"
    overlay.unlink(missing_ok=True)
    url = f"http://127.0.0.1:{far.port}/raw.img"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", url, overlay)
    image = (
        "driver=copy-on-read,file.driver=qcow2,file.discard=unmap,"
        f"file.file.driver=file,file.file.filename={overlay}"
    )
    argv = ["qemu-nbd", "-k", socket, "-e", "16", "-t", "--image-opts", image]
    with (
        _process(list(argv), socket.exists, work / "qemu-nbd.log"),
        _nbd(work, socket) as target,
    ):
        yield target


def _s3backer_words(world: World, port: int, work: Path) -> list[str | Path]:
    password = work / "s3backer-password"
    password.write_text("test:test\n")
    password.chmod(0o600)
    return [
        need("s3backer", "s3backer"), "-f", "--quiet", "--force", f"--accessFile={password}",
        f"--baseURL=http://127.0.0.1:{port}/", f"--size={world.image_size}",
        f"--blockSize={CHUNK}", "--blockCacheSize=10000", "--blockCacheThreads=20",
        # For stores that were only eventually consistent; they would only cost it time.
        "--md5CacheSize=0", "--md5CacheTime=0", "--minWriteDelay=0",
    ]  # fmt: skip


def _fill_s3backer(world: World, scratch: Path) -> None:
    work = scratch / "fill"
    work.mkdir(exist_ok=True)
    folder = work / "s3b"
    folder.mkdir(exist_ok=True)
    argv = [*_s3backer_words(world, world.s3.port, work), "s3backer-bench", folder]
    world.s3.client().create_bucket(Bucket="s3backer-bench")
    with _process(argv, (folder / "file").exists, work / "s3backer.log"):
        run("dd", f"if={world.root}/raw.img", f"of={folder}/file", f"bs={CHUNK}", "conv=notrunc")
        run("umount", folder)


@contextlib.contextmanager
def _s3backer(world: World, far: Far, work: Path) -> Iterator[Path]:
    folder = work / "s3b"
    folder.mkdir(exist_ok=True)
    argv = [*_s3backer_words(world, far.port, work), "s3backer-bench", folder]
    with _process(argv, (folder / "file").exists, work / "s3backer.log"):
        try:
            with _loop(work, folder / "file") as target:
                yield target
        finally:
            run("umount", "-l", folder)


def _rclone_words(world: World, far: Far) -> list[str]:
    return [
        need("rclone", "rclone"), "--config=/dev/null", "--sftp-host=127.0.0.1",
        f"--sftp-port={far.port}", "--sftp-user=root", f"--sftp-key-file={world.ssh.user_key}",
    ]  # fmt: skip


@contextlib.contextmanager
def _rclone_mount(world: World, far: Far, work: Path) -> Iterator[Path]:
    target, cache = work / "mnt", work / "rclone-cache"
    target.mkdir(exist_ok=True)
    uid, gid = shutil._get_uid("postgres"), shutil._get_gid("postgres")  # type: ignore[attr-defined]
    argv = [
        *_rclone_words(world, far), "mount", f":sftp:{world.data}", target, "--allow-other",
        "--vfs-cache-mode=full", f"--cache-dir={cache}", f"--uid={uid}", f"--gid={gid}",
        "--dir-perms=0700", "--file-perms=0600",
    ]  # fmt: skip
    with _process(list(argv), lambda: os.path.ismount(target), work / "rclone.log"):
        try:
            yield target
        finally:
            run("umount", "-l", target)


@contextlib.contextmanager
def _casync(world: World, far: Far, work: Path) -> Iterator[Path]:
    """casync's read-only mount, with overlayfs over it for what is written."""
    lower, upper, inner, target = (work / name for name in ("lower", "upper", "inner", "mnt"))
    for folder in (upper, inner):
        shutil.rmtree(folder, ignore_errors=True)
    for folder in (lower, upper, inner, target):
        folder.mkdir(exist_ok=True)
    url = f"http://127.0.0.1:{far.port}"
    argv = [need("casync", "casync"), "mount", f"--store={url}/default.castr",
            f"{url}/pg.caidx", lower]  # fmt: skip
    layers = f"lowerdir={lower},upperdir={upper},workdir={inner}"
    with _process(list(argv), lambda: os.path.ismount(lower), work / "casync.log"):
        try:
            with _mounted(work, "overlay", "-t", "overlay", "-o", layers) as mounted:
                yield mounted
        finally:
            run("umount", "-l", lower)


def _own(folder: Path) -> None:
    run("chown", "-R", "postgres:postgres", folder)
    folder.chmod(0o700)


@contextlib.contextmanager
def _rsync(world: World, far: Far, work: Path) -> Iterator[Path]:
    copy = work / "copy"
    ssh = f"ssh -F {world.ssh.write_config()} -p {far.port} -o StrictHostKeyChecking=no"
    source = f"root@127.0.0.1:{world.data}/"
    run(need("rsync", "rsync"), "-a", "-z", "--zc=zstd", "-e", ssh, source, copy)
    _own(copy)
    yield copy


@contextlib.contextmanager
def _rclone_copy(world: World, far: Far, work: Path) -> Iterator[Path]:
    copy = work / "copy"
    run(*_rclone_words(world, far), "copy", "--transfers=16", "--create-empty-src-dirs",
        f":sftp:{world.data}", copy)  # fmt: skip
    _own(copy)
    yield copy


OURS = (
    Peer("Horcrux, scp://", "ssh", True, _horcrux(_scp, "none")),  # type: ignore[arg-type]
    Peer("Horcrux, s3://", "s3", True, _horcrux(_s3, "none")),  # type: ignore[arg-type]
    Peer("Horcrux, scp://, profile", "ssh", True, _horcrux(_scp, "profile")),  # type: ignore[arg-type]
    Peer("Horcrux, s3://, profile, then all", "s3", True, _horcrux(_s3, "all")),  # type: ignore[arg-type]
)
PEERS = (
    Peer("nbdkit curl + cow", "http", True, _curl_cow),
    Peer("qemu-nbd, qcow2 over HTTP", "http", True, _qemu_nbd),
    Peer("s3backer", "s3", True, _s3backer),
    Peer("rclone mount", "ssh", True, _rclone_mount),
    Peer("casync mount + overlayfs", "http", True, _casync),
    Peer("rsync -z (whole copy)", "ssh", False, _rsync),
    Peer("rclone copy (whole copy)", "ssh", False, _rclone_copy),
)

"""What `doctor` looks at. Each check tells what it found, and how to mend it in one line."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .. import __version__, config, paths
from ..errors import HorcruxError, KeyRequired, NotFound
from ..units import GiB, format_size

OK, WARN, FAIL = "ok", "warn", "fail"

OLDEST_NBDKIT = (1, 26)  # its Python plugin has after_fork from there on
LITTLE_ROOM = 1 * GiB
SLOW = 2.0  # seconds for a look at a repository
CLOCK = 300  # seconds; S3 refuses requests that are 15 minutes off, sweeps allow an hour
LIMIT = 20.0  # seconds for a program to answer


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's. `mend` is empty where nothing has to be done."""

    check: str
    level: str  # OK, WARN or FAIL
    what: str
    mend: str = ""


def run(*argv: str) -> tuple[int, str]:
    """Exit code and all output of a program; 127 where it is not installed."""
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=LIMIT,
            check=False,
        )
    except (FileNotFoundError, PermissionError) as error:
        return 127, str(error)
    except subprocess.TimeoutExpired:
        return 124, f"{argv[0]} did not answer within {LIMIT:.0f} s"
    return done.returncode, done.stdout.decode(errors="replace")


def this_host() -> Iterator[Finding]:
    """All checks of this machine, in the order in which things are needed."""
    for check in (settings, nbdkit, generating, attaching, room, volumes, clock):
        yield from check()


# ---- configuration


def settings() -> Iterator[Finding]:
    try:
        found = config.load()
    except (HorcruxError, OSError) as error:
        yield Finding("configuration", FAIL, str(error), "correct that file")
        return
    where = f"{found.file}, {len(found.remotes)} remotes" if found.exists else "built-in defaults"
    yield Finding("configuration", OK, where)


# ---- nbdkit and its Python


def nbdkit() -> Iterator[Finding]:
    code, text = run("nbdkit", "--version")
    install = "apt-get install nbdkit nbdkit-plugin-python"
    if code:
        yield Finding("nbdkit", FAIL, "nbdkit is not installed", install)
        return
    version = text.split()[1] if len(text.split()) > 1 else "?"
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if numbers < OLDEST_NBDKIT:
        need = ".".join(map(str, OLDEST_NBDKIT))
        yield Finding("nbdkit", FAIL, f"version {version} is too old", f"install {need} or later")
        return
    yield Finding("nbdkit", OK, f"version {version}, {shutil.which('nbdkit')}")
    code, text = run("nbdkit", "python", "--dump-plugin")
    if code:
        yield Finding("nbdkit-python", FAIL, "nbdkit has no Python plugin", install)
        return
    yield from python_match(text)
    yield native_filter()


def native_filter() -> Finding:
    """Whether volumes that are served from now on are served natively."""
    from ..native import build

    if found := build.found():
        return Finding("native filter", OK, f"in use ({found})")
    if os.environ.get(build.SWITCH) == "0":
        return Finding("native filter", OK, f"switched off ({build.SWITCH}=0)")
    what = "not built for this nbdkit: all works, but what is local is served by Python, slower"
    return Finding("native filter", WARN, what, build.why_not() or "horcrux-cli native build")


def python_match(dump: str) -> Iterator[Finding]:
    """Whether nbdkit's Python is this one (`dump`: of the Python plugin), and our plugin loads."""
    match = re.search(r"^python_version=(\d+)\.(\d+)", dump, re.MULTILINE)
    theirs = (int(match[1]), int(match[2])) if match else (0, 0)
    ours = sys.version_info[:2]
    again = (
        "make the virtual environment with the Python that nbdkit embeds (Debian's: /usr/bin/"
        "python3 -m venv) and install horcrux-nbd there"
    )
    if theirs != ours:
        what = f"nbdkit embeds Python {theirs[0]}.{theirs[1]}, this is {ours[0]}.{ours[1]}"
        yield Finding("python", FAIL, what, again)
    else:
        yield Finding("python", OK, f"nbdkit and horcrux-cli both run Python {ours[0]}.{ours[1]}")
    from ..server import plugin_path

    code, text = run("nbdkit", "python", str(plugin_path()), "--dump-plugin")
    found = re.search(r"^horcrux_version=(.*)$", text, re.MULTILINE)
    if code or not found:
        yield Finding("plugin", FAIL, f"nbdkit cannot load it: {_reason(text)}", again)
    elif found[1] != __version__:
        what = f"nbdkit loads version {found[1]} of Horcrux, this is {__version__}"
        yield Finding("plugin", FAIL, what, "remove the other installation")
    else:
        yield Finding("plugin", OK, f"loads ({plugin_path()})")


def _reason(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if "horcrux:" in line or "Error" in line]
    return (telling or lines or ["it said nothing"])[-1].rpartition("error: ")[2]


# ---- programs and devices


def generating() -> Iterator[Finding]:
    install = "apt-get install e2fsprogs"
    if shutil.which("mke2fs", path=_path()) is None:
        yield Finding("ext4", FAIL, "mke2fs is missing: no directory can be generated", install)
    else:
        yield _tried("ext4", "mke2fs and libext2fs are there", _load_libext2fs, install)
    if shutil.which("qemu-img") is None:
        what = "qemu-img is missing: qcow2, vmdk, vdi, … cannot be generated from"
        yield Finding("qemu-img", WARN, what, "apt-get install qemu-utils")
    else:
        yield Finding("qemu-img", OK, "is there, for qcow2, vmdk, vdi, …")


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def _load_libext2fs() -> None:
    for library in ("libext2fs.so.2", "libcom_err.so.2"):
        ctypes.CDLL(library)


def _tried(check: str, fine: str, work: Callable[[], object], mend: str) -> Finding:
    try:
        work()
    except (HorcruxError, OSError) as error:
        return Finding(check, FAIL, str(error), mend)
    return Finding(check, OK, fine)


def attaching() -> Iterator[Finding]:
    from ..attach import choose

    root = os.geteuid() == 0
    if not root:
        what = "attaching and mounting need root; `serve` works without"
        yield Finding("root", WARN, what, "sudo horcrux-cli …")
    for node, module in (("/dev/fuse", "fuse"), ("/dev/loop-control", "loop")):
        if not os.path.exists(node):
            mend = f"modprobe {module}, or give the device to the container"
            yield Finding(module, WARN, f"{node} is missing: --via fuse cannot work", mend)
        elif root:
            yield _openable(node, module)
    ways = choose.ways()
    usable = [way for way in ways if way.available]
    for way in ways:
        name = f"attach {way.name}"
        if not way.available:
            level = WARN if usable or not root else FAIL
            yield Finding(name, level, way.missing, way.mend)
        elif way.warning:
            yield Finding(name, WARN, way.warning)
        else:
            chosen = " (taken unless --via says otherwise)" if way is usable[0] else ""
            yield Finding(name, OK, f"works here{chosen}")


def _openable(node: str, check: str) -> Finding:
    try:
        os.close(os.open(node, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        mend = "give the device to the container, or run outside of it"
        return Finding(check, WARN, f"{node} cannot be opened: {error.strerror}", mend)
    return Finding(check, OK, f"{node} can be opened")


# ---- room, volumes, clock


def room() -> Iterator[Finding]:
    for check, folder in (("state", paths.root()), ("temporary", _temporary())):
        there = folder
        while not there.exists():
            there = there.parent
        stat = os.statvfs(there)
        free = stat.f_bavail * stat.f_frsize
        if not os.access(there, os.W_OK):
            yield Finding(
                check, FAIL, f"{there} cannot be written", "set HORCRUX_ROOT, or use sudo"
            )
        elif free < LITTLE_ROOM:
            what = f"only {format_size(free)} free for {folder}"
            yield Finding(check, WARN, what, "free some: volumes keep there what is written")
        else:
            yield Finding(check, OK, f"{format_size(free)} free for {folder}")
    yield from _cache_room()


def _temporary() -> Path:
    return Path(os.environ.get("TMPDIR") or "/var/tmp")


def _cache_room() -> Iterator[Finding]:
    from ..volume.cache import Cache

    if not paths.cache().is_dir():
        yield Finding("cache", OK, "empty")
        return
    try:
        cache = Cache(paths.cache(), config.load().cache_size)
        used = cache.size()
    except (HorcruxError, OSError) as error:
        yield Finding("cache", FAIL, f"{paths.cache()}: {error}", "use sudo, or set HORCRUX_ROOT")
        return
    stat = os.statvfs(cache.folder)
    free = stat.f_bavail * stat.f_frsize
    what = f"{format_size(used)} of at most {format_size(cache.limit)}"
    if cache.limit - used > free:
        mend = "set a smaller cache.size in the configuration (see `horcrux-cli config --help`)"
        yield Finding("cache", WARN, f"{what}, but only {format_size(free)} is free", mend)
    else:
        yield Finding("cache", OK, what)


def volumes() -> Iterator[Finding]:
    from .. import host

    names = host.names()
    for name in names:
        try:
            problem = host.status(name).problem
        except (HorcruxError, OSError) as error:
            problem = str(error)
        if problem:
            mend = f"horcrux-cli umount --force {name}, then mount it again"
            yield Finding("volume", WARN, f"{name}: {problem}", mend)
    yield Finding("volumes", OK, f"{len(names)} on this host")


def clock() -> Iterator[Finding]:
    """A clock before this release was made is wrong for sure: TLS and S3 will refuse."""
    made = Path(__file__).stat().st_mtime
    if time.time() < made - CLOCK:
        what = f"the clock says {time.strftime('%Y-%m-%d %H:%M')}, before this program was made"
        yield Finding("clock", FAIL, what, "set it: timedatectl set-ntp true")
    else:
        yield Finding("clock", OK, time.strftime("%Y-%m-%d %H:%M %Z"))


# ---- a repository


def repository(url: str, write: bool) -> Iterator[Finding]:
    """Whether the store at `url` lets us in, holds a repository, and (`write`) takes versions."""
    from ..chunkstore import open_store, parse_store_url
    from ..repository.repository import Repository

    target = parse_store_url(url)
    if target.scheme == "scp":
        yield from _ssh()
    began = time.monotonic()
    try:
        store = open_store(target)
    except HorcruxError as error:
        yield Finding("store", FAIL, str(error), "see docs/stores.md for what each store needs")
        return
    with store:
        took = time.monotonic() - began
        level, mend = (OK, "") if took < SLOW else (WARN, "a mirror that is nearer may help")
        yield Finding("store", level, f"{url} answers ({took:.2f} s)", mend)
        try:
            opened = Repository.open(store)
            count = len(opened.refs.images())
            yield Finding("repository", OK, f"readable, {count} image{'' if count == 1 else 's'}")
        except NotFound as error:
            yield Finding("repository", WARN, str(error))
        except KeyRequired as error:
            yield Finding("repository", WARN, str(error), "horcrux-cli key unlock")
        except HorcruxError as error:
            yield Finding("repository", FAIL, str(error), "horcrux-cli verify tells more")
        if write:
            yield from _writing(store)


def _writing(store: object) -> Iterator[Finding]:
    from ..chunkstore import ChunkStore
    from ..repository.repository import check_exclusive_create

    assert isinstance(store, ChunkStore)
    key = f"probe/clock-{os.getpid()}-{time.time_ns()}"
    try:
        check_exclusive_create(store)
        yield Finding("write", OK, "two writers at once cannot overwrite each other")
        before = time.time()
        store.put(key, b"clock")
        try:
            theirs = store.stat(key).mtime
        finally:
            store.delete(key)
    except HorcruxError as error:
        yield Finding("write", FAIL, str(error), "ask for permission to write, or use it read-only")
        return
    off = theirs - (before + time.time()) / 2
    if abs(off) > CLOCK:
        what = f"the store's clock is {abs(off):.0f} s {'ahead' if off > 0 else 'behind'}"
        yield Finding("store clock", WARN, what, "timedatectl set-ntp true, here and there")
    else:
        yield Finding("store clock", OK, f"within {CLOCK // 60} minutes of ours")


def _ssh() -> Iterator[Finding]:
    socket = os.environ.get("SSH_AUTH_SOCK")
    folder = Path.home() / ".ssh"
    keys = sorted(path.stem for path in folder.glob("id_*.pub")) if folder.is_dir() else []
    if socket and os.path.exists(socket):
        yield Finding("ssh agent", OK, "there is one")
    elif keys:
        yield Finding("ssh agent", OK, f"none, but key files: {', '.join(keys)}")
    else:
        what = "no ssh agent and no key in ~/.ssh (one that ~/.ssh/config names is fine)"
        mend = "ssh-keygen -t ed25519, then ssh-copy-id user@host"
        yield Finding("ssh agent", WARN, what, mend)
    known = (folder / "known_hosts", Path("/etc/ssh/ssh_known_hosts"))
    if not any(path.exists() for path in known):
        what = "no known_hosts: unknown hosts are refused"
        yield Finding("known_hosts", WARN, what, "connect once with ssh user@host and compare")
    else:
        yield Finding("known_hosts", OK, "is there")

"""What `plugin.py` does: the configuration, start and end of one nbdkit process.

Everything that can be wrong with the request is found before nbdkit goes into the background, so
that it is told on the command line; threads and connections start after it has forked.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from . import __version__, paths, peer
from .attach.base import FOLDER
from .control import ControlServer
from .errors import HorcruxError, UsageError
from .names import check_name, check_ref
from .repository import keyring
from .repository.repository import Resolved
from .units import MiB, parse_size
from .volume import volume as volumes
from .volume.options import FillOptions, parse_record
from .volume.profile import recorded
from .volume.state import Pending
from .volume.volume import Volume

__all__ = ["BLOCK_SIZES", "KEYS", "Server", "__version__", "errno_of", "extents"]

log = logging.getLogger(__name__)

KEYS = {
    "volume": "a volume that horcrux-cli made: its name, or its folder",
    "repo": "URL of a repository: cp:///path, scp://user@host:/path, s3://bucket/prefix, …",
    "name": "the image",
    "ref": "its branch, tag or commit id (default: main)",
    "overlay": "folder for what is written, made if missing",
    "readonly": "true: serve the version itself (then overlay may be left out)",
    "cache": "folder of the cache (default: this host's)",
    "cache_size": "most bytes of it, e.g. 20G",
    "prefetch": "profile (default), all or none: what is fetched before it is asked for",
    "fill_rate": "most bytes per second that prefetch takes from the store, e.g. 20M",
    "record": "seconds (or true) after which what was read becomes the version's profile, "
    "if it has none",
    "timeout": "seconds that a read waits for a store that is away (default: 60)",
    "control": "path of a socket that tells this server's figures (horcrux-cli uses it)",
    "keyfile": "key file of an encrypted repository (default: the key that this host has)",
    "plain_tcp": "true: let other hosts in over TCP without TLS, to read and change everything",
    "log": "debug, info, warning (default) or error",
}

# Smallest, preferred, largest request. Anything works; whole 4 KiB blocks need no reading first.
BLOCK_SIZES = (1, 4096, 32 * MiB)
_HOLE, _ZERO = 1, 2  # NBD_STATE_HOLE, NBD_STATE_ZERO
LAST_CLIENTS = 2.0  # seconds to go for those who are connected but use nothing
FREE_STEP = 0.3  # seconds between looks at a device that is in use
MAX_EXTENTS = 4096  # in one answer; the client asks on

_YES = {"1": True, "true": True, "on": True, "yes": True}
_NO = {"0": False, "false": False, "off": False, "no": False}


# Everything else is EIO: nbdkit makes EINVAL of what the protocol has no number for, as if the
# client had asked for something wrong.
_TOLD = {
    errno.ENOSPC: errno.ENOSPC,
    errno.EDQUOT: errno.ENOSPC,
    errno.ENOMEM: errno.ENOMEM,
    errno.EROFS: errno.EROFS,
}


def errno_of(error: BaseException) -> int:
    """The errno that the client gets for a failed request."""
    if isinstance(error, UsageError):
        return errno.EINVAL
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    return _TOLD.get(getattr(error, "errno", None) or 0, errno.EIO)


class Server:
    """One nbdkit process: one volume, or one version read-only."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}
        self._volume: Volume | None = None
        self._resolved: Resolved | None = None
        self._folder: Path | None = None
        self._control: ControlServer | None = None
        self._began = time.monotonic()
        self.export = ""
        self.description = ""

    # ---- before the fork

    def configure(self, key: str, value: str) -> None:
        """One `key=value` of the command line. Raises UsageError."""
        if key not in KEYS:
            raise UsageError(f"unknown key {key!r}: the keys are {', '.join(KEYS)}")
        if key in self._values:
            raise UsageError(f"{key}= is given twice")
        if not value:
            raise UsageError(f"{key}= is empty")
        self._values[key] = value

    def configured(self) -> None:
        """All keys are here. Raises UsageError."""
        values = self._values
        if "volume" in values:
            others = set(values) & {"repo", "name", "ref", "overlay"}
            if others:
                raise UsageError(f"volume= already says it all: leave out {sorted(others)[0]}=")
        elif "repo" not in values and "overlay" not in values:
            raise UsageError("say what to serve: repo= and name= (and overlay=), or volume=")
        if "name" in values:
            check_name("image", values["name"])
        if "ref" in values:
            check_ref(values["ref"])
        self._flag("readonly")
        self._flag("plain_tcp")
        self._cache_size()
        self._limit()
        self._filling(FillOptions())
        _set_up_log(values.get("log", os.environ.get("HORCRUX_LOG", "warning")))
        for key in ("overlay", "cache", "control", "keyfile"):
            if key in values:
                values[key] = os.path.abspath(values[key])  # nbdkit goes to / when it forks
        if "keyfile" in values:
            keyring.use_key_file(values["keyfile"])
        if "volume" in values:
            name = values["volume"]
            self._folder = (
                Path(os.path.abspath(name))
                if "/" in name
                else paths.volumes() / check_name("volume", name)
            )
        elif "overlay" in values:
            self._folder = Path(values["overlay"])

    def _flag(self, key: str) -> bool:
        text = self._values.get(key, "false").lower()
        if text not in _YES and text not in _NO:
            raise UsageError(f"{key}={text}: say true or false")
        return text in _YES

    def _cache_size(self) -> int | None:
        text = self._values.get("cache_size")
        return None if text is None else parse_size(text, "cache_size")

    def _filling(self, told: FillOptions) -> FillOptions:
        values = self._values
        rate, record = values.get("fill_rate"), values.get("record")
        return FillOptions(
            values.get("prefetch", told.mode),
            told.rate if rate is None else parse_size(rate, "fill_rate"),
            told.record if record is None else parse_record(record),
        ).checked()

    def _limit(self) -> float:
        text = self._values.get("timeout", str(volumes.STORE_LIMIT))
        try:
            limit = float(text)
        except ValueError:
            limit = -1
        if not 1 <= limit <= 86400:
            raise UsageError(f"timeout={text}: give seconds, 1 to 86400")
        return limit

    def prepare(self) -> None:
        """Check all that can be wrong, make the overlay, open it. Leaves no thread and no
        connection, which a fork would not take along.
        """
        values = self._values
        self._resolved = volumes.prepare(
            self._folder,
            values.get("repo"),
            values.get("name"),
            values.get("ref"),
            read_only=self._flag("readonly"),
        )
        # For good, and not only for its errors: the lock goes along when nbdkit forks, so whoever
        # is second is told on the command line. Threads and connections come with the first use.
        self._volume = self._open()
        commit = self._volume.base.commit
        self.export = commit.image
        self.description = f"{self._volume.name}: {commit.message}".strip(": ")[:200]

    def _open(self) -> Volume:
        cache = self._values.get("cache")
        folder = None if cache is None else Path(cache)
        if self._folder is not None:
            return Volume.open(
                self._folder,
                cache=folder,
                cache_size=self._cache_size(),
                read_only=self._flag("readonly"),
                store_limit=self._limit(),
            )
        assert self._resolved is not None
        return Volume.open_version(
            self._values["repo"],
            self._resolved,
            cache=folder,
            cache_size=self._cache_size(),
            store_limit=self._limit(),
        )

    # ---- after it

    def start(self) -> None:
        """This process serves the volume."""
        assert self._volume is not None
        self._volume.forked()
        if path := self._values.get("control"):
            self._volume.warm_index()
            self._control = ControlServer(
                Path(path),
                {
                    "figures": lambda _: self.figures(),
                    "log": self._log_level,
                    "touched": lambda _: self._touched(),
                    "prepare": lambda _: self._prepare(),
                    "freeze": self._freeze,
                    "seal": self._seal,
                    "abandon": lambda _: self._abandon(),
                },
            )
            self._mind_signals(Path(path).parent)
        if {"control", "prefetch", "record"} & self._values.keys():
            self._volume.start_filling(self._filling(self._volume.fill))
        log.info("serving %s (%d bytes)", self._volume.name, self._volume.size)

    def _mind_signals(self, run: Path) -> None:
        """Who started us has blocked the signals that would end us at once (server.BLOCKED)."""
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        if signal.SIGTERM in blocked:
            assert self._volume is not None
            work = (run, blocked, self._volume.flush)
            threading.Thread(target=end_when_free, args=work, daemon=True).start()

    def _touched(self) -> dict[str, Any]:
        assert self._volume is not None
        profile = recorded(self._volume).encode()
        return {"version": self._volume.opened.hex(), "profile": profile.hex()}

    def _prepare(self) -> None:
        assert self._volume is not None
        self._volume.fresh.make()

    def _freeze(self, ask: Mapping[str, Any]) -> None:
        assert self._volume is not None
        pending = ask["pending"]
        self._volume.freeze(Pending(**{**pending, "members": tuple(pending["members"])}))

    def _abandon(self) -> None:
        assert self._volume is not None
        self._volume.abandon()

    def _seal(self, ask: Mapping[str, Any]) -> None:
        assert self._volume is not None
        self._volume.seal(bytes.fromhex(ask["commit"]))

    def figures(self) -> dict[str, Any]:
        """What this server did so far; bytes are of plaintext."""
        assert self._volume is not None
        native = self._volume.native.sums() if self._volume.native is not None else {}
        figures = self._volume.base.figures.to_json()
        figures["cache_hits"] += native.pop("native_cache_hits", 0)
        if self._volume.native is not None:
            counts, seconds = self._volume.native.flushes()
            flushes = figures["flush_seconds"]
            flushes["counts"] = [a + b for a, b in zip(flushes["counts"], counts, strict=True)]
            flushes["sum"] = round(flushes["sum"] + seconds, 6)
        return {
            "pid": os.getpid(),
            "seconds": round(time.monotonic() - self._began, 1),
            "dirty_bytes": self._volume.dirty_bytes(),
            **figures,
            "waited_chunks": self._volume.base.demand.missed,
            "prefetch": self._volume.filler.figures() if self._volume.filler else None,
            "native": self._volume.native is not None,
            **native,
        }

    def _log_level(self, ask: Mapping[str, Any]) -> None:
        level = _level(str(ask["level"]))
        logging.getLogger().setLevel(level)
        log.error("log level: %s", level)  # an error, so that it is seen at every level

    def admit(self) -> None:
        """Refuse a client from elsewhere that anybody could listen to. Raises UsageError."""
        peer.check(self._flag("plain_tcp"))

    def connect(self, export: str) -> Volume:
        """What a client gets that asked for `export`."""
        if export not in ("", self.export):
            raise UsageError(f"there is no export {export!r} here, only {self.export!r}")
        assert self._volume is not None
        return self._volume

    def stop(self) -> None:
        """Flush and close."""
        if self._control is not None:
            self._control.stop()
            self._control = None
        if self._volume is not None:
            self._volume.close()
            self._volume = None


def end_when_free(run: Path, signals: Iterable[int], flush: Callable[[], None]) -> None:
    """Wait for one of `signals`, and for the device of the volume to be free; then end nbdkit.

    nbdkit answers each request after that with an error. So what a shutdown of the host sends to
    everything must not count before the file system is unmounted.
    """
    number = signal.sigwait(signals)
    from .attach import device

    state = run / FOLDER
    if device.in_use(state):
        log.warning("%s: this server ends when its device is free", signal.Signals(number).name)
    while device.in_use(state):
        time.sleep(FREE_STEP)
    os.kill(os.getpid(), signal.SIGQUIT)
    time.sleep(LAST_CLIENTS)  # nbdkit waits for them without a limit: a kernel or nbdfuse stays
    flush()
    os._exit(0)


def extents(volume: Volume, offset: int, count: int, one: bool) -> list[tuple[int, int, int]]:
    """(offset, length, NBD state) of the range, or of its first piece."""
    found: list[tuple[int, int, int]] = []
    for start, stop, allocated, zero in volume.extents(offset, count):
        state = (0 if allocated else _HOLE) | (_ZERO if zero else 0)
        found.append((start, stop - start, state))
        if one or len(found) >= MAX_EXTENTS:
            break
    return found


def _level(name: str) -> str:
    levels = {"debug", "info", "warning", "error"}
    if name.lower() not in levels:
        raise UsageError(f"log={name}: say {', '.join(sorted(levels))}")
    return name.upper()


def _set_up_log(level: str) -> None:
    logging.basicConfig(
        stream=sys.stderr, level=_level(level), format="horcrux: %(levelname)s: %(message)s"
    )
    # boto3 and paramiko tell a lot, and some of it is none of a log's business.
    for library in ("boto3", "botocore", "urllib3", "paramiko"):
        logging.getLogger(library).setLevel(logging.WARNING)


def message_of(error: BaseException) -> str:
    """The line that a user sees."""
    if isinstance(error, HorcruxError) or not isinstance(error, OSError):
        return str(error)
    where = f": {error.filename}" if error.filename else ""
    return f"{error.strerror or error}{where}"


def tell_in_one_line() -> None:
    """Let nbdkit's error lines hold the message of an error, without a traceback.

    nbdkit 1.32 prints what `traceback.format_exception` makes of anything that a callback raises
    (its plugins/python/errors.c), and has no other way. A bug of ours keeps its traceback.
    """
    everything = traceback.format_exception

    def format_exception(kind: Any, error: Any = None, trace: Any = None, **options: Any) -> Any:
        if isinstance(error, (HorcruxError, OSError)):
            return [message_of(error)]
        return everything(kind, error, trace, **options)

    setattr(traceback, everything.__name__, format_exception)

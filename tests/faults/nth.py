"""The N-th call fails: of the local files below a folder, or of a chunk store.

A sweep runs an operation with N = 1, 2, … until it gets through without meeting the fault, and
looks after each run whether what is there is the old state or the new one.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from horcrux_nbd.chunkstore.base import ChunkStore, Stat
from horcrux_nbd.chunkstore.wrapper import WrapperStore
from horcrux_nbd.errors import StoreError, StoreFull, StoreUnavailable
from horcrux_nbd.volume import layer, maplog, recent

T = TypeVar("T")


class Nth:
    """Counts calls; the `nth` (1: the first) and those after it, `times` in all, are to fail.

    `times=None`: from then on for good. Safe for several threads.
    """

    def __init__(self, nth: int, times: int | None = 1) -> None:
        self._nth, self._times = nth, times
        self._lock = threading.Lock()
        self.calls: list[str] = []
        self.failures = 0

    def turn(self, what: str) -> bool:
        """Whether this call is one that fails."""
        with self._lock:
            self.calls.append(what)
            count = len(self.calls)
            fails = count >= self._nth and (self._times is None or self.failures < self._times)
            self.failures += fails
            return fails


# ---- local files

_OPENS = {"open", "scandir", "listdir"}
_READS = {*_OPENS, "pread", "preadv", "stat"}
_TAKES_ROOM = {
    "create", "mkdir", "rename", "link", "pwrite", "write", "fsync", "fdatasync",
    "posix_fallocate", "fallocate",
}  # fmt: skip
_WRITES = {*_TAKES_ROOM, "unlink", "ftruncate", "utime", "rmdir"}
_CALLS = {*_READS, *_WRITES} - {"create", "fallocate"}

# Which calls a kind of fault meets, and what they fail with; None: they do only a part.
KINDS: dict[str, tuple[set[str], int | None]] = {
    "EIO": (_READS | _WRITES, errno.EIO),
    "ENOSPC": (_TAKES_ROOM, errno.ENOSPC),
    "EMFILE": (_OPENS | {"create"}, errno.EMFILE),
    "short": ({"pwrite", "write", "pread", "preadv"}, None),
}


class FileFaults:
    """While it is entered, calls for files below `root` count, and those that `nth` says fail.

    Calls by ctypes are among them. Those of libraries in C are not, nor is what the kernel does by
    itself: tests/torture has a file system for that.
    """

    def __init__(self, root: Path, kind: str, nth: Nth) -> None:
        self._root, self._nth = str(root), nth
        self._calls, self._errno = KINDS[kind]
        self._stack = contextlib.ExitStack()

    def _is_ours(self, where: Any) -> bool:
        try:
            path = os.readlink(f"/proc/self/fd/{where}") if isinstance(where, int) else where
            return os.fspath(path).startswith(self._root)
        except (OSError, TypeError):
            return False

    def _fails(self, name: str, where: Any) -> bool:
        return name in self._calls and self._is_ours(where) and self._nth.turn(name)

    def _error(self, where: Any) -> OSError:
        assert self._errno is not None
        return OSError(self._errno, os.strerror(self._errno), where)

    def _wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kw: Any) -> Any:
            known = name
            if name == "open" and (args[1] if len(args) > 1 else kw["flags"]) & os.O_CREAT:
                known = "create"
            if args and self._fails(known, args[0]):
                if self._errno is not None:
                    raise self._error(args[0])
                return _part(name, real, args)
            return real(*args, **kw)

        return call

    def _wrap_open(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(file: Any, mode: str = "r", *args: Any, **kw: Any) -> Any:
            name = "create" if set(mode) & set("wax") else "open"
            if self._errno is not None and self._fails(name, file):
                raise self._error(file)
            return real(file, mode, *args, **kw)

        return call

    def __enter__(self) -> FileFaults:
        for name in _CALLS:
            self._replace(os, name, self._wrap(name, getattr(os, name)))
        opener = self._wrap_open(io.open)
        self._replace(io, "open", opener)
        self._replace(builtins, "open", opener)
        for module in (layer, maplog):
            self._replace(module, "_libc", _Libc(module._libc, self._fallocate))
        self._replace(recent, "_pwrite", self._wrap_pwrite(recent._pwrite))
        return self

    def _replace(self, where: Any, name: str, value: Any) -> None:
        self._stack.callback(setattr, where, name, getattr(where, name))
        setattr(where, name, value)

    def _fallocate(self, real: Callable[..., int], *args: Any) -> int:
        if self._errno is not None and self._fails("fallocate", args[0]):
            import ctypes

            ctypes.set_errno(self._errno)
            return -1
        return real(*args)

    def _wrap_pwrite(self, real: Callable[..., int]) -> Callable[..., int]:
        def call(fd: int, data: bytes, length: int, offset: int) -> int:
            if self._fails("pwrite", fd):
                if self._errno is None:
                    return real(fd, data, max(1, length // 2), offset)
                import ctypes

                ctypes.set_errno(self._errno)
                return -1
            return real(fd, data, length, offset)

        return call

    def __exit__(self, *exc: object) -> None:
        self._stack.close()


class _Libc:
    def __init__(self, real: Any, fallocate: Callable[..., int]) -> None:
        self._real, self._call = real, fallocate

    def fallocate(self, *args: Any) -> int:
        return self._call(self._real.fallocate, *args)


def _part(name: str, real: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Do a half of what was asked for, at least a byte."""
    if name == "pread":
        fd, length, offset = args
        return real(fd, max(1, length // 2), offset)
    if name == "preadv":
        fd, (view,), offset = args
        return real(fd, [view[: max(1, len(view) // 2)]], offset)
    fd, data, *offset = args
    return real(fd, data[: max(1, len(data) // 2)], *offset)


# ---- chunk stores

HANG = 0.05  # seconds that a store which hangs says nothing before its own limit ends it


class FaultyStore(WrapperStore):
    """A store whose calls `nth` counts; those that it says fail, in the way `kind`.

    unavailable  before it is done            lost       after it was done: the answer got lost
    hangs        and its time limit ends it   error      for good
    full         puts find no room            flipped    gets give a byte that is another
    cut          gets give less
    """

    def __init__(self, store: ChunkStore, kind: str, nth: Nth) -> None:
        super().__init__(store)
        self._kind, self._nth = kind, nth

    def _error(self, what: str) -> StoreError:
        if self._kind == "full":
            return StoreFull(f"test: no room for {what}")
        if self._kind == "error":
            return StoreError(f"test: {what} fails")
        return StoreUnavailable(f"test: {what} gets no answer")

    def _meets(self, what: str) -> bool:
        verb = what.split(" ", maxsplit=1)[0]
        return {
            "full": verb in ("put", "sync"),
            "flipped": verb == "get",
            "cut": verb == "get",
        }.get(self._kind, True)

    def _do(self, what: str, operation: Callable[[], T]) -> T:
        if not self._meets(what) or not self._nth.turn(what):
            return operation()
        if self._kind == "hangs":
            time.sleep(HANG)
        if self._kind not in ("lost", "flipped", "cut"):
            raise self._error(what)
        result = operation()
        if self._kind == "lost":
            raise self._error(what)
        assert isinstance(result, bytes)
        if self._kind == "cut":
            return result[: len(result) // 2]  # type: ignore[return-value]
        return result[:-1] + bytes([result[-1] ^ 1]) if result else result  # type: ignore[return-value]

    def list(self, prefix: str = "", after: str = "", limit: int | None = None) -> Iterator[Stat]:
        """Each object that is listed counts."""
        for stat in super().list(prefix, after, limit):
            if self._meets("list") and self._nth.turn(f"list {prefix}"):
                raise self._error(f"list {prefix}")
            yield stat


STORE_KINDS = ("unavailable", "lost", "hangs", "error", "full", "flipped", "cut")

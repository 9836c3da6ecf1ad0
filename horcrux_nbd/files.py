"""Local files that must be there whole or not at all. The one place that publishes them.

A file is written under a temporary name in its own folder, synced, and renamed; then the folder is
synced. Temporary names begin with `.tmp-`, so a sweep can tell them and no store key is like it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import Busy, Damaged, NoSpace

TEMPORARY_PREFIX = ".tmp-"
MAX_JSON = 16 << 20  # bytes; what is longer is none of ours


def sync_folder(folder: str | Path) -> None:
    """Make names in `folder` durable (fsync of a directory)."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folder(folder: str | Path, mode: int = 0o755) -> None:
    """Make `folder` and its parents, durably; no error where it exists."""
    folder = Path(folder)
    if folder.is_dir():
        return
    make_folder(folder.parent)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=mode)
    sync_folder(folder.parent)


def write_all(fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """`os.pwrite` until all of `data` is written (a signal or a full disk cuts it short)."""
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, offset)
        if done <= 0:
            raise OSError(errno.EIO, "write made no progress")
        view = view[done:]
        offset += done


def read_exactly(fd: int, length: int, offset: int) -> bytes:
    """`length` bytes at `offset`; what lies behind the end of the file reads as zeros."""
    data = os.pread(fd, length, offset)
    if len(data) == length:
        return data
    parts = [data]
    got = len(data)
    while got < length and data:
        data = os.pread(fd, length - got, offset + got)
        parts.append(data)
        got += len(data)
    parts.append(bytes(length - got))
    return b"".join(parts)


def publish(
    path: str | Path,
    data: bytes,
    trailer: bytes = b"",
    *,
    exclusive: bool = False,
    durable: bool = True,
    mode: int = 0o644,
) -> None:
    """Write `path` so that it is there whole or not at all; replaces it unless `exclusive`.

    Its content is `data`, then `trailer`: joined before, large data would be copied for that.

    `durable` syncs file and folder, so that it survives a power cut once this returns. Without it
    a power cut may leave it missing, empty or partial: only for what is checked when read.
    Raises FileExistsError if `exclusive` and `path` is there; NoSpace; OSError.
    """
    path = Path(path)
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            write_all(fd, data, 0)
            if trailer:
                write_all(fd, trailer, len(data))
            if durable:
                os.fsync(fd)
        finally:
            os.close(fd)
        if exclusive:
            os.link(temporary, path)
            os.unlink(temporary)
        else:
            os.rename(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(f"no space left for {path}: free some and try again") from error
        raise
    if durable:
        sync_folder(path.parent)


def publish_json(path: str | Path, value: Any, mode: int = 0o600) -> None:
    """`publish` of `value` as JSON for people (indented, sorted keys)."""
    publish(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode(), mode=mode)


def read_json(path: str | Path) -> Any:
    """What `publish_json` wrote. Raises FileNotFoundError, or Damaged if it is no JSON."""
    with open(path, "rb") as file:
        data = file.read(MAX_JSON + 1)
    try:
        if len(data) > MAX_JSON:
            raise ValueError(f"it is over {MAX_JSON >> 20} MiB")
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path} is damaged ({error}): restore it from a backup") from error


def sweep_temporaries(folder: str | Path) -> int:
    """Remove what killed writers left directly in `folder`; how many. Call under its lock."""
    count = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(TEMPORARY_PREFIX):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(entry.path)
                    count += 1
    return count


class FileLock:
    """An exclusive lock on a file, held by this process until `release` or its end (flock(2)).

    The holder writes its pid into the file, for the message that the next one gets.
    """

    def __init__(self, path: str | Path, what: str) -> None:
        self.path, self.what = Path(path), what
        self._fd = -1

    def acquire(self, wait: float = 0) -> FileLock:
        """Take the lock or raise Busy, after `wait` seconds, which says which process holds it."""
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + wait
        try:
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    # flock(2) has no time-out, and a signal is no way for threads
                    if time.monotonic() < deadline:
                        time.sleep(0.02)
                        continue
                    holder = os.pread(fd, 32, 0).decode(errors="replace").strip()
                    raise Busy(
                        f"{self.what} is in use by process {holder or '(unknown)'}: stop it first"
                    ) from None
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        self.note_holder()
        return self

    def note_holder(self) -> None:
        """Write down who holds it: after a fork, which takes the lock along, it is the child.

        For a message only, so a full disk is no reason not to have the lock.
        """
        with contextlib.suppress(OSError):
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def held_by_somebody(self) -> int | None:
        """The pid that holds the lock (0 if unknown), or None if it is free."""
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            text = os.pread(fd, 32, 0).decode(errors="replace").strip()
            return int(text) if text.isdigit() else 0
        finally:
            os.close(fd)
        return None

    def __enter__(self) -> FileLock:
        return self.acquire()

    def __exit__(self, *exc: object) -> None:
        self.release()


@contextlib.contextmanager
def opened(path: str | Path, flags: int, mode: int = 0o600) -> Iterator[int]:
    """A descriptor for the length of a `with` block."""
    fd = os.open(path, flags | os.O_CLOEXEC, mode)
    try:
        yield fd
    finally:
        os.close(fd)


def raise_file_limit() -> int:
    """Let this process open as many files as it may; how many that are."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(1 << 16, hard if hard != resource.RLIM_INFINITY else 1 << 16)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return soft

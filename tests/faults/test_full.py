"""Disks that are full, at any moment; and too few descriptors, a tiny cache, little memory.

What finds no room is refused with ENOSPC, and nothing that was acknowledged is lost. Real small
file systems: a tmpfs, and an ext4 on a loop device, which finds out about room later. A pass is
done again by its number.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import os
import random
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from horcrux_nbd.chunkstore import open_store
from horcrux_nbd.errors import HorcruxError, NotFound
from horcrux_nbd.repository.verify import verify
from horcrux_nbd.units import KiB, MiB
from horcrux_nbd.versions.commit import NothingToCommit
from horcrux_nbd.volume.volume import Volume

from ..servers.nbdkit import MISSING, Nbdkit, available, connected, libnbd
from ..versions.support import BLOCK, Disk, version_content
from ..volume.support import CHUNK, IMAGE, make_image, noise, open_descriptors, read, write
from .operations import die

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: run as root (sudo)")
needs_nbdkit = pytest.mark.skipif(not available(), reason=MISSING)

CHUNKS = 24
SIZE = CHUNKS * CHUNK
STEPS = 60


@contextlib.contextmanager
def small(folder: Path, kind: str, size: int) -> Iterator[Path]:
    """A file system of `size` bytes on `folder`."""
    folder.mkdir(parents=True)
    if kind == "tmpfs":
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "horcrux-test", folder], check=True
        )
    else:
        image = folder.with_suffix(".img")
        with image.open("wb") as file:
            file.truncate(size)
        subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", "-m", "0", image], check=True)
        subprocess.run(["mount", "-o", "loop", image, folder], check=True)
    try:
        yield folder
    except BaseException:
        subprocess.run(["umount", "-l", folder], check=True)  # something may be open still
        raise
    gc.collect()
    open_files = [fd for fd in open_descriptors() if str(folder) in fd]
    subprocess.run(["umount", *(["-l"] if open_files else []), folder], check=True)
    assert not open_files


class Filler:
    """Somebody else's file on a file system, which takes what room there is, or most of it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "somebody-elses"

    def fill(self, leave: int) -> None:
        self.free()
        with self.path.open("wb") as file, contextlib.suppress(OSError):
            while True:
                os.write(file.fileno(), bytes(64 * KiB))
        with self.path.open("r+b") as file, contextlib.suppress(OSError):
            while True:  # to the last byte
                file.seek(0, os.SEEK_END)
                os.write(file.fileno(), bytes(KiB))
        os.truncate(self.path, max(0, self.path.stat().st_size - leave))
        os.sync()

    def free(self) -> None:
        self.path.unlink(missing_ok=True)


class Pass:
    """One volume's life on disks that fill up and empty again."""

    def __init__(self, host: Path, store: Path, seed: int) -> None:
        self.rng = random.Random(seed)
        self.fillers = {"host": Filler(host), "store": Filler(store)}
        self.url = make_image(store / "repo", noise(SIZE, "image"))
        self.disk = Disk("v", self.url)
        self.allowed = [{bytes(self.disk.model[at : at + BLOCK])} for at in range(0, SIZE, BLOCK)]
        self.told: Counter[str] = Counter()
        self.volume: Volume | None = None

    def run(self) -> None:
        steps = {
            self.write: 12, self.zero: 3, self.flush: 5, self.read: 5, self.fill: 4,
            self.free: 3, self.commit: 3, self.push: 2, self.end: 2,
        }  # fmt: skip
        for number in range(STEPS):
            step = self.rng.choices(list(steps), list(steps.values()))[0]
            try:
                step()
            except (NothingToCommit, NotFound):
                pass
            except (HorcruxError, OSError) as error:
                name = getattr(step, "__name__", "")
                if error.errno != errno.ENOSPC:
                    raise AssertionError(f"step {number}, {name}: {error!r}") from error
                self.told[f"{name}: ENOSPC"] += 1
            else:
                self.told[getattr(step, "__name__", "")] += 1
        for filler in self.fillers.values():
            filler.free()
        self.close()
        self.look(self.disk.content())
        self.disk.model[:] = self.disk.content()
        with contextlib.suppress(NothingToCommit):
            self.disk.commit("at the end")
        self.disk.check()
        self.disk.push()
        assert version_content(self.url) == bytes(self.disk.model)
        with open_store(self.url) as store:
            report = verify(store, data=True)
            assert report.ok, report.problems

    # ---- steps

    def _open(self) -> Volume:
        if self.volume is None:
            self.volume = self.disk.open()
        return self.volume

    def close(self) -> None:
        volume, self.volume = self.volume, None
        if volume is not None:
            volume.close()

    def end(self) -> None:
        """Orderly, or not."""
        if self.rng.random() < 0.5:
            self.close()
        elif self.volume is not None:
            volume, self.volume = self.volume, None
            die(volume)

    def _change(self, offset: int, data: bytes, *, failed: bool) -> None:
        for block in range(offset // BLOCK, -(-(offset + len(data)) // BLOCK)):
            low, high = max(offset, block * BLOCK), min(offset + len(data), (block + 1) * BLOCK)
            inside = slice(low - block * BLOCK, high - block * BLOCK)
            now = set()
            for old in self.allowed[block]:
                changed = bytearray(old)
                changed[inside] = data[low - offset : high - offset]
                now.add(bytes(changed))
            self.allowed[block] = now | self.allowed[block] if failed else now

    def _place(self, most: int) -> tuple[int, int]:
        length = self.rng.choice((BLOCK, 8 * BLOCK, most, 700, BLOCK + 9))
        at = self.rng.randrange(SIZE - length)
        return (at if length % BLOCK else at // BLOCK * BLOCK), length

    def write(self) -> None:
        volume = self._open()
        at, length = self._place(4 * CHUNK)
        data = self.rng.randbytes(length)
        try:
            write(volume, at, data)
        except (HorcruxError, OSError):
            self._change(at, data, failed=True)
            raise
        self._change(at, data, failed=False)

    def zero(self) -> None:
        volume = self._open()
        at, length = self._place(4 * CHUNK)
        try:
            volume.zero(at, length)
        except (HorcruxError, OSError):
            self._change(at, bytes(length), failed=True)
            raise
        self._change(at, bytes(length), failed=False)

    def flush(self) -> None:
        try:
            self._open().flush()
        except HorcruxError as error:
            if type(error).__name__ == "SyncFailed":  # says so until the server is started again
                assert self.volume is not None
                volume, self.volume = self.volume, None
                die(volume)
            raise

    def read(self) -> None:
        self.look(read(self._open(), 0, SIZE))

    def look(self, content: bytes) -> None:
        for block, contents in enumerate(self.allowed):
            found = content[block * BLOCK : (block + 1) * BLOCK]
            assert found in contents, f"block {block}"

    def fill(self) -> None:
        which = self.rng.choice(("host", "host", "store"))
        self.fillers[which].fill(self.rng.choice((0, 0, 4 * KiB, 64 * KiB, 512 * KiB)))

    def free(self) -> None:
        self.rng.choice(list(self.fillers.values())).free()

    def commit(self) -> None:
        self.close()
        self.disk.commit("on the way")

    def push(self) -> None:
        self.close()
        self.disk.push()


def passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, numbers: range) -> None:
    told: Counter[str] = Counter()
    # Records of a log hold errors, and these what was open when they came.
    monkeypatch.setattr(logging.root.manager, "disable", logging.CRITICAL)
    for number in numbers:
        kind = ("tmpfs", "ext4")[number % 2]
        folder = tmp_path / f"{number}"
        with (
            small(folder / "host", kind, 24 * MiB) as host,
            small(folder / "store", kind, 24 * MiB) as store,
        ):
            monkeypatch.setenv("HORCRUX_ROOT", str(host / "root"))
            try:
                life = Pass(host, store, number)
                life.run()
                told += life.told
            except BaseException as error:
                error.add_note(f"pass {number} on {kind}")
                raise
        shutil.rmtree(folder)
    print(dict(sorted(told.items())))
    refused = sum(count for name, count in told.items() if "ENOSPC" in name)
    assert refused > len(numbers), "the disks were never full"


@needs_root
def test_full_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes(tmp_path, monkeypatch, range(6))


@needs_root
@pytest.mark.long
@pytest.mark.timeout(1800)
def test_full_disks_fifty_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes(tmp_path, monkeypatch, range(100, 150))


# ---- limits of a process


def look(server: Nbdkit, content: bytes, step: int, clients: int = 4) -> Counter[str]:
    """Read all with several clients; each piece is right or an error."""
    nbd = libnbd()
    assert nbd is not None
    told: Counter[str] = Counter()

    def reader(first: int) -> None:
        with connected(server) as handle:
            for at in range(first * step, len(content), clients * step):
                try:
                    got = handle.pread(step, at)
                except nbd.Error as error:
                    told[errno.errorcode[error.errnum]] += 1
                    continue
                assert got == content[at : at + step], f"byte {at}"
                told["right"] += 1

    with ThreadPoolExecutor(clients) as pool:
        readers = [pool.submit(reader, number) for number in range(clients)]
        for one in readers:
            try:
                one.result(30)
            except TimeoutError:
                server.kill()  # it takes no client: the reader ends with an error
                told["not served"] += 1
            except nbd.Error:
                told["not served"] += 1
    return told


def limited(keys: dict[str, Any], **limits: int) -> Nbdkit:
    server = Nbdkit(**keys)
    server._command = [
        "prlimit", *(f"--{name}={value}" for name, value in limits.items()), *server._command,
    ]  # fmt: skip
    return server


@needs_nbdkit
def test_too_few_descriptors(tmp_path: Path) -> None:
    """It does not start, with a reason; or what it gives is right, and it goes on."""
    content = noise(SIZE, "image")
    url = make_image(tmp_path / "repo", content)
    right: list[int] = []
    for number in (16, 24, 32, 48):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        keys: dict[str, Any] = {
            "repo": url, "name": IMAGE, "overlay": folder / "v", "cache": folder / "cache",
            "log": "error",
        }  # fmt: skip
        with contextlib.ExitStack() as stack:
            server = limited(keys, nofile=number)
            stack.push(server.__exit__)
            try:
                server.start()
            except RuntimeError as error:
                print(f"{number} descriptors: {str(error).splitlines()[0]}")
                continue
            told = look(server, content, CHUNK, 1)
            print(f"{number} descriptors: {dict(told)}")
            assert set(told) <= {"right", "EIO", "not served"}
            if told == {"right": CHUNKS}:
                right.append(number)
    assert 48 in right


@needs_nbdkit
def test_a_cache_smaller_than_a_chunk(tmp_path: Path) -> None:
    content = noise(SIZE, "image")
    url = make_image(tmp_path / "repo", content)
    with Nbdkit(
        repo=url, name=IMAGE, overlay=tmp_path / "v", cache=tmp_path / "c", cache_size="16K"
    ) as server:
        for _ in range(2):
            assert look(server, content, CHUNK) == {"right": CHUNKS}
        with connected(server) as handle:
            handle.pwrite(content[:700], 5 * CHUNK + 1)
            assert handle.pread(700, 5 * CHUNK + 1) == content[:700]
    assert sum(p.stat().st_size for p in (tmp_path / "c" / "chunks").rglob("*")) < CHUNK


@needs_nbdkit
def test_little_memory(tmp_path: Path) -> None:
    """What does not fit is an error, the rest is right, and the server lives on; unless nbdkit
    itself has no memory for a request, and ends.
    """
    chunk = 8 * MiB
    content = noise(6 * chunk, "image")
    url = make_image(tmp_path / "repo", content, chunk_size=chunk)
    right = 0
    for memory in (400, 1000, 2000):
        folder = tmp_path / f"{memory}"
        folder.mkdir()
        keys: dict[str, Any] = {
            "repo": url, "name": IMAGE, "overlay": folder / "v", "cache": folder / "cache",
            "log": "error", "options": ("--threads", "4"),
        }  # fmt: skip
        # Its stacks are part of what it may have: 4 MiB each, not 8.
        with contextlib.ExitStack() as stack:
            server = limited(keys, **{"as": memory * MiB, "stack": 1 * MiB})
            stack.push(server.__exit__)
            try:
                server.start()
            except RuntimeError as error:
                print(f"{memory} MiB: {str(error).splitlines()[0]}")
                continue
            found = look(server, content, 2 * MiB)
            print(f"{memory} MiB: {dict(found)}")
            # nbdkit itself ends a connection that it finds no memory for.
            assert set(found) <= {"right", "EIO", "ENOMEM", "ENOTCONN", "EINVAL"}
            assert server.process is not None
            if server.process.poll() is not None:
                assert memory == 400, "nbdkit ends where there is next to nothing"
                assert server.process.returncode == 1
                assert "malloc: Cannot allocate memory" in server.said()
            right = found["right"]
    assert right == 24, "with 2,000 MiB all of it"

"""A volume that is served, loaded, committed, attached and killed, and what must be left of it."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from horcrux_nbd import host, server, versions
from horcrux_nbd.attach.processes import Process, wait_until
from horcrux_nbd.chunkstore import open_store
from horcrux_nbd.chunkstore.base import ChunkStore
from horcrux_nbd.errors import HorcruxError
from horcrux_nbd.names import Version
from horcrux_nbd.native import build
from horcrux_nbd.repository.repository import Repository
from horcrux_nbd.repository.verify import verify
from tests.servers.nbdkit import libnbd
from tests.versions.support import AUTHOR, version_content
from tests.volume.support import CHUNK, IMAGE, make_image, noise

from .committer import Committer
from .load import Load, share
from .oracle import SECTOR, Oracle

WRITERS = 4
LOAD = 0.2  # seconds of load before a kill, at most
LIMIT = 30.0  # seconds for anything that is waited for
# 40 chunks and a bit that is no multiple of anything; data in the first half and at the end.
SIZE = 40 * CHUNK + 1234


def original() -> bytes:
    return noise(20 * CHUNK) + bytes(20 * CHUNK) + noise(1234, "end")


@dataclass
class Tally:
    """What was done, and what was found wrong."""

    kills: int = 0
    cuts: int = 0
    requests: int = 0
    commits: int = 0  # begun, and killed in the middle or not
    pushes: int = 0  # acknowledged
    versions: int = 0  # that came of them, each compared with the oracle
    attaches: int = 0
    native: int = 0  # servers with the native filter; the others are Python alone
    servers: int = 0
    recoveries: int = 0  # servers killed while they started
    violations: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.kills} kills, {self.cuts} power cuts, {self.requests} requests, "
            f"{self.commits} commits begun, {self.pushes} pushes, {self.versions} versions "
            f"compared, {self.attaches} attaches, "
            f"{self.native} of {self.servers} servers native, "
            f"{self.recoveries} recoveries killed, {len(self.violations)} violations"
        )


class World:
    """A repository in `store`, and a volume of this host ($HORCRUX_ROOT) on it."""

    COMMITS = 0.35  # how likely a round has one

    def __init__(
        self,
        store: Path,
        name: str = "t",
        options: dict[str, str] | None = None,
        *,
        create: bool = True,
    ) -> None:
        """Without `create` both are there."""
        self.name, self.tally = name, Tally()
        self._options = options
        content = original()
        self.oracle = Oracle(content)
        self.url = f"cp://{store}"
        if create:
            pieces = {0: content[: 20 * CHUNK], 40 * CHUNK: content[40 * CHUNK :]}
            make_image(store, pieces)
            host.create(name, self.url, Version(IMAGE))
        self._asked, self._paths = os.environ.get(build.SWITCH), random.Random(name)
        self._killed = 0.0  # monotonic
        # Commits by their messages: what each may hold; those that were acknowledged, and pushed.
        self.made: dict[str, dict[int, list[int]]] = {}
        self.committed: set[str] = set()
        self.pushed: set[str] = set()

    # ---- serve, load, kill

    def serve(self) -> None:
        self._choose_path()
        host.serve(self.name, options=self._options)

    def _choose_path(self) -> None:
        """The next server has the native filter or not, unless $HORCRUX_NATIVE says which: either
        goes on where the other was killed.
        """
        if self._asked is None:
            os.environ.pop(build.SWITCH, None)
            if self._paths.random() < 0.5:
                os.environ[build.SWITCH] = "0"
        self.tally.servers += 1
        self.tally.native += build.found() is not None

    def connect(self) -> Any:
        running = server.running(self.name)
        nbd = libnbd()
        assert nbd is not None
        if running is None:
            raise nbd.Error("the server is gone", 0)
        handle = nbd.NBD()
        handle.connect_unix(str(running.socket))
        return handle

    def kill(self) -> None:
        """SIGKILL, and gone when this returns."""
        running = server.running(self.name)
        assert running is not None, f"the server ended by itself: {self.said()}"
        self._killed = time.monotonic()
        self._end(running.process)

    @staticmethod
    def _end(process: Process) -> None:
        process.signal(signal.SIGKILL)
        assert process.wait_gone(LIMIT)

    def said(self) -> str:
        log = server.folder_of(self.name) / server.LOG
        return log.read_text(errors="replace")[-2000:] if log.exists() else ""

    def load(self, seed: str, during: Callable[[], None]) -> None:
        """Load from several connections, which `during` ends by a kill; what is wrong is noted."""
        loads = [Load(self.connect, self.oracle, n, WRITERS, f"{seed} {n}") for n in range(WRITERS)]
        for load in loads:
            load.start()
        during()
        for load in loads:
            load.join(LIMIT)
            assert not load.is_alive(), f"{load.name} hangs, {LIMIT} s after the kill"
            self.wrong(seed, load.wrong)
            if load.failed is not None and load.ended < self._killed:
                self.wrong(seed, [f"{load.name}: {load.failed}, before the kill"])
        self.tally.requests += sum(load.requests for load in loads)

    def check(self, seed: str, *, power_cut: bool = False) -> None:
        """Compare every sector with the oracle."""
        handle = self.connect()
        image = bytes(handle.pread(SIZE, 0))
        handle.shutdown()
        self.wrong(seed, self.oracle.survived(image, power_cut=power_cut))

    def wrong(self, seed: str, lines: list[str]) -> None:
        self.tally.violations += [f"seed {seed}: {line}" for line in lines]

    # ---- commits

    def load_and_commit(self, seed: str, chance: random.Random, kill: Callable[[], None]) -> None:
        """Load until `kill`, at a random moment. In some rounds another process commits, and dies
        at the end; `compare_versions` looks at what came of it.
        """
        label, since = f"commit {seed}", self.oracle.now()
        committer = Committer(self.name, label, chance) if chance.random() < self.COMMITS else None

        def during() -> None:
            if committer is not None:
                committer.wait()
            time.sleep(chance.uniform(0, LOAD))  # a random moment is what this is about
            kill()

        try:
            self.load(seed, during)
        finally:
            if committer is not None:
                committer.kill()
        if committer is not None:
            self.tally.commits += 1
            self.made[label] = self.oracle.allowed(since)
            if committer.committed:
                self.committed.add(label)
            if committer.pushed:
                self.pushed.add(label)
                self.tally.pushes += 1

    def compare_versions(self, seed: str) -> None:
        """Push what was committed and compare each new version, as somebody reads it who has
        nothing of it. Raises what is wrong with a push.
        """
        versions.push(self.name, author=AUTHOR)
        writers = [
            (f"writer {n}", [s for part in share(self.oracle.sectors, n, WRITERS) for s in part])
            for n in range(WRITERS)
        ]
        self.check_pushed(seed)
        with open_store(self.url) as store:
            for oid, message in self._new_versions(store):
                image = version_content(self.url, oid.hex())
                wrong = self.oracle.one_moment(image, self.made.pop(message), writers)
                self.wrong(seed, [f"version {message}: {line}" for line in wrong])
                self.committed.discard(message)
                self.tally.versions += 1
            report = verify(store, data=True)
        self.wrong(seed, [f"verify: {problem}" for problem in report.problems])
        self.wrong(seed, [f"{label} was acknowledged and is gone" for label in self.committed])
        self.made.clear()
        self.committed.clear()
        self.pushed.clear()

    def _new_versions(self, store: ChunkStore) -> list[tuple[bytes, str]]:
        """(id, message) of the versions in the repository that were not compared yet."""
        repository = Repository.open(store)
        oid, found = repository.resolve(Version(IMAGE)).id, []
        while (commit := repository.read_commit(oid)).message in self.made:
            found.append((oid, commit.message))
            oid = commit.parents[0]
        return found

    def check_pushed(self, seed: str) -> None:
        """What a push has acknowledged is in the repository."""
        with open_store(self.url) as store:
            there = {message for _, message in self._new_versions(store)}
        lost = sorted(self.pushed - there)
        self.wrong(seed, [f"{label} was pushed and is gone" for label in lost])

    # ---- one kill, each of another kind

    def round(self, seed: str) -> None:
        """Load, a SIGKILL at a random moment, a new server, every sector compared."""
        chance = random.Random(seed)
        self.load_and_commit(seed, chance, self.kill)
        self.tally.kills += 1
        if chance.random() < 0.12:
            self._kill_while_starting(chance)
        if chance.random() < 0.1:
            self._attached(seed, chance)
        else:
            self.serve()
        self.check(seed)

    def _kill_while_starting(self, chance: random.Random) -> None:
        """Recovery is killed as well, and begins anew."""
        child = os.fork()
        if not child:
            with contextlib.suppress(BaseException):
                self.serve()
            os._exit(0)
        started = wait_until(lambda: server.running(self.name) is not None, LIMIT, step=0.001)
        running = server.running(self.name)
        time.sleep(chance.uniform(0, 0.5))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert started
        assert running is not None
        self._end(running.process)
        self.tally.kills += 1
        self.tally.recoveries += 1

    def _attached(self, seed: str, chance: random.Random) -> None:
        """The volume as a block device, written through it and killed meanwhile."""
        self._choose_path()
        attachment = host.attach(self.name, options=self._options)
        self.tally.attaches += 1
        try:
            writer = threading.Thread(
                target=self._write_device,
                args=(attachment.device, random.Random(seed)),
                daemon=True,
            )
            writer.start()
            time.sleep(chance.uniform(0, LOAD))
            self.kill()
            writer.join(LIMIT)
            assert not writer.is_alive(), f"a write hangs, {LIMIT} s after the kill"
            self.tally.kills += 1
        finally:
            host.detach(self.name, force=True)
        self.serve()

    def _write_device(self, device: str, chance: random.Random) -> None:
        """Whole blocks with O_SYNC, until an error: the page cache of a device goes with it."""
        fd = os.open(device, os.O_RDWR | os.O_SYNC)
        try:
            while True:
                first = chance.randrange(self.oracle.sectors // 8) * 8
                sectors = range(first, first + 8)
                version = self.oracle.begins(sectors)
                os.pwrite(fd, self.oracle.data(sectors, version), first * SECTOR)
                self.oracle.acknowledged(sectors, durable=True)
                self.tally.requests += 1
        except OSError:
            return
        finally:
            with contextlib.suppress(OSError):
                os.close(fd)

    def close(self) -> None:
        with contextlib.suppress(HorcruxError):
            host.stop(self.name, force=True)
        if self._asked is None:
            os.environ.pop(build.SWITCH, None)

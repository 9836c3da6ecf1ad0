"""What is done while calls fail, and what must hold whatever came of it.

An operation works in a folder of its own, a copy of what `prepare` made. `run` does it, and may
raise any typed error; `check` looks, with nothing failing any more, whether what is there is the
state before or after, and that doing it again succeeds.
"""

from __future__ import annotations

import random
import shutil
from abc import ABC, abstractmethod
from pathlib import Path
from unittest.mock import patch

from horcrux_nbd import paths
from horcrux_nbd.chunkstore import open_store
from horcrux_nbd.errors import HorcruxError
from horcrux_nbd.generate import generate
from horcrux_nbd.names import Version
from horcrux_nbd.repository import leases
from horcrux_nbd.repository.removal import Collector
from horcrux_nbd.repository.repository import Repository
from horcrux_nbd.repository.retention import Rules
from horcrux_nbd.repository.verify import verify
from horcrux_nbd.versions.commit import NothingToCommit
from horcrux_nbd.volume.layer import SyncFailed
from horcrux_nbd.volume.volume import Volume

from ..versions.support import BLOCK, Disk, version_content
from ..volume.support import (
    CHUNK,
    IMAGE,
    BytesSource,
    abandon,
    make_image,
    noise,
    read,
    resolve,
    write,
)

CHUNKS = 3
SIZE = CHUNKS * CHUNK
TYPED = (HorcruxError, OSError)


def die(volume: Volume) -> None:
    """What the death of the process leaves, its descriptors closed too."""
    resources = [one for one in volume._resources if one.close.__name__ != "release"]
    abandon(volume)
    for resource in reversed(resources):
        resource.close()


class Operation(ABC):
    """One operation, in `<folder>/work`. `url` is its repository."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.work = folder, folder / "work"
        self.url = f"cp://{self.work}/store"
        self.work.mkdir()
        self.prepare()
        shutil.move(self.work, folder / "template")

    def reset(self) -> None:
        """Begin anew with what `prepare` made."""
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.folder / "template", self.work)
        self.before()

    @abstractmethod
    def prepare(self) -> None:
        """Make what there is before it."""

    def before(self) -> None:  # noqa: B027 - most need nothing
        """What comes right before `run`, without faults."""

    @abstractmethod
    def run(self) -> None:
        """Do it."""

    @abstractmethod
    def check(self, error: BaseException | None) -> None:
        """Look at what came of it."""

    # ---- what several of them need

    def sound(self) -> None:
        with open_store(self.url) as store:
            report = verify(store, data=True)
            assert report.ok, report.problems

    def head(self) -> str:
        return resolve(self.url).id.hex()


class WithVolume(Operation):
    """A volume with a patch committed, and writes over it."""

    def prepare(self) -> None:
        make_image(self.work / "store", noise(SIZE, "image"))
        self.disk = Disk("v", self.url)
        self.disk.write((BLOCK, noise(BLOCK, "committed")))
        self.disk.commit("first")
        self.disk.push()
        self.disk.write((CHUNK, noise(CHUNK, "whole")), (5 * BLOCK, noise(BLOCK, "part")))
        self.disk.zero(2 * CHUNK + BLOCK, 3 * BLOCK)
        self.model = bytes(self.disk.model)

    def open(self) -> Volume:
        return Volume.open(self.disk.folder, name="v", store_limit=1.0)


class Attach(WithVolume):
    """What a server does when it opens a volume whose last one died."""

    def prepare(self) -> None:
        super().prepare()
        volume = self.open()
        for n in range(3):
            write(volume, (8 + n) * BLOCK, noise(BLOCK, ("recent", n)))
        self.model = read(volume, 0, volume.size)
        die(volume)

    def run(self) -> None:
        volume = self.open()
        try:
            assert read(volume, 0, volume.size) == self.model
        finally:
            volume.close()

    def check(self, error: BaseException | None) -> None:
        self.run()


class Read(WithVolume):
    """Everything of a volume, with nothing of it in the cache."""

    def prepare(self) -> None:
        super().prepare()
        shutil.rmtree(paths.cache())

    def before(self) -> None:
        self.volume = self.open()

    def run(self) -> None:
        errors = []
        for at in range(0, SIZE, 4 * BLOCK):
            try:
                got = read(self.volume, at, 4 * BLOCK)
            except HorcruxError as error:
                errors.append(error)
                continue
            assert got == self.model[at : at + 4 * BLOCK]
        if errors:
            raise errors[0]

    def check(self, error: BaseException | None) -> None:
        try:
            self.run()  # by the same server: what failed is not kept
        finally:
            self.volume.close()


class Write(WithVolume):
    """Writes, zeros and flushes; what was acknowledged is there when the server has died."""

    def before(self) -> None:
        self.volume = self.open()
        self.allowed = [{self.model[at : at + BLOCK]} for at in range(0, SIZE, BLOCK)]
        self.flushed = [set(contents) for contents in self.allowed]

    def _steps(self) -> list[tuple[str, int, bytes]]:
        chance = random.Random(1)
        steps: list[tuple[str, int, bytes]] = []
        for number in range(14):
            length = chance.choice((BLOCK, 2 * BLOCK, 700, BLOCK + 9))
            at = chance.randrange(SIZE - length) // (1 if length % BLOCK else BLOCK)
            at *= 1 if length % BLOCK else BLOCK
            kind = "zero" if number % 5 == 4 else "write"
            steps.append((kind, at, noise(length, ("step", number))))
            if number % 4 == 3:
                steps.append(("flush", 0, b""))
        return steps

    def run(self) -> None:
        self._errors: list[BaseException] = []
        for kind, at, data in self._steps():
            try:
                self._step(kind, at, data)
            except TYPED as error:
                self._errors.append(error)
                self._apply(kind, at, data, failed=True)
                continue
            self._apply(kind, at, data, failed=False)
        if self._errors:
            raise self._errors[0]

    def _step(self, kind: str, at: int, data: bytes) -> None:
        if kind == "write":
            write(self.volume, at, data)
        elif kind == "zero":
            self.volume.zero(at, len(data))
        else:
            self.volume.flush()

    def _apply(self, kind: str, at: int, data: bytes, *, failed: bool) -> None:
        if kind == "flush":
            if not failed:
                self.flushed = [set(contents) for contents in self.allowed]
            return
        data = bytes(len(data)) if kind == "zero" else data
        for block in range(at // BLOCK, -(-(at + len(data)) // BLOCK)):
            low, high = max(at, block * BLOCK), min(at + len(data), (block + 1) * BLOCK)
            inside = slice(low - block * BLOCK, high - block * BLOCK)
            now = set()
            for old in self.allowed[block]:
                changed = bytearray(old)
                changed[inside] = data[low - at : high - at]
                now.add(bytes(changed))
            self.allowed[block] = now | self.allowed[block] if failed else now
            self.flushed[block] |= now  # a power cut may keep what was not flushed

    def _compare(self, content: bytes, allowed: list[set[bytes]]) -> None:
        for block, contents in enumerate(allowed):
            assert content[block * BLOCK : (block + 1) * BLOCK] in contents, f"block {block}"

    def check(self, error: BaseException | None) -> None:
        self._compare(read(self.volume, 0, SIZE), self.allowed)
        failed = any(isinstance(error, SyncFailed) for error in self._errors)
        if not failed:  # what failed before does not keep what comes later from being durable
            self.volume.flush()
            self.flushed = [set(contents) for contents in self.allowed]
        die(self.volume)
        copy = self.folder / "rebooted"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.disk.folder, copy)
        self._compare(self.disk.content(), self.allowed)
        for notes in copy.rglob("recent"):  # they do not count after a start of the machine
            notes.unlink()
        volume = Volume.open(copy, name="rebooted")
        self._compare(read(volume, 0, SIZE), self.flushed)
        volume.close()


class Commit(WithVolume):
    """A commit of a volume that nobody serves."""

    def run(self) -> None:
        self.disk.commit("second")

    def check(self, error: BaseException | None) -> None:
        assert self.disk.content() == self.model
        try:
            self.disk.commit("second")
        except NothingToCommit:
            pass
        else:
            assert error is not None
        self.disk.model[:] = self.model
        self.disk.check()
        state = self.disk.state
        assert state.pending is None
        assert len(state.layers) == 1
        self.disk.push()
        assert version_content(self.url) == self.model
        self.sound()


class Push(WithVolume):
    """A push of a commit."""

    def prepare(self) -> None:
        super().prepare()
        self.old = self.head()
        self.new = self.disk.commit("second").id.hex()

    def run(self) -> None:
        self.disk.push()

    def check(self, error: BaseException | None) -> None:
        there = self.head()
        assert there == self.new or (error is not None and there == self.old)
        self.sound()
        assert self.disk.content() == self.model
        self.disk.push()
        assert self.head() == self.new
        assert version_content(self.url) == self.model
        self.sound()
        # What tidying up left behind goes with the next one.
        self.disk.model[:] = self.model
        self.disk.write((9 * BLOCK, noise(BLOCK, "third")))
        last = self.disk.commit("third").id
        self.disk.push()
        assert set(self.disk.own()) == {last}


class Generate(Operation):
    """A second version of an image."""

    def prepare(self) -> None:
        make_image(self.work / "store", noise(SIZE, "old"))
        self.old = self.head()

    def run(self) -> None:
        data = noise(SIZE - CHUNK, "new") + noise(CHUNK, "old")
        with open_store(self.url) as store, BytesSource(SIZE, {0: data}) as source:
            generate(source, store, IMAGE, author="test", message="again")

    def check(self, error: BaseException | None) -> None:
        there = self.head()
        assert (there == self.old) <= (error is not None)
        self.sound()
        if there == self.old:
            assert version_content(self.url) == noise(SIZE, "old")
            self.run()
        assert version_content(self.url)[: SIZE - CHUNK] == noise(SIZE - CHUNK, "new")
        self.sound()


class First(Generate):
    """The first version, and the repository itself."""

    def prepare(self) -> None:
        (self.work / "store").mkdir()
        self.old = ""

    def head(self) -> str:
        try:
            return super().head()
        except HorcruxError:
            return ""

    def sound(self) -> None:
        if self.head():
            super().sound()

    def check(self, error: BaseException | None) -> None:
        if not self.head():
            assert error is not None
            self.run()
        super().check(None)


class Collect(Operation):
    """A removal of versions, and of what only they needed."""

    def prepare(self) -> None:
        for number in range(3):
            data = {0: noise(CHUNK, number), CHUNK: noise(CHUNK, "same")}
            make_image(self.work / "store", data)
        self.last = self.head()

    def run(self) -> None:
        with open_store(self.url) as store:
            collector = Collector(Repository.open(store), author="test", sleep=_no_sleep)
            self.done = collector.run(Rules(last=1), grace=False)

    def check(self, error: BaseException | None) -> None:
        self.sound()
        assert self.head() == self.last
        with patch.object(leases, "_is_stale", return_value=True):  # who did it has ended
            self.run()
        self.sound()
        with open_store(self.url) as store:
            repository = Repository.open(store)
            assert not Collector(repository).plan(Rules()).unreachable
            # A commit, a node and two chunks: nothing else is left, nor a lease or an announcement.
            assert sum(1 for _ in store.list("objects/")) == 4
            assert list(store.list("gc/")) == []
            assert repository.resolve(Version(IMAGE)).id.hex() == self.last
        assert version_content(self.url) == noise(CHUNK, 2) + noise(CHUNK, "same")


def _no_sleep(seconds: float) -> None:
    raise AssertionError(f"it waits {seconds} s")


OPERATIONS: dict[str, type[Operation]] = {
    one.__name__.lower(): one
    for one in (Attach, Read, Write, Commit, Push, Generate, First, Collect)
}

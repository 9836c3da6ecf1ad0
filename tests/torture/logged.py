"""A load whose disk logs each write: the log is replayed up to every flush, and looked at.

    python -m tests.torture.logged run SEED STEPS FOLDER DEVICE OFFSET
    python -m tests.torture.logged replay SEED STEPS FOLDER DISK LOG OFFSET     (own mounts)

FOLDER is where the disk's file system is mounted, the same in both; repository, volume and cache
are in there. The load is the same for the same seed. After each step, whose writes are flushed
then, its number goes to OFFSET of the disk itself, where no file system is: so the log tells at
each moment what had been acknowledged.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import random
import shutil
import struct
import subprocess
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

from horcrux_nbd import host, versions
from horcrux_nbd.volume.volume import Volume
from tests.versions.support import AUTHOR
from tests.volume.support import read

from . import write_log
from .kills import environment
from .oracle import SECTOR, Oracle
from .power import BOOT_ID
from .world import SIZE, World

_MARK = struct.Struct("<8sQ")
_MAGIC = b"HRCXSTEP"
# How likely a moment between two flushes is looked at as well; and how likely, of moments between
# the same two steps but the first, more than the volume's content is: versions, and a push.
BETWEEN = 0.25


@dataclass
class Step:
    """Requests, then a flush, then perhaps a commit and a push."""

    number: int  # from 1
    requests: list[tuple[str, range]] = field(default_factory=list)
    commit: str = ""
    push: bool = False


def steps(seed: str, count: int, sectors: int) -> Iterator[Step]:
    chance = random.Random(seed)
    for number in range(1, count + 1):
        step = Step(number)
        for _ in range(chance.randrange(1, 10)):
            first = chance.randrange(sectors)
            last = min(sectors, first + chance.choice([1, 2, 8, 64, 400]))
            step.requests.append((chance.choice(["write"] * 3 + ["zero"]), range(first, last)))
        if number % 5 == 2:
            step.commit, step.push = f"step {number}", number % 10 == 2
        yield step


# ---- the load


def run(seed: str, count: int, folder: Path, device: Path, offset: int) -> None:
    environment(folder / "root", Path("/run/horcrux-logged"))
    world = World(folder / "store")
    world.serve()
    handle = world.connect()
    mark(device, offset, 0)
    for step in steps(seed, count, world.oracle.sectors):
        for kind, sectors in step.requests:
            version = world.oracle.begins(sectors, zero=kind == "zero")
            at, length = sectors.start * SECTOR, len(sectors) * SECTOR
            if kind == "zero":
                handle.zero(length, at)
            else:
                handle.pwrite(world.oracle.data(sectors, version), at)
        handle.flush()
        if step.commit:
            versions.commit([world.name], step.commit, author=AUTHOR)
            if step.push:
                versions.push(world.name, author=AUTHOR)
        mark(device, offset, step.number)
    handle.shutdown()
    world.kill()  # an orderly end would be one more flush
    print(f"{count} steps")


def mark(device: Path, offset: int, number: int) -> None:
    """Durable when it returns. O_DIRECT wants a buffer that is aligned, as a mapping is."""
    with mmap.mmap(-1, 4096) as buffer:
        buffer[: _MARK.size] = _MARK.pack(_MAGIC, number)
        fd = os.open(device, os.O_WRONLY | os.O_DIRECT | os.O_DSYNC)
        try:
            assert os.pwritev(fd, [buffer], offset) == 4096
        finally:
            os.close(fd)


# ---- the replay


class Expected:
    """What a disk with the mark of a step may hold."""

    def __init__(self, seed: str, count: int, oracle: Oracle) -> None:
        self.oracle = oracle
        self.allowed: list[dict[int, list[int]]] = []  # by mark
        self.commits: dict[str, tuple[int, bool, dict[int, list[int]]]] = {}
        for step in steps(seed, count, oracle.sectors):
            since = oracle.now()
            for kind, sectors in step.requests:
                oracle.begins(sectors, zero=kind == "zero")
                oracle.acknowledged(sectors)
            self.allowed.append(oracle.allowed(since))
            if step.commit:
                exact = oracle.allowed(oracle.now())
                self.commits[step.commit] = step.number, step.push, exact
        self.allowed.append(oracle.allowed(oracle.now()))


@dataclass
class Replayed:
    """What was looked at."""

    entries: int = 0
    barriers: int = 0
    states: int = 0
    marks: int = 0
    versions: int = 0
    violations: list[str] = field(default_factory=list)


def replay(seed: str, count: int, folder: Path, disk: Path, log: Path, offset: int) -> Replayed:
    """Bring `disk`, as it was at the beginning, to every flush and FUA of `log`, and look."""
    found, chance = Replayed(), random.Random(seed)
    boot = disk.with_name("boot_id")
    boot.write_text(f"{UUID(int=1)}\n")
    subprocess.run(["mount", "--bind", boot, BOOT_ID], check=True)
    shutil.rmtree("/run/horcrux-logged", ignore_errors=True)
    environment(folder / "root", disk.with_name("run"))
    expected = Expected(seed, count, World(folder / "store", create=False).oracle)
    state = disk.with_name("state.raw")
    marks: set[int] = set()
    with disk.open("r+b", buffering=0) as image:
        for entry in write_log.entries(log):
            found.entries += 1
            entry.apply(image)
            found.barriers += entry.is_barrier
            if not entry.is_barrier and chance.random() > BETWEEN:
                continue
            image.seek(offset)
            magic, number = _MARK.unpack(image.read(_MARK.size))
            if magic != _MAGIC:
                continue  # before the load began
            subprocess.run(["cp", "--sparse=always", disk, state], check=True)
            everything = number not in marks or chance.random() < BETWEEN
            marks.add(number)
            wrong, compared = _look(state, folder, expected, number, everything)
            found.states += 1
            found.versions += compared
            where = f"seed {seed}, entry {found.entries}, step {number}"
            found.violations += [f"{where}: {line}" for line in wrong]
            if found.violations:
                break
    found.marks = len(marks)
    return found


def _look(
    state: Path, folder: Path, expected: Expected, number: int, everything: bool
) -> tuple[list[str], int]:
    """(what is wrong, versions compared), found by a process of its own."""
    subprocess.run(["mount", "-o", "loop", state, folder], check=True)
    hear, say = os.pipe()
    child = os.fork()
    if not child:
        try:
            answer = _look_inside(folder, expected, number, everything)
        except BaseException as error:
            answer = ["".join(traceback.format_exception(error))], 0
        with os.fdopen(say, "w") as out:
            json.dump(answer, out)
        os._exit(0)
    os.close(say)
    with os.fdopen(hear) as lines:
        said = lines.read()
    os.waitpid(child, 0)
    subprocess.run(["umount", folder], check=True)
    wrong, compared = json.loads(said)
    return wrong, compared


def _look_inside(
    folder: Path, expected: Expected, number: int, everything: bool
) -> tuple[list[str], int]:
    world = World(folder / "store", create=False)
    world.oracle = expected.oracle
    for label, (step, push, exact) in expected.commits.items():
        if step <= number + 1:  # the next may be there
            world.made[label] = exact
        if step <= number:
            world.committed.add(label)
            if push:
                world.pushed.add(label)
    world.check_pushed("")
    volume = Volume.open(host.folder_of(world.name))
    image = read(volume, 0, SIZE)
    volume.close()
    world.wrong("", expected.oracle.check(image, expected.allowed[number])[0])
    if everything:
        world.compare_versions("")
    return world.tally.violations, world.tally.versions


def main() -> None:
    what, seed, count, folder, *rest = sys.argv[1:]
    logging.basicConfig(level=logging.ERROR)
    if what == "run":
        run(seed, int(count), Path(folder), Path(rest[0]), int(rest[1]))
    else:
        found = replay(seed, int(count), Path(folder), Path(rest[0]), Path(rest[1]), int(rest[2]))
        print(json.dumps(found.__dict__))


if __name__ == "__main__":
    main()

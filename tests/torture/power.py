"""Power cuts below the overlay, the cache and a `cp://` store: `scripts/torture --cuts N`.

    python -m tests.torture.power --cuts N --seed S FOLDER      (in a mount namespace of its own)

All of it lies on a file system that forgets what was not synced (forgetful.py). A cut kills the
server and whoever commits, forgets, and gives the machine a new boot id, so that nothing of the
time before counts that only memory had.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from uuid import UUID

from horcrux_nbd import host, paths
from horcrux_nbd.volume.volume import Volume
from tests.volume.support import read

from .kills import COMPARE_EVERY, environment
from .world import SIZE, Tally, World

ATTEMPTS = 4  # cuts that are tried at the moment of each that goes on
BOOT_ID = "/proc/sys/kernel/random/boot_id"
LIMIT = 60  # seconds for the file system to end
_NEWNS, _BIND = 0x20000, 4096  # CLONE_NEWNS, MS_BIND


class Machine:
    """A disk that forgets, mounted on `target`, and a boot id; both for this process's children."""

    def __init__(self, folder: Path) -> None:
        self.target = folder / "disk"
        self.target.mkdir()
        self._boot = folder / "boot_id"
        self._boots = 0
        self._started()
        subprocess.run(["mount", "--bind", self._boot, BOOT_ID], check=True)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.torture.forgetful", self.target],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._said("mounted")

    def _started(self) -> None:
        self._boots += 1
        self._boot.write_text(f"{UUID(int=self._boots)}\n")

    def _said(self, what: str) -> None:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        assert line == what, f"the file system said {line!r}"

    def _ask(self, command: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        self._said("done")

    def cut(self, seed: str) -> None:
        """Nobody may have anything open there any more."""
        self._ask(f"cut {seed}")
        self._started()

    def attempt(self, seed: str, look: Callable[[], Tally]) -> Tally:
        """What `look` returns, in a process that sees the disk as a cut now would leave it; the
        disk itself stays as it is.
        """
        other = self.target.with_name("attempt")
        other.mkdir(exist_ok=True)
        self._started()
        self._ask(f"try {seed} {other}")
        hear, say = os.pipe()
        child = os.fork()  # no thread runs here
        if not child:
            try:
                _own_mounts(other, self.target)
                tally = look()
            except BaseException as error:
                where = traceback.format_exception(error)
                tally = Tally(violations=[f"seed {seed}: {''.join(where)}"])
            with os.fdopen(say, "w") as out:
                json.dump(asdict(tally), out)
            os._exit(0)
        os.close(say)
        with os.fdopen(hear) as lines:
            said = lines.read()
        os.waitpid(child, 0)
        subprocess.run(["umount", "--lazy", other], check=True)
        return Tally(**json.loads(said))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(LIMIT)


def _own_mounts(source: Path, target: Path) -> None:
    """Let this process alone see `source` at `target`."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEWNS) or libc.mount(
        os.fsencode(source), os.fsencode(target), b"", _BIND, None
    ):
        raise OSError(ctypes.get_errno(), "mount --bind")


class PowerCuts(World):
    """A world whose rounds end in power cuts: several for each moment, and one that counts."""

    COMMITS = 0.6

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        super().__init__(machine.target / "store")

    def round(self, seed: str) -> None:
        chance = random.Random(seed)
        self.load_and_commit(seed, chance, self.kill)
        if chance.random() < 0.15:  # dead first, and the power goes while the next one works
            self.tally.kills += 1
            self.serve()
            self.check(seed)
            if chance.random() < 0.5:
                self.load(f"{seed} again", self.kill)
            else:
                self.kill()
        shutil.rmtree(paths.run(), ignore_errors=True)  # a tmpfs, as /run is
        for number in range(ATTEMPTS):
            one = f"{seed}/{number}"
            self.tally.cuts += 1
            found = self._machine.attempt(one, partial(self._opened, one))
            self.tally.versions += found.versions
            self.tally.violations += found.violations
        self._machine.cut(seed)
        self.tally.cuts += 1
        self.check_pushed(seed)
        self.serve()
        self.check(seed, power_cut=True)

    def _opened(self, seed: str) -> Tally:
        """Look at volume and repository, which nobody serves. They are used up then."""
        self.tally = Tally()
        self.check_pushed(seed)
        volume = Volume.open(host.folder_of(self.name))
        image = read(volume, 0, SIZE)
        volume.close()
        self.wrong(seed, self.oracle.survived(image, power_cut=True))
        self.compare_versions(seed)
        return self.tally


def power_cuts(folder: Path, *, cuts: int, seed: str) -> Tally:
    """`cuts` power cuts of a volume; ends at the first violation. `folder` is empty."""
    with _machine(folder) as machine:
        environment(root=machine.target / "root", run=folder / "run")  # /run is memory
        world = PowerCuts(machine)
        tally, number = world.tally, 0
        try:
            world.serve()
            while tally.cuts < cuts and not tally.violations:
                world.round(f"{seed}/{number}")
                number += 1
                if (number % COMPARE_EVERY == 0 or number == cuts) and not tally.violations:
                    world.compare_versions(f"{seed}/{number}")
        finally:
            world.close()
    return tally


@contextlib.contextmanager
def _machine(folder: Path) -> Iterator[Machine]:
    machine = Machine(folder)
    try:
        yield machine
    finally:
        machine.close()


def in_namespace(folder: Path, cuts: int, seed: str) -> Tally:
    """`power_cuts`, in a process with mounts of its own. Raises RuntimeError if it fails."""
    done = subprocess.run(
        [
            "unshare", "--mount", "--propagation", "private", sys.executable,
            "-m", "tests.torture.power", "--cuts", str(cuts), "--seed", seed, folder,
        ],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"power cuts with seed {seed}: {done.stderr[-4000:]}")
    return Tally(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.torture.power")
    parser.add_argument("--cuts", type=int, required=True)
    parser.add_argument("--seed", required=True)
    parser.add_argument("folder", type=Path)
    asked = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)  # torn cache files are found, and told, after each cut
    tally = power_cuts(asked.folder, cuts=asked.cuts, seed=asked.seed)
    print(json.dumps(asdict(tally)))


if __name__ == "__main__":
    main()

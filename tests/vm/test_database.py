"""A VM with PostgreSQL on a volume is killed under pgbench.

All of it lies on one disk of the VM, and what was in the memory of its kernel is gone: a power cut.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.versions.test_served import POSTGRES, run_as_postgres

from .test_vm import PROJECT, pytestmark  # noqa: F401 - these need the same

KILLS = int(os.environ.get("HORCRUX_VM_KILLS", "3"))
PACKAGES = "postgresql,python3-libnbd"
CLIENTS = 4
START = 400.0  # seconds until a VM under emulation has acknowledged something
TABLE = "create table acked (client int, n int, primary key (client, n))"


@pytest.fixture
def disk() -> Iterator[Path]:
    """An ext4 disk with a repository of a PostgreSQL directory in it."""
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="horcrux-vm-") as name:
        os.chmod(name, 0o755)
        folder = Path(name)
        data, sockets, tree = folder / "data", folder / "s", folder / "tree"
        for each in (data, sockets, tree):
            each.mkdir()
        for each in (data, sockets):
            os.chown(each, *_postgres())
        run_as_postgres(POSTGRES / "initdb", "-D", data, "-A", "trust", "--no-sync")
        options = f"-k {sockets} -c listen_addresses="
        control = [POSTGRES / "pg_ctl", "-D", data, "-w"]
        run_as_postgres(*control, "-l", sockets / "log", "-o", options, "start")
        try:
            run_as_postgres(POSTGRES / "pgbench", "-h", sockets, "-i", "-s", "2", "-q", "postgres")
            run_as_postgres(POSTGRES / "psql", "-h", sockets, "-c", TABLE, "postgres")
        finally:
            run_as_postgres(*control, "-m", "fast", "stop")
        cli = PROJECT / ".venv/bin/horcrux-cli"
        subprocess.run([cli, "generate", "-q", "DB", data, tree / "repo"], check=True)
        image = folder / "disk.raw"
        subprocess.run(["truncate", "-s", "3G", image], check=True)
        subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", tree, image], check=True)
        yield image


def _postgres() -> tuple[int, int]:
    import pwd

    entry = pwd.getpwnam("postgres")
    return entry.pw_uid, entry.pw_gid


def start(disk: Path, *words: str) -> subprocess.Popen[str]:
    drive = f"-drive file={disk},format=raw,if=virtio,cache=writeback"
    return subprocess.Popen(
        [
            PROJECT / "scripts/vm", "run", "--packages", PACKAGES, "--timeout", "1200",
            "--qemu", drive, "--", PROJECT / "tests/vm/database", *words,
        ],
        cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def kill_machine(script: subprocess.Popen[str]) -> None:
    """SIGKILL for qemu, found among the processes that the script has started."""
    waiting, found = [script.pid], []
    while waiting:
        pid = waiting.pop()
        with contextlib.suppress(OSError):
            waiting += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
            if Path(f"/proc/{pid}/comm").read_text().startswith("qemu-system"):
                found.append(pid)
    (qemu,) = found
    os.kill(qemu, signal.SIGKILL)


@pytest.mark.skipif(not (POSTGRES / "pg_amcheck").exists(), reason="needs postgresql")
def test_a_vm_killed_under_pgbench_loses_no_acknowledged_transaction(disk: Path) -> None:
    """HORCRUX_VM_KILLS and HORCRUX_SEED say how often, and when."""
    seed = os.environ.get("HORCRUX_SEED") or secrets.token_hex(4)
    print(f"repeat with: HORCRUX_VM_KILLS={KILLS} HORCRUX_SEED={seed}")
    chance, acked, commits = random.Random(seed), dict.fromkeys(range(1, CLIENTS + 1), 0), 0
    for _ in range(KILLS):
        machine = start(disk, "load", str(CLIENTS))
        assert machine.stdout is not None
        killer = None
        deadline, said = time.monotonic() + START, []
        for line in machine.stdout:
            said.append(line)
            match line.split():
                case ["acked", client, number]:
                    acked[int(client)] = int(number)
                    if killer is None:
                        killer = time.monotonic() + chance.uniform(1, 40)
                case ["committed"]:
                    commits += 1
            if time.monotonic() > (deadline if killer is None else killer):
                kill_machine(machine)
                break
        for line in machine.stdout:  # what was on its way
            if line.endswith("\n") and line.startswith("acked "):
                _, client, number = line.split()
                acked[int(client)] = int(number)
        assert machine.wait(60) == 125, "".join(said[-20:])
        assert killer is not None, "".join(said[-20:])
        _check(disk, acked)
    print(f"{KILLS} kills, {sum(acked.values())} inserts acknowledged, {commits} commits")
    assert all(acked.values())


def _check(disk: Path, acked: dict[int, int]) -> None:
    machine = start(disk, "check")
    out, err = machine.communicate(timeout=1200)
    assert machine.returncode == 0, out + err
    for word in ("sound", "pushed", "verified", "sums t"):
        assert word in out.splitlines(), out
    there = {
        int(x[1]): (int(x[2]), int(x[3]))
        for x in map(str.split, out.splitlines())
        if x and x[0] == "there"
    }
    for client, number in acked.items():
        newest, count = there[client]
        assert newest >= number, f"client {client}: {number} was acknowledged, {newest} is there"
        assert count == newest, f"client {client}: {newest - count} inserts are missing"

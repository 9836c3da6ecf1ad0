from __future__ import annotations

import fcntl
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from horcrux_nbd.attach import processes
from horcrux_nbd.attach.processes import Process, ProgramFailed, TimedOut, readable, run
from horcrux_nbd.errors import EnvironmentProblem

from .conftest import wait_for

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


def test_a_process_is_told_from_a_later_one_with_its_pid() -> None:
    us = Process.of(os.getpid())
    assert us is not None
    assert us.alive()
    assert not Process(us.pid, us.start + 1).alive()


def test_a_name_with_brackets_and_spaces_does_not_shift_the_fields(tmp_path: Path) -> None:
    program = tmp_path / "a) S 1 (b"
    program.symlink_to("/bin/sleep")
    child = subprocess.Popen([str(program), "60"])
    try:
        wait_for(lambda: processes.Process(child.pid, 0).name() == program.name, "exec")
        process = Process.of(child.pid)
        assert process is not None
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        assert abs(uptime - process.start / os.sysconf("SC_CLK_TCK")) < 30
    finally:
        child.kill()
        child.wait()


def test_a_zombie_is_not_alive() -> None:
    child = subprocess.Popen(SLEEP)
    process = Process.of(child.pid)
    assert process is not None
    child.kill()
    wait_for(lambda: not process.alive(), "death")
    child.wait()


def test_a_recycled_pid_is_not_signalled() -> None:
    child = subprocess.Popen(SLEEP)
    try:
        process = Process.of(child.pid)
        assert process is not None
        other = Process(process.pid, process.start - 1)
        other.signal(signal.SIGKILL)
        assert other.wait_gone(0)
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.3)
    finally:
        child.kill()
        child.wait()


def test_stop_goes_from_term_to_kill() -> None:
    code = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "print(1, flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert child.stdout
    child.stdout.readline()
    process = Process.of(child.pid)
    assert process is not None
    assert process.stop(grace=0.2)
    assert not process.alive()
    child.wait()
    child.stdout.close()
    assert process.stop(grace=0)  # again is no error


def test_with_argument_wants_the_program_and_the_whole_word(tmp_path: Path) -> None:
    program = tmp_path / "nbdfuse"
    program.symlink_to("/bin/sleep")
    child = subprocess.Popen([str(program), "60.125"])
    try:
        wait_for(lambda: processes.with_argument("nbdfuse", "60.125"), "the process")
        assert [found.pid for found in processes.with_argument("nbdfuse", "60.125")] == [child.pid]
        assert not processes.with_argument("nbdfuse", "60.1")
        assert not processes.with_argument("other", "60.125")
    finally:
        child.kill()
        child.wait()


def test_run_gives_output_and_says_what_a_failure_said() -> None:
    assert run(["echo", "a b"], 5) == "a b\n"
    with pytest.raises(ProgramFailed, match=r"sh failed \(exit status 3\): oh no") as caught:
        run(["sh", "-c", "echo oh no >&2; exit 3"], 5)
    assert caught.value.status == 3
    with pytest.raises(EnvironmentProblem, match="no-such-program is not installed"):
        run(["no-such-program"], 5)


def test_run_comes_back_in_time_and_leaves_no_grandchild() -> None:
    began = time.monotonic()
    with pytest.raises(TimedOut, match="took longer than"):
        run(["sh", "-c", "sleep 60.375; true"], 0.2)
    assert time.monotonic() - began < 5
    wait_for(lambda: not processes.with_argument("sleep", "60.375"), "the end of sleep")


def test_io_flusher_is_inherited_by_programs_and_ends_for_us() -> None:
    def flags(text: str) -> int:
        return int(text[text.rindex(")") :].split()[7])

    with processes.io_flusher() as allowed:
        if not allowed:
            pytest.skip("needs CAP_SYS_RESOURCE: `scripts/vm-test` has it")
        inside = flags(run(["cat", "/proc/self/stat"], 5))
    # PF_MEMALLOC_NOIO and PF_LOCAL_THROTTLE of linux/sched.h
    assert inside & 0x180000 == 0x180000
    assert not flags(Path("/proc/self/stat").read_text()) & 0x180000


def test_a_descriptor_beyond_those_of_select_can_be_waited_for() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 1200:
        pytest.skip("needs `ulimit -Hn` of 1200 or more")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1200), hard))
    read, write = os.pipe()
    try:
        high = fcntl.fcntl(read, fcntl.F_DUPFD, 1100)
        try:
            assert not readable(high, 0)
            os.write(write, b"x")
            assert readable(high, 10)
        finally:
            os.close(high)
    finally:
        os.close(read)
        os.close(write)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

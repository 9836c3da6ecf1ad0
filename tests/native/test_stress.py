"""The native part under the compiler's sanitizers, by many threads at once."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from horcrux_nbd.native import build

STRESS = Path(__file__).with_name("stress.c")


def stressed(program: Path, turns: int) -> subprocess.CompletedProcess[str]:
    # The thread sanitizer does not start where the kernel puts things at addresses too random.
    plain = ["setarch", "-R"] if "thread" in program.name else []
    return subprocess.run(
        [*plain, program, str(turns)], capture_output=True, text=True, timeout=100, check=False,
        env={**os.environ, "TSAN_OPTIONS": "halt_on_error=1"},
    )  # fmt: skip


def made(path: Path, sanitizer: str, *more: str) -> Path:
    """The stress program, or what the compiler misses."""
    if reason := build.why_not():
        pytest.skip(reason)
    sources = [source for source in build.SOURCES.glob("*.c") if source.name != "filter.c"]
    flags = ["-std=gnu11", "-O1", "-g", "-pthread", "-Wall", "-Wextra", "-Werror", *more]
    done = subprocess.run(
        ["gcc", *flags, f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all",
         f"-I{build.SOURCES}", "-o", path, *sources, STRESS],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    if "cannot find" in done.stderr and "san" in done.stderr:
        pytest.skip("needs the compiler's sanitizers: apt-get install gcc")
    assert done.returncode == 0, done.stderr
    return path


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_under_a_sanitizer(tmp_path: Path, sanitizer: str) -> None:
    program = made(tmp_path / f"stress-{sanitizer}", sanitizer)
    done = stressed(program, 40)
    assert done.returncode == 0, done.stderr[-3000:]
    assert " 0 wrong" in done.stdout
    assert not done.stdout.startswith("0 reads")


def test_a_race_is_found(tmp_path: Path) -> None:
    """Without the layer's lock in the native write."""
    broken = tmp_path / "native"
    broken.mkdir()
    for source in [*build.SOURCES.glob("*.c"), *build.SOURCES.glob("*.h")]:
        text = source.read_text()
        if source.name == "volume.c":
            whole = text
            text = text.replace("pthread_mutex_lock (&top->lock)", "(void) 0")
            text = text.replace("pthread_mutex_unlock (&top->lock)", "(void) 0")
            assert text != whole
        (broken / source.name).write_text(text)
    if reason := build.why_not():
        pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(build, "SOURCES", broken)
        program = made(tmp_path / "stress-thread", "thread")
    done = stressed(program, 40)
    assert done.returncode != 0
    assert "data race" in done.stderr

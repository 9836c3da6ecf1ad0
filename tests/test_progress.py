"""How long work reports how far it is: a bar on a terminal, lines elsewhere, or nothing."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import sys
import threading

import pytest

from horcrux_nbd import progress as progresses
from horcrux_nbd.progress import BarProgress, PlainProgress, Progress, make_progress


def test_what_suits_the_stream() -> None:
    assert type(make_progress(quiet=True)) is Progress
    assert isinstance(make_progress(stream=io.StringIO()), PlainProgress)
    master, slave = pty.openpty()
    with os.fdopen(master), os.fdopen(slave, "w") as terminal:
        with make_progress(stream=terminal) as progress:
            assert isinstance(progress, BarProgress)


def test_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progresses.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    with PlainProgress(out) as progress:
        progress.start("looking")
        progress.start("reading", 4096)
        progress.advance(1024)
        assert out.getvalue() == "looking\n"  # a stage that counted nothing says no figures
        now[0] += 8
        progress.advance(1024)
        progress.note("by the way")
        now[0] += 1
        progress.advance(2048)
    assert out.getvalue().splitlines() == [
        "looking",
        "reading: 2.0 KiB of 4.0 KiB, 256 B/s, 8 s left",
        "by the way",
        "reading: 4.0 KiB of 4.0 KiB, 455 B/s",
    ]


def test_threads_lose_no_count() -> None:
    out, interval = io.StringIO(), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # or they hardly ever meet
    with PlainProgress(out) as progress:
        progress.start("reading")
        threads = [
            threading.Thread(target=lambda: [progress.advance(1) for _ in range(5000)])
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    sys.setswitchinterval(interval)
    assert out.getvalue().startswith("reading: 19.5 KiB,")


def test_nothing() -> None:
    with Progress() as progress:
        progress.start("reading", 10)
        progress.advance(5)
        progress.note("nobody hears it")


def test_bar() -> None:
    """Bytes and rate are on the screen; a file name in brackets is no markup."""
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as terminal:
        with BarProgress(terminal) as progress:
            progress.start("looking")
            progress.start("reading", 1 << 20)
            progress.advance(1 << 19)
            progress.note("[bold] is a file")
            progress.advance(1 << 19)
            assert all(task.total is not None for task in progress._bar.tasks)
    shown = ""
    with contextlib.suppress(OSError):  # EIO: nobody has the other end open, and all is read
        while part := os.read(master, 1 << 16):
            shown += part.decode(errors="replace")
    os.close(master)
    assert "[bold] is a file" in shown
    assert "1.0/1.0 MiB" in shown
    assert "reading" in shown

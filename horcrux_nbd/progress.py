"""How long work reports how far it is. The one place that does.

Code that works takes a `Progress` and calls `advance`; who called it chose what is shown: a bar
with bytes, rate and time left on a terminal, a line every few seconds elsewhere, or nothing.
"""

from __future__ import annotations

import sys
import threading
import time
from typing import TYPE_CHECKING, TextIO

from .closing import Closing
from .units import format_size

if TYPE_CHECKING:
    from rich.progress import TaskID

PLAIN_INTERVAL = 5.0  # seconds between lines where there is no terminal (a CI log)


class Progress(Closing):
    """Says nothing. Base of the others; safe to call from several threads."""

    def start(self, what: str, total: int | None = None) -> None:
        """A new stage: `what` it does and how many bytes in `total`, if that is known."""

    def advance(self, count: int) -> None:
        """`count` more bytes are done."""

    def note(self, line: str) -> None:
        """One line that stays."""

    def close(self) -> None:
        """No more comes."""


class PlainProgress(Progress):
    """A line at the end of a stage, and every few seconds before."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._lock = stream, threading.Lock()
        self._what, self._total, self._done = "", None, 0
        self._began = self._last = time.monotonic()

    _total: int | None

    def start(self, what: str, total: int | None = None) -> None:
        self._finish()
        with self._lock:
            self._what, self._total, self._done = what, total, 0
            self._began = self._last = time.monotonic()

    def advance(self, count: int) -> None:
        with self._lock:
            self._done += count
            now = time.monotonic()
            if now - self._last < PLAIN_INTERVAL:
                return
            self._last = now
            self._print(now)

    def _print(self, now: float) -> None:
        if not self._done and not self._total:  # a stage that counts nothing
            print(self._what, file=self._stream, flush=True)
            return
        rate = self._done / max(now - self._began, 1e-6)
        of = f" of {format_size(self._total)}" if self._total else ""
        left = ""
        if self._total and rate and self._total > self._done:
            left = f", {(self._total - self._done) / rate:.0f} s left"
        print(
            f"{self._what}: {format_size(self._done)}{of}, {format_size(rate)}/s{left}",
            file=self._stream,
            flush=True,
        )

    def note(self, line: str) -> None:
        print(line, file=self._stream, flush=True)

    def _finish(self) -> None:
        with self._lock:
            if self._what:
                self._print(time.monotonic())
                self._what = ""

    def close(self) -> None:
        self._finish()


class BarProgress(Progress):
    """A bar on a terminal (rich): bytes, rate and time left."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.progress import (
            Progress as Bar,
        )

        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(file=stream),
        )
        self._task: TaskID | None = None
        self._bar.start()

    def start(self, what: str, total: int | None = None) -> None:
        self._finish()
        self._task = self._bar.add_task(what, total=total)

    def advance(self, count: int) -> None:
        if self._task is not None:
            self._bar.advance(self._task, count)

    def _finish(self) -> None:
        """Let the bar of a stage stand still: one without a total would go on pulsing."""
        if self._task is not None:
            done = next(task.completed for task in self._bar.tasks if task.id == self._task)
            self._bar.update(self._task, total=done, completed=done)

    def note(self, line: str) -> None:
        self._bar.console.print(line, markup=False, highlight=False)

    def close(self) -> None:
        self._bar.stop()


def make_progress(quiet: bool = False, stream: TextIO | None = None) -> Progress:
    """What suits `stream` (standard error by default): a bar, plain lines, or nothing."""
    stream = stream or sys.stderr
    if quiet:
        return Progress()
    return BarProgress(stream) if stream.isatty() else PlainProgress(stream)

"""Every call fails once, and from then on: the old state or the new one, and never a hang.

For each operation, each kind of fault, and N = 1, 2, … the N-th call of it fails; then what is
there is looked at, and the operation is done again. It ends when a run completes untouched. The
usual run takes a sample of N; --long takes all.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from horcrux_nbd import chunkstore, host
from horcrux_nbd.chunkstore.base import ChunkStore
from horcrux_nbd.chunkstore.retry import RetryStore
from horcrux_nbd.chunkstore.url import StoreURL
from horcrux_nbd.volume import maplog, recent

from ..attach.conftest import needs_fuse
from .nth import KINDS, STORE_KINDS, FaultyStore, FileFaults, Nth
from .operations import OPERATIONS, TYPED, Operation, WithVolume

SAMPLE = 5  # faults of a kind in the usual run
LIMIT = 20.0  # seconds for one run: far more than all the limits in it, far less than a hang
STORE_LIMIT = 0.2  # seconds that a store which is away is waited for


_firsts = itertools.count()


class _Quick(RetryStore):
    """The real one, with limits that suit a test."""

    def __init__(self, store: ChunkStore, limit: float) -> None:
        super().__init__(store, min(limit, STORE_LIMIT), first_pause=0.002, longest_pause=0.02)


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """In memory, where there is such a place: thousands of runs, and what a sync does is told."""
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    made = Path(tempfile.mkdtemp(prefix="sweep-", dir=memory))
    monkeypatch.setenv("HORCRUX_ROOT", str(made / "work" / "root"))
    monkeypatch.setenv("HORCRUX_RUN", str(made / "work" / "run"))
    monkeypatch.setattr(chunkstore, "RetryStore", _Quick)
    # Notes of marks count in the folder that they were written in, which a copy is not.
    place = recent.Recent._place
    monkeypatch.setattr(recent.Recent, "_place", lambda self: (place(self)[0], 1, 1))
    monkeypatch.setattr(maplog, "COMPACT_FROM", 300)  # bytes: so that it happens in a few flushes
    monkeypatch.setattr(maplog, "COMPACT_FACTOR", 1)
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    yield made
    logging.disable(level)
    shutil.rmtree(made, ignore_errors=True)


def sweep(
    operation: Operation,
    meet: Callable[[Nth], FileFaults | None],
    every: bool,
    for_good: bool,
) -> tuple[int, int, int]:
    """(runs, errors that a user gets, calls) of a sweep. Fails with the N and the call."""

    def once(number: int) -> tuple[Nth, BaseException | None]:
        nth = Nth(number, None if for_good else 1)
        faults = meet(nth)
        operation.reset()
        error: BaseException | None = None
        began = time.monotonic()
        if faults is not None:
            faults.__enter__()
        try:
            operation.run()
        except TYPED as caught:
            error = caught.with_traceback(None)
        except BaseException as caught:
            caught.add_note(f"at call {number}: {nth.calls[number - 1 : number]}")
            raise
        finally:
            if faults is not None:
                faults.__exit__()
            nth._nth = 1 << 60  # a store has it still, and nothing fails any more
        assert time.monotonic() - began < LIMIT, f"call {number}: {nth.calls[number - 1]} hangs"
        try:
            operation.check(error)
        except BaseException as caught:
            caught.add_note(
                f"after call {number} failed: {nth.calls[number - 1 : number]}: {error!r}"
            )
            raise
        return nth, error

    untouched, error = once(1 << 60)
    assert error is None
    total = len(untouched.calls)
    assert total
    descriptors = _descriptors()
    # The sample of one kind of fault is not that of another.
    step = 1 if every else max(1, total // SAMPLE)
    first = next(_firsts) * 7 % step + 1
    errors = runs = 0
    for number in itertools.count(first, step):
        nth, error = once(number)
        errors += error is not None
        runs += 1
        if not nth.failures:
            assert error is None
            break
    assert _descriptors() <= descriptors, "descriptors are left open"
    return runs, errors, total


def _descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def _parameters() -> list[object]:
    """Every operation with every kind of fault, once and for good; all of N with --long."""
    found = []
    for every in (False, True):
        marks = [pytest.mark.long, pytest.mark.timeout(1800)] if every else []
        for name in OPERATIONS:
            found.append(
                pytest.param(name, every, marks=marks, id=f"{name}-{'all' if every else 'some'}")
            )
    return found


@pytest.mark.parametrize(("name", "every"), _parameters())
def test_local_files(folder: Path, name: str, every: bool) -> None:
    operation = OPERATIONS[name](folder)
    for kind, for_good in itertools.product(KINDS, (False, True)):

        def meet(nth: Nth, kind: str = kind) -> FileFaults:
            return FileFaults(folder / "work", kind, nth)

        runs, errors, calls = sweep(operation, meet, every, for_good)
        told = "for good" if for_good else "once"
        print(f"{name}: {kind} {told}: {runs} runs of {calls} calls, {errors} errors")
        if kind == "short":
            assert errors == 0, "a call that does only a part is no failure"


WITH_STORE = ("read", "push", "generate", "first", "collect")
HEALS = ("unavailable", "lost", "hangs")


@pytest.mark.parametrize(("name", "every"), [p for p in _parameters() if p.values[0] in WITH_STORE])  # type: ignore[attr-defined]
def test_stores(folder: Path, name: str, every: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    operation = OPERATIONS[name](folder)
    real = chunkstore._make
    now: list[tuple[str, Nth]] = []

    def make(url: StoreURL, timeout: float, concurrency: int | None) -> ChunkStore:
        store = real(url, timeout, concurrency)
        return FaultyStore(store, *now[-1]) if now and str(url) == operation.url else store

    monkeypatch.setattr(chunkstore, "_make", make)
    for kind, for_good in itertools.product(STORE_KINDS, (False, True)):
        if kind == "full" and name == "read":
            continue

        def meet(nth: Nth, kind: str = kind) -> None:
            now.append((kind, nth))

        runs, errors, calls = sweep(operation, meet, every, for_good)
        now.clear()
        told = "for good" if for_good else "once"
        print(f"{name}: {kind} {told}: {runs} runs of {calls} calls, {errors} errors")
        if kind in HEALS and not for_good:
            assert errors == 0, "what passes is waited for"


# ---- a real server, a real device


class Device(WithVolume):
    """The volume as a block device of this host, and the server behind it."""

    def run(self) -> None:
        host.attach("v", via="fuse", options={"timeout": "5"})

    def check(self, error: BaseException | None) -> None:
        found = host.status("v")
        if error is None:
            assert found.attachment is not None
        elif found.attachment is None:
            # Whatever was begun is undone: else the next attach would find the volume locked.
            host.attach("v", via="fuse", options={"timeout": "5"})
        attachment = host.status("v").attachment
        assert attachment is not None
        assert Path(attachment.device).read_bytes()[: 16 * 4096] == self.model[: 16 * 4096]
        host.detach("v")
        found = host.status("v")
        assert found.attachment is None
        assert found.server is None

    def end(self) -> None:
        """For a run that failed: nothing may be left on the machine."""
        with contextlib.suppress(Exception):
            host.detach("v", force=True)


@needs_fuse
@pytest.mark.parametrize(
    "every", [False, pytest.param(True, marks=[pytest.mark.long, pytest.mark.timeout(1800)])]
)
def test_attach_to_the_host(folder: Path, every: bool) -> None:
    operation = Device(folder)
    try:
        for kind in ("EIO", "ENOSPC", "EMFILE") if every else ("EIO",):

            def meet(nth: Nth, kind: str = kind) -> FileFaults:
                return FileFaults(folder / "work", kind, nth)

            runs, errors, calls = sweep(operation, meet, every, False)
            print(f"attach to the host: {kind} once: {runs} runs of {calls} calls, {errors} errors")
    finally:
        operation.end()

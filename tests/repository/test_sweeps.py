"""Removal and pushes in any interleaving: what a ref reaches is never gone (docs/format.md, 11)."""

from __future__ import annotations

import heapq
import random
from collections.abc import Generator

import pytest

from horcrux_nbd.errors import Busy
from horcrux_nbd.repository import sweeps
from horcrux_nbd.repository.sweeps import MARGIN, NOTICE, Sweeps, announcement, begins

from .memory_store import MemoryStore

HOUR = 3600.0
X, REF = "objects/x", "refs/x"
Actor = Generator[float, None, None]  # yields how many seconds pass until it goes on


def test_announcements() -> None:
    key = announcement(1_800_000_000, "0123")
    assert key == "gc/20270115T080000Z-0123"
    assert begins(key[3:]) == 1_800_000_000
    for name in ("", "x", "20270115T080000Z", "20271315T080000Z-00", "20270115T080000Z-XY"):
        assert begins(name) is None


def test_other_keys_are_passed_over() -> None:
    store = MemoryStore()
    store.objects["gc/README"] = b""
    assert not Sweeps(store).must_look_again()


class Simulation:
    """Hours of a remover and of writers who all rely on one object, in a few steps of time."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.store, self.now = rng, MemoryStore(), 0.0
        self.store.objects[X] = b"left by a push that was broken off"
        self.pushed = self.removed = self.refused = self.stored_again = 0

    def skew(self) -> float:
        """How far one host's clock is off: two differ by less than the margin, with the ref's
        way to the store counted in."""
        return self.rng.uniform(-0.24, 0.24) * MARGIN

    def writer(self) -> Actor:
        off = self.skew()
        rng, store = self.rng, self.store
        yield rng.uniform(0, 60) * HOUR
        guard = Sweeps(store, lambda: self.now + off)
        yield rng.choice([0, 1, 10, 30]) * HOUR * rng.random()
        if X not in store.objects:
            store.objects[X] = b"stored"
        yield rng.choice([0, 1, 10, 30, 60]) * HOUR * rng.random()
        while True:
            try:
                again = guard.must_look_again()
            except Busy:
                self.refused += 1
                yield rng.uniform(0.1, 2) * HOUR
                continue
            if not again:
                break
            guard = Sweeps(store, lambda: self.now + off)
            yield rng.random() * HOUR
            if X not in store.objects:
                self.stored_again += 1
                store.objects[X] = b"stored again"
        yield rng.uniform(0, 0.4) * MARGIN
        store.objects[REF] = b""
        self.pushed += 1
        assert X in store.objects, "a ref was made to what is gone"
        if rng.random() < 0.5:  # and deleted, so that the remover has work again
            yield rng.uniform(0, 20) * HOUR
            store.objects.pop(REF, None)

    def remover(self) -> Actor:
        rng, store = self.rng, self.store
        off = self.skew()
        while True:
            yield rng.uniform(0, 20) * HOUR
            condemned = REF not in store.objects and X in store.objects
            yield rng.random() * HOUR
            begin = self.now + off + NOTICE + rng.choice([0, 0, 5 * HOUR])
            key = announcement(begin + 1, f"{rng.randrange(1 << 30):x}")  # whole seconds
            store.objects[key] = b""
            yield begin + 1 - (self.now + off) + rng.choice([0, 0, 1, 10]) * HOUR * rng.random()
            if condemned and REF not in store.objects:
                yield rng.random() * 2 * HOUR  # a slow one: it looked long ago
                self.removed += store.objects.pop(X, None) is not None
                assert REF not in store.objects, "what a ref reaches was removed"
            yield rng.random() * HOUR
            del store.objects[key]

    def run(self) -> None:
        actors = [self.writer() for _ in range(3)] + [self.remover()]
        queue = [(0.0, number) for number in range(len(actors))]
        while queue and queue[0][0] < 300 * HOUR:
            self.now, number = heapq.heappop(queue)
            pause = next(actors[number], None)
            if pause is not None:
                heapq.heappush(queue, (self.now + pause, number))


def simulate(count: int) -> list[int]:
    total = [0, 0, 0, 0]
    for seed in range(count):
        simulation = Simulation(random.Random(seed))
        try:
            simulation.run()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from None
        found = simulation
        for at, n in enumerate((found.pushed, found.removed, found.refused, found.stored_again)):
            total[at] += n
    return total


def test_any_interleaving() -> None:
    pushed, removed, refused, stored_again = simulate(3000)
    assert pushed > 5000
    assert removed > 500
    assert refused > 500
    assert stored_again > 20


@pytest.mark.parametrize("rule", ["notice", "look again", "wait", "first list"])
def test_each_rule_is_needed(monkeypatch: pytest.MonkeyPatch, rule: str) -> None:
    """Left out, each lets something be lost: the simulation can see what it looks for."""
    real = Sweeps.must_look_again
    if rule == "notice":
        monkeypatch.setitem(Simulation.remover.__globals__, "NOTICE", 0.5 * HOUR)
    elif rule == "look again":
        monkeypatch.setattr(Sweeps, "must_look_again", lambda self: real(self) and False)
    elif rule == "wait":

        def no_wait(self: Sweeps) -> bool:
            try:
                return real(self)
            except Busy:
                return False

        monkeypatch.setattr(Sweeps, "must_look_again", no_wait)
    else:

        def forgets(self: Sweeps) -> bool:
            self._seen = []
            return real(self)

        monkeypatch.setattr(Sweeps, "must_look_again", forgets)
    with pytest.raises(AssertionError, match="seed"):
        simulate(3000)
    assert sweeps.NOTICE == 24 * HOUR

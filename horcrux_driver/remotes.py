"""Whether the repositories answer, asked in the background: no inspect waits for one."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from horcrux_nbd.chunkstore import open_store
from horcrux_nbd.errors import HorcruxError

FRESH = 30.0  # seconds that an answer holds
LIMIT = 5.0  # seconds to wait for one


@dataclass(frozen=True)
class Answer:
    """What asking told, and when (monotonic seconds). An empty `problem` is a yes."""

    problem: str
    at: float


class Remotes:
    """The last answers, by URL. `ask` never waits, and starts a question where one is due."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answers: dict[str, Answer] = {}
        self._asking: set[str] = set()

    def ask(self, url: str) -> Answer | None:
        """The last answer of the repository at `url`; None before the first."""
        with self._lock:
            answer = self._answers.get(url)
            due = answer is None or time.monotonic() - answer.at > FRESH
            if due and url not in self._asking:
                self._asking.add(url)
                threading.Thread(target=self._look, args=(url,), daemon=True).start()
            return answer

    def _look(self, url: str) -> None:
        problem = ""
        try:
            with open_store(url, limit=LIMIT):
                pass
        except (HorcruxError, OSError) as error:
            problem = str(error)
        finally:
            with self._lock:
                self._answers[url] = Answer(problem, time.monotonic())
                self._asking.discard(url)

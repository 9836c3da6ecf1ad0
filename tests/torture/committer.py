"""A process that commits a volume, and then perhaps pushes, and can be killed while it does."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time

from horcrux_nbd import versions
from horcrux_nbd.attach.processes import readable
from tests.versions.support import AUTHOR

WAIT = 10.0  # seconds for a commit or push that is to be done before it is killed


class Committer:
    """Begins at once. Call it while no thread runs: it is a fork of this process."""

    def __init__(self, volume: str, label: str, chance: random.Random) -> None:
        """`label` is the message of the commit."""
        self.label = label
        self._push = chance.random() < 0.4
        # How much is to be done before the end comes: nothing, the commit, all of it.
        self._until = chance.choice(["", "c", "cp" if self._push else "c"])
        self._said = ""
        self._pipe, say = os.pipe()
        pause = chance.uniform(0, 0.05)
        self._pid = os.fork()
        if not self._pid:
            with contextlib.suppress(BaseException):
                time.sleep(pause)
                versions.commit([volume], label, author=AUTHOR)
                os.write(say, b"c")
                if self._push:
                    versions.push(volume, author=AUTHOR)
                    os.write(say, b"p")
            os._exit(0)
        os.close(say)

    def wait(self) -> None:
        """Until as much is done as this one is to do; less if it failed, or takes too long."""
        deadline = time.monotonic() + WAIT
        while len(self._said) < len(self._until):
            if not readable(self._pipe, deadline - time.monotonic()) or not self._hear():
                return

    def _hear(self) -> bool:
        word = os.read(self._pipe, 2)
        self._said += word.decode()
        return bool(word)

    def kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        while self._hear():
            pass
        os.close(self._pipe)

    @property
    def committed(self) -> bool:
        """Whether the commit was acknowledged."""
        return "c" in self._said

    @property
    def pushed(self) -> bool:
        return "p" in self._said

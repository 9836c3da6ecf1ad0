"""The driver's log: lines for people, or JSON for programs; its level is changed by signals.

SIGUSR1 says more, SIGUSR2 less, one step each, as in the original Horcrux. The servers of volumes
(nbdkit) follow. No secret reaches a log: options hold none, and URLs cannot (chunkstore/url.py).
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime

from horcrux_nbd import control, host, server
from horcrux_nbd.errors import HorcruxError, UsageError

log = logging.getLogger(__name__)

PROGRAM = "horcrux-dv"
LEVELS = ("error", "warning", "info", "debug")  # each says more than the one before it
_ASK_LIMIT = 2.0  # seconds for one server to take a new level
# They tell a lot, and some of it is none of a log's business.
_LIBRARIES = ("boto3", "botocore", "urllib3", "paramiko", "docker", "asyncio", "aiohttp")
_STANDARD = frozenset(vars(logging.LogRecord("", 0, "", 0, "", (), None))) | {"message", "asctime"}


class JsonFormatter(logging.Formatter):
    """One object a line: time (RFC 3339, UTC), level, logger, message, and what `extra` had."""

    def format(self, record: logging.LogRecord) -> str:
        value = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **{key: one for key, one in vars(record).items() if key not in _STANDARD},
        }
        if record.exc_info:
            value["exception"] = self.formatException(record.exc_info)
        return json.dumps(value, ensure_ascii=False, default=str)


def set_up(level: str, *, as_json: bool = False) -> None:
    """Log to standard error from now on. Raises UsageError for an unknown level."""
    if level not in LEVELS:
        raise UsageError(f"--log-level {level}: say {', '.join(LEVELS)}")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JsonFormatter() if as_json else logging.Formatter(f"{PROGRAM}: %(levelname)s: %(message)s")
    )
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    for library in _LIBRARIES:
        logging.getLogger(library).setLevel(logging.WARNING)


def level() -> str:
    """The level in force."""
    return logging.getLevelName(logging.getLogger().level).lower()


def step(more: bool) -> str:
    """One step more or less; the level from now on. The ends stay where they are."""
    before = level()
    number = LEVELS.index(before) + (1 if more else -1)
    now = LEVELS[max(0, min(number, len(LEVELS) - 1))]
    logging.getLogger().setLevel(now.upper())
    # An error, so that it is seen at every level.
    log.error("log level: %s, was %s", now, before, extra={"old": before, "new": now})
    return now


def tell_servers(now: str) -> None:
    """Give the level to the nbdkit of each volume; those that do not answer keep theirs."""
    for name in host.names():
        try:
            if server.running(name) is not None:
                path = server.folder_of(name) / server.CONTROL
                control.ask(path, "log", timeout=_ASK_LIMIT, level=now)
        except (HorcruxError, OSError, ValueError) as error:
            log.warning("volume %s: its server keeps its log level: %s", name, error)


def follow_signals(loop: asyncio.AbstractEventLoop) -> None:
    """SIGUSR1: more. SIGUSR2: less."""

    def on(more: bool) -> Callable[[], None]:
        def change() -> None:
            threading.Thread(target=tell_servers, args=(step(more),), daemon=True).start()

        return change

    loop.add_signal_handler(signal.SIGUSR1, on(True))
    loop.add_signal_handler(signal.SIGUSR2, on(False))

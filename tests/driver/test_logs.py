"""The driver's log: JSON on request, louder and quieter by signals, and no secret in it."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from horcrux_driver import logs
from horcrux_nbd import host, server
from horcrux_nbd.errors import UsageError

from .conftest import clean_host
from .support import DriverProcess, wait_for


@pytest.fixture
def talking(configured: Path, tmp_path: Path) -> Iterator[DriverProcess]:
    """A driver that logs JSON at its usual level."""
    process = DriverProcess(tmp_path)
    process.words = ["--docker-host", "unix:///nonexistent", "--log-json"]
    process.start()
    yield process
    process.stop()
    process.socket.unlink(missing_ok=True)
    clean_host()


def lines(process: DriverProcess) -> list[dict[str, object]]:
    """All that it logged: JSON, every line."""
    return [json.loads(line) for line in process.log.read_text().splitlines()]


def levels(process: DriverProcess) -> list[tuple[object, object]]:
    return [(line["old"], line["new"]) for line in lines(process) if "old" in line]


def test_calls_are_told_with_what_they_were_about(talking: DriverProcess) -> None:
    talking.error("Mount", Name="none", ID="id-1")
    (line,) = [line for line in lines(talking) if line.get("call") == "Mount"]
    assert line["volume"] == "none"
    assert line["mount_id"] == "id-1"
    assert "no such volume" in str(line["problem"])
    assert 0 <= float(str(line["seconds"])) < 60
    assert line["level"] == "info"
    assert str(line["time"]).endswith("+00:00")


def test_louder_and_quieter(talking: DriverProcess) -> None:
    talking.ask("Create", Name="v", Opts=None)
    host.serve("v")
    wait_for((server.folder_of("v") / server.CONTROL).exists, "the control socket of nbdkit")
    try:
        assert not any(line.get("call") == "List" for line in lines(talking))
        os.kill(talking.pid, signal.SIGUSR1)
        wait_for(lambda: ("info", "debug") in levels(talking), "a louder log")
        talking.ask("List")
        assert any(line.get("call") == "List" for line in lines(talking))
        log = server.folder_of("v") / server.LOG
        wait_for(lambda: "log level: DEBUG" in log.read_text(), "a louder nbdkit")
        for count, number in enumerate((signal.SIGUSR1, *[signal.SIGUSR2] * 4), 2):
            os.kill(talking.pid, number)
            wait_for(lambda count=count: len(levels(talking)) == count, "another level")
        assert [new for _, new in levels(talking)] == [
            "debug", "debug", "info", "warning", "error", "error",
        ]  # fmt: skip
        count = len(lines(talking))
        talking.error("Mount", Name="none", ID="x")
        assert len(lines(talking)) == count
    finally:
        host.stop("v")


def test_an_unknown_level() -> None:
    with pytest.raises(UsageError, match="say error, warning, info, debug"):
        logs.set_up("loud")


def test_an_exception_is_one_line_too() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        import sys

        record = logging.LogRecord("x", logging.ERROR, "f", 1, "a %s", ("b",), sys.exc_info())
    record.volume = "v"
    text = logs.JsonFormatter().format(record)
    assert "\n" not in text
    value = json.loads(text)
    assert (value["message"], value["volume"]) == ("a b", "v")
    assert "two\nlines" in value["exception"]

"""The control socket: one JSON line asked, one answered."""

from __future__ import annotations

import socket
import stat
from pathlib import Path

import pytest

from horcrux_nbd.control import ControlServer, ask
from horcrux_nbd.errors import Busy, HorcruxError


@pytest.fixture
def path(horcrux_host: Path) -> Path:
    horcrux_host.mkdir()
    return horcrux_host / "c.sock"  # short: a socket's path has at most 107 bytes


def test_a_command_gets_its_arguments_and_answers(path: Path) -> None:
    server = ControlServer(path, {"add": lambda request: request["a"] + request["b"]})
    try:
        assert ask(path, "add", a=1, b=2) == 3
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    finally:
        server.stop()
    assert not path.exists()


def test_an_error_keeps_its_line_and_exit_code(path: Path) -> None:
    def fail(_: object) -> None:
        raise Busy("somebody has it")

    server = ControlServer(path, {"fail": fail})
    try:
        with pytest.raises(HorcruxError, match="somebody has it") as caught:
            ask(path, "fail")
        assert caught.value.exit_code == Busy.exit_code
        with pytest.raises(HorcruxError, match="unknown command 'other'"):
            ask(path, "other")
    finally:
        server.stop()


@pytest.mark.parametrize("line", [b"\n", b"[]\n", b"{}\n", b"\xff\xfe\n", b'{"command": 3}\n'])
def test_what_is_no_request_gets_an_error_and_the_next_one_is_served(
    path: Path, line: bytes
) -> None:
    server = ControlServer(path, {"one": lambda _: 1})
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(10)
            client.connect(str(path))
            client.sendall(line)
            assert b'"error"' in client.recv(4096)
        assert ask(path, "one") == 1
    finally:
        server.stop()


def test_the_socket_of_a_killed_server_is_replaced(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    server = ControlServer(path, {"one": lambda _: 1})
    try:
        assert ask(path, "one") == 1
    finally:
        server.stop()

from __future__ import annotations

import socket
from pathlib import Path

from horcrux_nbd.attach.sockets import listener


def test_a_listener_is_known_by_its_inode_and_a_new_one_differs(tmp_path: Path) -> None:
    path = tmp_path / "a  b.sock"  # the kernel pads its columns with spaces, so names must not trip
    assert listener(path) == 0
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        assert listener(path) == 0  # bound, but nobody listens
        server.listen()
        first = listener(path)
        assert first
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            connection, _ = server.accept()
            connection.close()
        assert listener(path) == first
    assert listener(path) == 0  # closed; the file is still there
    path.unlink()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        assert listener(path) not in (0, first)

"""The kernel's NBD driver over generic netlink: connect, reconnect and disconnect a device.

Needs no process that stays: the kernel owns the sockets. Sources: linux/nbd-netlink.h,
linux/genetlink.h, linux/netlink.h. As a program (`python -m horcrux_nbd.attach.nbd_netlink
disconnect N NAME`) it disconnects in a process of its own, because the kernel waits in that call
for a server that takes no data.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from collections.abc import Iterator, Sequence

from ..errors import EnvironmentProblem, HorcruxError

_GENERIC = 16  # NETLINK_GENERIC
_REQUEST, _ACK = 1, 4  # NLM_F_*
_ERROR, _DONE = 2, 3  # NLMSG_*
_CONTROL, _GETFAMILY, _FAMILY_ID, _FAMILY_NAME = 0x10, 3, 1, 2
_CONNECT, _DISCONNECT, _RECONFIGURE = 1, 2, 3
_INDEX, _SIZE, _BLOCK_SIZE, _TIMEOUT, _SERVER_FLAGS, _CLIENT_FLAGS, _SOCKETS = range(1, 8)
_DEAD_TIMEOUT, _BACKEND = 8, 10
_SOCK_ITEM, _SOCK_FD = 1, 1
_TYPE_MASK = 0x3FFF  # without NLA_F_NESTED and NLA_F_NET_BYTEORDER
_REPLY_TIMEOUT = 30.0  # seconds; the kernel answers within the call, so this never passes


class KernelRefused(HorcruxError):
    """The NBD driver refused a command; `errno` says why."""

    def __init__(self, command: str, number: int) -> None:
        super().__init__(f"the kernel's NBD driver refused to {command}: {os.strerror(number)}")
        self.errno = number


def connect(
    streams: Sequence[socket.socket],
    *,
    size: int,
    block_size: int,
    flags: int,
    timeout: int,
    dead_timeout: int,
    backend: str,
) -> int:
    """Give `streams` to a free device, which the kernel picks; its number N of /dev/nbdN.

    `backend` names it for good: reconnects must give the same, and sysfs shows it. Time-outs are
    in seconds. The streams may be closed afterwards.
    """
    answer = _call(
        _CONNECT,
        _attribute(_SIZE, _u64(size))
        + _attribute(_BLOCK_SIZE, _u64(block_size))
        + _attribute(_SERVER_FLAGS, _u64(flags))
        + _attribute(_TIMEOUT, _u64(timeout))
        + _attribute(_DEAD_TIMEOUT, _u64(dead_timeout))
        + _attribute(_BACKEND, backend.encode() + b"\0")
        + _sockets(streams),
        "connect",
    )
    return int(struct.unpack("=I", answer[_INDEX])[0])


def reconnect(number: int, streams: Sequence[socket.socket], *, backend: str) -> None:
    """Put `streams` in the place of the device's dead connections; live ones are kept."""
    _call(
        _RECONFIGURE,
        _attribute(_INDEX, struct.pack("=I", number))
        + _attribute(_BACKEND, backend.encode() + b"\0")
        + _sockets(streams),
        f"reconnect nbd{number}",
    )


def disconnect(number: int) -> None:
    """Take the connections away; requests that wait end with EIO. No error if there are none."""
    _call(_DISCONNECT, _attribute(_INDEX, struct.pack("=I", number)), f"disconnect nbd{number}")


def _sockets(streams: Sequence[socket.socket]) -> bytes:
    items = (
        _attribute(_SOCK_ITEM, _attribute(_SOCK_FD, struct.pack("=I", stream.fileno())))
        for stream in streams
    )
    return _attribute(_SOCKETS, b"".join(items))


def _u64(value: int) -> bytes:
    return struct.pack("=Q", value)


def _attribute(kind: int, data: bytes) -> bytes:
    length = 4 + len(data)
    return struct.pack("=HH", length, kind) + data + bytes(-length % 4)


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Kind and payload of each attribute in `data`; stops at one that is cut off."""
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        if length < 4 or length > len(data):
            return
        yield kind & _TYPE_MASK, data[4:length]
        data = data[length + (-length % 4) :]


def _call(command: int, payload: bytes, what: str) -> dict[int, bytes]:
    """Send one command of the NBD family; the attributes of the answer, empty if just an ACK."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _GENERIC) as link:
        link.settimeout(_REPLY_TIMEOUT)
        link.bind((0, 0))
        try:
            family = _exchange(link, _CONTROL, _GETFAMILY, _attribute(_FAMILY_NAME, b"nbd\0"))
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
            raise EnvironmentProblem("the kernel has no NBD driver loaded: modprobe nbd") from None
        number = struct.unpack("=H", family[_FAMILY_ID][:2])[0]
        try:
            return _exchange(link, number, command, payload)
        except OSError as error:
            raise KernelRefused(what, error.errno or errno.EIO) from error


def _exchange(link: socket.socket, family: int, command: int, payload: bytes) -> dict[int, bytes]:
    body = struct.pack("=BBH", command, 1, 0) + payload
    link.send(struct.pack("=IHHII", 16 + len(body), family, _REQUEST | _ACK, 1, 0) + body)
    answer: dict[int, bytes] = {}
    while True:
        data = link.recv(65536)
        while len(data) >= 16:
            length, kind = struct.unpack_from("=IH", data)
            message, data = data[16:length], data[length + (-length % 4) :]
            if kind == _ERROR:
                code = struct.unpack_from("=i", message)[0]
                if code:
                    raise OSError(-code, os.strerror(-code))
                return answer
            if kind == _DONE:
                return answer
            answer.update(attributes(message[4:]))


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] != "disconnect" or not sys.argv[2].isdigit():
        sys.exit("usage: python -m horcrux_nbd.attach.nbd_netlink disconnect N NAME")
    try:
        disconnect(int(sys.argv[2]))
    except HorcruxError as error:
        sys.exit(str(error))

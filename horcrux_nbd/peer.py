"""Who is on the other end of the connection that nbdkit is serving in this thread.

nbdkit 1.32's Python plugin does not tell, but the program that embeds it exports the C functions
(nbdkit-plugin(3): nbdkit_is_tls, nbdkit_peer_name).
"""

from __future__ import annotations

import ctypes
import ipaddress
import socket
import struct

from .errors import EnvironmentProblem, UsageError


def check(plain_tcp: bool) -> None:
    """Refuse a client that came over a network without TLS, unless that is wanted.

    Unix sockets and this host's own loopback addresses are no network. Raises UsageError.
    """
    if plain_tcp or _is_tls():
        return
    address = _address()
    if address is not None and not address.is_loopback:
        raise UsageError(
            f"refused {address}, which came over TCP without TLS: give nbdkit --tls=require, or "
            "plain_tcp=true if that network may read and change everything"
        )


def _is_tls() -> bool:
    call = getattr(ctypes.CDLL(None), "nbdkit_is_tls", None)
    return call is not None and call() == 1


def _address() -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The client's; None for a socket that is of no network. What is not known is refused."""
    call = getattr(ctypes.CDLL(None), "nbdkit_peer_name", None)
    if call is None:
        raise EnvironmentProblem("this nbdkit does not tell who connects: it needs 1.24 or later")
    buffer = ctypes.create_string_buffer(128)
    length = ctypes.c_uint32(len(buffer))
    if call(buffer, ctypes.byref(length)) == -1:
        return None  # `nbdkit -s`: a pipe
    return parse(buffer.raw[: length.value])


def parse(name: bytes) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address in a struct sockaddr (ip(7), ipv6(7)); None for a Unix socket.

    Raises UsageError for a family that is neither: vsock reaches other machines too.
    """
    family = struct.unpack_from("=H", name)[0] if len(name) >= 2 else socket.AF_UNIX
    if family == socket.AF_UNIX:
        return None
    if family == socket.AF_INET and len(name) >= 8:
        return ipaddress.IPv4Address(name[4:8])
    if family == socket.AF_INET6 and len(name) >= 24:
        address = ipaddress.IPv6Address(name[8:24])
        return address.ipv4_mapped or address
    raise UsageError(f"refused a client of socket family {family}: give nbdkit --tls=require")

"""Socket addresses in one form, whatever family of socket they were seen on."""

from __future__ import annotations

import functools
import ipaddress
import socket
from typing import Any, Final

Peer = tuple[str, int] | tuple[str, int, int, int]
"""``(host, port)`` for IPv4, ``(host, port, 0, scope)`` for IPv6; the host is a literal in its shortest form."""
MAX_SCOPE: Final = 2**32 - 1
"""sin6_scope_id has 32 bits (RFC 3493, 3.3)."""


@functools.lru_cache(maxsize=8192)
def normalised(address: tuple[Any, ...]) -> Peer:
    """The one form of a socket address: IPv4-mapped IPv6 (RFC 4291, 2.5.5.2) becomes IPv4."""
    host, port = str(address[0]), int(address[1])
    literal, _, zone = host.partition("%")
    ip = ipaddress.ip_address(literal)
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return (str(ip.ipv4_mapped), port)
        scope = int(address[3]) if len(address) == 4 else 0
        if zone and not scope:
            scope = int(zone) if zone.isdigit() else socket.if_nametoindex(zone)
        if not 0 <= scope <= MAX_SCOPE:
            raise ValueError(f"{scope} is no interface")  # sendto(2) would take its low 32 bits for one
        return (str(ip), port, 0, scope)
    return (str(ip), port)


@functools.lru_cache(maxsize=8192)
def for_family(peer: Peer, family: int) -> tuple[Any, ...]:
    """``peer`` as a socket of ``family`` takes it. Raises OSError where that family can't reach it."""
    if family == socket.AF_INET6:
        return peer if len(peer) == 4 else (f"::ffff:{peer[0]}", peer[1], 0, 0)
    if len(peer) == 4:
        raise OSError(f"{peer[0]} is IPv6, the socket is IPv4")
    return peer


def shown(peer: Peer) -> str:
    """``host:port`` or ``[host]:port``, for logs."""
    return f"[{peer[0]}]:{peer[1]}" if len(peer) == 4 else f"{peer[0]}:{peer[1]}"


def open_socket(local: tuple[str, int], *, receive_buffer: int, succeeds: bool = False) -> socket.socket:
    """A non-blocking UDP socket bound to the literal ``local``; ``::`` also takes IPv4 (ipv6(7)). Raises OSError.

    ``succeeds``: one of ours may be bound there still, with SO_REUSEADDR as well. Never otherwise: two UDP sockets
    with it share a port without an error, even one that the kernel has chosen, and the newer gets what is
    meant for both (socket(7)).
    """
    family = socket.AF_INET6 if ":" in local[0] else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_DGRAM)
    try:
        sock.setblocking(False)
        if succeeds:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6 and local[0] == "::":
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        widen(sock, receive_buffer)
        bind_to: tuple[Any, ...] = local
        if family == socket.AF_INET6:
            bind_to = normalised(local)
        sock.bind(bind_to)
    except BaseException:
        sock.close()
        raise
    return sock


def widen(sock: socket.socket, receive_buffer: int) -> None:
    """Ask for a receive buffer of so many bytes; beyond net.core.rmem_max it takes CAP_NET_ADMIN."""
    force = getattr(socket, "SO_RCVBUFFORCE", 33)
    try:
        sock.setsockopt(socket.SOL_SOCKET, force, receive_buffer)
    except OSError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)

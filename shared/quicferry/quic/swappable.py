"""Client side: the QUIC stack sees one peer that never changes; real datagrams go where we decide.

aioquic's client would drop or distrust datagrams from another address; a constant fake peer above and the
admission of real peers below keep an address change out of its sight.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Final

import structlog

from quicferry.quic.addresses import Peer, for_family, open_socket, shown
from quicferry.quic.udp import BATCH, UdpEndpoint

log = structlog.get_logger(__name__)

FAKE_PEER: Final = ("192.0.2.1", 4242)
"""The server's address as the stack sees it (TEST-NET-1, RFC 5737): never on the wire."""
LINGER: Final = 3.0
"""Seconds a replaced local socket stays readable for what is still under way to it."""
MAX_LINGERING: Final = 4
RECEIVE_BUFFER: Final = 4 * 1024 * 1024

Deliver = Callable[[bytes, tuple[str, int]], bool]
"""Hands a datagram to QUIC as from the fake peer; whether QUIC accepted a fresh packet in it."""


class SwappablePeer(UdpEndpoint):
    """One server at a time, two while a move is pending."""

    def __init__(self, sock: socket.socket, peer: Peer, deliver: Deliver) -> None:
        self.peer = peer
        """The admitted real peer."""
        self.pending: Peer | None = None
        """A move's target: also sent to and admitted, until it speaks or the move is called off."""
        self.heard_at = time.monotonic()
        """When the current peer last sent something fresh."""
        self.heard_at_unix = time.time()
        self.sent_at = 0.0
        self.on_target_heard: Callable[[], None] | None = None
        self.speaking: Peer | None = None
        """Who sent the datagram that QUIC was handed last."""
        self._deliver = deliver
        self._lingering: list[socket.socket] = []
        super().__init__(sock)

    def sendto(self, data: bytes | bytearray | memoryview, addr: object = None) -> None:
        """Send to the real peer, whatever ``addr`` the stack passed; to both while a move is pending."""
        if self._closed:
            return
        payload = bytes(data)
        self.sent_at = time.monotonic()
        self._send_or_keep(payload, self.peer)
        if self.pending is not None:
            self._send_or_keep(payload, self.pending)

    def check_reach(self, target: Peer) -> None:
        """Raises OSError if the socket's family can't reach ``target``."""
        if self._socket is not None:
            for_family(target, self._socket.family)

    def begin(self, target: Peer) -> None:
        """Send to ``target`` too and admit it; a target pending before is dropped."""
        self.pending = target

    def abandon(self) -> None:
        """The current peer stays the only one."""
        self.pending = None

    def pin(self) -> None:
        """The pending target is the only peer from now on."""
        if self.pending is not None:
            self.peer, self.pending = self.pending, None

    def rebind_local(self, local: tuple[str, int] | None = None) -> Peer:
        """Send from another local address: new socket first, then the swap; the old one is read a while longer.

        Without ``local`` the kernel chooses, by the routes of the moment. Returns the new local address;
        raises OSError if it can't be had or can't reach the peer, and nothing has changed then.
        """
        new = open_client_socket(self.peer, local)
        try:
            for_family(self.peer, new.family)
        except OSError:
            new.close()
            raise
        old = self._exchange(new)
        if old is not None:
            self._linger(old)
        return self.local

    def close(self) -> None:
        super().close()
        for sock in list(self._lingering):
            self._drop(sock)

    def _linger(self, old: socket.socket) -> None:
        while len(self._lingering) >= MAX_LINGERING:
            self._drop(self._lingering[0])
        self._lingering.append(old)
        self._loop.add_reader(old, self.drain, old, BATCH)
        self._loop.call_later(LINGER, self._drop, old)

    def _drop(self, old: socket.socket) -> None:
        if old in self._lingering:
            self._lingering.remove(old)
            self._loop.remove_reader(old)
            old.close()

    def _arrived(self, data: bytes, peer: Peer) -> None:
        self.speaking = peer
        if peer == self.peer:
            at, at_unix = time.monotonic(), time.time()
            if self._deliver(data, FAKE_PEER) and peer == self.peer:
                self.heard_at, self.heard_at_unix = at, at_unix
        elif peer == self.pending:
            if self._deliver(data, FAKE_PEER) and self.on_target_heard is not None and peer == self.pending:
                self.on_target_heard()
        else:
            self.counters.foreign += 1
            log.debug("foreign_datagram", peer=shown(peer), size=len(data))


def open_client_socket(peer: Peer, local: tuple[str, int] | None = None) -> socket.socket:
    """A socket that reaches ``peer`` from ``local``; of both families where the kernel allows. Raises OSError."""
    if local is not None:
        return open_socket(local, receive_buffer=RECEIVE_BUFFER)
    try:
        return open_socket(("::", 0), receive_buffer=RECEIVE_BUFFER)
    except OSError:
        if len(peer) == 4:
            raise
        return open_socket(("0.0.0.0", 0), receive_buffer=RECEIVE_BUFFER)  # noqa: S104 - a client's wildcard

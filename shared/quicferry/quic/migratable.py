"""Server side: a UDP socket that can be replaced, given away and adopted under a running QUIC stack."""

from __future__ import annotations

import socket
import struct
from collections import deque
from typing import Final

from quicferry.protocol.handover import SO_TIMESTAMPNS
from quicferry.quic.addresses import Peer, normalised, open_socket, widen
from quicferry.quic.udp import BATCH, MAX_DATAGRAM, RECEIVE_BUFFER, Received, UdpEndpoint

CONTROL_BYTES: Final = 64
OLD_LIMIT: Final = 65_536
"""Datagrams read from a socket that is about to be closed: more than its queue can hold."""
RELEASE_LIMIT: Final = 4096
"""Datagrams read before the socket is given away; who swapped has sent them to the target as well."""
SINGLY: Final = 16
"""Of a short queue in an adopted socket, so many datagrams are taken one by one: each may be what a client waits for.
A long one has hundreds of clients, whose timers are all due and would have their turn between any two."""


Datagram = tuple[bytes, Peer]


class MigratableUDP(UdpEndpoint):
    """What the QUIC listener sends and receives through."""

    def __init__(self, sock: socket.socket, received: Received) -> None:
        self._received = received
        self._fresh: deque[Datagram] = deque()
        """Of an adopted socket's queue, what is still to be taken."""
        self._stale: deque[Datagram] = deque()
        """Likewise, what the source has answered: last."""
        self._singly = 0
        self._bound = sock.getsockname()[:2]
        super().__init__(sock)

    @classmethod
    def bind(cls, host: str, port: int, received: Received) -> MigratableUDP:
        """Listen on an IP literal, ``0.0.0.0`` or ``::``. Raises OSError."""
        return cls(open_socket((host, port), receive_buffer=RECEIVE_BUFFER), received)

    @property
    def port(self) -> int:
        """The bound port; it stays the same through every exchange of sockets in a berth."""
        return int(self._bound[1])

    def rebind(self, new: socket.socket | None = None) -> None:
        """Replace the socket: new one first, then the swap, then the old one is emptied and closed.

        Without ``new`` one is bound to the address first bound to. Raises OSError if that can't be
        done; the old socket is then still in use.
        """
        if self._socket is not None:
            # Both ends of a shared address have to allow it (socket(7)).
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        new = new or open_socket(
            (str(self._bound[0]), self.port), receive_buffer=RECEIVE_BUFFER, succeeds=self._socket is not None
        )
        if (old := self._exchange(new)) is not None:
            self.drain(old, OLD_LIMIT)
            old.close()

    def release(self) -> socket.socket:
        """Give the socket away, read empty as far as it goes; from here nothing is sent or received.

        Raises OSError if it is away already.
        """
        if self._socket is None:
            raise OSError("the socket was given away already")
        sock = self._socket
        self.drain(sock, RELEASE_LIMIT)
        self._detach()
        return sock

    def adopt(self, sock: socket.socket, since: float = 0.0) -> int:
        """Go on with ``sock``, and take what is queued in it, the first of it before this returns. Returns how many.

        What has come before ``since`` (Unix seconds) is taken last, where the socket has the times: while they swap,
        clients send to both addresses, so the source has answered it, and with hundreds of them it is thousands.
        """
        sock.setblocking(False)
        widen(sock, RECEIVE_BUFFER)
        if (old := self._exchange(sock)) is not None:
            self.drain(old, OLD_LIMIT)
            old.close()
        self._read_queue(sock, since)
        waiting = len(self._fresh) + len(self._stale)
        self._singly = SINGLY if waiting <= BATCH else 1
        self._take_waiting()
        return waiting

    def _read_queue(self, sock: socket.socket, since: float) -> None:
        for _ in range(OLD_LIMIT):
            try:
                data, control, _, address = sock.recvmsg(MAX_DATAGRAM, CONTROL_BYTES)
            except (BlockingIOError, InterruptedError):
                break
            except OSError:
                self.counters.receive_errors += 1  # an ICMP error queued on it; reading it took it off
                continue
            self.counters.received += 1
            (self._fresh if _came_at(control) >= since else self._stale).append((data, normalised(address)))

    def _take_waiting(self) -> None:
        for _ in range(1 if self._singly else BATCH):
            if queue := self._fresh or self._stale:
                self._hand_up(*queue.popleft())
        self._singly = max(0, self._singly - 1)
        if self._fresh or self._stale:
            # Behind the application that these woke, ahead of timers: asyncio puts those that are due at the end.
            soon = self._loop.call_soon
            if self._singly:
                soon(soon, self._take_waiting)  # a turn later, when what the application answered has left
            else:
                soon(self._take_waiting)

    def _readable(self, sock: socket.socket) -> None:
        # Taken before what waits, newer datagrams would make that look lost (RFC 9002, 6.1.1): congestion window.
        if not self._fresh:
            super()._readable(sock)

    def _arrived(self, data: bytes, peer: Peer) -> None:
        self._received(data, peer)


def _came_at(control: list[tuple[int, int, bytes]]) -> float:
    """Unix time of arrival by the kernel; infinity if it did not note it."""
    for level, kind, data in control:
        if (level, kind) == (socket.SOL_SOCKET, SO_TIMESTAMPNS):
            seconds, nanoseconds = struct.unpack("ll", data)
            return float(seconds + nanoseconds / 1e9)
    return float("inf")

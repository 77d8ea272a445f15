"""Server side: a UDP socket that can be replaced, given away and adopted under a running QUIC stack."""

from __future__ import annotations

import socket
from typing import Final

from quicferry.quic.addresses import Peer, open_socket, widen
from quicferry.quic.udp import RECEIVE_BUFFER, Received, UdpEndpoint

ADOPT_LIMIT: Final = 256
"""Datagrams read from an adopted socket before timers and the application run. What a few clients sent in a pause
is less; with hundreds of them the application must not wait for all, and the loop reads on in batches."""
OLD_LIMIT: Final = 65_536
"""Datagrams read from a socket that is about to be closed: more than its queue can hold."""
RELEASE_LIMIT: Final = 4096
"""Datagrams read before the socket is given away; who swapped has sent them to the target as well."""


class MigratableUDP(UdpEndpoint):
    """What the QUIC listener sends and receives through."""

    def __init__(self, sock: socket.socket, received: Received) -> None:
        self._received = received
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

    def adopt(self, sock: socket.socket) -> int:
        """Go on with ``sock``; the first of what is queued in it is read before this returns. Returns how many."""
        sock.setblocking(False)
        widen(sock, RECEIVE_BUFFER)
        if (old := self._exchange(sock)) is not None:
            self.drain(old, OLD_LIMIT)
            old.close()
        return self.drain(sock, ADOPT_LIMIT)

    def _arrived(self, data: bytes, peer: Peer) -> None:
        self._received(data, peer)

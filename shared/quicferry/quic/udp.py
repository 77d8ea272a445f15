"""A UDP endpoint for QUIC whose socket can be exchanged while in use."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import structlog

from quicferry.quic.addresses import Peer, for_family, normalised

log = structlog.get_logger(__name__)

RECEIVE_BUFFER: Final = 8 * 1024 * 1024
"""Bytes asked of the kernel for what arrives while nobody reads."""
BATCH: Final = 64
"""Datagrams read in one go: more would starve the timers."""
BACKLOG: Final = 1024
"""Datagrams kept while the socket takes none; the oldest is dropped, as a network would."""
MAX_DATAGRAM: Final = 65_535


@dataclass
class Counters:
    """What happened on the socket since the start; the stack above is told of none of it."""

    sent: int = 0
    received: int = 0
    send_errors: int = 0
    """Datagrams the kernel refused (ICMP unreachable and the like); QUIC sends again what mattered."""
    receive_errors: int = 0
    overflowed: int = 0
    """Datagrams dropped because the backlog was full."""
    retried: int = 0
    """Reads and writes caught in an exchange of sockets and done again on the new one."""
    foreign: int = 0
    """Datagrams from a peer that is not admitted."""


class UdpEndpoint(asyncio.DatagramTransport):
    """The transport QUIC sees. It never reports an error upwards, whatever becomes of the socket below."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__()
        self.counters = Counters()
        self.generation = 0
        """Rises with each exchange of the socket."""
        self._loop = asyncio.get_running_loop()
        self._socket: socket.socket | None = None
        self._backlog: deque[tuple[bytes, Peer]] = deque()
        self._writing: socket.socket | None = None
        self._closed = False
        self._buffer = bytearray(MAX_DATAGRAM)
        self._exchange(sock)

    # The transport's side.

    def sendto(self, data: Any, addr: Any = None) -> None:
        if not self._closed:
            self._send_or_keep(bytes(data), addr)

    def is_closing(self) -> bool:
        return self._closed

    def close(self) -> None:
        """Close the socket now; a datagram still kept is tried once more first."""
        if self._closed:
            return
        self._flush()
        self._closed = True
        self._backlog.clear()
        if (sock := self._detach()) is not None:
            sock.close()

    def abort(self) -> None:
        self._backlog.clear()
        self.close()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        if self._socket is None:
            return default
        if name == "sockname":
            return self._socket.getsockname()
        return self._socket if name == "socket" else default

    @property
    def local(self) -> Peer:
        """The local address. Raises OSError while there is no socket."""
        if self._socket is None:
            raise OSError(errno.EBADF, "no socket")
        return normalised(self._socket.getsockname())

    # The subclass's side.

    def _arrived(self, data: bytes, peer: Peer) -> None:
        """Each seam's own: what it does with a datagram."""
        raise NotImplementedError  # abstract; asyncio's transport leaves no room for abc

    def _exchange(self, new: socket.socket) -> socket.socket | None:
        """Use ``new`` from now on; the one used before is returned, open and no longer watched."""
        old = self._detach()
        self._socket = new
        self.generation += 1
        self._watch(new)
        self._flush()
        return old

    def _watch(self, sock: socket.socket) -> None:
        self._loop.add_reader(sock, self._readable, sock)

    def _readable(self, sock: socket.socket) -> None:
        self.drain(sock, BATCH)

    def _detach(self) -> socket.socket | None:
        """Stop watching the socket and forget it."""
        sock, self._socket = self._socket, None
        if sock is not None:
            self._loop.remove_reader(sock)
            if self._writing is sock:
                self._loop.remove_writer(sock)
                self._writing = None
        return sock

    def drain(self, sock: socket.socket, limit: int) -> int:
        """Read what is queued in ``sock``, ``limit`` datagrams at most; how many there were."""
        for count in range(limit):
            try:
                size, address = sock.recvfrom_into(self._buffer)
            except (BlockingIOError, InterruptedError):
                return count
            except OSError as error:
                if sock is not self._socket:
                    # Exchanged from within a datagram's own handling; its successor has a reader of its own.
                    self.counters.retried += 1
                    return count
                # An ICMP error queued on the socket; reading it took it off the queue.
                self.counters.receive_errors += 1
                if error.errno == errno.EBADF:
                    return count
                continue
            self.counters.received += 1
            self._hand_up(bytes(memoryview(self._buffer)[:size]), normalised(address))
        return limit

    def _hand_up(self, data: bytes, peer: Peer) -> None:
        try:
            self._arrived(data, peer)
        except Exception:  # one datagram, however hostile, must not cost the others their reader
            log.exception("datagram_failed", size=len(data))

    def _send_or_keep(self, data: bytes, peer: Peer) -> None:
        if self._backlog or not self._send(data, peer):
            if len(self._backlog) >= BACKLOG:
                self._backlog.popleft()
                self.counters.overflowed += 1
            self._backlog.append((data, peer))
            self._want_write()

    def _send(self, data: bytes, peer: Peer) -> bool:
        """Whether the datagram is off our hands; False where it has to wait."""
        while True:
            generation, sock = self.generation, self._socket
            if sock is None:
                return False
            try:
                sock.sendto(data, for_family(peer, sock.family))
            except (BlockingIOError, InterruptedError):
                return False
            except OSError:
                if generation != self.generation:
                    self.counters.retried += 1
                    continue
                self.counters.send_errors += 1
                return True
            self.counters.sent += 1
            return True

    def _want_write(self) -> None:
        if self._socket is not None and self._writing is None:
            self._writing = self._socket
            self._loop.add_writer(self._socket, self._flush)

    def _flush(self) -> None:
        while self._backlog:
            data, peer = self._backlog[0]
            if not self._send(data, peer):
                self._want_write()
                return
            self._backlog.popleft()
        if self._writing is not None:
            self._loop.remove_writer(self._writing)
            self._writing = None


Received = Callable[[bytes, Peer], None]

"""A control stream's bytes in the wrappers: the server's connection with a move under way, the client's follower.

QUIC is there and not connected: what is sent goes nowhere.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Final

from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.packet import QuicFrameType

from quicferry.protocol import control, wire
from quicferry.protocol.api import Address, Options
from quicferry.protocol.control import MAX_LINE_BYTES, Hello
from quicferry.quic.adapter import Stream, StreamConnection
from quicferry.quic.addresses import Peer, for_family
from quicferry.quic.follower import Follower
from quicferry.quic.herald import Outbox, SilentHerald
from quicferry.quic.move import Move
from quicferry.quic.mover import Mover
from quicferry.quic.policy import Policy
from quicferry.quic.served import CONTROL_STREAM, MAX_IDLE_LINES, ServedConnection
from quicferry.quic.swappable import SwappablePeer

MEANINGFUL: Final = 4
"""Lines of one client that can matter in one move: an ack, a ready and two accounts."""
TURNS: Final = 6
"""Of the event loop, until whoever reads has read."""
PEERS: Final[tuple[Peer, ...]] = (("192.0.2.7", 4242), ("::1", 4242, 0, 0), ("fe80::1", 4242, 0, 1))


class Server:
    """One connection, and a real mover that waits for its client."""

    def __init__(self) -> None:
        self.outbox = Outbox(SilentHerald())
        self.mover = Mover(
            self,  # type: ignore[arg-type] - it never comes to need a socket
            self.outbox,
            migrate_to=None,
            on_quiesce=None,
            on_resume=None,
        )
        self.mover._move = self.move = Move("m1", Address(host="192.0.2.9", port=4242), 3, Options())
        self.application: list[Stream] = []
        self.lost = self.meant = 0
        configuration = QuicConfiguration(is_client=False)
        # Both are only looked at in the handshake, and there is none.
        configuration.certificate = configuration.private_key = "none"
        quic = QuicConnection(configuration=configuration, original_destination_connection_id=b"12345678")
        quic._get_or_create_stream(QuicFrameType.STREAM_BASE, CONTROL_STREAM)
        self.connection = ServedConnection(quic, self)
        self.connection.transmit = lambda: None  # type: ignore[method-assign]

    @property
    def clients(self) -> list[ServedConnection]:
        return [self.connection] if self.connection.has_control else []

    @property
    def strangers(self) -> list[ServedConnection]:
        return [] if self.connection.has_control else [self.connection]

    def connection_established(self, connection: ServedConnection) -> None: ...
    def connection_ended(self, connection: ServedConnection) -> None: ...

    def said_hello(self, connection: ServedConnection, hello: Hello) -> str:
        self.move.told[hello.client] = connection
        self.move.names.add(hello.client)
        return hello.client

    def control_lost(self, connection: ServedConnection) -> None:
        self.lost += 1
        self.mover.gone(connection)

    def stream_opened(self, connection: ServedConnection, stream: Stream) -> None:
        self.application.append(stream)

    def acked(self, connection: ServedConnection, message: control.Ack) -> bool:
        return self._counted(self.mover.acked(connection, message))

    def ready(self, connection: ServedConnection, message: control.Ready) -> bool:
        return self._counted(self.mover.ready(connection, message))

    def moved(self, connection: ServedConnection, message: control.Moved) -> bool:
        return self._counted(self.mover.moved(connection, message))

    def _counted(self, meant: bool) -> bool:
        self.meant += meant
        return meant


async def at_the_server(pieces: list[bytes]) -> None:
    """A client sends ``pieces`` on its first stream, and ends it."""
    server = Server()
    connection = server.connection
    try:
        connection.handshake_completed()
        for piece in pieces:
            connection.stream_data(CONTROL_STREAM, piece, False)
            assert len(connection._first) <= MAX_LINE_BYTES, "it keeps more than a line"
            await asyncio.sleep(0)
        connection.stream_data(CONTROL_STREAM, b"", True)
        for _ in range(TURNS):
            await asyncio.sleep(0)
        await _check_server(server, b"".join(pieces))
    finally:
        connection._be_over("the end")
        await server.mover.stop()


async def _check_server(server: Server, stream: bytes) -> None:
    connection = server.connection
    assert connection._decided
    assert connection._sniffing is None
    assert not connection.has_control, "the client has ended it"
    assert server.lost <= 1
    assert connection._idle_lines <= MAX_IDLE_LINES + 1
    assert server.meant <= MEANINGFUL, "lines without an effect count as if they had one"
    assert len(server.outbox._waiting) <= MEANINGFUL
    for event in server.outbox._waiting:
        assert wire.decode(wire.encode(event), type(event)) == event, "an event that nobody can read"
    if server.application:
        (application,) = server.application
        got = bytearray()
        while more := await application.reader.read(65_536):
            got += more
        assert bytes(got) == stream, "the application's stream is not what was sent"


async def at_the_client(pieces: list[bytes], peer: Peer) -> None:
    """The server at ``peer`` sends ``pieces`` on the control stream, and ends it."""
    sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    sock.setblocking(False)
    sock.bind(("::", 0))
    seam = SwappablePeer(sock, peer, lambda _data, _peer: True)
    connection = StreamConnection(QuicConnection(configuration=QuicConfiguration(is_client=True)))
    connection.transmit = lambda: None  # type: ignore[method-assign]
    follower = Follower(connection, seam, policy=Policy(), on_quiesce=None)
    try:
        follower.start("car-7")
        stream = follower._control
        assert stream is not None
        for piece in pieces:
            stream.feed(piece, False)
            await asyncio.sleep(0)
            _check_target(seam)
        stream.feed(b"", True)
        for _ in range(TURNS):
            await asyncio.sleep(0)
        _check_target(seam)
        assert not follower.has_control
    finally:
        follower.stop()
        connection._be_over("the end")
        seam.close()


def _check_target(seam: SwappablePeer) -> None:
    """Wherever the server sent us, a socket takes it as it stands (sockaddr_in6, RFC 3493, 3.3)."""
    for peer in (seam.peer, seam.pending):
        if peer is not None:
            _, port, *rest = for_family(peer, socket.AF_INET6)
            assert 0 < port < 2**16
            assert all(0 <= number < 2**32 for number in rest), "no socket can send there"

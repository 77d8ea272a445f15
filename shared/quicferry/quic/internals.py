"""The only module that touches what aioquic and asyncio do not promise to keep; a test notices when it changes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sized
from typing import Any, Final, Protocol, cast

from aioquic import tls
from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.asyncio.server import QuicServer
from aioquic.buffer import Buffer  # type: ignore[attr-defined]
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import NetworkAddress, QuicConnection, QuicConnectionError
from aioquic.quic.packet import QuicErrorCode, QuicFrameType, QuicHeader, QuicPacketType, pull_quic_header
from aioquic.quic.packet_builder import QuicPacketBuilder
from aioquic.quic.recovery import QuicPacketSpace
from aioquic.quic.retry import QuicRetryTokenHandler
from aioquic.quic.stream import QuicStream

STREAM_WINDOW: Final = 4 * 1024 * 1024
"""Bytes of a stream that the peer may send ahead of the application, at most."""
CONNECTION_WINDOW: Final = 16 * 1024 * 1024
"""Likewise for all streams together: some that nobody reads must leave room for the control stream."""
MAX_PIECES: Final = 2048
"""Pieces that a stream's data may be in; a full window of whole packets, every other one lost, is fewer."""
MAX_CRYPTO: Final = 64 * 1024
"""Bytes of a handshake that may wait for what comes before them (RFC 9000, 7.5: at least 4096)."""
HANDSHAKE_TIME: Final = 10.0
"""Seconds without a packet after which a server gives a handshake up."""
ASK_FROM: Final = 256
"""Connections in their handshake from which on a client must prove its address first (RFC 9000, 8.1.2)."""
MAX_HALF_OPEN: Final = 1024
"""Connections in their handshake at once; further clients are not answered, and try again by themselves."""


def largest_received(quic: QuicConnection) -> int:
    """The largest packet number accepted in the application space (RFC 9000, 12.3); -1 before the first.

    It rises only with a packet that is authentic and no repetition.
    """
    space = quic._spaces.get(tls.Epoch.ONE_RTT)
    return -1 if space is None else space.largest_received_packet


def unsent(quic: QuicConnection, stream_id: int) -> int:
    """Bytes of a stream written by the application and not yet acknowledged; 0 once it is finished."""
    stream = quic._streams.get(stream_id)
    return 0 if stream is None else len(stream.sender._buffer)


def reserve_stream(quic: QuicConnection) -> int:
    """The id of a new bidirectional stream; taken, so that the next call gives another one."""
    stream_id = quic.get_next_available_stream_id()
    quic.send_stream_data(stream_id, b"")
    return stream_id


def congestion_window(quic: QuicConnection) -> int:
    """Bytes that may be in flight (RFC 9002, 7)."""
    return quic._loss.congestion_window


def send_probe(quic: QuicConnection) -> None:
    """The next packet is one that the peer must acknowledge, even into a full congestion window (RFC 9002, 7.5)."""
    quic._send_probe()


def stop_timer(protocol: QuicConnectionProtocol) -> None:
    """No timer of the connection fires any more; for one that is given up for good."""
    if protocol._timer is not None:
        protocol._timer.cancel()
        protocol._timer = None
        protocol._timer_at = None


def empty(reader: asyncio.StreamReader) -> None:
    """Throw away what nobody will read."""
    reader._buffer.clear()  # type: ignore[attr-defined]


class Unread(Protocol):
    """What a connection's window must know of a stream."""

    unread: int
    """Bytes handed to the application that it has left alone."""


def bound_receiving(quic: QuicConnection, streams: Mapping[int, Unread]) -> None:
    """Bound the memory that the peer can take: what ``streams`` leave unread closes the window (RFC 9000, 4)."""
    quic.__class__ = _Bounded  # aioquic's server makes the connection itself
    cast(_Bounded, quic).unread_streams = streams


class _Bounded(QuicConnection):
    """Windows that begin with the configuration's and grow with what the peer has sent and the application read.

    aioquic doubles its limits with the highest offset that the peer has named, and fills the gap to it with
    zeros: ten small packets would take half a gigabyte (aioquic issue 589).
    """

    unread_streams: Mapping[int, Unread]

    def datagrams_to_send(self, now: float) -> list[tuple[bytes, NetworkAddress]]:
        if not self._handshake_complete and any(
            len(stream.receiver._buffer) > MAX_CRYPTO for stream in self._crypto_streams.values()
        ):
            self.close(QuicErrorCode.CRYPTO_BUFFER_EXCEEDED, QuicFrameType.CRYPTO, "too much crypto buffering")
        return super().datagrams_to_send(now)

    def _get_or_create_stream(self, frame_type: int, stream_id: int) -> QuicStream:
        stream = super()._get_or_create_stream(frame_type, stream_id)
        if len(stream.receiver._ranges) > MAX_PIECES:  # RFC 9000, 21.7
            raise QuicConnectionError(QuicErrorCode.INTERNAL_ERROR, frame_type, "a stream in too many pieces")
        return stream

    def _write_connection_limits(self, builder: QuicPacketBuilder, space: QuicPacketSpace) -> None:
        limit, first = self._local_max_data, self._configuration.max_data
        used = limit.used
        if _slid(limit.value, used, used, first, CONNECTION_WINDOW) != limit.value:  # else a closer look is no use
            come = used - self._missing()
            read = come - sum(reader.unread for reader in self.unread_streams.values())
            # It grows by what has come, not read: a stream that nobody reads must not silence the others at once.
            limit.value = _slid(limit.value, read, come, first, CONNECTION_WINDOW)
        limit.used = 0  # with which aioquic sends the limit as it is, and does not double it
        try:
            super()._write_connection_limits(builder, space)
        finally:
            limit.used = used

    def _missing(self) -> int:
        """Bytes up to the highest offsets that were named which have not been delivered."""
        missing = 0
        for stream in self._streams.values():
            receiver = stream.receiver
            if receiver.is_finished:
                receiver._buffer.clear()  # a reset leaves it, and its bytes are missed no more
            else:
                missing += receiver.highest_offset - receiver.starting_offset()
        return missing

    def _write_stream_limits(self, builder: QuicPacketBuilder, space: QuicPacketSpace, stream: QuicStream) -> None:
        receiver, first = stream.receiver, self._configuration.max_stream_data
        if receiver.is_finished:
            return
        if receiver.highest_offset >= first // 4:  # before, there is nothing to raise
            reader = self.unread_streams.get(cast(int, stream.stream_id))
            read = receiver.starting_offset() - (0 if reader is None else reader.unread)
            stream.max_stream_data_local = _slid(stream.max_stream_data_local, read, read, first, STREAM_WINDOW)
        if stream.max_stream_data_local == stream.max_stream_data_local_sent:
            return
        named, receiver.highest_offset = receiver.highest_offset, 0  # as above
        try:
            super()._write_stream_limits(builder, space, stream)
        finally:
            receiver.highest_offset = named

    def _idle_timeout(self) -> float:
        timeout = super()._idle_timeout()
        return timeout if self._is_client or self._handshake_complete else min(timeout, HANDSHAKE_TIME)


def _slid(limit: int, read: int, come: int, first: int, most: int) -> int:
    """The limit for the peer in bytes, a window beyond what was read; not raised with each packet.

    The window is ``first`` bytes and as many more as have come, but not above ``most``.
    """
    window = first + come
    if window > most:
        window = max(first, most)
    return read + window if read + window - limit >= first // 2 else limit


class Listener(QuicServer):
    """aioquic's, with a bound on handshakes: each Initial makes a connection, also one from a forged address.

    With ``ASK_FROM`` of them under way a client gets a Retry and begins again with its token, which proves that it
    gets what is sent to its address (RFC 9000, 8.1.2 and 21.2); with ``MAX_HALF_OPEN`` it gets no answer.
    """

    def __init__(
        self, *, configuration: QuicConfiguration, create_protocol: Callable[..., Any], half_open: Sized
    ) -> None:
        super().__init__(configuration=configuration, create_protocol=create_protocol)
        self._half_open = half_open
        self._tokens = QuicRetryTokenHandler()

    def datagram_received(self, data: bytes | str, addr: NetworkAddress) -> None:
        if self._admits(cast(bytes, data), addr):
            super().datagram_received(data, addr)

    def _admits(self, data: bytes, addr: NetworkAddress) -> bool:
        """Whether aioquic may look at it; then ``_retry`` says whether it asks for a token, and takes one."""
        if not data or data[0] < 0x80:
            return True  # a short header begins nothing (RFC 9000, 17.3)
        try:
            header = pull_quic_header(Buffer(data=data), self._configuration.connection_id_length)
        except ValueError:
            return False
        if header.packet_type != QuicPacketType.INITIAL or header.destination_cid in self._protocols:
            return True
        asks = len(self._half_open) >= ASK_FROM
        self._retry = self._tokens if asks or self._proven(header, addr) else None  # type: ignore[assignment]
        return len(self._half_open) < MAX_HALF_OPEN

    def _proven(self, header: QuicHeader, addr: NetworkAddress) -> bool:
        """Whether it has a token of ours: its client goes by the Retry also when none is asked for any more."""
        try:
            self._tokens.validate_token(
                address=addr, destination_cid=header.destination_cid, token=header.token, now=self._loop.time()
            )
        except ValueError:
            return False
        return True

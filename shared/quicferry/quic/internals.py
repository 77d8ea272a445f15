"""The only module that touches what aioquic does not promise to keep; a test notices when it changes."""

from __future__ import annotations

from aioquic import tls
from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.quic.connection import QuicConnection


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

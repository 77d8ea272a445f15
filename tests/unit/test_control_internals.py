"""Fails when aioquic changes what quic/internals.py relies on."""

from __future__ import annotations

import ssl
from pathlib import Path

from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.buffer import Buffer
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.packet import QuicPacketType, pull_quic_header

from quicferry.quic import certificates, internals
from quicferry.quic.server import server_configuration

CLIENT, SERVER = ("c", 1), ("s", 2)


def pair(folder: Path) -> tuple[QuicConnection, QuicConnection]:
    """Two connections that have shaken hands, without a socket."""
    certificate, key = folder / "c.pem", folder / "k.pem"
    certificates.ensure(certificate, key)
    configuration = QuicConfiguration(alpn_protocols=["quicferry/1"], verify_mode=ssl.CERT_NONE)
    client = QuicConnection(configuration=configuration)
    client.connect(SERVER, now=0.0)
    first = client.datagrams_to_send(now=0.0)
    header = pull_quic_header(Buffer(data=first[0][0]), host_cid_length=8)
    assert header.packet_type == QuicPacketType.INITIAL
    server = QuicConnection(
        configuration=server_configuration(str(certificate), str(key)),
        original_destination_connection_id=header.destination_cid,
    )
    for data, _ in first:
        server.receive_datagram(data, CLIENT, now=0.0)
    for turn in range(6):
        exchange(server, client, turn / 100)
    return client, server


def exchange(one: QuicConnection, other: QuicConnection, now: float) -> list[bytes]:
    """Deliver everything once each way; what went from one to the other."""
    sent = [data for data, _ in one.datagrams_to_send(now=now)]
    for data in sent:
        other.receive_datagram(data, CLIENT if one._is_client else SERVER, now=now)
    for data, _ in other.datagrams_to_send(now=now):
        one.receive_datagram(data, SERVER if one._is_client else CLIENT, now=now)
    return sent


def test_only_a_fresh_authentic_packet_raises_the_largest_received(tmp_path: Path) -> None:
    client, server = pair(tmp_path)
    before = internals.largest_received(client)
    assert before >= 0
    server.send_ping(1)
    (datagram,) = exchange(server, client, 1.0)
    after = internals.largest_received(client)
    assert after > before
    client.receive_datagram(datagram, SERVER, now=1.1)  # again
    damaged = datagram[:-1] + bytes([datagram[-1] ^ 1])
    client.receive_datagram(damaged, SERVER, now=1.1)  # not authentic
    client.receive_datagram(b"\x40" + client.host_cid + bytes(40), SERVER, now=1.1)
    client.receive_datagram(bytes(100), SERVER, now=1.1)
    assert internals.largest_received(client) == after


def test_before_the_handshake_nothing_was_received() -> None:
    client = QuicConnection(configuration=QuicConfiguration())
    assert internals.largest_received(client) == -1


def test_unacknowledged_bytes_are_counted(tmp_path: Path) -> None:
    client, server = pair(tmp_path)
    stream_id = internals.reserve_stream(client)
    assert internals.unsent(client, stream_id) == 0
    client.send_stream_data(stream_id, b"x" * 500)
    assert internals.unsent(client, stream_id) == 500
    exchange(client, server, 2.0)
    server.handle_timer(now=2.5)
    exchange(server, client, 2.5)
    assert internals.unsent(client, stream_id) == 0
    assert internals.unsent(client, 400) == 0


def test_reserved_streams_differ(tmp_path: Path) -> None:
    client, _ = pair(tmp_path)
    assert [internals.reserve_stream(client) for _ in range(3)] == [0, 4, 8]


def test_the_congestion_window_is_there(tmp_path: Path) -> None:
    client, _ = pair(tmp_path)
    assert internals.congestion_window(client) >= 10_000


def test_a_probe_is_sent_into_a_full_congestion_window(tmp_path: Path) -> None:
    client, server = pair(tmp_path)
    client.send_stream_data(internals.reserve_stream(client), bytes(100_000))
    for turn in range(200):  # it paces itself
        client.datagrams_to_send(now=2.0 + turn / 1000)  # all of it is lost
    client.send_ping(1)
    assert not client.datagrams_to_send(now=2.2)
    internals.send_probe(client)
    before = internals.largest_received(server)
    exchange(client, server, 2.2)
    assert internals.largest_received(server) > before


async def test_a_stopped_timer_is_gone(tmp_path: Path) -> None:
    client, _ = pair(tmp_path)
    protocol = QuicConnectionProtocol(client)
    protocol.transmit()
    timer = protocol._timer
    assert timer is not None
    internals.stop_timer(protocol)
    assert timer.cancelled()
    assert protocol._timer is None

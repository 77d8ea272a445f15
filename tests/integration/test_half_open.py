"""Handshakes that nobody ends, over real UDP: how many a server keeps, and that others get in."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection

from quicferry.protocol.errors import FerryError
from quicferry.quic import internals
from quicferry.quic.server import MigratableServer
from tests.integration.test_wrappers import until
from tests.integration.wrapper_kit import LIMIT, Tls, dial, make_tls, ping, serving

SERVER = ("192.0.2.1", 4242)


@pytest.fixture
def tls(tmp_path: Path) -> Tls:
    return make_tls(tmp_path)


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(internals, "ASK_FROM", 4)
    monkeypatch.setattr(internals, "MAX_HALF_OPEN", 8)


@pytest.fixture
def sock() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.setblocking(False)
        yield sock


def first_flight() -> tuple[QuicConnection, bytes]:
    """A client's connection and the datagram with its Initial."""
    configuration = QuicConfiguration(alpn_protocols=["quicferry/1"], verify_mode=ssl.CERT_NONE)
    client = QuicConnection(configuration=configuration)
    client.connect(SERVER, now=0.0)
    return client, client.datagrams_to_send(now=0.0)[0][0]


async def begin(server: MigratableServer, sock: socket.socket, count: int) -> None:
    """Handshakes that go no further."""
    for _ in range(count):
        sock.sendto(first_flight()[1], ("127.0.0.1", server.port))
    await until(lambda: len(server._half_open) >= count)


async def until_retry(sock: socket.socket, client: QuicConnection) -> bytes:
    """Read on until the server's Retry has come; the Initial with its token."""
    async with asyncio.timeout(LIMIT):
        while client._retry_count == 0:
            data = await asyncio.get_running_loop().sock_recv(sock, 2000)
            client.receive_datagram(data, SERVER, now=0.1)
    return client.datagrams_to_send(now=0.1)[0][0]


async def test_without_a_crowd_no_client_is_asked_for_its_address(tls: Tls) -> None:
    async with serving(tls) as (server, _), dial(tls, server.port) as connection:
        assert await ping(connection) == b"ping"
        assert connection._wire.quic._retry_count == 0
        assert server._half_open == set()


async def test_in_a_crowd_an_address_must_be_proven(tls: Tls, sock: socket.socket) -> None:
    async with serving(tls) as (server, _):
        await begin(server, sock, internals.ASK_FROM)
        for _ in range(20):
            sock.sendto(first_flight()[1], ("127.0.0.1", server.port))  # its address could be anybody's
        async with dial(tls, server.port) as connection:
            assert await ping(connection) == b"ping"
            assert connection._wire.quic._retry_count == 1
            assert connection.handshakes == 1
            connection.rebind_local()
            assert await ping(connection) == b"ping"
        assert len(server._half_open) == internals.ASK_FROM


async def test_a_token_is_good_once_the_crowd_is_gone_and_after_a_change_of_sockets(
    tls: Tls, sock: socket.socket
) -> None:
    async with serving(tls) as (server, _):
        await begin(server, sock, internals.ASK_FROM)
        client, datagram = first_flight()
        sock.sendto(datagram, ("127.0.0.1", server.port))
        datagram = await until_retry(sock, client)
        for connection in list(server._half_open):
            connection.finish("the test")
        server.udp.rebind()
        sock.sendto(datagram, ("127.0.0.1", server.port))
        await until(lambda: len(server._half_open) == 1)
        (connection,) = server._half_open
        assert connection._quic._retry_source_connection_id is not None


async def test_a_false_token_counts_only_in_a_crowd(tls: Tls, sock: socket.socket) -> None:
    async with serving(tls) as (server, _):
        for expected in (1, internals.ASK_FROM):
            configuration = QuicConfiguration(alpn_protocols=["quicferry/1"], token=b"of another server" * 3)
            client = QuicConnection(configuration=configuration)
            client.connect(SERVER, now=0.0)
            sock.sendto(client.datagrams_to_send(now=0.0)[0][0], ("127.0.0.1", server.port))
            if expected == 1:
                await until(lambda: len(server._half_open) == 1)
                await begin(server, sock, internals.ASK_FROM - 1)
                await until(lambda: len(server._half_open) == internals.ASK_FROM)
        async with dial(tls, server.port) as connection:
            assert await ping(connection) == b"ping"
        assert len(server._half_open) == internals.ASK_FROM


async def test_too_many_proven_ones_are_not_answered_until_some_have_ended(tls: Tls) -> None:
    async with serving(tls) as (server, _):
        socks = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2 * internals.MAX_HALF_OPEN)]
        try:
            for number, sock in enumerate(socks):
                sock.setblocking(False)
                sock.bind(("127.0.0.1", 0))
                client, datagram = first_flight()
                sock.sendto(datagram, ("127.0.0.1", server.port))
                if number < internals.ASK_FROM:
                    await until(lambda number=number: len(server._half_open) == number + 1)  # type: ignore[misc]
                elif number < internals.MAX_HALF_OPEN:
                    sock.sendto(await until_retry(sock, client), ("127.0.0.1", server.port))
                    await until(lambda number=number: len(server._half_open) == number + 1)  # type: ignore[misc]
            with pytest.raises(FerryError, match="did not answer"):
                async with dial(tls, server.port, timeout=0.5):
                    pass
            assert len(server._half_open) == internals.MAX_HALF_OPEN
            for connection in server._half_open:
                connection._quic._close_at = 0.0
                connection.transmit()  # it looks at its timer again
            async with dial(tls, server.port) as other:
                assert await ping(other) == b"ping"
        finally:
            for sock in socks:
                sock.close()


async def test_a_handshake_that_stands_still_leaves_nothing_behind(
    tls: Tls, sock: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(internals, "HANDSHAKE_TIME", 0.05)
    async with serving(tls) as (server, _):
        for _ in range(internals.ASK_FROM - 1):
            sock.sendto(first_flight()[1], ("127.0.0.1", server.port))
        junk = (
            b"\xc0\x00\x00\x00\x01\x08" + bytes(8) + b"\x00\x00\x44\x00" + bytes(1200)
        )  # an Initial that does not decrypt
        sock.sendto(junk, ("127.0.0.1", server.port))
        await until(lambda: server.udp.counters.received == internals.ASK_FROM and not server._half_open)
        assert server._listener._protocols == {}


async def test_a_handshake_that_fails_leaves_nothing_behind(tls: Tls) -> None:
    async with serving(tls) as (server, _):
        with pytest.raises(FerryError, match="handshake failed"):
            async with dial(tls, server.port, alpn=("something-else",)):
                pass
        await until(lambda: not server._half_open and not server._listener._protocols)


@pytest.mark.parametrize("data", [b"", b"\xc0", b"\xc0" + bytes(1300), b"\xff" * 1300, b"\x40" * 30])
async def test_what_is_no_packet_is_passed_over(tls: Tls, data: bytes, sock: socket.socket) -> None:
    async with serving(tls) as (server, _), dial(tls, server.port) as connection:
        sock.sendto(data, ("127.0.0.1", server.port))
        assert await ping(connection) == b"ping"
        assert server._half_open == set()

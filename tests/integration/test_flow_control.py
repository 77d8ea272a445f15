"""Back-pressure over real UDP: an application that does not read stops its peer, and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from quicferry.quic import internals
from quicferry.quic.adapter import StreamConnection
from quicferry.quic.client import Connection
from quicferry.quic.server import MigratableServer
from tests.integration.lossy import Relay, Weather
from tests.integration.test_wrappers import migrate, until
from tests.integration.wrapper_kit import Tls, dial, make_tls, ping, serving

MIB = 1024 * 1024
BULK = 50 * MIB
PIECE = bytes(range(256)) * 256
FULL = 2 * 65_536
"""Bytes at which asyncio's reader calls itself full."""
LONG = 120.0
"""Seconds for what moves fifty MiB on a slow machine."""


@pytest.fixture
def tls(tmp_path: Path) -> Tls:
    return make_tls(tmp_path)


@contextlib.asynccontextmanager
async def joined(tls: Tls, handler, **options) -> AsyncIterator[tuple[MigratableServer, Connection]]:  # type: ignore[no-untyped-def]
    async with serving(tls, handler) as (server, _), dial(tls, server.port, **options) as connection:
        await until(lambda: bool(server.clients))
        yield server, connection


def kept(connection: StreamConnection) -> int:
    """Bytes of the peer that a connection holds: in QUIC, and in the readers that nobody reads."""
    quic = sum(len(stream.receiver._buffer) for stream in connection._quic._streams.values())
    return quic + sum(len(stream.reader._buffer) for stream in connection._streams.values())  # type: ignore[attr-defined]


def quiet(connection: StreamConnection) -> bool:
    """Whether it does nothing any more by itself: no timer but the idle one runs."""
    return connection._quic.get_timer() == connection._quic._close_at


async def push(writer: asyncio.StreamWriter, size: int) -> None:
    for _ in range(size // len(PIECE)):
        writer.write(PIECE)
        await writer.drain()
    writer.write_eof()


async def pull(reader: asyncio.StreamReader, piece: int, turns: int = 0) -> tuple[int, str]:
    """All of a stream, ``piece`` bytes at a time and so many of the loop's turns between; its size and hash."""
    size, digest = 0, hashlib.sha256()
    while data := await reader.read(piece):
        size += len(data)
        digest.update(data)
        for _ in range(turns):
            await asyncio.sleep(0)
    return size, digest.hexdigest()


@pytest.mark.parametrize(("piece", "turns"), [(MIB, 0), (65_536, 30)], ids=["fast", "slow"])
async def test_fifty_mib_go_both_ways_at_once(tls: Tls, piece: int, turns: int) -> None:
    results: asyncio.Queue[tuple[int, str]] = asyncio.Queue()
    highest = 0

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with asyncio.TaskGroup() as both:
            both.create_task(push(writer, BULK))
            pulling = both.create_task(pull(reader, piece, turns))
            await pulling
        await results.put(pulling.result())

    async def watch(server: MigratableServer, connection: Connection) -> None:
        nonlocal highest
        while True:
            highest = max(highest, kept(server.clients[0]), kept(connection._wire))
            await asyncio.sleep(0.01)  # the pace of looking

    async with joined(tls, handler) as (server, connection), asyncio.timeout(LONG):
        watching = asyncio.create_task(watch(server, connection))
        reader, writer = await connection.open_stream()
        got, _ = await asyncio.gather(pull(reader, piece, turns), push(writer, BULK))
        watching.cancel()
        expected = (BULK, hashlib.sha256(PIECE * (BULK // len(PIECE))).hexdigest())
        assert got == expected
        assert await results.get() == expected
        assert highest <= internals.STREAM_WINDOW + FULL + MIB


async def test_who_does_not_read_stops_the_writer_and_loses_nothing(tls: Tls) -> None:
    go = asyncio.Event()
    results: asyncio.Queue[tuple[int, str]] = asyncio.Queue()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if await reader.readexactly(1) != b"?":
            writer.write(b"!")
            return
        await go.wait()
        await results.put(await pull(reader, 65_536))

    async with joined(tls, handler) as (server, connection), asyncio.timeout(LONG):
        _, writer = await connection.open_stream()
        writer.write(b"?")
        pushing = asyncio.create_task(push(writer, 8 * MIB))
        stream = connection._wire._quic._streams[4]
        await until(lambda: stream.sender.highest_offset == stream.max_stream_data_remote)
        for _ in range(20):
            assert await ping(connection, b".") == b"!"  # others go on, and the window stays shut
        assert not pushing.done()
        assert stream.sender.highest_offset == stream.max_stream_data_remote
        assert kept(server.clients[0]) <= MIB + FULL
        await until(lambda: quiet(server.clients[0]) and quiet(connection._wire))
        go.set()
        await pushing
        assert await results.get() == (8 * MIB, hashlib.sha256(PIECE * (8 * MIB // len(PIECE))).hexdigest())


async def test_streams_that_nobody_reads_leave_the_control_stream_room(tls: Tls) -> None:
    """A move must reach the client whatever its application has left lying about."""
    go = asyncio.Event()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(1)
        with contextlib.suppress(ConnectionError):
            await push(writer, 2 * MIB)

    async def leave(connection: Connection) -> int:
        reader, writer = await connection.open_stream()
        writer.write(b"?")
        await go.wait()
        size, _ = await pull(reader, 65_536)
        return size

    async with joined(tls, handler) as (server, connection), asyncio.timeout(LONG):
        left = [asyncio.create_task(leave(connection)) for _ in range(10)]
        wire = connection._wire
        await until(lambda: kept(wire) >= 10 * (MIB - 65_536))
        seen = connection.migrate_seen
        assert server.clients[0].tell(migrate("m", "127.0.0.1", server.port))
        await seen.wait()
        assert kept(wire) <= internals.CONNECTION_WINDOW + 10 * FULL
        go.set()
        assert await asyncio.gather(*left) == [2 * MIB] * 10


async def test_the_connection_window_opens_when_many_streams_are_read(tls: Tls) -> None:
    """More unread than one connection may hold: all of them stop, and go on when they are read."""
    go = asyncio.Event()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await go.wait()
        size, _ = await pull(reader, 1000)
        writer.write(b"%d" % size)

    async with joined(tls, handler) as (server, connection), asyncio.timeout(LONG):

        async def one() -> bytes:
            reader, writer = await connection.open_stream()
            await push(writer, MIB)
            return await reader.read()

        streams = [asyncio.create_task(one()) for _ in range(40)]
        quic = connection._wire._quic
        await until(lambda: quic._remote_max_data_used == quic._remote_max_data > internals.CONNECTION_WINDOW // 2)
        await connection._wire.ping()
        assert quic._remote_max_data_used == quic._remote_max_data
        await until(lambda: quiet(server.clients[0]) and quiet(connection._wire))
        assert kept(server.clients[0]) <= internals.CONNECTION_WINDOW + 40 * FULL
        go.set()
        assert await asyncio.gather(*streams) == [b"%d" % MIB] * 40


async def test_an_application_may_ask_for_more_than_a_window(tls: Tls) -> None:
    size = 3 * internals.STREAM_WINDOW

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"%d" % len(await reader.readexactly(size)))

    async with joined(tls, handler) as (_, connection), asyncio.timeout(LONG):
        reader, writer = await connection.open_stream()
        await push(writer, size)
        assert await reader.read() == b"%d" % size


async def test_a_handler_that_left_holds_nothing(tls: Tls) -> None:
    """What is sent to it is thrown away: neither kept, nor the window shut by it."""

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.readexactly(1))

    async with joined(tls, handler) as (server, connection), asyncio.timeout(LONG):
        for _ in range(5):
            reader, writer = await connection.open_stream()
            await push(writer, internals.CONNECTION_WINDOW // 2)
            assert await reader.read() == PIECE[:1]
        await until(lambda: len(server.clients[0]._streams) == 1)
        assert kept(server.clients[0]) == 0


async def test_what_a_handler_left_unread_is_thrown_away_at_once(tls: Tls) -> None:
    go = asyncio.Event()
    readers: list[asyncio.StreamReader] = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        readers.append(reader)
        await go.wait()

    async with joined(tls, handler) as (server, connection), asyncio.timeout(LONG):
        _, writer = await connection.open_stream()
        writer.write(bytes(4 * MIB))
        await until(lambda: kept(server.clients[0]) >= MIB)
        go.set()
        await until(lambda: kept(server.clients[0]) == 0 and connection._wire.unsent(4) == 0)
        assert len(server.clients[0]._streams) == 2  # its end has not come
        with pytest.raises(ConnectionResetError, match="has returned"):  # and not as if it had
            await readers[0].read()


async def test_a_stream_given_up_holds_nothing(tls: Tls) -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            await push(writer, MIB)

    async with joined(tls, handler) as (_, connection), asyncio.timeout(LONG):
        for _ in range(40):
            reader, writer = await connection.open_stream()
            writer.write(b"?")
            await reader.readexactly(1)
            writer.transport.abort()
        reader, writer = await connection.open_stream()
        writer.write_eof()
        assert (await pull(reader, 65_536))[0] == MIB
        assert kept(connection._wire) == 0


async def test_windows_move_in_bad_weather(tls: Tls) -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        size, _ = await pull(reader, 65_536)
        writer.write(b"%d" % size)

    async with (
        serving(tls, handler) as (server, _),
        Relay(("127.0.0.1", server.port), Weather(loss=0.03, duplicate=0.05, reorder=0.1), 5) as relay,
        dial(tls, relay.port) as connection,
        asyncio.timeout(LONG),
    ):
        reader, writer = await connection.open_stream()
        await push(writer, 3 * MIB)
        assert await reader.read() == b"%d" % (3 * MIB)

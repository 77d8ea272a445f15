"""The two wrappers over real UDP in one process: bad weather, hostile lines, strangers, changing sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from aioquic.asyncio.client import connect as raw_connect
from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.events import ConnectionTerminated, QuicEvent
from structlog.testing import capture_logs

from quicferry.protocol.control import MAX_LINE_BYTES
from quicferry.protocol.errors import FerryError
from quicferry.quic import adapter, qlog
from quicferry.quic.policy import Policy
from quicferry.quic.served import MAX_IDLE_LINES
from tests.integration.lossy import Relay, Weather
from tests.integration.wrapper_kit import LIMIT, Tls, dial, echo, make_tls, ping, serving


@pytest.fixture
def tls(tmp_path: Path) -> Tls:
    return make_tls(tmp_path)


class RawProtocol(QuicConnectionProtocol):
    ended: ConnectionTerminated | None = None

    def quic_event_received(self, event: QuicEvent) -> None:
        if isinstance(event, ConnectionTerminated):
            self.ended = event
        super().quic_event_received(event)

    def _create_stream(self, stream_id: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = super()._create_stream(stream_id)
        self.writers = [*getattr(self, "writers", []), writer]
        return reader, writer


@contextlib.asynccontextmanager
async def raw(port: int, alpn: str = "quicferry/1") -> AsyncIterator[RawProtocol]:
    """Plain aioquic, nothing of ours between it and the server."""
    configuration = QuicConfiguration(is_client=True, alpn_protocols=[alpn], verify_mode=ssl.CERT_NONE)
    async with raw_connect("127.0.0.1", port, configuration=configuration, create_protocol=RawProtocol) as protocol:
        assert isinstance(protocol, RawProtocol)
        yield protocol
        for writer in getattr(protocol, "writers", []):
            with contextlib.suppress(ValueError, RuntimeError):  # finished, or reset by the server
                writer.close()  # aioquic's own do not notice that their connection is over


# Streams.


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_every_byte_gets_through_bad_weather(tls: Tls, seed: int) -> None:
    weather = Weather(loss=0.08, duplicate=0.1, reorder=0.2)
    data = random.Random(seed).randbytes(200_000)
    async with (
        serving(tls) as (server, recorder),
        Relay(("127.0.0.1", server.port), weather, seed) as relay,
        dial(tls, relay.port, name="wet") as connection,
    ):
        assert await ping(connection, data) == data
        answers = await asyncio.gather(*(ping(connection, b"%d" % number) for number in range(50)))
        assert answers == [b"%d" % number for number in range(50)]
        assert relay.dropped
        assert relay.duplicated
        assert relay.reordered
        assert [client.name for client in server.clients] == ["wet"]
        assert recorder.events == []


async def test_more_than_the_buffers_hold_goes_through_in_order(tls: Tls) -> None:
    """``drain`` waits: a writer that is faster than the network does not fill the memory."""
    data = random.Random(7).randbytes(4 * adapter.HIGH_WATER)
    async with serving(tls) as (server, _), dial(tls, server.port) as connection, asyncio.timeout(LIMIT):
        reader, writer = await connection.open_stream()
        highest = 0

        async def write() -> None:
            nonlocal highest
            for start in range(0, len(data), 65_536):
                writer.write(data[start : start + 65_536])
                highest = max(highest, connection._wire.unsent(4))
                await writer.drain()
            writer.write_eof()

        writing = asyncio.create_task(write())
        assert await reader.read() == data
        await writing
        assert highest <= adapter.HIGH_WATER + 65_536
        writer.close()
        await writer.wait_closed()


async def test_a_reset_stream_reaches_the_handler_and_only_it(tls: Tls) -> None:
    seen: asyncio.Queue[str] = asyncio.Queue()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await echo(reader, writer)
        except ConnectionResetError as error:
            await seen.put(str(error))
            raise

    async with serving(tls, handler) as (server, _), dial(tls, server.port) as connection, asyncio.timeout(LIMIT):
        reader, writer = await connection.open_stream()
        writer.write(b"half")
        assert await reader.readexactly(4) == b"half"
        writer.transport.abort()
        assert "reset" in await seen.get()
        assert await ping(connection) == b"ping"


async def test_a_failing_handler_costs_its_stream_only(tls: Tls) -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if await reader.read(1) == b"!":
            raise RuntimeError("a defect of the application")
        writer.write(b"fine")

    async with serving(tls, handler) as (server, _), dial(tls, server.port) as connection:
        with capture_logs() as logs:
            with pytest.raises(ConnectionResetError):
                await ping(connection, b"!")
            assert await ping(connection, b".") == b"fine"
        assert [line["event"] for line in logs if line["log_level"] == "error"] == ["stream_handler_failed"]


async def test_the_server_may_open_streams_too(tls: Tls) -> None:
    got: asyncio.Queue[bytes] = asyncio.Queue()

    async def on_stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await got.put(await reader.read())

    async with serving(tls) as (server, _), dial(tls, server.port, on_stream=on_stream) as connection:
        assert await ping(connection) == b"ping"
        stream = server.clients[0].new_stream()
        stream.write(b"from the server")
        stream.write_eof()
        async with asyncio.timeout(LIMIT):
            assert await got.get() == b"from the server"


async def test_too_many_connections_are_refused_with_a_reason(tls: Tls) -> None:
    async with serving(tls, max_connections=1) as (server, _), dial(tls, server.port) as first:
        assert await ping(first) == b"ping"
        async with dial(tls, server.port) as second, asyncio.timeout(LIMIT):
            await second.wait_closed()
            assert second.close_reason == "too many connections"
        assert await ping(first) == b"ping"


# Connecting.


async def test_connect_says_what_went_wrong(tls: Tls, tmp_path: Path) -> None:
    other = make_tls(tmp_path / "other")
    async with serving(tls) as (server, _):
        with pytest.raises(FerryError) as caught:
            async with dial(other, server.port):
                pass
        assert caught.value.code == "connect_failed"
        with pytest.raises(FerryError, match="did not answer"):
            async with dial(tls, 1, timeout=0.1):
                pass
        with pytest.raises(FerryError, match="can't be read"):
            async with dial(Tls(str(tmp_path / "none.pem"), ""), server.port):
                pass
        with pytest.raises(FerryError, match="can't name a client"):
            async with dial(tls, server.port, name="no spaces please"):
                pass
        with pytest.raises(FerryError, match="handshake failed"):
            async with dial(tls, server.port, alpn=("something-else",)):
                pass


async def test_any_alpn_the_application_configures(tls: Tls) -> None:
    from quicferry.quic.server import MigratableServer, server_configuration

    configuration = server_configuration(tls.certificate, tls.private_key, alpn=("mine", "quicferry/1"))
    async with (
        MigratableServer(echo, configuration=configuration, host="127.0.0.1", port=0, signals=False) as server,
        dial(tls, server.port, alpn=("mine",)) as connection,
    ):
        assert await ping(connection) == b"ping"


@pytest.mark.parametrize("listen", ["::1", "::"])
async def test_ipv6(tls: Tls, listen: str) -> None:
    from quicferry.quic.client import connect

    if not _has_ipv6():
        pytest.skip("IPv6 is missing: no ::1 on this machine")
    async with (
        serving(tls, host=listen) as (server, _),
        connect("::1", server.port, cafile=tls.certificate) as connection,
    ):
        assert connection.peer == f"[::1]:{server.port}"
        assert await ping(connection) == b"ping"
        if listen == "::":  # and IPv4 on the same socket
            async with dial(tls, server.port) as mapped:
                assert await ping(mapped) == b"ping"
                server.udp.rebind()
                assert await ping(mapped) == b"ping"


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


async def test_clients_of_one_name_are_told_apart(tls: Tls) -> None:
    name = "n" * 64
    async with serving(tls) as (server, _), dial(tls, server.port, name=name) as one:
        assert await ping(one) == b"ping"
        async with dial(tls, server.port, name=name) as two:
            assert await ping(two) == b"ping"
            assert sorted(client.name for client in server.clients) == ["n" * 62 + "-2", name]


# The control stream, hostile both ways.

HOSTILE: dict[str, bytes] = {
    "no json": b"{this is not json}\n",
    "wrong type": b'{"type":"launch"}\n',
    "wrong field": b'{"type":"ack","id":7}\n',
    "name out of range": b'{"type":"ack","id":"a b"}\n',
    "an array": b"[1,2,3]\n",
    "binary": bytes(range(11, 256)) + b"\n",
    "not utf-8": b'{"type":"ack","id":"\xff\xfe"}\n',
    "huge": b'{"type":"ack","id":"' + b"x" * MAX_LINE_BYTES + b'"}\n',
    "huge without an end": b"x" * (MAX_LINE_BYTES + 1),
    "deep": b"[" * 3000 + b"\n",
    "a number too large": b'{"type":"moved","id":"a","source":"wrapper","interruption_ms":1e999}\n',
}


@pytest.mark.parametrize("line", HOSTILE.values(), ids=HOSTILE.keys())
async def test_a_hostile_client_line_costs_the_control_stream_only(tls: Tls, line: bytes) -> None:
    async with serving(tls) as (server, _), dial(tls, server.port, name="evil") as connection:
        assert await ping(connection) == b"ping"
        assert len(server.clients) == 1
        with capture_logs() as logs:
            assert connection._follower._control is not None
            connection._follower._control.write(line)
            await until(lambda: not server.clients)
        assert [entry["event"] for entry in logs if entry["log_level"] == "error"] == ["control_stream_broken"]
        assert await ping(connection) == b"ping"
        await until(lambda: not connection.follows)


@pytest.mark.parametrize("line", HOSTILE.values(), ids=HOSTILE.keys())
async def test_a_hostile_server_line_costs_the_control_stream_only(tls: Tls, line: bytes) -> None:
    async with serving(tls) as (server, _), dial(tls, server.port) as connection:
        assert await ping(connection) == b"ping"
        with capture_logs() as logs:
            assert server.clients[0].tell(line)
            await until(lambda: not connection.follows)
        assert "control_stream_broken" in [entry["event"] for entry in logs if entry["log_level"] == "error"]
        assert await ping(connection) == b"ping"


async def test_lines_without_effect_are_bounded(tls: Tls) -> None:
    async with serving(tls) as (server, _), dial(tls, server.port) as connection:
        assert await ping(connection) == b"ping"
        assert connection._follower._control is not None
        connection._follower._control.write(b'{"type":"ack","id":"x"}\n' * MAX_IDLE_LINES)
        assert await ping(connection) == b"ping"
        assert len(server.clients) == 1
        connection._follower._control.write(b'{"type":"ack","id":"x"}\n')
        await until(lambda: not server.clients)
        assert await ping(connection) == b"ping"


async def until(condition: Callable[[], bool]) -> None:
    """Give the event loop turns until it holds; there is no event for what goes away."""
    async with asyncio.timeout(LIMIT):
        while not condition():  # noqa: ASYNC110 - no event tells of it
            await asyncio.sleep(0.001)


# The first stream: hello or not.


async def first_stream(tls: Tls, *pieces: bytes, end: bool) -> tuple[bytes, int, bool]:
    """Send pieces on stream 0 of a raw connection; what came back, clients known, whether it still serves."""
    async with serving(tls) as (server, _), raw(server.port) as protocol, asyncio.timeout(LIMIT):
        reader, writer = await protocol.create_stream()
        for piece in pieces:
            writer.write(piece)
            await protocol.ping()  # the piece is there before the next one leaves
        if end:
            writer.write_eof()
        try:
            back = await reader.read() if end else await reader.readexactly(sum(map(len, pieces)))
        except asyncio.IncompleteReadError as error:
            back = error.partial
        known = len(server.clients)
        other, other_writer = await protocol.create_stream()
        other_writer.write(b"still there")
        return back, known, await other.readexactly(11) == b"still there"


@pytest.mark.parametrize(
    ("pieces", "end"),
    [
        ((b"ping",), False),
        ((b"{not a hello}\n", b"more"), False),
        ((b'{"json":"of the application"}\n', b'{"again":1}\n'), False),
        ((b"{" * (MAX_LINE_BYTES + 10),), False),
        ((b"{", b"x" * MAX_LINE_BYTES, b"y"), False),
        ((b"{unfinished",), True),
        ((b'{"type":"hello","client":"x"}',), True),
        ((b"{slow, but no hello",), False),
        ((b"\n{",), True),
    ],
)
async def test_a_first_stream_without_hello_is_the_applications_and_intact(
    tls: Tls, pieces: tuple[bytes, ...], end: bool
) -> None:
    back, known, serves = await first_stream(tls, *pieces, end=end)
    assert back == b"".join(pieces)
    assert known == 0
    assert serves


@pytest.mark.parametrize(
    ("pieces", "known"),
    [
        ((b'{"type":"hello","client":"raw","extra":[1]}\n',), 1),
        ((b'{"ty', b'pe":"hello","cli', b'ent":"raw","v":99}\n'), 1),
        ((b'{"type":"hello"}\n',), 0),
        ((b'{"type":"hello","client":"../../etc"}\n',), 0),
        ((b'{"type":"hello","client":"raw"}\n', b"garbage\n"), 0),
        ((b'{"type":"hello","client":"raw"}\ngarbage\n',), 0),
    ],
)
async def test_a_first_stream_that_says_hello_is_the_control_stream(
    tls: Tls, pieces: tuple[bytes, ...], known: int
) -> None:
    async with serving(tls) as (server, _), raw(server.port) as protocol, asyncio.timeout(LIMIT):
        _, writer = await protocol.create_stream()
        for piece in pieces:
            writer.write(piece)
            await protocol.ping()
        assert len(server.clients) == known
        other, other_writer = await protocol.create_stream()
        other_writer.write(b"still there")
        assert await other.readexactly(11) == b"still there"


async def test_a_first_stream_may_be_one_way_or_come_late(tls: Tls) -> None:
    """Stream 4 before stream 0: only stream 0 is asked whether it says hello."""
    async with serving(tls) as (server, _), raw(server.port) as protocol, asyncio.timeout(LIMIT):
        quic = protocol._quic
        quic.send_stream_data(0, b"")  # opened, silent
        quic.send_stream_data(4, b"four")
        reader, _ = protocol._create_stream(4)
        protocol.transmit()
        assert await reader.readexactly(4) == b"four"
        quic.send_stream_data(0, b'{"type":"hello","client":"late"}\n')
        protocol.transmit()
        await protocol.ping()
        assert [client.name for client in server.clients] == ["late"]


# Where a client goes.


async def test_a_refusal_says_why_and_the_old_peer_stays(tls: Tls) -> None:
    async with serving(tls) as (server, _), dial(tls, server.port, policy=Policy.only("192.0.2.0/24")) as connection:
        assert await ping(connection) == b"ping"
        heard: list[Any] = []
        server.acked = lambda client, ack: bool(heard.append(ack)) or True  # type: ignore[method-assign]
        server.clients[0].tell(migrate("m", "127.0.0.1", 9))
        await until(lambda: bool(heard))
        assert heard[0].refused == "127.0.0.1 is not in the allowed networks"
        assert not connection.migrate_seen.is_set()
        assert connection.migration is None
        assert await ping(connection) == b"ping"


def migrate(migration: str, host: str, port: int, epoch: int = 0) -> bytes:
    message = {"type": "migrate", "id": migration, "addr": host, "port": port, "epoch": epoch}
    return json.dumps(message).encode() + b"\n"


async def test_repeated_replaced_and_outdated_moves(tls: Tls) -> None:
    async with serving(tls) as (server, _), serving(tls) as (elsewhere, _), dial(tls, server.port) as connection:
        assert await ping(connection) == b"ping"
        heard: list[Any] = []
        server.acked = lambda client, ack: bool(heard.append((ack.id, ack.refused))) or True  # type: ignore[method-assign]
        client = server.clients[0]
        client.tell(migrate("one", "127.0.0.1", elsewhere.port, 1))
        await until(lambda: len(heard) == 1)
        seen = connection.migrate_seen
        first = connection.migration
        assert first is not None
        assert seen.is_set()
        client.tell(migrate("one", "127.0.0.1", elsewhere.port, 1))
        await until(lambda: len(heard) == 2)
        assert connection.migration is first
        client.tell(migrate("two", "127.0.0.2", elsewhere.port, 2))
        await until(lambda: len(heard) == 3)
        assert await first.arrived(LIMIT) == "replaced"
        second = connection.migration
        assert second is not None
        assert second.id == "two"
        client.tell(b'{"type":"rollback","id":"one"}\n')  # too late: it was replaced
        assert await ping(connection) == b"ping"
        assert second.outcome is None
        client.tell(b'{"type":"rollback","id":"two"}\n')
        assert await second.arrived(LIMIT) == "rolled_back"
        # One that goes through raises the epoch; what is below it is outdated.
        other = server.udp._socket
        assert other is not None
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as target:
            target.setblocking(False)
            target.bind(("127.0.0.1", 0))
            client.tell(migrate("three", "127.0.0.1", target.getsockname()[1], 5))
            await until(lambda: len(heard) == 4)
            server.udp.adopt(target.dup())
            third = connection.migration
            assert third is not None
            assert await third.arrived(LIMIT) == "arrived"
            client.tell(migrate("old", "127.0.0.1", 9, 4))
            await until(lambda: len(heard) == 5)
        assert heard[-1] == ("old", "outdated: epoch 4, the server is at 5")
        assert await ping(connection) == b"ping"
        assert [id_ for id_, refused in heard if not refused] == ["one", "one", "two", "three"]


async def test_a_target_whose_first_word_is_the_next_move_has_spoken(tls: Tls) -> None:
    """A client that was out of reach meanwhile: two moves on, and a rollback of the second must reach it."""
    async with serving(tls) as (server, _), dial(tls, server.port) as connection:
        assert await ping(connection) == b"ping"
        seam, follower = connection._seam, connection._follower
        old, first, second = seam.peer, ("127.0.0.2", 9), ("127.0.0.3", 9)

        def brings(line: bytes) -> Callable[[bytes, Any], bool]:
            return lambda *_: follower._hear(line) is None

        follower._hear(migrate("one", *first, 1))
        assert (seam.peer, seam.pending) == (old, first)
        deliver = seam._deliver
        try:
            seam._deliver = brings(migrate("two", *second, 2))
            seam._arrived(b"", first)
            assert (seam.peer, seam.pending) == (first, second)
            assert [move.outcome for move in follower.history] == ["arrived", None]
            seam._deliver = brings(b'{"type":"rollback","id":"two"}\n')
            seam._arrived(b"", first)
            assert (seam.peer, seam.pending) == (first, None)
            assert [move.outcome for move in follower.history] == ["arrived", "rolled_back"]
        finally:
            seam._deliver = deliver


async def test_datagrams_of_others_are_not_read(tls: Tls) -> None:
    """An answer from where nobody was admitted does not reach QUIC, and does not pin anything."""
    async with serving(tls) as (server, _), dial(tls, server.port) as connection:
        assert await ping(connection) == b"ping"
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
            stranger.sendto(b"\x40" + bytes(60), ("127.0.0.1", connection._seam.local[1]))
            await until(lambda: connection.foreign_datagrams == 1)
        assert await ping(connection) == b"ping"


async def test_only_a_fresh_authentic_packet_pins_the_target(tls: Tls) -> None:
    async with serving(tls) as (server, _), dial(tls, server.port) as connection:
        assert await ping(connection) == b"ping"
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as target:
            target.setblocking(False)
            target.bind(("127.0.0.1", 0))
            seen = connection.migrate_seen
            server.clients[0].tell(migrate("m", *target.getsockname()))
            async with asyncio.timeout(LIMIT):
                await seen.wait()
            received = connection._seam.counters.received
            forged = bytes([0x40]) + connection._wire.quic.host_cid + bytes(40)
            target.sendto(forged, ("127.0.0.1", connection._seam.local[1]))
            await until(lambda: connection._seam.counters.received > received)
            assert await ping(connection) == b"ping"
            migration = connection.migration
            assert migration is not None
            assert migration.outcome is None
            assert connection._seam.pending is not None


# Strangers, and sockets that change.


async def test_a_stranger_is_served_by_plain_quic(tls: Tls) -> None:
    async with serving(tls) as (server, _), raw(server.port) as protocol, asyncio.timeout(LIMIT):
        reader, writer = await protocol.create_stream()
        writer.write(b"no hello from me")
        writer.write_eof()
        assert await reader.read() == b"no hello from me"
        assert server.clients == []
        assert len(server.strangers) == 1


async def test_rebind_local_keeps_the_session(tls: Tls) -> None:
    async with serving(tls) as (server, _), dial(tls, server.port) as connection:
        before = connection.local
        for local in (None, ("127.0.0.1", 0), ("127.0.0.3", 0), None):
            assert await ping(connection) == b"ping"
            now = connection.rebind_local(local)
            assert now != before  # an earlier one the kernel may choose again
            before = now
            assert await ping(connection, b"after") == b"after"
        with pytest.raises(OSError):
            connection.rebind_local(("192.0.2.1", 0))  # not ours
        assert await ping(connection) == b"ping"
        assert connection.handshakes == 1
        assert len(server.clients) == 1


async def test_rebind_local_with_traffic_in_bad_weather(tls: Tls) -> None:
    async with (
        serving(tls) as (server, _),
        Relay(("127.0.0.1", server.port), Weather(loss=0.05, duplicate=0.05, reorder=0.1), 11) as relay,
        dial(tls, relay.port) as connection,
    ):
        data = random.Random(11).randbytes(100_000)
        echoing = asyncio.create_task(ping(connection, data))
        for _ in range(5):
            assert await ping(connection) == b"ping"
            connection.rebind_local()
        assert await echoing == data
        assert connection.handshakes == 1


async def test_a_swap_under_concurrent_traffic_is_not_seen_by_quic(tls: Tls) -> None:
    async with serving(tls) as (server, _), contextlib.AsyncExitStack() as stack:
        connections = [await stack.enter_async_context(dial(tls, server.port)) for _ in range(4)]
        data = random.Random(3).randbytes(300_000)
        with capture_logs() as logs:
            echoing = [asyncio.create_task(ping(connection, data)) for connection in connections]
            swaps = 0
            while not all(task.done() for task in echoing):
                server.udp.rebind()
                swaps += 1
                await asyncio.sleep(0.002)  # the pace of the swaps, so that there is traffic between them
            assert all([await task == data for task in echoing])
        assert swaps > 3
        assert server.udp.generation == swaps + 1
        assert server.udp.counters.send_errors == 0
        assert [entry for entry in logs if entry["log_level"] in ("warning", "error")] == []
        assert {connection.handshakes for connection in connections} == {1}


# The trace.


async def test_the_trace_proves_one_handshake_and_the_window(tls: Tls, tmp_path: Path) -> None:
    folder = tmp_path / "qlog"
    async with serving(tls) as (server, _), dial(tls, server.port, qlog=str(folder)) as connection:
        assert await ping(connection, bytes(100_000)) == bytes(100_000)
        live = connection.traces.all[0].windows
        odcid = connection.odcid
        window = connection.congestion_window
    (path,) = folder.iterdir()
    stored = qlog.read(path)
    assert path.stem == stored.odcid == odcid
    assert stored.handshakes == live.handshakes == 1
    assert list(stored.timeline) == list(live.timeline)
    assert stored.timeline[-1][1] == window
    assert stored.last_handshake_at < stored.timeline[-1][0]
    frames = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    received = [frame for frame in frames if frame["name"] == "transport:packet_received"]
    assert any(frame["data"]["frames"] for frame in received)

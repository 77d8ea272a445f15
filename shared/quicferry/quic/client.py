"""The client wrapper: a QUIC connection that follows its server from one address to the next."""

from __future__ import annotations

import asyncio
import secrets
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

import msgspec
import structlog
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection

from quicferry.protocol.errors import FerryError
from quicferry.protocol.wire import Name
from quicferry.quic import internals
from quicferry.quic.adapter import Stream, StreamConnection
from quicferry.quic.addresses import Peer, normalised, shown
from quicferry.quic.follower import Follower, QuiesceHook
from quicferry.quic.migration import Migration
from quicferry.quic.policy import Policy
from quicferry.quic.qlog import SETTLE, Traces
from quicferry.quic.swappable import FAKE_PEER, SwappablePeer, open_client_socket

log = structlog.get_logger(__name__)

ALPN: Final = ("quicferry/1",)

StreamHandler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class ClientWire(StreamConnection):
    """The aioquic protocol under a :class:`Connection`."""

    def __init__(self, quic: QuicConnection, on_stream: StreamHandler | None) -> None:
        super().__init__(quic)
        self.quic = quic
        self.close_reason = ""
        self.on_over: Callable[[], None] = lambda: None
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._on_stream = on_stream
        self._tasks: set[asyncio.Task[None]] = set()

    def deliver(self, data: bytes, peer: tuple[str, int]) -> bool:
        """For the seam: whether QUIC accepted a fresh packet in ``data``."""
        before = internals.largest_received(self.quic)
        self.datagram_received(data, peer)
        return internals.largest_received(self.quic) > before

    def handshake_completed(self) -> None:
        if not self.ready.done():
            self.ready.set_result(None)

    def connection_over(self, reason: str) -> None:
        self.close_reason = reason
        for task in self._tasks:
            task.cancel()
        if not self.ready.done():
            self.ready.set_exception(
                FerryError("connect_failed", f"The QUIC handshake failed: {reason or 'the server closed it'}.")
            )
        self.on_over()

    def stream_opened(self, stream: Stream) -> None:
        if self._on_stream is None:
            stream.abort()
            return
        task = asyncio.create_task(self._serve(self._on_stream, stream), name=f"stream-{stream.id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, handler: StreamHandler, stream: Stream) -> None:
        try:
            await handler(stream.reader, stream.writer)
        except ConnectionError as error:
            log.debug("stream_lost", stream=stream.id, reason=str(error))
        except Exception:  # an application's defect ends its stream, not the session
            log.exception("stream_handler_failed", stream=stream.id)
            stream.abort()
        finally:
            with suppress(ConnectionError):
                stream.release()


class Connection:
    """A connection to a server that may move. Made by :func:`connect`."""

    def __init__(self, wire: ClientWire, seam: SwappablePeer, follower: Follower, traces: Traces) -> None:
        self.traces = traces
        """The connection's qlog: what is said of handshakes and congestion windows is read from it."""
        self._wire = wire
        self._seam = seam
        self._follower = follower

    async def open_stream(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A new bidirectional stream. Raises ConnectionResetError once the connection is over."""
        stream = self._wire.new_stream()
        return stream.reader, stream.writer

    @property
    def peer(self) -> str:
        """The server's real address now."""
        return shown(self._seam.peer)

    @property
    def local(self) -> str:
        """Our own address now; the host is a wildcard unless it was chosen."""
        return shown(self._seam.local)

    @property
    def migrate_seen(self) -> asyncio.Event:
        """Set once when the server says it will move; ask again for the next move's event."""
        return self._follower.seen

    @property
    def migration(self) -> Migration | None:
        """The newest move, ended or not."""
        return self._follower.current

    @property
    def migrations(self) -> Sequence[Migration]:
        """The moves so far, the newest last; the last 64 of them."""
        return tuple(self._follower.history)

    @property
    def follows(self) -> bool:
        """Whether the control stream works; without it the server can't tell us of a move."""
        return self._follower.has_control

    @property
    def handshakes(self) -> int:
        """Handshakes in the trace."""
        return self.traces.handshakes

    @property
    def congestion_window(self) -> int:
        """Bytes that may be in flight, now."""
        return internals.congestion_window(self._wire.quic)

    @property
    def foreign_datagrams(self) -> int:
        """Datagrams dropped because their sender is not an admitted peer."""
        return self._seam.counters.foreign

    @property
    def over(self) -> bool:
        return self._wire.over

    @property
    def close_reason(self) -> str:
        """Why the connection ended, in the words of whoever ended it."""
        return self._wire.close_reason

    @property
    def odcid(self) -> str:
        """The connection's original destination id, hexadecimal: a rebuilt connection has another one."""
        return self.traces.all[-1].windows.odcid

    def windows_around(self, migration: Migration) -> tuple[int, int]:
        """Congestion window in bytes before a move's pause, and the smallest one from there to a second after it."""
        windows = self.traces.all[-1].windows
        before = windows.before(migration.last_before)
        until = (migration.first_after or migration.last_before) + SETTLE
        return before, windows.lowest(migration.last_before, until)

    def report_interruption(self, interruption_ms: float, migration: Migration | None = None) -> None:
        """Tell the server how long the application was without data in a move, the newest by default.

        Milliseconds, 0 to 3,600,000. Raises ValueError without a move to report on, or out of range.
        """
        self._follower.report_interruption(interruption_ms, migration)

    def rebind_local(self, local: tuple[str, int] | None = None) -> str:
        """Go on from another local address, ``(IP literal, port)`` or one the kernel chooses; the session stays.

        Uses a new connection id, as RFC 9000, 9.5 asks, and lets the server validate the new path. Returns
        the new local address. Raises OSError if it can't be had; nothing has changed then.
        """
        address = shown(self._seam.rebind_local(local))
        self._wire.quic.change_connection_id()
        self._wire.probe()
        log.info("local_rebound", local=address)
        return address

    def close(self, reason: str = "") -> None:
        """Say goodbye; :meth:`wait_closed` waits for the end."""
        self._wire.say_goodbye(reason)

    async def wait_closed(self) -> None:
        """Until the connection is over, by whichever side."""
        await self._wire.wait_closed()


def client_configuration(
    *,
    cafile: str | None = None,
    verify: bool = True,
    server_name: str | None = None,
    alpn: Sequence[str] = ALPN,
    idle_timeout: float = 60.0,
) -> QuicConfiguration:
    """QUIC settings of a client. Raises FerryError ``bad_settings`` if ``cafile`` has no certificate."""
    configuration = QuicConfiguration(
        is_client=True, alpn_protocols=list(alpn), server_name=server_name, idle_timeout=idle_timeout
    )
    if not verify:
        configuration.verify_mode = ssl.CERT_NONE
    if cafile is not None:
        try:  # aioquic would read it in the middle of the handshake, and fail there
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile)
        except OSError as error:  # ssl.SSLError is one
            raise FerryError(
                "bad_settings",
                f"The certificate file {cafile} can't be read: {error.strerror or error}.",
                hint="It is the server's certificate, or its CA's, in PEM.",
            ) from None
        configuration.load_verify_locations(cafile=cafile)
    return configuration


@asynccontextmanager
async def connect(
    host: str,
    port: int = 4242,
    *,
    configuration: QuicConfiguration | None = None,
    cafile: str | None = None,
    verify: bool = True,
    server_name: str | None = None,
    alpn: Sequence[str] = ALPN,
    name: str | None = None,
    policy: Policy | None = None,
    on_quiesce: QuiesceHook | None = None,
    on_stream: StreamHandler | None = None,
    qlog: str | None = None,
    local: tuple[str, int] | None = None,
    timeout: float = 10.0,
) -> AsyncIterator[Connection]:
    """Connect to a server, say hello, and follow it wherever it moves; closes the connection at the end.

    ``name`` is what the server's events call this client; ``policy`` says where the server may send it;
    ``on_quiesce`` is called in a move and returns once it is safe to dump the server; ``on_stream`` serves
    streams that the server opens; ``qlog`` is a directory for traces; ``configuration`` replaces
    the five settings after it. Raises FerryError ``connect_failed`` within ``timeout`` seconds or ``bad_settings``.
    """
    client = _client_name(name)
    if not 1 <= port <= 65_535:
        raise FerryError("bad_settings", f"{port} is no UDP port.", hint="A port is a number from 1 to 65535.")
    configuration = configuration or client_configuration(
        cafile=cafile, verify=verify, server_name=server_name, alpn=alpn
    )
    configuration.server_name = configuration.server_name or host
    try:
        traces = Traces(qlog)
    except OSError as error:
        raise FerryError("bad_settings", f"No traces can be written to {qlog}: {error.strerror}.") from None
    configuration.quic_logger = traces
    peer = await _resolve(host, port, timeout)
    try:
        sock = open_client_socket(peer, local)
    except (OSError, ValueError) as error:
        raise FerryError("connect_failed", f"No local UDP socket: {error}.") from None
    wire = ClientWire(QuicConnection(configuration=configuration), on_stream)
    seam = SwappablePeer(sock, peer, wire.deliver)
    wire.connection_made(seam)
    follower = Follower(wire, seam, policy=policy or Policy(), on_quiesce=on_quiesce)
    wire.on_over = follower.stop
    try:
        wire.connect(FAKE_PEER)
        try:
            async with asyncio.timeout(timeout):
                await wire.ready
        except TimeoutError:
            raise FerryError(
                "connect_failed",
                f"{host} port {port} did not answer within {timeout:g} s.",
                hint="Is a QUIC server listening on that UDP port?",
            ) from None
        follower.start(client)
        log.info("connected", peer=shown(peer), client=client)
        yield Connection(wire, seam, follower, traces)
    finally:
        follower.stop()
        wire.finish("")
        seam.close()
        traces.close()


def _client_name(name: str | None) -> str:
    if name is None:
        return f"client-{secrets.token_hex(4)}"
    try:
        return msgspec.convert(name, Name)
    except msgspec.ValidationError:
        raise FerryError(
            "bad_settings", f"{name!r} can't name a client.", hint="Letters, digits, '_' and '-', 64 at most."
        ) from None


async def _resolve(host: str, port: int, timeout: float) -> Peer:
    with suppress(ValueError, OSError):
        return normalised((host, port))
    try:
        async with asyncio.timeout(timeout):
            found: list[Any] = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    except (OSError, TimeoutError, UnicodeError) as error:
        raise FerryError("connect_failed", f"The host {host!r} was not found: {error or 'timeout'}.") from None
    # IPv4 first: published ports of containers often listen on nothing else.
    found.sort(key=lambda entry: entry[0] != socket.AF_INET)
    return normalised(found[0][4])

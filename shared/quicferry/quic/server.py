"""The server wrapper: a QUIC listener that can be moved while its clients stay connected."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import signal
import threading
from collections.abc import Awaitable, Callable
from typing import Any, Final

import structlog
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection

from quicferry.protocol.agents import ArmReply, ArmRequest
from quicferry.protocol.api import Address
from quicferry.protocol.control import Ack, Hello, Moved, Ready
from quicferry.protocol.errors import FerryError
from quicferry.quic import internals
from quicferry.quic.adapter import Stream
from quicferry.quic.addresses import shown
from quicferry.quic.herald import Herald, Outbox, SilentHerald
from quicferry.quic.migratable import MigratableUDP
from quicferry.quic.mover import CLOSE_TIME, FLUSH_TIME, Mover, QuiesceHook, ResumeHook
from quicferry.quic.served import ServedConnection

log = structlog.get_logger(__name__)

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
"""One call a stream of the application."""

ALPN: Final = ("quicferry/1",)
MAX_CONNECTIONS: Final = 4096
MAX_STREAMS: Final = 1024
"""Application streams at once of one connection."""
LEAVE_TIME: Final = 2.0
"""Seconds a stream's handler may go on after its connection ended or the server stopped."""
REFUSED: Final = 2
"""CONNECTION_REFUSED (RFC 9000, 20.1), as an application code."""


def server_configuration(
    certificate: str, private_key: str, *, alpn: tuple[str, ...] = ALPN, idle_timeout: float = 60.0
) -> QuicConfiguration:
    """QUIC settings from PEM files. Raises FerryError ``bad_settings`` if they can't be used."""
    configuration = QuicConfiguration(is_client=False, alpn_protocols=list(alpn), idle_timeout=idle_timeout)
    try:
        configuration.load_cert_chain(certificate, private_key)
        if configuration.private_key.public_key() != configuration.certificate.public_key():
            raise ValueError("they do not belong together")
    except (OSError, ValueError, TypeError, LookupError) as error:  # LookupError: a file without a certificate
        raise FerryError(
            "bad_settings",
            f"The certificate {certificate} and the key {private_key} can't be used: {error}.",
            hint="Both are PEM files; the key is not encrypted.",
        ) from None
    return configuration


class MigratableServer:
    """Serves ``handler`` one call a stream, and moves when told to.

    Use it as an asynchronous context manager, in the main thread if ``signals``: SIGTERM begins the move that
    :meth:`arm` prepared, or with ``migrate_to`` tells the clients to go there, or else stops; SIGUSR2 asks the
    berth's agent for a socket, or binds a new one; SIGINT stops.
    """

    def __init__(
        self,
        handler: Handler,
        *,
        configuration: QuicConfiguration,
        host: str = "0.0.0.0",  # noqa: S104 - a server's wildcard: restored anywhere
        port: int = 4242,
        herald: Herald | None = None,
        migrate_to: Address | None = None,
        on_quiesce: QuiesceHook | None = None,
        on_resume: ResumeHook | None = None,
        max_connections: int = MAX_CONNECTIONS,
        signals: bool = True,
    ) -> None:
        self._handler = handler
        self._configuration = configuration
        self._address = (host, port)
        self._signals = signals
        self._max_connections = max_connections
        self._outbox = Outbox(herald or SilentHerald())
        self._mover = Mover(self, self._outbox, migrate_to=migrate_to, on_quiesce=on_quiesce, on_resume=on_resume)
        self._half_open: set[ServedConnection] = set()
        """Those whose handshake is not over; the listener bounds them."""
        self._connections: set[ServedConnection] = set()
        self._tasks: dict[ServedConnection, set[asyncio.Task[None]]] = {}
        self._stopped = asyncio.Event()
        self.udp: MigratableUDP
        self._listener: internals.Listener

    async def __aenter__(self) -> MigratableServer:
        """Bind and listen. Raises FerryError ``bad_settings`` if the address can't be had."""
        self._listener = internals.Listener(
            configuration=self._configuration, create_protocol=self._connection_begun, half_open=self._half_open
        )
        host, port = self._address
        try:
            self.udp = MigratableUDP.bind(host, port, self._listener.datagram_received)
        except (OSError, ValueError) as error:
            raise FerryError(
                "bad_settings",
                f"Can't listen on UDP {host} port {port}: {error}.",
                hint="The host is an IP literal of this machine and the port is free.",
            ) from None
        self._listener.connection_made(self.udp)
        self._outbox.start()
        if self._signals:
            self._watch_signals()
        log.info("serving", address=shown(self.udp.local))
        return self

    async def __aexit__(self, *_: Any) -> None:
        loop = asyncio.get_running_loop()
        if self._signals:
            for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
                loop.remove_signal_handler(number)
        await self._mover.stop()
        for connection in list(self._connections):
            connection.finish("the server is stopping")
        tasks = [task for group in self._tasks.values() for task in group]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=LEAVE_TIME)
        self._listener.close()
        await self._outbox.suspend(flush=FLUSH_TIME, close=CLOSE_TIME)
        await self._outbox.stop()
        log.info("stopped")

    # What an application or its wiring may ask.

    async def wait_stopped(self) -> None:
        """Until :meth:`stop`, SIGINT, or a SIGTERM that means it."""
        await self._stopped.wait()

    def stop(self) -> None:
        self._stopped.set()

    async def arm(self, request: ArmRequest) -> ArmReply:
        """Say what the next SIGTERM means, or with no target call that off. Raises FerryError ``service_busy``."""
        self._mover.arm(request)
        return ArmReply(id=request.id, clients=len(self.clients))

    @property
    def port(self) -> int:
        return self.udp.port

    @property
    def clients(self) -> list[ServedConnection]:
        """Connections with a working control stream."""
        return [connection for connection in self._connections if connection.has_control]

    @property
    def strangers(self) -> list[ServedConnection]:
        """Connections that can't be told of a move."""
        return [connection for connection in self._connections if not connection.has_control]

    # What connections tell (served.Host).

    def _connection_begun(self, quic: QuicConnection, **_: Any) -> ServedConnection:
        connection = ServedConnection(quic, self)
        self._half_open.add(connection)
        return connection

    def connection_established(self, connection: ServedConnection) -> None:
        self._half_open.discard(connection)
        if len(self._connections) >= self._max_connections:
            log.warning("connection_refused", limit=self._max_connections)
            connection.close(error_code=REFUSED, reason_phrase="too many connections")
            return
        self._connections.add(connection)

    def connection_ended(self, connection: ServedConnection) -> None:
        self._half_open.discard(connection)
        self._connections.discard(connection)
        self._mover.gone(connection)
        if self._tasks.get(connection):
            asyncio.get_running_loop().call_later(LEAVE_TIME, self._cancel_streams, connection)
        else:
            self._tasks.pop(connection, None)

    def said_hello(self, connection: ServedConnection, hello: Hello) -> str:
        taken = {other.name for other in self._connections if other is not connection} | self._mover.names
        name, count = hello.client, 1
        while name in taken:
            count += 1
            suffix = f"-{count}"
            name = hello.client[: 64 - len(suffix)] + suffix
        log.info("client_hello", client=name, said=hello.client, quiesces=hello.quiesce)
        asyncio.get_running_loop().call_soon(self._mover.joined, connection)
        return name

    def control_lost(self, connection: ServedConnection) -> None:
        self._mover.gone(connection)

    def stream_opened(self, connection: ServedConnection, stream: Stream) -> None:
        group = self._tasks.setdefault(connection, set())
        if len(group) >= MAX_STREAMS:
            stream.abort()
            return
        task = asyncio.create_task(self._handle(stream), name=f"stream-{stream.id}")
        group.add(task)
        task.add_done_callback(functools.partial(self._stream_done, connection))

    def acked(self, connection: ServedConnection, message: Ack) -> bool:
        return self._mover.acked(connection, message)

    def ready(self, connection: ServedConnection, message: Ready) -> bool:
        return self._mover.ready(connection, message)

    def moved(self, connection: ServedConnection, message: Moved) -> bool:
        return self._mover.moved(connection, message)

    # Streams.

    async def _handle(self, stream: Stream) -> None:
        try:
            await self._handler(stream.reader, stream.writer)
        except (ConnectionError, asyncio.IncompleteReadError) as error:
            log.debug("stream_lost", stream=stream.id, reason=str(error))
        except Exception:  # an application's defect ends its stream, not the server
            log.exception("stream_handler_failed", stream=stream.id)
            stream.abort()
        finally:
            with contextlib.suppress(ConnectionError):
                stream.release()

    def _stream_done(self, connection: ServedConnection, task: asyncio.Task[None]) -> None:
        group = self._tasks.get(connection)
        if group is not None:
            group.discard(task)
            if not group:
                del self._tasks[connection]

    def _cancel_streams(self, connection: ServedConnection) -> None:
        for task in self._tasks.get(connection, ()):
            task.cancel()

    # Signals.

    def _watch_signals(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise FerryError("bad_settings", "Signals reach the main thread only.", hint="Pass signals=False.")
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._on_sigterm)
        loop.add_signal_handler(signal.SIGUSR2, self._mover.wake)
        loop.add_signal_handler(signal.SIGINT, self.stop)

    def _on_sigterm(self) -> None:
        if not self._mover.begin():
            log.info("stop_asked")
            self.stop()

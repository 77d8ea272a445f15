"""What an application imports: ``serve`` for a server that can be moved, ``connect`` for its clients."""

from __future__ import annotations

import asyncio
import importlib
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

import msgspec
import structlog

from quicferry.protocol import subjects, wire
from quicferry.protocol.agents import ArmRequest
from quicferry.protocol.api import Address
from quicferry.protocol.errors import FerryError
from quicferry.protocol.events import AnyEvent
from quicferry.quic.certificates import ensure as ensure_certificate
from quicferry.quic.herald import Herald
from quicferry.quic.mover import QuiesceHook, ResumeHook
from quicferry.quic.server import ALPN, Handler, MigratableServer, server_configuration

if TYPE_CHECKING:
    from quicferry.bus.log import EventLog
    from quicferry.bus.settings import NatsSettings
    from quicferry.quic.client import Connection, connect
    from quicferry.quic.meter import Meter, Pause
    from quicferry.quic.migration import Migration
    from quicferry.quic.policy import Policy

__all__ = [
    "BusHerald",
    "Connection",
    "Meter",
    "Migration",
    "Pause",
    "Policy",
    "connect",
    "ensure_certificate",
    "serve",
]

log = structlog.get_logger(__name__)

CLIENTS: Final = {
    "Connection": "client",
    "Meter": "meter",
    "Migration": "migration",
    "Pause": "meter",
    "Policy": "policy",
    "connect": "client",
}
"""What only clients use, and the module of ``quicferry.quic`` that it comes from."""
RETRY_EVERY: Final = 1.0
"""Seconds between two attempts to use a NATS that answers but refuses."""
CANCEL_AGAIN: Final = 0.3
"""Seconds until a connection that is to end is told so once more."""
THREADS_GONE: Final = 0.2
"""Seconds idle helper threads have to end before a dump."""


def __getattr__(name: str) -> Any:
    # Looked up when first used (PEP 562): a server that holds no client is less to dump.
    if name not in CLIENTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"quicferry.quic.{CLIENTS[name]}"), name)


async def serve(
    handler: Handler,
    *,
    certificate: str,
    private_key: str,
    host: str = "0.0.0.0",  # noqa: S104 - a server's wildcard: restored anywhere
    port: int = 4242,
    service: str | None = None,
    alpn: Sequence[str] = ALPN,
    on_quiesce: QuiesceHook | None = None,
    on_resume: ResumeHook | None = None,
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Serve ``handler(reader, writer)``, one call a stream, until SIGINT, or a SIGTERM that means no move.

    ``service`` (or QUICFERRY_SERVICE) names it on NATS, whose address is NATS_URL; without either the
    server can still be moved by hand: with MIGRATE_ADDR (``ip:port``, or with MIGRATE_PORT beside it) SIGTERM sends
    the clients there. ``on_quiesce(id)`` returns once it is safe to dump, ``on_resume(id, outcome)`` is told how it
    went. Must run in the main thread. Raises FerryError ``bad_settings``.
    """
    configuration = server_configuration(certificate, private_key, alpn=tuple(alpn))
    herald = bus_herald(service or environment.get("QUICFERRY_SERVICE"), environment)
    server = MigratableServer(
        handler,
        configuration=configuration,
        host=host,
        port=port,
        herald=herald,
        migrate_to=migrate_address(environment),
        on_quiesce=on_quiesce,
        on_resume=on_resume,
    )
    async with server:
        if herald is not None:
            herald.start(server)
        await server.wait_stopped()


def migrate_address(environment: Mapping[str, str]) -> Address | None:
    """MIGRATE_ADDR, with MIGRATE_PORT if it is apart. Raises FerryError ``bad_settings``."""
    given = environment.get("MIGRATE_ADDR", "").strip()
    if not given:
        return None
    port = environment.get("MIGRATE_PORT", "").strip()
    host = given
    if not port and ":" in given:
        host, _, port = given.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    try:
        address = Address(host=host, port=int(port))
        return msgspec.convert(msgspec.to_builtins(address), Address)
    except (ValueError, msgspec.ValidationError):
        raise FerryError(
            "bad_settings", f"MIGRATE_ADDR={given!r} is not an address.", hint="It looks like 192.0.2.7:4242."
        ) from None


def bus_herald(service: str | None, environment: Mapping[str, str]) -> BusHerald | None:
    """A herald if both a service's name and NATS_URL are given. Raises FerryError ``bad_settings``."""
    if not service:
        return None
    try:
        msgspec.convert(service, wire.Name)
    except msgspec.ValidationError:
        raise FerryError(
            "bad_settings", f"{service!r} can't name a service.", hint="Letters, digits, '_' and '-', 64 at most."
        ) from None
    if not environment.get("NATS_URL"):
        return None
    from quicferry.bus.settings import NatsSettings

    return BusHerald(service, NatsSettings.load())


class BusHerald(Herald):
    """Publishes to the event log and answers ``arm``; connects in the background and for ever."""

    def __init__(self, service: str, settings: NatsSettings) -> None:
        self._service = service
        self._settings = settings
        self._server: MigratableServer
        self._log: EventLog | None = None
        self._connected = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        """The one that is connected, or tries to be."""
        self._ending: set[asyncio.Task[None]] = set()
        self._executor = ThreadPoolExecutor(thread_name_prefix="quicferry")

    def start(self, server: MigratableServer) -> None:
        self._server = server
        self._connect()

    async def publish(self, event: AnyEvent) -> None:
        """Waits for NATS as long as it takes. Raises FerryError where NATS refuses for good."""
        while True:
            await self._connected.wait()
            try:
                if self._log is not None:
                    await self._log.append(event)
                return
            except FerryError as error:
                if error.code not in ("nats_unreachable", "no_answer"):
                    raise
                log.warning("event_waits", id=event.id, reason=error.message)
                await asyncio.sleep(RETRY_EVERY)

    async def suspend(self) -> None:
        """Close the connection, and let go of the thread that looked up its name."""
        if self._task is not None:
            # At once: whoever waits no longer for the end finds us suspended, and can resume.
            self._ending.add(self._task)
            self._task.add_done_callback(self._ending.discard)
            self._task = None
            self._no_longer_connected()
        while self._ending:
            for task in self._ending:
                task.cancel()
            # Again if need be: Python 3.11's wait_for, which nats-py uses, can lose a cancellation.
            await asyncio.wait(self._ending, timeout=CANCEL_AGAIN)
        await self._end_threads()

    async def resume(self) -> None:
        if self._task is None:
            self._connect()

    def _connect(self) -> None:
        # Looking up NATS's name takes a thread of the loop's executor; one of our own can be ended before a dump.
        asyncio.get_running_loop().set_default_executor(self._executor)
        self._task = asyncio.create_task(self._stay_connected(), name="nats")

    async def _stay_connected(self) -> None:
        from quicferry.bus import endpoints
        from quicferry.bus.connection import Bus
        from quicferry.bus.log import EventLog

        arm = endpoints.Endpoint("arm", subjects.arm(self._service), ArmRequest, self._arm)
        while True:
            try:
                async with (
                    Bus.connect(f"server-{self._service}", self._settings, wait=True) as bus,
                    endpoints.serve(
                        bus,
                        name="quicferry-server",
                        description="A QUIC server that can be moved",
                        endpoints=[arm],
                        metadata={"service": self._service},
                    ),
                ):
                    self._log = await EventLog.open(bus)
                    self._connected.set()
                    log.info("heralding", service=self._service)
                    await bus.closed.wait()
            except FerryError as error:
                log.warning("nats_refused", code=error.code, reason=error.message)
            except Exception:  # whatever nats-py raises: a server that nobody can arm could never be moved again
                log.exception("nats_failed")
            finally:
                if self._task is asyncio.current_task():  # else it was suspended, and the next one may be there
                    self._no_longer_connected()
            await asyncio.sleep(RETRY_EVERY)

    def _no_longer_connected(self) -> None:
        self._connected.clear()
        self._log = None

    async def _arm(self, request: Any) -> msgspec.Struct:
        return await self._server.arm(request)

    async def _end_threads(self) -> None:
        old, self._executor = self._executor, ThreadPoolExecutor(thread_name_prefix="quicferry")
        loop = asyncio.get_running_loop()
        loop.set_default_executor(self._executor)
        old.shutdown(wait=False)  # idle threads end now, an application's own job when it is done
        end = loop.time() + THREADS_GONE
        while threading.active_count() > 1 and loop.time() < end:  # noqa: ASYNC110 - a thread's end raises no event
            await asyncio.sleep(0.001)

"""What the tests of whole moves share: the API's caller, clients with traffic in flight, and a capture."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator
from typing import NamedTuple

import quicferry
from quicferry.bus.connection import Bus
from quicferry.bus.log import EventLog
from quicferry.bus.settings import NatsSettings
from quicferry.cli.client import find_cafile
from quicferry.cli.session import heralds
from quicferry.host.compose import Stack
from quicferry.migration.report import Report, report
from quicferry.protocol import events as ev
from quicferry.protocol import subjects
from quicferry.protocol.api import MigrateReply, MigrateRequest, Options, ServicesReply, ServicesRequest
from quicferry.protocol.errors import FerryError

PATIENCE = 60.0
ETH_P_ALL = 0x0003


class System:
    """The running system, seen from outside: NATS and UDP only."""

    def __init__(self, stack: Stack, variables: dict[str, str]) -> None:
        self.stack = stack
        self.nats = f"nats://127.0.0.1:{variables['NATS_PORT']}"

    @property
    def cafile(self) -> str:
        """There once the server serves, see :meth:`address`."""
        return find_cafile(self.stack)

    @contextlib.asynccontextmanager
    async def bus(self) -> AsyncIterator[Bus]:
        async with Bus.connect("e2e", NatsSettings.load(self.nats), wait=False) as bus:
            yield bus

    async def services(self) -> ServicesReply:
        """What the coordinator knows, once it knows the server and that serves."""
        async with asyncio.timeout(PATIENCE), self.bus() as bus:
            while True:
                with contextlib.suppress(FerryError):
                    reply = await bus.request(subjects.SERVICES, ServicesRequest(), ServicesReply, timeout=5)
                    if reply.services and await heralds(bus, "echo"):
                        return reply
                await asyncio.sleep(0)  # the request itself is what waits

    async def address(self) -> tuple[str, int]:
        """Where clients dial the server now."""
        (placement,) = (await self.services()).services
        return placement.place.address.host, placement.place.address.port

    async def move(self, *, to: str | None = None, **limits: int) -> tuple[Report, list[ev.AnyEvent]]:
        """One migration from request to outcome."""
        await self.services()
        async with self.bus() as bus:
            request = MigrateRequest(service="echo", to=to, options=Options(**limits))
            reply = await bus.request(subjects.MIGRATE, request, MigrateReply, timeout=5)
            seen = await self.followed(bus, reply.id)
        return report(seen), seen

    async def followed(self, bus: Bus, migration: str) -> list[ev.AnyEvent]:
        """A migration's events up to its outcome."""
        log = await EventLog.open(bus)
        seen: list[ev.AnyEvent] = []
        async with asyncio.timeout(PATIENCE), contextlib.aclosing(log.follow(migration=migration)) as entries:
            async for _, event, _ in entries:
                seen.append(event)
                if isinstance(event, ev.Completed | ev.RolledBack | ev.Failed):
                    break
        return seen

    @contextlib.asynccontextmanager
    async def client(self, name: str, *, interval: float = 0.02, **more: object) -> AsyncIterator[Pinger]:
        """A connected client that pings until the block ends, and then has got every echo or fails the test."""
        host, port = await self.address()
        dial = quicferry.connect(host, port, cafile=self.cafile, server_name="localhost", name=name, **more)  # type: ignore[arg-type]
        async with dial as connection:
            pinger = Pinger(connection, interval)
            async with pinger.running():
                yield pinger


class Pinger:
    """Numbered lines out at a steady pace, whatever comes back; echoes are counted in order."""

    def __init__(self, connection: quicferry.Connection, interval: float) -> None:
        self.connection = connection
        self.sent = 0
        self.echoed = 0
        self._interval = interval
        self._news = asyncio.Condition()
        self._stop = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """While the block runs; after it every echo must have come, on one session."""
        async with self.going():
            yield
            self._stop.set()
            await self.reaches(self.sent)
            assert self.connection.handshakes == 1

    @contextlib.asynccontextmanager
    async def going(self) -> AsyncIterator[None]:
        """While the block runs, and no longer; :meth:`check` tells whether it still does."""
        reader, writer = await self.connection.open_stream()
        self._tasks = [asyncio.create_task(self._send(writer)), asyncio.create_task(self._read(reader))]
        try:
            await self.echoes(5)
            yield
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def check(self) -> None:
        """Fails if the stream ended, or an echo was not the next one."""
        for task in self._tasks:
            if task.done() and not self._stop.is_set():
                raise AssertionError(f"the session ended: {task.exception() or 'the stream was closed'!r}")

    async def echoes(self, more: int) -> None:
        """Until so many more echoes have come."""
        await self.reaches(self.echoed + more)

    async def reaches(self, number: int) -> None:
        """Until the echo of line ``number`` has come."""
        async with asyncio.timeout(PATIENCE), self._news:
            await self._news.wait_for(lambda: self.echoed >= number or self._tasks[1].done())
        assert self.echoed >= number, f"{number - self.echoed} of {self.sent} echoes lost"

    async def _send(self, writer: asyncio.StreamWriter) -> None:
        while not self._stop.is_set():
            self.sent += 1
            writer.write(b"%d\n" % self.sent)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._interval):
                    await self._stop.wait()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        while line := await reader.readline():
            assert int(line) == self.echoed + 1
            async with self._news:
                self.echoed += 1
                self._news.notify_all()


class Datagram(NamedTuple):
    """A UDP datagram seen on a bridge, in the order seen."""

    source: str
    source_port: int
    destination: str
    destination_port: int


class Capture:
    """Every UDP datagram over IPv4 on one network interface, by packet(7)."""

    def __init__(self, interface: str) -> None:
        self.seen: list[Datagram] = []
        # Protocol 0 until it is bound: before, it would see every interface.
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 * 1024 * 1024)
        self._socket.bind((interface, ETH_P_ALL))
        self._socket.setblocking(False)

    def __enter__(self) -> Capture:
        asyncio.get_running_loop().add_reader(self._socket, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        self._take()
        asyncio.get_running_loop().remove_reader(self._socket)
        self._socket.close()

    def _take(self) -> None:
        while True:
            try:
                frame = self._socket.recv(65_535)
            except BlockingIOError:
                return
            if frame[12:14] != b"\x08\x00" or frame[23] != socket.IPPROTO_UDP:
                continue
            ports = 14 + (frame[14] & 0x0F) * 4
            source_port, destination_port = struct.unpack_from("!HH", frame, ports)
            self.seen.append(
                Datagram(
                    socket.inet_ntoa(frame[26:30]), source_port, socket.inet_ntoa(frame[30:34]), destination_port
                )
            )

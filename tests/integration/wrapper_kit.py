"""What the wrappers' tests share: certificates, a server process, the berth's agent, pings."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quicferry.protocol import events, handover, wire
from quicferry.protocol.agents import ArmRequest
from quicferry.protocol.api import Address, Options
from quicferry.protocol.events import AnyEvent
from quicferry.quic import certificates
from quicferry.quic.client import Connection, connect
from quicferry.quic.server import Handler, MigratableServer, server_configuration

LIMIT = 15.0
"""Seconds any wait of a test may take: a failure, not a measurement."""


@dataclass(frozen=True)
class Tls:
    certificate: str
    private_key: str


def make_tls(folder: Path) -> Tls:
    tls = Tls(str(folder / "cert.pem"), str(folder / "key.pem"))
    certificates.ensure(tls.certificate, tls.private_key)
    return tls


class Recorder:
    """A herald that remembers."""

    def __init__(self) -> None:
        self.events: list[AnyEvent] = []
        self.suspended = 0
        self.resumed = 0
        self._more = asyncio.Condition()

    async def publish(self, event: AnyEvent) -> None:
        async with self._more:
            self.events.append(event)
            self._more.notify_all()

    async def suspend(self) -> None:
        self.suspended += 1

    async def resume(self) -> None:
        self.resumed += 1

    def of(self, kind: str) -> list[Any]:
        return [event for event in self.events if events.kind(event) == kind]

    async def until(self, kind: str, count: int = 1) -> list[Any]:
        async with asyncio.timeout(LIMIT), self._more:
            await self._more.wait_for(lambda: len(self.of(kind)) >= count)
        return self.of(kind)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65_536):
        writer.write(data)
        await writer.drain()


@contextlib.asynccontextmanager
async def serving(
    tls: Tls, handler: Handler = echo, **options: Any
) -> AsyncIterator[tuple[MigratableServer, Recorder]]:
    """A server in this process, without signals."""
    recorder = Recorder()
    options = {"host": "127.0.0.1", "port": 0, "herald": recorder, "signals": False, **options}
    configuration = server_configuration(tls.certificate, tls.private_key)
    async with MigratableServer(handler, configuration=configuration, **options) as server:
        yield server, recorder


def dial(tls: Tls, port: int, **options: Any) -> contextlib.AbstractAsyncContextManager[Connection]:
    return connect("127.0.0.1", port, cafile=tls.certificate, **options)


async def ping(connection: Connection, data: bytes = b"ping") -> bytes:
    """One echo on a stream of its own."""
    async with asyncio.timeout(LIMIT):
        reader, writer = await connection.open_stream()
        writer.write(data)
        writer.write_eof()
        return await reader.read()


@dataclass
class ServerProcess:
    """``wrapper_server.py``, its events as they come."""

    process: asyncio.subprocess.Process
    port: int = 0
    events: list[dict[str, Any]] = field(default_factory=list)
    more: asyncio.Condition = field(default_factory=asyncio.Condition)

    @classmethod
    @contextlib.asynccontextmanager
    async def start(
        cls, tls: Tls, *arguments: str, environment: Mapping[str, str] = {}
    ) -> AsyncIterator[ServerProcess]:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "tests.integration.wrapper_server", tls.certificate, tls.private_key, *arguments),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            cwd=Path(__file__).parents[2],
            env={**os.environ, **environment},
        )
        self = cls(process)
        reading = asyncio.create_task(self._read())
        try:
            self.port = (await self.until("serving"))[0]["port"]
            yield self
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            await reading
            assert process.stdin is not None
            process.stdin.close()

    async def _read(self) -> None:
        assert self.process.stdout is not None
        while line := await self.process.stdout.readline():
            if line.startswith(b"{"):
                async with self.more:
                    self.events.append(json.loads(line))
                    self.more.notify_all()

    def of(self, kind: str, migration: str | None = None) -> list[dict[str, Any]]:
        return [
            event
            for event in self.events
            if event["kind"] == kind and (migration is None or event.get("id") == migration)
        ]

    async def until(self, kind: str, count: int = 1, *, migration: str | None = None) -> list[dict[str, Any]]:
        async with asyncio.timeout(LIMIT), self.more:
            await self.more.wait_for(lambda: len(self.of(kind, migration)) >= count)
        return self.of(kind, migration)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def exit_code(self) -> int:
        async with asyncio.timeout(LIMIT):
            return await self.process.wait()

    async def arm(
        self, migration: str, port: int | None, *, epoch: int = 1, options: Options | None = None
    ) -> dict[str, Any]:
        """The answer: ``armed`` or ``refused``."""
        before = len(self.of("armed")) + len(self.of("refused"))
        target = None if port is None else Address(host="127.0.0.1", port=port)
        request = ArmRequest(id=migration, epoch=epoch, target=target, options=options or Options())
        assert self.process.stdin is not None
        self.process.stdin.write(wire.encode(request) + b"\n")
        async with asyncio.timeout(LIMIT), self.more:
            await self.more.wait_for(lambda: len(self.of("armed")) + len(self.of("refused")) > before)
        return [event for event in self.events if event["kind"] in ("armed", "refused")][-1]


class Agent:
    """A berth's agent as the server wrapper sees it: takes the parked socket, hands one out."""

    def __init__(self, port: int) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(handover.socket_name(port))
        self._listener.listen(4)
        self._listener.setblocking(False)

    def __enter__(self) -> Agent:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    async def take(self) -> tuple[handover.Park, socket.socket]:
        """The parked socket, once the server has closed its own."""
        connection = await self._accept()
        with connection:
            data, fds, _, _ = await asyncio.to_thread(socket.recv_fds, connection, handover.MAX_LINE_BYTES, 4)
            assert len(fds) == 1
            rest = await asyncio.to_thread(connection.recv, 10)
            assert rest == b""
        park = wire.decode(data.rstrip(b"\n"), handover.Request)
        assert isinstance(park, handover.Park)
        sock = socket.socket(fileno=fds[0])
        return park, sock

    async def give(self, sock: socket.socket, migration: str, outcome: Any, *, epoch: int = 1) -> handover.Adopt:
        """Answer the server's ``adopt``, which is returned, with ``sock``, which is closed here."""
        connection = await self._accept()
        with connection, sock:
            data = await asyncio.to_thread(connection.recv, handover.MAX_LINE_BYTES)
            asked = wire.decode(data.rstrip(b"\n"), handover.Request)
            assert isinstance(asked, handover.Adopt)
            host, port = sock.getsockname()
            adopted = handover.Adopted(
                id=migration,
                outcome=outcome,
                node="n",
                berth="b",
                address=Address(host=host, port=port),
                epoch=epoch,
            )
            socket.send_fds(connection, [wire.encode(adopted) + b"\n"], [sock.fileno()])
        return asked

    async def _accept(self) -> socket.socket:
        async with asyncio.timeout(LIMIT):
            connection, _ = await asyncio.get_running_loop().sock_accept(self._listener)
        connection.setblocking(True)
        connection.settimeout(LIMIT)
        return connection


def parked(port: int = 0) -> socket.socket:
    """A socket bound as the target's, queueing what comes."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * 1024 * 1024)
    sock.bind(("127.0.0.1", port))
    sock.setblocking(False)
    return sock

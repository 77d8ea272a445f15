"""A server on the wrapper in a process of its own: events as JSON lines out, commands as JSON lines in."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import threading
from typing import Any

import msgspec

from quicferry.app import migrate_address
from quicferry.protocol.agents import ArmRequest
from quicferry.protocol.errors import FerryError
from quicferry.protocol.events import AnyEvent
from quicferry.quic import served
from quicferry.quic.server import MigratableServer, server_configuration


def say(**fields: Any) -> None:
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


class Teller:
    async def publish(self, event: AnyEvent) -> None:
        say(**msgspec.to_builtins(event))

    async def suspend(self) -> None:
        say(kind="suspended")

    async def resume(self) -> None:
        say(kind="resumed")


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65_536):
        writer.write(data)
        await writer.drain()


async def obey(server: MigratableServer, commands: asyncio.StreamReader) -> None:
    while line := await commands.readline():
        try:
            reply = await server.arm(msgspec.json.decode(line, type=ArmRequest))
            say(kind="armed", clients=reply.clients)
        except FerryError as error:
            say(kind="refused", code=error.code)


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("certificate")
    parser.add_argument("private_key")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--quiesce", action="store_true")
    parser.add_argument("--thread", action="store_true", help="an application's own thread runs all the time")
    parser.add_argument("--hello-grace", type=float, default=served.HELLO_GRACE, help="more for a slow test")
    options = parser.parse_args()
    served.HELLO_GRACE = options.hello_grace  # type: ignore[misc]  # final for everybody else
    if options.thread:
        threading.Thread(target=threading.Event().wait, daemon=True).start()

    async def on_quiesce(migration: str) -> None:
        say(kind="quiesce", id=migration)

    async def on_resume(migration: str, outcome: str) -> None:
        say(kind="resume", id=migration, outcome=outcome)

    commands = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    server = MigratableServer(
        echo,
        configuration=server_configuration(options.certificate, options.private_key),
        host="127.0.0.1",
        port=options.port,
        herald=Teller(),
        migrate_to=migrate_address(os.environ),
        on_quiesce=on_quiesce if options.quiesce else None,
        on_resume=on_resume if options.quiesce else None,
    )
    async with server:
        say(kind="serving", port=server.port)
        obeying = asyncio.create_task(obey(server, commands))
        await server.wait_stopped()
        obeying.cancel()


if __name__ == "__main__":
    asyncio.run(main())

"""An independent client: plain aioquic and docs/protocol.md, nothing of quicferry.

Pings an echo server and follows it through moves. Prints JSON lines: ``connected``, ``migrate``, ``target``,
``rollback``, ``control_closed``, ``summary``. Ends after --moves moves and --count pings, or at SIGINT or SIGTERM.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ipaddress
import json
import signal
import socket
import ssl
import sys
import time
from typing import Any

from aioquic import tls
from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.events import ConnectionTerminated, HandshakeCompleted, QuicEvent

MADE_UP = ("198.51.100.1", 443)
"""The server's address as aioquic sees it."""


def say(event: str, **fields: Any) -> None:
    print(json.dumps({"event": event, **fields}), flush=True)


class Client(QuicConnectionProtocol):
    """The QUIC connection, and the moves."""

    def __init__(self, quic: QuicConnection, wire: Wire) -> None:
        super().__init__(quic)
        self.wire = wire
        self.moves = 0
        self.moved = asyncio.Event()
        self.reason: str | None = None
        self.handshakes = 0
        self._pending = ""
        self._control: asyncio.StreamWriter

    def quic_event_received(self, event: QuicEvent) -> None:
        if isinstance(event, HandshakeCompleted):
            self.handshakes += 1
        if isinstance(event, ConnectionTerminated):
            self.reason = event.reason_phrase
            self.moved.set()
        super().quic_event_received(event)

    def largest(self) -> int:
        return self._quic._spaces[tls.Epoch.ONE_RTT].largest_received_packet

    def probe(self) -> None:
        self._quic.send_ping(0)
        self.transmit()

    async def follow(self, name: str) -> None:
        """The control stream."""
        reader, self._control = await self.create_stream()
        self.tell(type="hello", client=name)
        while line := await reader.readline():
            message = json.loads(line)
            if message["type"] == "migrate":
                self.on_migrate(message)
            elif message["type"] == "rollback" and message["id"] == self._pending:
                self._pending = ""
                self.wire.target = None
                self.probe()
                say("rollback", id=message["id"])
        say("control_closed")

    def on_migrate(self, message: dict[str, Any]) -> None:
        address = ipaddress.ip_address(message["addr"])
        if address.is_multicast or address.is_unspecified:
            self.tell(type="ack", id=message["id"], refused="no unicast address")
            return
        self.tell(type="ack", id=message["id"])  # leaves by the old path alone
        self._pending = message["id"]
        self.wire.target = (message["addr"], message["port"])
        say("migrate", id=message["id"], addr=message["addr"], port=message["port"])
        asyncio.get_running_loop().create_task(self.keep_something_on_the_way(message["id"]))

    async def keep_something_on_the_way(self, migration: str) -> None:
        while self._pending == migration and self.reason is None:
            self.probe()
            await asyncio.sleep(0.02)  # its pace; it waits for nothing

    def on_target(self, silence: float) -> None:
        """The target has said something fresh."""
        migration, self._pending = self._pending, ""
        self.tell(type="moved", id=migration, source="wrapper", interruption_ms=round(silence * 1000, 3))
        say("target", id=migration, silence_ms=round(silence * 1000, 1))
        self.moves += 1
        self.moved.set()

    def tell(self, **message: Any) -> None:
        self._control.write(json.dumps(message).encode() + b"\n")
        self.transmit()


class Wire(asyncio.DatagramTransport):
    """The real socket, behind one made-up address."""

    def __init__(self, peer: tuple[str, int]) -> None:
        super().__init__()
        self.peer = peer
        self.target: tuple[str, int] | None = None
        self.client: Client
        self.heard = time.monotonic()
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.setblocking(False)
        self.sock.bind(("0.0.0.0", 0))
        asyncio.get_running_loop().add_reader(self.sock, self.readable)

    def sendto(self, data: Any, addr: Any = None) -> None:
        for peer in (self.peer, self.target):
            if peer is not None:
                with contextlib.suppress(OSError):
                    self.sock.sendto(data, peer)

    def readable(self) -> None:
        for _ in range(64):
            try:
                data, sender = self.sock.recvfrom(65_535)
            except OSError:
                return
            if sender not in (self.peer, self.target):
                continue
            before = self.client.largest()
            self.client.datagram_received(data, MADE_UP)
            if self.client.largest() <= before:
                continue
            now = time.monotonic()
            if sender == self.target:
                silence = now - self.heard
                self.peer, self.target = self.target, None
                self.client.on_target(silence)
            self.heard = now

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self.sock)
        self.sock.close()


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("host", help="IPv4 address")
    parser.add_argument("port", type=int)
    parser.add_argument("--cafile", help="the server's authority; not verified if absent")
    parser.add_argument("--server-name", default="localhost")
    parser.add_argument("--name", default="independent")
    parser.add_argument("--no-hello", action="store_true", help="stay out of moves")
    parser.add_argument("--moves", type=int, default=0, help="end after so many moves")
    parser.add_argument("--count", type=int, default=0, help="and after so many pings; with neither: never")
    parser.add_argument("--interval-ms", type=float, default=10.0)
    options = parser.parse_args()

    configuration = QuicConfiguration(alpn_protocols=["quicferry/1"], server_name=options.server_name)
    if options.cafile:
        configuration.load_verify_locations(options.cafile)
    else:
        configuration.verify_mode = ssl.CERT_NONE
    wire = Wire((options.host, options.port))
    client = wire.client = Client(QuicConnection(configuration=configuration), wire)
    client.connection_made(wire)
    client.connect(MADE_UP)
    async with asyncio.timeout(10):
        await client.wait_connected()
    following = asyncio.create_task(asyncio.sleep(0) if options.no_hello else client.follow(options.name))
    await asyncio.sleep(0)  # the control stream is the first one
    say("connected", peer=f"{options.host}:{options.port}")

    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    sent = echoed = 0
    reader, writer = await client.create_stream()
    while not stop.is_set() and client.reason is None:
        if (options.moves or options.count) and client.moves >= options.moves and echoed >= options.count:
            break
        sent += 1
        writer.write(b"%d\n" % sent)
        try:
            async with asyncio.timeout(10):
                if await reader.readline() != b"%d\n" % sent:
                    break
        except TimeoutError:
            break
        echoed += 1
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(options.interval_ms / 1000):
                await stop.wait()
    say(
        "summary",
        sent=sent,
        echoed=echoed,
        moves=client.moves,
        handshakes=client.handshakes,
        peer=f"{wire.peer[0]}:{wire.peer[1]}",
        reason=client.reason,
    )
    following.cancel()
    with contextlib.suppress(ValueError, RuntimeError):
        writer.close()
    client.close()
    wire.close()
    return 0 if echoed == sent and client.reason is None else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))

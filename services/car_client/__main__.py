"""Pings an echo server, a deadline on each ping; TARGET_ADDR says where it is, TRANSPARENT=1 stays connected."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import time
from typing import Any

import quicferry
import quicferry.logging

SESSION_ENDED, NO_SESSION = 1, 2
KEPT_STREAMS = 64  # given up after a timeout and still listened to: a late echo is not a lost one
GRACE = 1.0  # seconds at the end in which echoes may still come
TIGHTER = 4  # in a move interval and timeout are divided by this, to see its end sooner


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="car_client", description=__doc__)
    on = os.environ.get("TRANSPARENT", "").lower() in ("1", "true", "yes")
    parser.add_argument("--target", default=os.environ.get("TARGET_ADDR", "127.0.0.1:14242"), metavar="HOST:PORT")
    parser.add_argument(
        "--stay-connected", action="store_true", default=on, help="a timeout does not end the session"
    )
    parser.add_argument("--interval-ms", type=float, default=20.0, help="between pings (20)")
    parser.add_argument("--timeout-ms", type=float, default=2000.0, help="for each read and write (2000)")
    parser.add_argument("--count", type=int, help="end after so many pings")
    parser.add_argument("--duration", type=float, metavar="SECONDS", help="end after so long")
    parser.add_argument("--cafile", default=os.environ.get("QUICFERRY_CA"), help="the server's authority, PEM")
    parser.add_argument("--insecure", action="store_true", help="do not verify the server")
    parser.add_argument("--server-name", default="localhost", help="in its certificate")
    parser.add_argument("--name", help="what the server's events call this client")
    parser.add_argument("--qlog", metavar="DIRECTORY", help="keep the QUIC trace")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    return parser.parse_args()


class Session:
    """One connection's pings."""

    def __init__(self, connection: quicferry.Connection, options: argparse.Namespace) -> None:
        self.connection, self.options = connection, options
        self.meter = quicferry.Meter(connection)
        self.sent = 0
        self.waiting: dict[int, asyncio.Future[None]] = {}
        self.readers: list[asyncio.Task[None]] = []
        self.said = ""

    def say(self, event: str, **fields: Any) -> None:
        """One line on standard output."""
        text = " ".join(f"{key}={value}" for key, value in fields.items() if key not in ("moves", "lost"))
        words = f"service interruption {fields['interruption_ms']:.1f} ms" if event == "move" else event
        print(json.dumps({"event": event, **fields}) if self.options.json else f"[client] {words} {text}", flush=True)

    async def run(self) -> None:
        """Raises TimeoutError after a ping without an echo unless staying connected, ConnectionError at the end."""
        writer = await self.stream()
        while self.options.count is None or self.sent < self.options.count:
            began, tighter = time.monotonic(), TIGHTER if self.in_move() else 1
            try:
                async with asyncio.timeout(self.options.timeout_ms / 1000 / tighter):
                    await self.ping(writer)
            except TimeoutError:
                self.say("timeout", sent=self.sent)
                if not self.options.stay_connected:
                    raise
                writer = await self.stream()
            await asyncio.sleep(max(0.0, began + self.options.interval_ms / 1000 / tighter - time.monotonic()))

    def in_move(self) -> bool:
        migration = self.connection.migration
        if migration is not None and migration.id != self.said:
            self.said = migration.id
            self.say("migrate_seen", id=migration.id, target=migration.target_shown)
        return self.connection.migrate_seen.is_set()

    async def stream(self) -> asyncio.StreamWriter:
        reader, writer = await self.connection.open_stream()
        self.readers.append(asyncio.create_task(self.read(reader)))
        if len(self.readers) > KEPT_STREAMS:
            self.readers.pop(0).cancel()
        return writer

    async def ping(self, writer: asyncio.StreamWriter) -> None:
        self.sent += 1
        echo = self.waiting[self.sent] = asyncio.get_running_loop().create_future()
        writer.write(b"ping %d\n" % self.sent)
        await writer.drain()
        await asyncio.shield(echo)

    async def read(self, reader: asyncio.StreamReader) -> None:
        while line := await reader.readline():
            if (echo := self.waiting.pop(int(line.split()[-1]), None)) is not None:
                echo.set_result(None)
                for pause in self.meter.good():
                    counts = {"echoes_sent": self.sent, "unanswered": len(self.waiting)}
                    self.say("move", **pause.fields(), **counts, handshakes=self.connection.handshakes)
        for echo in self.waiting.values():  # the server ended the stream, or the connection is over
            if self.connection.over and not echo.done():
                echo.set_exception(ConnectionResetError(self.connection.close_reason or "the connection ended"))

    async def finish(self) -> None:
        """Give late echoes a moment, then sum up."""
        if late := [echo for echo in self.waiting.values() if not echo.done()]:
            await asyncio.wait(late, timeout=GRACE)
        for reader in self.readers:
            reader.cancel()
        facts = {"handshakes": self.connection.handshakes, "odcid": self.connection.odcid}
        moves, lost = [pause.fields() for pause in self.meter.pauses], sorted(self.waiting)
        self.say("summary", echoes_sent=self.sent, echoes_lost=len(lost), lost=lost, **facts, moves=moves)


async def run(options: argparse.Namespace) -> int:
    host, _, port = options.target.rpartition(":")
    if not port.isdecimal() or not host or min(options.interval_ms, options.timeout_ms) <= 0:
        raise quicferry.FerryError("bad_settings", "The target is HOST:PORT, interval and timeout are above 0.")
    tls = {"cafile": options.cafile, "verify": not options.insecure, "server_name": options.server_name}
    dial = quicferry.connect(host.strip("[]"), int(port), name=options.name, qlog=options.qlog, **tls)
    async with dial as connection:
        session = Session(connection, options)
        session.say("connected", peer=connection.peer, odcid=connection.odcid)
        pinging = asyncio.create_task(session.run())
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, pinging.cancel)
        await asyncio.wait([pinging], timeout=options.duration)
        pinging.cancel()
        (ended,) = await asyncio.gather(pinging, return_exceptions=True)
        if failed := isinstance(ended, TimeoutError | ConnectionError):
            session.say("ended", reason=str(ended) or "no echo in time")
        await session.finish()
        return SESSION_ENDED if failed else 0


def main() -> int:
    quicferry.logging.configure("car-client")
    try:
        return asyncio.run(run(arguments()))
    except quicferry.FerryError as error:
        print(f"car-client: {error}", file=sys.stderr)
        return NO_SESSION


if __name__ == "__main__":
    sys.exit(main())

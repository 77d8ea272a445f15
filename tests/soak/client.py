"""``python -m tests.soak.client``: a process full of real sessions, led over its standard input."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
import time
from collections import deque
from itertools import pairwise
from typing import Final

import msgspec

import quicferry
import quicferry.logging
from tests.soak.words import (
    Account,
    Accounts,
    Connected,
    Ended,
    Gap,
    Go,
    Leave,
    NotConnected,
    Open,
    Order,
    Said,
    Still,
)

TIGHTER: Final = 4
"""In a move pings come so much closer, to see its end sooner."""
ECHO_SECONDS: Final = 65.0
"""For the echoes that are still on their way when nothing more is sent. After a silence QUIC's next probe may take as
long again (RFC 9002, 6.2.1); a session that hears nothing at all ends in 60 s."""
KEPT: Final = 4096
"""Instants of echoes kept: minutes, and no move takes that long."""
LOOKED_AT: Final = 4
"""The newest moves of a session, among which the ended ones that are not measured yet must be."""


class WrongEchoError(Exception):
    """An echo that is not the next one."""


class Session:
    """One connection with numbered lines out at a steady pace, whatever comes back."""

    def __init__(self, order: Open, crew: Crew) -> None:
        self.order = order
        self._crew = crew
        self._connection: quicferry.Connection | None = None
        self._sent = 0
        self._echoed = 0
        self._news = asyncio.Condition()
        self._echoes: deque[float] = deque(maxlen=KEPT)
        self._measured: dict[str, None] = {}
        self._task = asyncio.create_task(self._run(), name=order.session)

    async def _run(self) -> None:
        order, say = self.order, self._crew.say
        dial = quicferry.connect(
            order.host, order.port, cafile=self._crew.cafile, server_name="localhost", name=order.session
        )
        try:
            async with dial as connection:
                self._connection = connection
                reader, writer = await connection.open_stream()
                say(Connected(session=order.session))
                sending = asyncio.create_task(self._send(connection, writer))
                try:
                    await self._read(connection, reader)
                finally:
                    sending.cancel()
                    await asyncio.gather(sending, return_exceptions=True)
                why = connection.close_reason or "the server ended the stream"
        except quicferry.FerryError as error:
            say(NotConnected(session=order.session, why=str(error)))
            return
        except (ConnectionError, WrongEchoError, ValueError) as error:
            why = f"{type(error).__name__}: {error}"
        say(Ended(session=order.session, service=order.service, why=why))
        async with self._news:
            self._news.notify_all()

    async def _send(self, connection: quicferry.Connection, writer: asyncio.StreamWriter) -> None:
        while True:
            await self._crew.going.wait()
            self._sent += 1
            writer.write(b"%d\n" % self._sent)
            await asyncio.sleep(self._crew.interval / (TIGHTER if connection.migrate_seen.is_set() else 1))

    async def _read(self, connection: quicferry.Connection, reader: asyncio.StreamReader) -> None:
        while line := await reader.readline():
            if int(line) != self._echoed + 1:
                raise WrongEchoError(f"echo {int(line)} came where {self._echoed + 1} was due")
            self._echoes.append(time.monotonic())
            async with self._news:
                self._echoed += 1
                self._news.notify_all()
            self._measure(connection)

    def _measure(self, connection: quicferry.Connection) -> None:
        """The gap as :class:`quicferry.Meter` defines it, with fewer instants kept."""
        for migration in connection.migrations[-LOOKED_AT:]:
            if migration.ended_at is None or migration.id in self._measured or migration.outcome == "replaced":
                continue
            self._measured[migration.id] = None
            gaps = [(one, next_) for one, next_ in pairwise(self._echoes) if next_ >= migration.seen_at]
            if migration.outcome == "arrived":
                gaps = [(one, next_) for one, next_ in gaps if one < migration.ended_at <= next_]
            ms = max((next_ - one for one, next_ in gaps), default=0.0) * 1000
            if migration.outcome == "arrived":
                connection.report_interruption(min(ms, 3_600_000), migration)
            outcome = migration.outcome or ""
            self._crew.say(Gap(session=self.order.session, migration=migration.id, outcome=outcome, ms=round(ms, 1)))

    async def all_echoed(self) -> None:
        """Until nothing is on its way any more, for a while."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ECHO_SECONDS), self._news:
                await self._news.wait_for(lambda: self._echoed >= self._sent or self._task.done())

    def account(self) -> Account:
        connection = self._connection
        return Account(
            session=self.order.session,
            service=self.order.service,
            sent=self._sent,
            echoed=self._echoed,
            handshakes=connection.handshakes if connection else 0,
            peer=connection.peer if connection else "",
            moves=len(self._measured),
        )

    @property
    def kept(self) -> int:
        return sum(len(trace.windows.timeline) for trace in self._connection.traces.all) if self._connection else 0

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


class Crew:
    """All sessions of this process."""

    def __init__(self, cafile: str, interval: float) -> None:
        self.cafile = cafile
        self.interval = interval
        self.going = asyncio.Event()
        self.going.set()
        self._sessions: dict[str, Session] = {}

    def say(self, said: Said) -> None:
        os.write(sys.stdout.fileno(), msgspec.json.encode(said) + b"\n")

    async def take(self, order: Order) -> None:
        match order:
            case Open():
                if old := self._sessions.pop(order.session, None):
                    await old.close()
                self._sessions[order.session] = Session(order, self)
            case Leave():
                left = [session for session in self._sessions.values() if session.order.service == order.service]
                self._say_accounts(left)
                for session in left:
                    await session.close()
                    del self._sessions[session.order.session]
            case Still():
                self.going.clear()
                await asyncio.gather(*(session.all_echoed() for session in self._sessions.values()))
                self._say_accounts(list(self._sessions.values()))
            case Go():
                self.going.set()

    def _say_accounts(self, sessions: list[Session]) -> None:
        accounts = [session.account() for session in sessions]
        self.say(Accounts(sessions=accounts, kept=sum(session.kept for session in self._sessions.values())))

    async def close(self) -> None:
        for session in self._sessions.values():
            await session.close()


async def lead(cafile: str, interval: float) -> None:
    """Do what standard input says until it ends."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    crew = Crew(cafile, interval)
    try:
        while line := await reader.readline():
            await crew.take(msgspec.json.decode(line, type=Order))
    finally:
        await crew.close()


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.soak.client", description=__doc__)
    parser.add_argument("--cafile", required=True)
    parser.add_argument("--interval-ms", type=float, required=True)
    arguments = parser.parse_args()
    quicferry.logging.configure("soak-client")
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(lead(arguments.cafile, arguments.interval_ms / 1000))
    return 0


if __name__ == "__main__":
    sys.exit(main())

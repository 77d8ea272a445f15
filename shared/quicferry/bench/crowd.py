"""``python -m quicferry.bench.crowd``: many connections in a process of their own, each with a ping now and then.

Standard output: ``{"connected": n}`` once all are; then, for every line on standard input, an account of the move
since the last one. The end of standard input ends it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
from typing import Final

import msgspec

import quicferry
import quicferry.logging
from quicferry.app import Connection

DIALS_AT_ONCE: Final = 8
ARRIVE_SECONDS: Final = 15.0
EVERY: Final = 1.0
"""Seconds between a connection's pings."""


class Account(msgspec.Struct, frozen=True, kw_only=True):
    """What became of them in the newest move."""

    arrived: int
    lost: int
    """Pings without an echo, one under way for each connection not counted."""
    handshakes: int
    """After the first of each connection."""
    interruption_ms: list[float]


class Member:
    """One connection."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.sent = 0
        self.echoed = 0

    async def ping(self, offset: float) -> None:
        """For ever; over when the connection is."""
        reader, writer = await self.connection.open_stream()
        await asyncio.sleep(offset)
        with contextlib.suppress(ConnectionError):
            while True:
                self.sent += 1
                writer.write(b".\n")
                if not await reader.readline():
                    return
                self.echoed += 1
                await asyncio.sleep(EVERY)


def account(members: list[Member], known: int) -> Account:
    """After a move; ``known``: how many moves each connection had seen before."""
    new = [member.connection.migrations[known:] for member in members]
    arrived = [moves[-1] for moves in new if moves and moves[-1].outcome == "arrived"]
    return Account(
        arrived=len(arrived),
        lost=sum(max(0, member.sent - member.echoed - 1) for member in members)
        + sum(member.connection.over for member in members),
        handshakes=sum(member.connection.handshakes - 1 for member in members),
        interruption_ms=[round(move.interruption_ms, 2) for move in arrived if move.interruption_ms is not None],
    )


async def crowd(host: str, port: int, cafile: str, count: int) -> None:
    gate = asyncio.Semaphore(DIALS_AT_ONCE)
    async with contextlib.AsyncExitStack() as stack:

        async def dial() -> Member:
            async with gate:
                one = quicferry.connect(host, port, cafile=cafile, server_name="localhost", timeout=30)
                return Member(await stack.enter_async_context(one))

        members = await asyncio.gather(*(dial() for _ in range(count)))
        pings = [asyncio.create_task(member.ping(number / count * EVERY)) for number, member in enumerate(members)]
        print(msgspec.json.encode({"connected": len(members)}).decode(), flush=True)
        known = 0
        while await asyncio.to_thread(sys.stdin.readline):
            await _all_arrived(members, known)
            print(msgspec.json.encode(account(members, known)).decode(), flush=True)
            known = max(len(member.connection.migrations) for member in members)
        for ping in pings:
            ping.cancel()
        await asyncio.gather(*pings, return_exceptions=True)


async def _all_arrived(members: list[Member], known: int) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(ARRIVE_SECONDS):
            for member in members:
                while len(member.connection.migrations) <= known and not member.connection.over:
                    await member.connection.migrate_seen.wait()
                    await asyncio.sleep(0)
                if member.connection.migration is not None:
                    await member.connection.migration.arrived()


def main() -> int:
    quicferry.logging.configure("bench-crowd")  # to standard error
    parser = argparse.ArgumentParser(prog="quicferry.bench.crowd", description=__doc__)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--cafile", required=True)
    parser.add_argument("--count", type=int, required=True)
    args = parser.parse_args()
    asyncio.run(crowd(args.host, args.port, args.cafile, args.count))
    return 0


if __name__ == "__main__":
    sys.exit(main())

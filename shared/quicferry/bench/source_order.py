"""``source-order``: the literal order of the source document, with CRIU by its command line and nothing parked."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time

import quicferry
from quicferry.bench import by_hand
from quicferry.bench.load import PATIENCE, SETTLE, Load, no_collections
from quicferry.bench.stand import SERVER, Box, Stand, free_port, memory_folder
from quicferry.bench.variant import Measured


class SourceOrder:
    """SIGTERM with MIGRATE_ADDR, the client swaps; dump, kill, restore, SIGUSR2: a new socket."""

    name = "source-order"
    what = "the source document's order: swap at SIGTERM, dump, restore, new socket; nothing parked, no dual sending"

    def __init__(self, stand: Stand, cafile: str) -> None:
        self._stand = stand
        self._cafile = cafile
        self._images = -1
        self._exit = contextlib.ExitStack()

    async def open(self) -> None:
        self._images = self._exit.enter_context(memory_folder())

    async def close(self) -> None:
        self._exit.close()

    async def move(self, *, bulk: bool = False) -> Measured:
        # New berths each time: the server's MIGRATE_ADDR is its environment's, so it moves only once.
        port = free_port()
        environment = {"QUICFERRY_QUIET": "1", "MIGRATE_ADDR": f"127.0.0.1:{port}"}
        source = await self._stand.berth("order-a", SERVER, environment=environment)
        target = await self._stand.berth("order-b", port=port)
        try:
            return await self._moved(source, target, bulk)
        finally:
            await self._stand.remove(source, target)
            by_hand.empty(self._images)

    async def _moved(self, source: Box, target: Box, bulk: bool) -> Measured:
        load = Load(bulk=bulk)
        dial = quicferry.connect("127.0.0.1", source.port, cafile=self._cafile, server_name="localhost")
        with await source.server() as server:
            async with dial as connection:
                with no_collections():
                    async with load.on(connection):
                        await asyncio.sleep(load.warm)
                        lost, since, seen = load.packets_lost, time.time(), connection.migrate_seen
                        server.signal(signal.SIGTERM)
                        async with asyncio.timeout(PATIENCE):
                            await seen.wait()
                        # The document's client has one peer: it leaves the old one at once.
                        connection._seam.pin()
                        told = time.time()
                        await by_hand.dump(source.init_pid, self._images)
                        dumped = time.time()
                        size = by_hand.size_bytes(self._images)
                        await by_hand.restore(target.init_pid, self._images)
                        restored = time.time()
                        with await target.server() as moved:
                            moved.signal(signal.SIGUSR2)
                        rebound = time.time()
                        await load.first_echo_after(len(load.sent))
                        await asyncio.sleep(SETTLE)
        times = by_hand.times(self._images)
        gap = load.gap(since)
        move = load.move(
            since,
            lost,
            frozen_ms=times.frozen_ms,
            restore_ms=times.restore_ms,
            image_bytes=size,
            phases_ms={
                "ack": (told - since) * 1000,
                "dump": (dumped - told) * 1000,
                "restore": (restored - dumped) * 1000,
                "adopt": (rebound - restored) * 1000,
                "first echo": max(0.0, gap.first_after - rebound) * 1000,
            },
        )
        return Measured(move, load.throughput(since) if bulk else None, load.trace(since))

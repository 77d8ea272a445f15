"""``reconnect``: no migration. Stop A, start a fresh server in B, the client dials again, and is eager about it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Final

import quicferry
from quicferry.app import Connection
from quicferry.bench.load import PATIENCE, SETTLE, Load, no_collections
from quicferry.bench.stand import SERVER, Box, Stand
from quicferry.bench.variant import Measured
from quicferry.protocol.errors import FerryError

DIAL_SECONDS: Final = 0.15
"""One attempt: a client that waits longer for an answer would find the new server later."""


class Reconnect:
    """A container for each server; B's is created ahead, so that its start is what is measured."""

    name = "reconnect"
    what = "stop A, start a fresh server in B (its container made ahead), the client dials again"

    def __init__(self, stand: Stand, cafile: str) -> None:
        self._stand = stand
        self._cafile = cafile

    async def open(self) -> None:
        pass

    async def close(self) -> None:
        pass

    async def move(self, *, bulk: bool = False) -> Measured:
        environment = {"QUICFERRY_QUIET": "1"}
        old = await self._stand.berth("again-a", SERVER, environment=environment)
        new = await self._stand.berth("again-b", SERVER, environment=environment, start=False)
        try:
            (await old.server()).close()
            return await self._moved(old, new, bulk)
        finally:
            await self._stand.remove(old, new)

    async def _moved(self, old: Box, new: Box, bulk: bool) -> Measured:
        load = Load(bulk=bulk)
        phases: dict[str, float] = {}
        async with contextlib.AsyncExitStack() as later:
            first = await later.enter_async_context(self._dial(old.port, 10.0))
            later.enter_context(no_collections())
            async with load.on(first):
                await asyncio.sleep(load.warm)
                lost, since = load.packets_lost, time.time()
                replacing = asyncio.create_task(self._replace(old, new, phases))
                try:
                    async with asyncio.timeout(PATIENCE):
                        await first.wait_closed()
                    phases["close"] = (time.time() - since) * 1000
                    # From now on, while B is not even started: no client could be more eager.
                    again = await self._again(new.port, later)
                finally:
                    await replacing
                number = len(load.sent)
            async with load.on(again, wait=False):
                await load.first_echo_after(number)
                await asyncio.sleep(SETTLE)
        move = load.move(since, lost, phases_ms=phases)
        return Measured(move, load.throughput(since) if bulk else None, load.trace(since))

    async def _replace(self, old: Box, new: Box, phases: dict[str, float]) -> None:
        start = time.monotonic()
        await self._stand.podman("stop", "--time", "5", old.name)
        stopped = time.monotonic()
        await self._stand.podman("start", new.name)
        phases |= {"stop": (stopped - start) * 1000, "start": (time.monotonic() - stopped) * 1000}

    async def _again(self, port: int, later: contextlib.AsyncExitStack) -> Connection:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                return await later.enter_async_context(self._dial(port, DIAL_SECONDS))
            except FerryError:
                if time.monotonic() > end:
                    raise

    def _dial(self, port: int, timeout: float) -> contextlib.AbstractAsyncContextManager[Connection]:
        return quicferry.connect("127.0.0.1", port, cafile=self._cafile, server_name="localhost", timeout=timeout)

"""``floor``: CRIU alone. A bare dump and restore of the server, there and back, with no client at all."""

from __future__ import annotations

import contextlib
import time

from quicferry.bench import by_hand
from quicferry.bench.figures import Move, Trace
from quicferry.bench.stand import SERVER, Box, Stand, memory_folder
from quicferry.bench.variant import Measured


class Alone:
    """The gap here is CRIU's own time, frozen and restoring: nobody is there to feel one."""

    name = "floor"
    what = "criu dump; criu restore of the same server with no client at all: CRIU's own time in it"

    def __init__(self, stand: Stand) -> None:
        self._stand = stand
        self._images = -1
        self._here: Box
        self._there: Box
        self._exit = contextlib.ExitStack()

    async def open(self) -> None:
        self._images = self._exit.enter_context(memory_folder())
        self._here = await self._stand.berth("alone-a", SERVER, environment={"QUICFERRY_QUIET": "1"})
        self._there = await self._stand.berth("alone-b")
        (await self._here.server()).close()

    async def close(self) -> None:
        self._exit.close()

    async def move(self, *, bulk: bool = False) -> Measured:
        by_hand.empty(self._images)
        start = time.monotonic()
        await by_hand.dump(self._here.init_pid, self._images, by_hand.QUICK)
        size = by_hand.size_bytes(self._images)
        await by_hand.restore(self._there.init_pid, self._images, by_hand.QUICK)
        took = (time.monotonic() - start) * 1000
        times = by_hand.times(self._images)
        own = round(times.frozen_ms + times.restore_ms, 3)
        self._here, self._there = self._there, self._here
        move = Move(
            gap_ms=own,
            sent=0,
            lost=0,
            handshakes=0,
            retransmissions=0,
            cwnd_before=0,
            cwnd_after=0,
            frozen_ms=times.frozen_ms,
            restore_ms=times.restore_ms,
            image_bytes=size,
            phases_ms={"dump": times.frozen_ms, "restore": times.restore_ms, "process starts": took - own},
        )
        return Measured(move, None, Trace(gap_ms=own, points=[]))

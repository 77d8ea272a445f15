"""The client's side: numbered pings at a steady pace, a bulk stream beside them if wanted, and what they tell."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from collections.abc import AsyncIterator, Iterator
from itertools import pairwise
from typing import Final, NamedTuple

from quicferry.app import Connection
from quicferry.bench.figures import Move, Throughput, Trace

INTERVAL: Final = 0.002
"""Seconds between pings."""
WARM: Final = 0.6
"""Seconds of pings before a move."""
SETTLE: Final = 1.1
"""Seconds of pings after one: losses and the congestion window are looked at for a second."""
BULK_WARM: Final = 1.6
LATE: Final = 2.0
"""Seconds at the end in which echoes may still come."""
CHUNK: Final = 32 * 1024
FIRST_ECHOES: Final = 20
PATIENCE: Final = 20.0
TRACE_BEFORE_MS, TRACE_AFTER_MS = 60.0, 1000.0
TRACE_POINTS: Final = 600


class Gap(NamedTuple):
    """The longest time without an echo in a move: Unix seconds."""

    last_before: float
    first_after: float

    @property
    def ms(self) -> float:
        return (self.first_after - self.last_before) * 1000


class Load:
    """One move's traffic, over as many connections as the client needed one after the other."""

    def __init__(self, *, bulk: bool = False, interval: float = INTERVAL) -> None:
        self.sent: list[float] = []
        self.echoed: dict[int, float] = {}
        """Ping number to when its echo came."""
        self.bulk: list[tuple[float, int]] = []
        """When how many bytes of the bulk stream came back."""
        self.connections: list[Connection] = []
        self._with_bulk = bulk
        self._interval = interval
        self._news = asyncio.Condition()

    @property
    def warm(self) -> float:
        """Seconds of traffic wanted before a move."""
        return BULK_WARM if self._with_bulk else WARM

    @contextlib.asynccontextmanager
    async def on(self, connection: Connection, *, wait: bool = True) -> AsyncIterator[None]:
        """Traffic on ``connection`` while the block runs, and at its end time for late echoes if it still lives.

        With ``wait`` the block begins once echoes flow. Raises TimeoutError if they do not.
        """
        self.connections.append(connection)
        reader, writer = await connection.open_stream()
        reading = asyncio.create_task(self._read(reader))
        sending = asyncio.create_task(self._send(writer))
        streams = [writer]
        tasks = [sending, reading]
        if self._with_bulk:
            reader, writer = await connection.open_stream()
            streams.append(writer)
            tasks += [asyncio.create_task(self._pour(writer)), asyncio.create_task(self._drink(reader))]
        try:
            if wait:
                await self._until(lambda: len(self.echoed) >= FIRST_ECHOES)
            yield
            await _end(sending)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LATE), self._news:
                    await self._news.wait_for(lambda: len(self.echoed) == len(self.sent) or connection.over)
        finally:
            for task in tasks:
                await _end(task)
            for stream in streams:
                stream.transport.abort()

    async def first_echo_after(self, number: int) -> None:
        """Until a ping sent as ``number`` or later is answered. Raises TimeoutError."""
        await self._until(lambda: bool(self.echoed) and max(self.echoed) >= number)

    def gap(self, since: float) -> Gap:
        """The longest time without an echo that ended after ``since``. Raises ValueError without echoes."""
        times = sorted(self.echoed.values())
        return Gap(*max(((a, b) for a, b in pairwise(times) if b >= since), key=lambda pair: pair[1] - pair[0]))

    def move(self, since: float, lost_before: int, **figures: object) -> Move:
        """The client's figures of a move that began at ``since``; ``figures`` are what else is known."""
        gap = self.gap(since)
        first, last = self.connections[0], self.connections[-1]
        windows = last.traces.all[-1].windows
        after = gap.last_before if first is last else gap.first_after
        return Move(
            gap_ms=round(gap.ms, 3),
            sent=len(self.sent),
            lost=len(self.sent) - len(self.echoed),
            handshakes=sum(connection.handshakes for connection in self.connections) - 1,
            retransmissions=self.packets_lost - lost_before,
            cwnd_before=first.traces.all[-1].windows.before(gap.last_before),
            cwnd_after=windows.lowest(after, gap.first_after + 1.0) or last.congestion_window,
            **figures,  # type: ignore[arg-type]
        )

    @property
    def packets_lost(self) -> int:
        """Declared lost so far, on all connections."""
        return sum(trace.windows.lost for connection in self.connections for trace in connection.traces.all)

    def throughput(self, since: float) -> Throughput:
        """Of the bulk stream around a move."""
        times = [at for at, _ in self.bulk]
        before, after = max(((a, b) for a, b in pairwise(times) if b >= since), key=lambda pair: pair[1] - pair[0])
        return Throughput(
            before=sum(size for at, size in self.bulk if before - 1.0 < at <= before),
            after=sum(size for at, size in self.bulk if after <= at < after + 1.0),
        )

    def trace(self, since: float) -> Trace:
        """Round trips around the gap, for a plot."""
        gap = self.gap(since)
        points = []
        for number, at in sorted(self.echoed.items()):
            sent = self.sent[number]
            x = (sent - gap.last_before) * 1000
            if -TRACE_BEFORE_MS <= x <= gap.ms + min(TRACE_AFTER_MS, max(60.0, gap.ms * 0.6)):
                points.append((round(x, 2), round((at - sent) * 1000, 2)))
        return Trace(gap_ms=round(gap.ms, 2), points=points[:: max(1, len(points) // TRACE_POINTS)])

    async def _until(self, wanted: object) -> None:
        assert callable(wanted)  # noqa: S101 - lambdas of ours
        async with asyncio.timeout(PATIENCE), self._news:
            await self._news.wait_for(wanted)

    async def _send(self, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            number = len(self.sent)
            self.sent.append(time.time())
            with contextlib.suppress(ConnectionError):  # a ping into a dead connection is a lost one
                writer.write(b"%d\n" % number)
            due = max(due + self._interval, loop.time())  # what was missed is not made up for in a burst
            await asyncio.sleep(due - loop.time())

    async def _read(self, reader: asyncio.StreamReader) -> None:
        rest = b""
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65_536):
                now = time.time()
                *lines, rest = (rest + data).split(b"\n")
                async with self._news:
                    for line in lines:
                        self.echoed[int(line)] = now
                    self._news.notify_all()

    async def _pour(self, writer: asyncio.StreamWriter) -> None:
        chunk = bytes(CHUNK)
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(chunk)
                await writer.drain()
                await asyncio.sleep(0)

    async def _drink(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 20):
                self.bulk.append((time.time(), len(data)))


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@contextlib.contextmanager
def no_collections() -> Iterator[None]:
    """The client's own garbage collector would add its pauses to what is measured."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()

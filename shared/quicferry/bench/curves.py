"""``ferry`` under more of something: connections beside the one that measures, or resident memory."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Final

import msgspec

from quicferry.bench.crowd import Account
from quicferry.bench.ferry import Ferry
from quicferry.bench.figures import Move, Point, over_floor, summary
from quicferry.bench.own_service import OwnService
from quicferry.bench.stand import Stand
from quicferry.bus.connection import Bus
from quicferry.protocol.errors import FerryError

Say = Callable[[str], None]
CROWD_SECONDS: Final = 60.0
"""How long a crowd may take to connect, or to have arrived."""
END_SECONDS: Final = 5.0
OWN_MB: Final = 30
"""What a server without ballast holds, about; the ballast makes up the rest."""


class Crowd:
    """``count`` connections in another process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    @contextlib.asynccontextmanager
    async def of(cls, count: int, ferry: Ferry, cafile: str) -> AsyncIterator[Crowd | None]:
        """Connected once the block begins; gone after it. None for none."""
        if not count:
            yield None
            return
        address = (await ferry.placement()).place.address
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "quicferry.bench.crowd", "--host", address.host, "--port", str(address.port)),
            *("--cafile", cafile, "--count", str(count)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "QUICFERRY_LOG_LEVEL": "error"},
            limit=1 << 20,
            start_new_session=True,  # Ctrl-C is ours to act upon; its standard input's end is its own
        )
        crowd = cls(process)
        try:
            await crowd._line()
            yield crowd
        finally:
            await crowd._end()

    async def account(self) -> Account:
        """Of the move just made. Raises FerryError ``setup_failed``."""
        assert self._process.stdin is not None  # noqa: S101 - asked for above
        self._process.stdin.write(b"\n")
        return msgspec.json.decode(await self._line(), type=Account)

    async def _line(self) -> bytes:
        assert self._process.stdout is not None  # noqa: S101 - asked for above
        try:
            async with asyncio.timeout(CROWD_SECONDS):
                line = await self._process.stdout.readline()
        except TimeoutError:
            line = b""
        if not line:
            raise FerryError("setup_failed", "The load generator ended, or says nothing.")
        return line

    async def _end(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(END_SECONDS):
                await self._process.wait()
        if self._process.returncode is None:
            self._process.kill()
            await self._process.wait()


async def connections(ferry: Ferry, numbers: Sequence[int], moves: int, say: Say) -> list[Point]:
    """One of the connections pings every 2 ms and measures; the others ping every second."""
    points = []
    for number in numbers:
        taken: list[Move] = []
        accounts: list[Account] = []
        async with Crowd.of(number - 1, ferry, ferry.cafile) as crowd:
            for _ in range(moves):
                taken.append(await _moved(ferry))
                if crowd is not None:
                    accounts.append(await crowd.account())
        point = _point(number, taken, accounts)
        points.append(point)
        say(_told("connections", point))
    return points


async def memory(bus: Bus, cafile: str, stand: Stand, sizes: Sequence[int], moves: int, say: Say) -> list[Point]:
    """A service of its own for each size, in two berths of the running system."""
    points = []
    for size in sizes:
        environment = {"QUICFERRY_BALLAST_MB": str(max(0, size - OWN_MB))}
        ferry = OwnService(bus, cafile, stand, f"{size}mb", environment)
        try:
            await ferry.open()
            taken = [await _moved(ferry) for _ in range(moves)]
        finally:
            await asyncio.shield(ferry.close())
        point = _point(size, taken, [])
        points.append(point)
        say(_told("MB", point))
    return points


async def _moved(ferry: Ferry) -> Move:
    """One move. Raises FerryError, ``setup_failed`` where it came to no end: a point has no second attempt."""
    try:
        return (await ferry.move()).move
    except (TimeoutError, ConnectionError) as error:
        raise FerryError(
            "setup_failed",
            f"A move of a curve did not come to its end: {str(error) or 'no end in time'}.",
            hint="Measure again; --connections 0 and --memory 0 leave the curves out.",
        ) from error


def _point(x: int, moves: Sequence[Move], accounts: Sequence[Account]) -> Point:
    return Point(
        x=x,
        moves=len(moves),
        gap_ms=summary(move.gap_ms for move in moves),
        floor_ms=summary(move.floor_ms for move in moves),
        gap_over_floor=over_floor(moves),
        image_mb=summary(None if move.image_bytes is None else move.image_bytes / 1e6 for move in moves),
        echoes_lost=sum(move.lost for move in moves) + sum(one.lost for one in accounts),
        handshakes=sum(move.handshakes for move in moves) + sum(one.handshakes for one in accounts[-1:]),
        arrived=min((one.arrived + 1 for one in accounts), default=1) if x else None,
        interruption_ms=summary(ms for one in accounts for ms in one.interruption_ms),
    )


def _told(what: str, point: Point) -> str:
    gap = f"{point.gap_ms.median:.1f}" if point.gap_ms else "?"
    floor = f"{point.floor_ms.median:.1f}" if point.floor_ms else "?"
    return f"{point.x} {what}: gap {gap} ms, floor {floor} ms, lost {point.echoes_lost}"

"""One benchmark: every variant in turn, round after round, so that the machine's noise hits all alike."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from quicferry.bench import curves, facts, figures
from quicferry.bench.alone import Alone
from quicferry.bench.ferry import Ferry
from quicferry.bench.figures import Move, Point, Result, Throughput, Trace
from quicferry.bench.own_service import Copied
from quicferry.bench.podman import Podman
from quicferry.bench.reconnect import Reconnect
from quicferry.bench.source_order import SourceOrder
from quicferry.bench.stand import Stand
from quicferry.bench.variant import Measured, Variant
from quicferry.bus.connection import Bus
from quicferry.host.compose import Stack
from quicferry.protocol.errors import FerryError

Say = Callable[[str], None]
MOVE_SECONDS: Final = 90.0
"""How long any one move may take, its set-up included."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How much to measure."""

    moves: int = 10
    bulk_moves: int = 3
    """Moves under a bulk stream, besides; for the throughput's sake."""
    variants: tuple[str, ...] = ()
    connections: tuple[int, ...] = ()
    memory: tuple[int, ...] = ()
    curve_moves: int = 5


class Taken(msgspec.Struct):
    """What has been measured of one variant so far."""

    what: str
    moves: list[Move] = msgspec.field(default_factory=list)
    bulk: list[Throughput] = msgspec.field(default_factory=list)
    traces: list[Trace] = msgspec.field(default_factory=list)
    failed: list[str] = msgspec.field(default_factory=list)

    def summed(self) -> figures.Variant:
        median = figures.summary(trace.gap_ms for trace in self.traces)
        # The plot shows the move that is nearest to the median, not the prettiest.
        typical = min(self.traces, key=lambda one: abs(one.gap_ms - median.median)) if median is not None else None
        return figures.variant(self.what, self.moves, bulk=self.bulk, trace=typical, failed=self.failed)


async def interleaved(variants: Sequence[Variant], plan: Plan, say: Say) -> dict[str, Taken]:
    """Every variant's moves, one of each a round. Raises FerryError if one can't be opened or fails twice."""
    taken = {variant.name: Taken(variant.what) for variant in variants}
    async with contextlib.AsyncExitStack() as stack:
        for variant in variants:
            stack.push_async_callback(variant.close)
            await variant.open()
        for number in range(plan.moves + plan.bulk_moves):
            bulk = number >= plan.moves
            for variant in variants:
                if bulk and variant.name == "floor":
                    continue  # no client, no stream
                one = taken[variant.name]
                measured = await _once_more(variant, bulk, one.failed, say)
                if bulk:
                    if measured.throughput is not None:
                        one.bulk.append(measured.throughput)
                    continue
                one.moves.append(measured.move)
                one.traces.append(measured.trace)
                say(
                    f"{variant.name} {number + 1}/{plan.moves}: gap {measured.move.gap_ms:.1f} ms"
                    f"{_floor(measured.move)}, lost {measured.move.lost}, handshakes {measured.move.handshakes}"
                )
    return taken


async def _once_more(variant: Variant, bulk: bool, failed: list[str], say: Say) -> Measured:
    """A move; a second attempt if the first went wrong, and the first is told."""
    for attempt in (1, 2):
        try:
            async with asyncio.timeout(MOVE_SECONDS):
                return await variant.move(bulk=bulk)
        except (FerryError, TimeoutError, ConnectionError) as error:
            why = str(error) or "no end in time"
            failed.append(why)
            if attempt == 2:
                raise FerryError(
                    "setup_failed", f"{variant.name}: {why}", hint="`quicferry doctor` looks around."
                ) from error
            say(f"{variant.name}: {why}; once more")
    raise AssertionError("unreachable")


def _floor(move: Move) -> str:
    return f", floor {move.floor_ms:.1f} ms" if move.floor_ms is not None else ""


class Bench:
    """A benchmark of one running system."""

    def __init__(self, *, bus: Bus, stack: Stack, project: Path, cafile: str, service: str, say: Say) -> None:
        self._bus = bus
        self._stack = stack
        self._project = project
        self._cafile = cafile
        self._service = service
        self._say = say

    async def run(self, plan: Plan, *, command: str) -> Result:
        """Everything the plan asks for; whatever was started for it is gone at the end. Raises FerryError."""
        machine = await asyncio.to_thread(facts.machine, self._project, self._stack.environment)
        stand = await Stand.opened(self._stack)
        try:
            taken = await interleaved([self._variant(name, stand) for name in plan.variants], plan, self._say)
            bends: dict[str, list[Point]] = {}
            if plan.connections:
                bends["connections"] = await curves.connections(
                    Ferry(self._bus, self._cafile, self._service), plan.connections, plan.curve_moves, self._say
                )
            if plan.memory:
                bends["memory"] = await curves.memory(
                    self._bus, self._cafile, stand, plan.memory, plan.curve_moves, self._say
                )
        finally:
            await asyncio.shield(stand.remove_all())
        return Result(
            machine=machine,
            variants={name: one.summed() for name, one in taken.items()},
            curves=bends,
            command=command,
        )

    def _variant(self, name: str, stand: Stand) -> Variant:
        match name:
            case "ferry":
                return Ferry(self._bus, self._cafile, self._service)
            case "copied":
                return Copied(self._bus, self._cafile, stand)
            case "source-order":
                return SourceOrder(stand, self._cafile)
            case "reconnect":
                return Reconnect(stand, self._cafile)
            case "podman":
                tls = f"{self._stack.name}_tls"
                return Podman(stand, self._cafile, tls, self._project, self._say)
            case "floor":
                return Alone(stand)
        raise FerryError("internal", f"There is no variant {name!r}.")


__all__ = ["Bench", "Plan", "Point", "Result", "Taken", "interleaved"]

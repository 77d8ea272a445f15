"""``ferry``: what this project does by default, asked for over NATS as any user would."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from typing import Final

import quicferry
from quicferry.app import Connection
from quicferry.bench.figures import Throughput, Trace
from quicferry.bench.load import PATIENCE, SETTLE, Load, no_collections
from quicferry.bench.variant import Measured
from quicferry.bus.connection import Bus
from quicferry.bus.log import EventLog
from quicferry.protocol import events as ev
from quicferry.protocol import subjects
from quicferry.protocol.agents import ARE_YOU_THERE, ArmReply
from quicferry.protocol.api import MigrateReply, MigrateRequest, Placement, ServicesReply, ServicesRequest
from quicferry.protocol.errors import FerryError

MOVE_SECONDS: Final = 60.0
ASK_EVERY: Final = 0.1
DIAL_SECONDS: Final = 2.0


class Ferry:
    """Moves of one service of a running system; there and back, as the placement has it."""

    name = "ferry"
    what = "what quicferry does by default"

    def __init__(self, bus: Bus, cafile: str, service: str = "echo") -> None:
        self._bus = bus
        self.cafile = cafile
        self._service = service

    async def open(self) -> None:
        pass

    async def close(self) -> None:
        pass

    async def move(self, *, bulk: bool = False) -> Measured:
        """One move under load. Raises FerryError ``setup_failed`` if it does not complete."""
        placement = await self.placement()
        load = Load(bulk=bulk)
        async with self._dial(placement, 10.0) as connection:
            with no_collections():
                async with load.on(connection):
                    await asyncio.sleep(load.warm)
                    lost = load.packets_lost
                    since, seen = time.time(), connection.migrate_seen
                    migration = await self.ask()
                    async with asyncio.timeout(PATIENCE):
                        await seen.wait()
                        assert connection.migration is not None  # noqa: S101 - seen says so
                        await connection.migration.arrived()
                    await asyncio.sleep(SETTLE)
        events = await self.outcome(migration)
        gap = load.gap(since)
        move = load.move(since, lost, **criu_figures(events), phases_ms=phases(events, gap.first_after))
        throughput: Throughput | None = load.throughput(since) if bulk else None
        trace: Trace = load.trace(since)
        return Measured(move, throughput, trace, events, gap)

    async def placement(self) -> Placement:
        """Where the service is, once it is anywhere. Raises FerryError ``unknown_service``."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE):
                while True:
                    with contextlib.suppress(FerryError):
                        reply = await self._bus.request(
                            subjects.SERVICES, ServicesRequest(), ServicesReply, timeout=5
                        )
                        for placement in reply.services:
                            if placement.service == self._service and await self._serves(placement):
                                return placement
                    await asyncio.sleep(ASK_EVERY)  # nothing announces a service's first sight
        raise FerryError("unknown_service", f"No service {self._service!r} was seen within {PATIENCE:g} s.")

    async def _serves(self, placement: Placement) -> bool:
        """Whether the server's wrapper is on NATS, where after a move it comes back only behind the clients.

        And whether it is where the placement says, which after a new start may be that of the old one.
        Raises FerryError.
        """
        await self._bus.request(subjects.arm(self._service), ARE_YOU_THERE, ArmReply, timeout=5)
        async with self._dial(placement, DIAL_SECONDS):
            return True

    def _dial(self, placement: Placement, timeout: float) -> contextlib.AbstractAsyncContextManager[Connection]:
        address = placement.place.address
        return quicferry.connect(
            address.host, address.port, cafile=self.cafile, server_name="localhost", timeout=timeout
        )

    async def ask(self) -> str:
        """Ask for a move; the id. Asks again while the server has not come back to NATS after the last one."""
        end = time.monotonic() + PATIENCE
        while True:
            try:
                request = MigrateRequest(service=self._service)
                return (await self._bus.request(subjects.MIGRATE, request, MigrateReply, timeout=5)).id
            except FerryError as error:
                if error.code not in ("service_busy", "no_target") or time.monotonic() > end:
                    raise
                await asyncio.sleep(ASK_EVERY)

    async def outcome(self, migration: str) -> list[ev.AnyEvent]:
        """The log of a move that is over. Raises FerryError ``setup_failed`` if it did not complete."""
        log = await EventLog.open(self._bus)
        seen: list[ev.AnyEvent] = []
        async with asyncio.timeout(MOVE_SECONDS), contextlib.aclosing(log.follow(migration=migration)) as entries:
            async for _, event, _ in entries:
                seen.append(event)
                if isinstance(event, ev.RolledBack | ev.Failed):
                    raise FerryError("setup_failed", f"The move {migration} did not complete: {event.reason.message}")
                if isinstance(event, ev.Completed):
                    break
        return seen


def criu_figures(events: Sequence[ev.AnyEvent]) -> dict[str, float | int | None]:
    """CRIU's own account of a move."""
    frozen = next((event.frozen_ms for event in events if isinstance(event, ev.SourceGone)), None)
    restore = next((event.restore_ms for event in events if isinstance(event, ev.Resumed)), None)
    size = next((event.image_bytes for event in events if isinstance(event, ev.Dumped)), None)
    return {"frozen_ms": frozen, "restore_ms": restore, "image_bytes": size}


def phases(events: Sequence[ev.AnyEvent], first_echo: float) -> dict[str, float]:
    """What a move's time went into, in milliseconds.

    Where the log has no duration of its own they are differences of its whole milliseconds, so single ones are
    true to 1 ms; ``first_echo`` (Unix seconds) is the client's. Phases overlap where the agents work ahead.
    """
    at: dict[type[ev.Event], ev.AnyEvent] = {}
    for event in events:
        at.setdefault(type(event), event)
    found: dict[str, float | None] = {}
    acks = [event.after_ms for event in events if isinstance(event, ev.AckSeen)]

    def between(first: type[ev.Event], then: type[ev.Event], *, less: float = 0.0) -> float | None:
        if first not in at or then not in at:
            return None
        return max(0.0, at[then].at_ms - at[first].at_ms - less)

    held, dumped = at.get(ev.SourceHeld), at.get(ev.Dumped)
    restored, resumed = at.get(ev.Restored), at.get(ev.Resumed)
    found["arm"] = between(ev.Prepared, ev.Armed)
    found["ack"] = max(acks, default=None)
    if isinstance(held, ev.SourceHeld):
        found["freeze"] = max(0.0, held.waited_ms - max(acks, default=0.0))
    if isinstance(dumped, ev.Dumped):
        found["dump"] = dumped.took_ms
    if isinstance(restored, ev.Restored):
        found["transfer"] = between(ev.Dumped, ev.Restored, less=restored.took_ms)
        found["restore"] = restored.took_ms
        found["commit"] = between(ev.Restored, ev.Committed)
    if isinstance(resumed, ev.Resumed):
        found["adopt"] = resumed.took_ms
        found["first echo"] = max(0.0, first_echo * 1000 - resumed.at_ms)
    return {name: round(value, 3) for name, value in found.items() if value is not None}

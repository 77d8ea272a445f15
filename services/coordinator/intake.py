"""The public API: checks a request, chooses the target, takes the lock and writes the first decision."""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import Final

import structlog

from quicferry import faults
from quicferry.bus.log import EventLog
from quicferry.bus.registry import Registry, Sighted
from quicferry.migration.machine import Phase, State
from quicferry.protocol import events as ev
from quicferry.protocol.agents import ARE_YOU_THERE
from quicferry.protocol.api import (
    CancelReply,
    CancelRequest,
    MigrateReply,
    MigrateRequest,
    MigrationStatus,
    Placement,
    ServicesReply,
    ServicesRequest,
    StatusReply,
    StatusRequest,
)
from quicferry.protocol.errors import FerryError
from services.coordinator import places
from services.coordinator.book import Book, read_book
from services.coordinator.driver import now_ms

log = structlog.get_logger()

ORPHAN_SECONDS: Final = 0.5
"""A lock whose migration is not in the log after so long belongs to a coordinator that died in between. Only the
leader takes locks, one request after another: nobody else can be about to write this one's."""
TRIES: Final = 20
TRY_WAIT: Final = 0.05
CAUGHT_UP_SECONDS: Final = 2.0
_PAST_RETURN: Final = (Phase.COMMITTING, Phase.RESUMING, Phase.SETTLING)


class Intake:
    """One method an endpoint. ``leader`` is the name that the status tells."""

    def __init__(self, event_log: EventLog, registry: Registry, book: Book, leader: str) -> None:
        self._log = event_log
        self._registry = registry
        self._book = book
        self._leader = leader
        self._orphan = ("", 0.0)
        """A lock's migration that is not in the log, and when it was first missed (this loop's time)."""

    async def migrate(self, request: MigrateRequest) -> MigrateReply:
        """Put the migration into the log, once for each id. Raises FerryError with one of a dozen codes."""
        if request.id == ARE_YOU_THERE.id:  # every later probe of the server would call that move off
            raise FerryError(
                "bad_request",
                f"The id {request.id!r} is what servers are asked by whether they are there.",
                hint="Choose another id, or leave it out.",
                path="$.id",
            )
        await self._caught_up()
        if request.id is not None and (known := self._book.state(request.id)):
            return _again(request, known.request)
        migration = request.id or _make_id(request.service)
        for _ in range(TRIES):
            if await self._registry.lock(request.service, migration):
                return await self._locked(request, migration)
            if reply := await self._held(request, migration):
                return reply
        raise FerryError(
            "service_busy",
            f"The lock of {request.service!r} keeps changing hands.",
            hint="Try again.",
        )

    async def _locked(self, request: MigrateRequest, migration: str) -> MigrateReply:
        try:
            requested = await self._choose(request, migration)
            await faults.at("coordinator.locked")
            await self._log.decide(requested, after=0)
            await faults.at("coordinator.requested")
        except FerryError as error:
            known = await self._caught_up()
            state = self._book.state(migration) or (await read_book(self._log, migration)).state(migration)
            # The same id may have been asked for a moment ago; then this lock is its own, for as long as it runs.
            if state is None:  # what is read may lag behind the log
                over = known and error.code != "log_conflict"
            else:
                over = state.outcome is not None or state.request.service != request.service
            if over:
                await self._registry.unlock(request.service, migration)
            if state is not None and error.code == "log_conflict":
                return _again(request, state.request)
            raise
        return _reply(requested)

    async def _choose(self, request: MigrateRequest, migration: str) -> ev.Requested:
        (berths, now), placement = await self._where(request.service)
        source = places.source(request.service, berths, placement, now)
        return ev.Requested(
            id=migration,
            at_ms=now_ms(),
            service=request.service,
            source=source,
            target=places.target(request.service, request.to, source, berths, now),
            epoch=(placement.epoch if placement else 0) + 1,
            options=request.options,
        )

    async def _where(self, service: str) -> tuple[Sighted, Placement | None]:
        sighted = await self._sighted()
        placement = (await self._registry.placement(service)).placement
        logged = self._book.placements().get(service)
        if placement is None or (logged is not None and logged.epoch > placement.epoch):
            placement = logged  # the bucket is the log's cache, and may lag
        return sighted, placement

    async def _sighted(self) -> Sighted:
        berths, now = await self._registry.sighted()
        return Sighted(places.corrected(berths, self._book.verdict), now)

    async def _held(self, request: MigrateRequest, migration: str) -> MigrateReply | None:
        """Somebody has the lock: the answer for the same id, an error for a live one, None when it is worth a try."""
        holder = await self._registry.lock_holder(request.service)
        if holder is None:
            return None
        state = self._book.state(holder.id) or (await read_book(self._log, holder.id)).state(holder.id)
        if state is None:
            if self._orphaned(holder.id):
                log.warning("lock_taken_over", id=migration, service=request.service, holder=holder.id)
                await self._registry.unlock(request.service, holder.id)
            else:
                await asyncio.sleep(TRY_WAIT)  # the last leader's request may be on its way still
            return None
        if state.outcome is not None:
            log.info("lock_taken_over", id=migration, service=request.service, holder=holder.id)
            await self._registry.unlock(request.service, holder.id)
            return None
        if holder.id == migration:
            return _again(request, state.request)
        raise FerryError(
            "service_busy",
            f"{request.service!r} is being moved by {holder.id!r}.",
            hint=f"Wait for it (`quicferry status {holder.id}`) or cancel it.",
        )

    def _orphaned(self, migration: str) -> bool:
        now = asyncio.get_running_loop().time()
        if self._orphan[0] != migration:
            self._orphan = (migration, now)
        return now - self._orphan[1] > ORPHAN_SECONDS

    async def cancel(self, request: CancelRequest) -> CancelReply:
        """Ask the log to turn back. Raises FerryError ``unknown_migration`` or ``too_late``."""
        await self._caught_up()
        state, _ = await self._known(request.id)
        if state.outcome is None and state.reason is None:
            seq = await self._log.append(ev.CancelAsked(id=request.id, at_ms=now_ms()))
            await self._caught_up(seq)  # the log's order says which came first, this or the commit
            state = self._book.state(request.id) or state
        if state.committed or state.phase in _PAST_RETURN or state.outcome == "completed":
            raise FerryError(
                "too_late",
                f"The migration {request.id!r} is committed: it only goes forward.",
                hint="Move the service back when it is done.",
            )
        return CancelReply(id=request.id, phase=state.outcome or state.phase.value)

    async def status(self, request: StatusRequest) -> StatusReply:
        """One migration, or the newest ones first. Raises FerryError ``unknown_migration``."""
        await self._caught_up()
        if request.id is not None:
            _, status = await self._known(request.id)
            return StatusReply(migrations=[status], leader=self._leader)
        return StatusReply(migrations=self._book.newest(request.limit, request.service), leader=self._leader)

    async def services(self, request: ServicesRequest) -> ServicesReply:
        """Where every service is, and every berth."""
        del request  # it has no fields
        await self._caught_up()
        berths, now = await self._sighted()
        placements = {placement.service: placement for placement in await self._registry.placements()}
        for service, logged in self._book.placements().items():
            if service not in placements or placements[service].epoch < logged.epoch:
                placements[service] = logged
        return ServicesReply(services=places.services(berths, placements, now), berths=berths)

    async def _caught_up(self, seq: int | None = None) -> bool:
        """Know at least what the log held when we were asked: who saw a migration end may ask for the next one.

        False if that took too long; then the answer is what is known by now.
        """
        seq = await self._log.last_seq() if seq is None else seq
        try:
            async with asyncio.timeout(CAUGHT_UP_SECONDS):
                await self._book.reached(seq)
        except TimeoutError:
            return False
        return True

    async def _known(self, migration: str) -> tuple[State, MigrationStatus]:
        book = self._book if self._book.state(migration) else await read_book(self._log, migration)
        state, status = book.state(migration), book.status(migration)
        if state is None or status is None:
            raise FerryError(
                "unknown_migration",
                f"No migration {migration!r} is in the log.",
                hint="'quicferry status' lists the newest ones.",
                path="$.id",
            )
        return state, status


def _make_id(service: str) -> str:
    """Readable, sortable within a service, and not guessed twice."""
    return f"{service[:40]}-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"


def _again(request: MigrateRequest, known: ev.Requested) -> MigrateReply:
    """The answer to an id that is in the log already."""
    if known.service != request.service or (request.to is not None and not places.names(request.to, known.target)):
        raise FerryError(
            "id_in_use",
            f"The id {known.id!r} names the migration of {known.service!r} to {known.target.berth!r}.",
            hint="Choose another id, or leave it out.",
            path="$.id",
        )
    return _reply(known)


def _reply(requested: ev.Requested) -> MigrateReply:
    return MigrateReply(
        id=requested.id,
        service=requested.service,
        source=requested.source,
        target=requested.target,
        epoch=requested.epoch,
    )

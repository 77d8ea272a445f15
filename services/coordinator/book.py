"""What the log has said so far about every migration, kept for status, driver and intake."""

from __future__ import annotations

import asyncio
from typing import Final, NamedTuple

import structlog
from msgspec.structs import replace

from quicferry.bus.log import Entry, EventLog
from quicferry.migration.commands import Command
from quicferry.migration.machine import State, handle
from quicferry.protocol import events as ev
from quicferry.protocol.api import MigrationStatus, Place, Placement

log = structlog.get_logger()

KEPT_ENDED: Final = 1000
"""Ended migrations held in memory, without their clients' names; older ones are read from the log when asked for."""


class Verdict(NamedTuple):
    """Where the newest ended migration of a service left it: newer than any sighting from before ``at_ms``.

    That is by NATS's clock, as sightings are.
    """

    occupied: Place
    empty: Place
    at_ms: int


class Taken(NamedTuple):
    """What one entry of the log came to."""

    entry: Entry
    before: State | None
    state: State
    commands: list[Command]
    """What is to be done now."""


class Book:
    """Fed with the log's entries in order; feeds them to the state machine."""

    def __init__(self) -> None:
        self._states: dict[str, State] = {}
        self._decided: dict[str, int] = {}
        self._ended: dict[str, MigrationStatus] = {}
        self._broken: set[str] = set()
        self._verdicts: dict[str, Verdict] = {}
        self._placements: dict[str, Placement] = {}
        self._seq = 0
        self._waiting: set[tuple[int, asyncio.Event]] = set()

    def take(self, entry: Entry) -> Taken | None:
        """What ``entry`` came to; None when it belongs to no known migration."""
        event = entry.event
        try:
            taken = self._take(entry)
        except ValueError:
            # Its beginning has left the log, or somebody published it by hand.
            log.debug("log_entry_orphaned", id=event.id, kind=ev.kind(event))
            taken = None
        except Exception:  # a defect in the machine stops this migration, not the others
            log.exception("machine_failed", id=event.id, seq=entry.seq, kind=ev.kind(event))
            self._broken.add(event.id)
            taken = None
        self.passed(entry.seq)
        return taken

    @property
    def seq(self) -> int:
        """Up to which entry the log has been taken or passed over."""
        return self._seq

    def passed(self, seq: int) -> None:
        """Nothing up to entry ``seq`` is still to come."""
        self._seq = max(self._seq, seq)
        for waiting in [w for w in self._waiting if w[0] <= self._seq]:
            self._waiting.discard(waiting)
            waiting[1].set()

    def _take(self, entry: Entry) -> Taken | None:
        event = entry.event
        if event.id in self._broken:
            return None
        before = self._states.get(event.id)
        state, commands = handle(before, event)
        self._states[event.id] = state
        if isinstance(event, ev.Decision):
            self._decided[event.id] = entry.seq
        if state.committed and (before is None or not before.committed):
            self._note_placement(state)
        if state.outcome is not None and (before is None or before.outcome is None):
            self._note_end(state, entry.at_ms)
        return Taken(entry, before, state, commands)

    def _note_placement(self, state: State) -> None:
        request = state.request
        known = self._placements.get(request.service)
        if known is None or known.epoch <= request.epoch:
            self._placements[request.service] = placement_of(state)

    def _note_end(self, state: State, at_ms: int) -> None:
        request = state.request
        if state.outcome == "completed":
            self._verdicts[request.service] = Verdict(request.target, request.source, at_ms)
        elif state.outcome == "rolled_back":
            self._verdicts[request.service] = Verdict(request.source, request.target, at_ms)
        self._ended[request.id] = status_of(state)
        # Each client is named twice: a thousand moves of thousands of clients would not fit.
        self._states[request.id] = replace(state, acks=frozenset(), arrived=frozenset())
        while len(self._ended) > KEPT_ENDED:
            oldest = next(iter(self._ended))
            del self._ended[oldest], self._states[oldest]
            self._decided.pop(oldest, None)

    def state(self, migration: str) -> State | None:
        """Once it has ended, without its clients' names."""
        return self._states.get(migration)

    def status(self, migration: str) -> MigrationStatus | None:
        """As the public API tells it."""
        state = self._states.get(migration)
        return self._ended.get(migration) or (status_of(state) if state else None)

    def last_decision(self, migration: str) -> int:
        """The number of the newest decision's entry; 0 when there is none."""
        return self._decided.get(migration, 0)

    def unfinished(self) -> list[State]:
        return [s for s in self._states.values() if s.outcome is None and s.request.id not in self._broken]

    def newest(self, limit: int, service: str | None = None) -> list[MigrationStatus]:
        """The newest first."""
        fitting = [s for s in self._states.values() if service in (None, s.request.service)]
        return [self._ended.get(s.request.id) or status_of(s) for s in fitting[::-1][:limit]]

    def verdict(self, service: str) -> Verdict | None:
        return self._verdicts.get(service)

    def placements(self) -> dict[str, Placement]:
        """Where the log's committed migrations put each service."""
        return dict(self._placements)

    async def reached(self, seq: int) -> None:
        """Wait until entry ``seq`` has been taken or passed over."""
        if seq <= self._seq:
            return
        reached = asyncio.Event()
        waiting = (seq, reached)
        self._waiting.add(waiting)
        try:
            await reached.wait()
        finally:
            self._waiting.discard(waiting)


async def read_book(event_log: EventLog, migration: str) -> Book:
    """One migration from the log itself: for those the book no longer holds, or does not hold yet."""
    book = Book()
    for entry in await event_log.read(migration):
        book.take(entry)
    return book


def placement_of(state: State) -> Placement:
    """What the placement bucket says once ``state`` is committed."""
    request = state.request
    return Placement(service=request.service, place=request.target, epoch=request.epoch, migration=request.id)


def status_of(state: State) -> MigrationStatus:
    """A migration as the public API tells it."""
    request = state.request
    return MigrationStatus(
        id=request.id,
        service=request.service,
        source=request.source,
        target=request.target,
        epoch=request.epoch,
        phase=state.phase.value,
        outcome=state.outcome,
        requested_ms=request.at_ms,
        acks=len(state.acks),
        clients=state.clients,
        reason=state.reason,
    )

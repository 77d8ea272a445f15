"""A migration's phases as its log tells them, one after the other, while it runs or afterwards."""

from __future__ import annotations

import msgspec

from quicferry.cli import describe
from quicferry.cli.logfile import Entry
from quicferry.migration.machine import Phase, State, handle
from quicferry.protocol import events as ev
from quicferry.protocol.errors import FerryError


class PhaseDone(msgspec.Struct, frozen=True, kw_only=True):
    """A phase that is over, how long it took and what came of it."""

    phase: str
    took_ms: int
    detail: str = ""


class Narrator:
    """Takes log entries in order and says which phases they ended."""

    def __init__(self) -> None:
        self.events: list[ev.AnyEvent] = []
        self._state: State | None = None
        self._since_ms = 0
        self._notes: list[str] = []

    @property
    def phase(self) -> str:
        """The phase that the migration is in."""
        return self._state.phase.value if self._state else Phase.PREPARING.value

    @property
    def outcome(self) -> str | None:
        return self._state.outcome if self._state else None

    def feed(self, entry: Entry) -> PhaseDone | None:
        """The phase that this entry ended, if it ended one.

        Raises FerryError ``log_unreadable`` when the log does not begin with its request.
        """
        event = entry.event
        before = self._state.phase if self._state else None
        try:
            self._state, _ = handle(self._state, event)
        except ValueError as error:
            raise FerryError("log_unreadable", f"This log can't be followed: {error}.") from None
        self.events.append(event)
        self._note(event)
        if before is None:
            self._since_ms = event.at_ms
        if before is None or self._state.phase is before:
            return None
        took = max(event.at_ms - self._since_ms, 0)
        done = PhaseDone(phase=before.value, took_ms=took, detail=self._detail(before))
        self._since_ms = event.at_ms
        self._notes = []
        return done

    def _note(self, event: ev.AnyEvent) -> None:
        match event:
            case ev.PreDumped() | ev.Dumped() | ev.Restored() | ev.Resumed() | ev.Armed():
                self._notes.append(describe.details(event))
            case ev.CallFailed():
                self._notes.append(f"{event.to} failed: {event.error.code}")
            case ev.CheckpointFailed() | ev.RestoreFailed():
                self._notes.append(f"{event.verb} failed: {event.error.code}")
            case ev.CancelAsked():
                self._notes.append("called off")
            case ev.TimedOut() if event.phase == self.phase and event.phase != Phase.SETTLING:
                self._notes.append(f"timeout{' ' + str(event.attempt) if event.attempt > 1 else ''}")
            case ev.SourceReady():
                self._notes.append(f"{describe.memory(event)}, image {describe.image(event.image)}")
            case _:
                pass

    def _detail(self, ended: Phase) -> str:
        state = self._state
        assert state is not None  # noqa: S101 - set by feed, which calls this
        if ended is Phase.DUMPING and state.dumped:
            return "; ".join([f"acks {len(state.acks)}/{state.clients}", *self._notes])
        if ended is Phase.SETTLING:
            return f"{describe.count(len(state.arrived), 'client')} arrived"
        if ended is Phase.PRE_COPYING and len(self._notes) > 1:
            return f"{len(self._notes)} rounds; last {self._notes[-1]}"
        return "; ".join(self._notes)

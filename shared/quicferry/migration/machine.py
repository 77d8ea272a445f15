"""One migration as a state machine: facts in, commands out.

The state is what the log has said so far. Its phase, and what it wants done, are functions of those facts
alone (:func:`wanted`); an event's commands are what the new state wants and the old one did not. A coordinator that
starts again feeds itself the log and gives everything the last state still wants.

Before ``committed`` is in the log, every failure leads back; from the moment it is wanted, none does.
"""

from __future__ import annotations

import enum
from typing import Final

import msgspec
from msgspec.structs import replace

from quicferry.migration.commands import (
    ArmServer,
    CallAgent,
    Command,
    Decide,
    Place,
    StartTimer,
    StopTimer,
    Unlock,
)
from quicferry.migration.retries import RETRY_SECONDS, given_up, growing, last_attempt, served
from quicferry.protocol import events as ev
from quicferry.protocol.errors import ErrorBody

ENOUGH_PAGES: Final = 64
"""A pre-copy round that wrote no more pages than this is the last one (p.haul's rule)."""
MOST_GROWTH: Final = 1.1
"""So is one that wrote more pages than the round before, times this."""


class Phase(enum.StrEnum):
    """Where a migration stands; in order, but for the last but one."""

    PREPARING = "preparing"
    PRE_COPYING = "pre_copying"
    ARMING = "arming"
    DUMPING = "dumping"
    RESTORING = "restoring"
    COMMITTING = "committing"
    RESUMING = "resuming"
    SETTLING = "settling"
    ABORTING = "aborting"
    ENDED = "ended"


class State(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the log has said about one migration."""

    request: ev.Requested
    source_image: str | None = None
    target_image: str | None = None
    prepared: bool = False
    pre_copied: int = 0
    """Pre-copy rounds done."""
    pre_copy_pages: int = 0
    """Pages written by the last of them."""
    pre_copy_over: bool = False
    armed: bool = False
    clients: int = 0
    acks: frozenset[str] = frozenset()
    held: bool = False
    dumped: bool = False
    restored: bool = False
    committed: bool = False
    resumed: bool = False
    released: bool = False
    adopted: bool = False
    arrived: frozenset[str] = frozenset()
    settled: bool = False
    reason: ErrorBody | None = None
    """Why it goes back, or why it could not be finished."""
    disarmed: bool = False
    source_back: bool = False
    target_cleared: bool = False
    attempt: int = 1
    """Of what the present phase wants."""
    served_since: int = 0
    """The attempt in which a copy was first known to serve again; 0 if it was from the phase's beginning."""
    gave_up: bool = False
    outcome: str | None = None
    """``completed``, ``rolled_back`` or ``failed`` once it has ended."""

    @property
    def phase(self) -> Phase:
        if self.outcome is not None:
            return Phase.ENDED
        if self.committed:
            return Phase.SETTLING if self.resumed and self.released else Phase.RESUMING
        if self.reason is not None:
            return Phase.ABORTING
        if self.dumped:
            return Phase.COMMITTING if self.restored else Phase.RESTORING
        if self.armed:
            return Phase.DUMPING
        if self.prepared:
            return Phase.ARMING if self.pre_copy_over else Phase.PRE_COPYING
        return Phase.PREPARING


def handle(state: State | None, event: ev.AnyEvent) -> tuple[State, list[Command]]:
    """Take the log's next entry; the first is ``decision.requested``. Returns the new state and what to do now.

    Raises ValueError when the log does not begin with a request.
    """
    if state is None:
        if not isinstance(event, ev.Requested):
            raise ValueError(f"the log of {event.id} begins with {ev.kind(event)}, not with a request")
        new = State(request=event, pre_copy_over=event.options.pre_copy_rounds == 0)
        return new, wanted(new)
    before = wanted(state)
    new = _absorb(state, event)
    if new.phase is not state.phase:
        new = replace(new, attempt=1, served_since=0)
    elif served(new) and not served(state):
        new = replace(new, served_since=new.attempt)
    commands = [command for command in wanted(new) if command not in before]
    if _timer(before) and not _timer(wanted(new)):
        commands.append(StopTimer())
    return new, commands


def outstanding(state: State) -> list[Command]:
    """What to do after a restart: all that the state wants, whether it was asked for before or not."""
    return wanted(state)


def wanted(state: State) -> list[Command]:
    """All that is to be done in this state; each may be done again without harm."""
    options = state.request.options
    limit = options.phase_timeout_ms / 1000
    match state.phase:
        case Phase.PREPARING:
            calls: list[Command] = []
            if state.source_image is None:
                calls.append(CallAgent(agent="checkpoint", verb="prepare"))
            if state.target_image is None:
                calls.append(CallAgent(agent="restore", verb="prepare"))
            return [*(calls or [Decide(decision="prepared")]), _timer_for(state, limit)]
        case Phase.PRE_COPYING:
            round_ = state.pre_copied + 1
            return [
                CallAgent(agent="checkpoint", verb="pre_dump", round=round_),
                StartTimer(phase=state.phase, seconds=limit, attempt=round_),
            ]
        case Phase.ARMING:
            return [ArmServer(), _timer_for(state, limit)]
        case Phase.DUMPING:
            waits = (options.ack_timeout_ms + options.quiesce_timeout_ms) / 1000
            # The restore is asked for ahead: the target waits for the images itself, and loses no time to us.
            ahead: list[Command] = [] if state.restored else [CallAgent(agent="restore", verb="restore")]
            return [*ahead, CallAgent(agent="checkpoint", verb="dump"), _timer_for(state, waits + limit)]
        case Phase.RESTORING:
            return [CallAgent(agent="restore", verb="restore"), _timer_for(state, limit)]
        case Phase.COMMITTING:
            return [Decide(decision="committed")]
        case Phase.RESUMING:
            return _wanted_resuming(state, limit)
        case Phase.SETTLING:
            if state.settled:
                return [Place(), Decide(decision="completed", arrived=len(state.arrived))]
            return [Place(), _timer_for(state, options.settle_timeout_ms / 1000)]
        case Phase.ABORTING:
            return _wanted_aborting(state)
        case Phase.ENDED:
            return [Unlock()]


def _wanted_resuming(state: State, limit: float) -> list[Command]:
    if state.gave_up:
        return [Decide(decision="failed", reason=state.reason)]
    calls: list[Command] = []
    if not state.resumed:
        calls.append(CallAgent(agent="restore", verb="resume", attempt=state.attempt))
    # The source goes last: until the target serves, a restore that has to be done again finds the memory with it.
    # On the last attempt it goes as well, so that a migration that can't be finished leaves no frozen process.
    if not state.released and (state.resumed or state.attempt >= last_attempt(state)):
        calls.append(CallAgent(agent="checkpoint", verb="release", attempt=state.attempt))
    # The first wait is the limit itself; later ones leave an agent whose step hangs the time to end it.
    more = 0.0 if state.attempt == 1 else RETRY_SECONDS if served(state) else growing(state.attempt - 1)
    # The bucket is only the log's cache: it waits until the target runs, as clients do.
    place: list[Command] = [Place()] if state.resumed or state.attempt > 1 else []
    return [*calls, *place, _timer_for(state, max(limit, more))]


def _wanted_aborting(state: State) -> list[Command]:
    if state.gave_up:
        return [Decide(decision="failed", reason=state.reason)]
    if state.source_back and state.disarmed and state.target_cleared:
        # Before `prepared` nothing of the source was touched: a refusal, not a way back.
        decision = Decide(decision="rolled_back" if state.prepared else "failed", reason=state.reason)
        return [decision]
    calls: list[Command] = []
    if not state.target_cleared:
        calls.append(CallAgent(agent="restore", verb="abort", attempt=state.attempt))
    # The agent first: a server that is disarmed while the agent is about to send its SIGTERM takes that for its end.
    if not state.source_back:
        calls.append(CallAgent(agent="checkpoint", verb="abort", attempt=state.attempt))
    elif not state.disarmed:
        calls.append(ArmServer(disarm=True))
    return [*calls, _timer_for(state, RETRY_SECONDS if served(state) else growing(state.attempt))]


def _timer_for(state: State, seconds: float) -> StartTimer:
    return StartTimer(phase=state.phase, seconds=seconds, attempt=state.attempt)


def _timer(commands: list[Command]) -> bool:
    return any(isinstance(command, StartTimer) for command in commands)


def _absorb(state: State, event: ev.AnyEvent) -> State:
    """Add one entry's facts to the state."""
    if state.outcome is not None:
        return state
    match event:
        case ev.Prepared():
            return replace(state, prepared=True)
        case ev.Committed():
            return replace(state, committed=True)
        case ev.RolledBack() | ev.Failed():
            return replace(state, outcome=ev.kind(event).partition(".")[2], reason=event.reason)
        case ev.Completed():
            return replace(state, outcome="completed")
        case ev.SourceReady() | ev.TargetReady():
            return _absorb_ready(state, event)
        case ev.PreDumped():
            return _absorb_pre_dumped(state, event)
        case ev.Armed():
            return replace(state, armed=True, clients=event.clients)
        case ev.MigrateSent():
            return replace(state, clients=event.clients)
        case ev.AckSeen():
            return replace(state, acks=state.acks | {event.client})
        case ev.SourceHeld():
            # Nobody is left to be told that the move is off; only the agent can bring the server back.
            return replace(state, held=True, disarmed=True)
        case ev.Dumped():
            return replace(state, dumped=True)
        case ev.Restored():
            return replace(state, restored=True)
        case ev.Resumed() | ev.SourceGone() | ev.Adopted() | ev.ClientArrived():
            return _absorb_after_commit(state, event)
        case ev.Disarmed():
            return replace(state, disarmed=True)
        case ev.SourceBack():
            return replace(state, source_back=True)
        case ev.TargetCleared():
            return replace(state, target_cleared=True)
        case ev.CancelAsked():
            return _fail(state, ErrorBody(code="cancelled", message="The migration was cancelled on request."))
        case ev.TimedOut():
            return _absorb_timeout(state, event)
        case ev.CallFailed(to="server.disarm"):
            # It has stopped listening: about to stand still, standing still, or gone. The agent will see which.
            return replace(state, disarmed=True)
        case ev.CallFailed() | ev.CheckpointFailed() | ev.RestoreFailed():
            return _fail(state, event.error)
        case _:
            return state


def _absorb_ready(state: State, event: ev.SourceReady | ev.TargetReady) -> State:
    if isinstance(event, ev.SourceReady):
        state = replace(state, source_image=event.image)
    else:
        state = replace(state, target_image=event.image)
    if None in (state.source_image, state.target_image) or state.source_image == state.target_image:
        return state
    return _fail(
        state,
        ErrorBody(
            code="image_mismatch",
            message=f"The source berth runs image {state.source_image}, the target berth {state.target_image}.",
            hint="Start both berths from the same image: a process can only be restored onto the files it runs.",
        ),
    )


def _absorb_pre_dumped(state: State, event: ev.PreDumped) -> State:
    if event.round <= state.pre_copied:
        return state  # said again: it would open rounds that are over
    grew = state.pre_copied > 0 and event.pages > state.pre_copy_pages * MOST_GROWTH
    over = event.round >= state.request.options.pre_copy_rounds or event.pages <= ENOUGH_PAGES or grew
    return replace(state, pre_copied=event.round, pre_copy_pages=event.pages, pre_copy_over=over)


def _absorb_after_commit(state: State, event: ev.Resumed | ev.SourceGone | ev.Adopted | ev.ClientArrived) -> State:
    if state.settled:
        return state
    match event:
        case ev.Resumed():
            state = replace(state, resumed=True)
        case ev.SourceGone():
            state = replace(state, released=True)
        case ev.Adopted():
            state = replace(state, adopted=state.adopted or event.outcome == "moved")
        case ev.ClientArrived():
            state = replace(state, arrived=state.arrived | {event.client})
    done = state.phase is Phase.SETTLING and state.adopted and state.acks <= state.arrived
    return replace(state, settled=done)


def _absorb_timeout(state: State, event: ev.TimedOut) -> State:
    phase = state.phase
    attempt = state.pre_copied + 1 if phase is Phase.PRE_COPYING else state.attempt
    if event.phase != phase or event.attempt != attempt:
        return state  # a timer that had been replaced
    match phase:
        case Phase.SETTLING:
            return replace(state, settled=True)
        case Phase.ABORTING | Phase.RESUMING if state.gave_up:
            return state
        case Phase.ABORTING if state.attempt < last_attempt(state):
            # A server that was asked in vain calls its move off by itself, and an arming ends.
            return replace(state, attempt=state.attempt + 1, disarmed=state.disarmed or state.source_back)
        case Phase.RESUMING if state.attempt < last_attempt(state):
            return replace(state, attempt=state.attempt + 1)
        case Phase.ABORTING | Phase.RESUMING:
            return replace(state, gave_up=True, reason=given_up(state))
        case _:
            return _fail(state, _too_slow(phase))


def _too_slow(phase: Phase) -> ErrorBody:
    return ErrorBody(
        code="phase_timeout",
        message=f"The migration was {phase.value} for longer than its limit.",
        hint="`quicferry events ID` shows what was seen last; the limits are options of the request.",
    )


def _fail(state: State, reason: ErrorBody) -> State:
    """Turn back, unless it already does, or is past the point where it may."""
    if state.reason is not None or state.phase in (Phase.COMMITTING, Phase.RESUMING, Phase.SETTLING):
        return state
    told = state.phase in (Phase.ARMING, Phase.DUMPING) and not state.held
    return replace(state, reason=reason, disarmed=not told)

"""Carries out what the state machine asks for, one task a command, and writes what came of it into the log."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from typing import Final

import structlog

from quicferry import faults
from quicferry.bus.connection import Bus
from quicferry.bus.log import EventLog
from quicferry.bus.registry import Registry
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
from quicferry.migration.machine import Phase, State, outstanding
from quicferry.protocol import events as ev
from quicferry.protocol import subjects
from quicferry.protocol.agents import Accepted, AgentRequest, ArmReply, ArmRequest
from quicferry.protocol.api import Placement
from quicferry.protocol.errors import FerryError
from services.coordinator.book import Book, Taken, placement_of
from services.coordinator.follower import Follower

log = structlog.get_logger()

CALL_SECONDS: Final = 3.0
"""How long a request may go unanswered, repeats included, before the log says that it failed."""
DISARM_SECONDS: Final = 1.0
CALL_WAIT: Final = 0.2
"""Between two tries to reach somebody who is not there: agents and wrappers come back from restarts and moves."""
LONGEST_CALL_WAIT: Final = 1.0
"""It may take an hour until an agent is there again, and then every second counts: nobody serves."""
CALL_WAIT_SHARE: Final = 1 / 15
"""Of the time since the first try: it is the shortest wait for 3 s, and the longest from 15 s on."""
CALLS_PER_NODE: Final = 16
"""Requests in flight to one node: a node that hangs holds up only itself."""
CACHE_TRIES: Final = 100
"""To bring a bucket up to what the log says. Whoever leads next does it again; till then the log is asked as well."""
FIRST_WAIT: Final = 0.1
LONGEST_WAIT: Final = 2.0
_UNHEARD: Final = ("no_answer", "nats_unreachable")
_PERSISTENT: Final = (Phase.RESUMING, Phase.ABORTING)
"""Here a call that nobody takes is repeated for as long as it is wanted: there is no other way out."""

Permit = Callable[[], None]
"""Raises FerryError ``not_leading`` when this coordinator may not act any more."""


def now_ms() -> int:
    """Unix time in milliseconds."""
    return time.time_ns() // 1_000_000


class Driver:
    """Acts on what the follower reads, but only while :meth:`act` runs."""

    def __init__(
        self, bus: Bus, event_log: EventLog, registry: Registry, book: Book, follower: Follower, permit: Permit
    ) -> None:
        self._bus = bus
        self._log = event_log
        self._registry = registry
        self._book = book
        self._follower = follower
        self._permit = permit
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._node_limits: defaultdict[str, asyncio.Semaphore] = defaultdict(
            lambda: asyncio.Semaphore(CALLS_PER_NODE)
        )
        self._tasks: asyncio.TaskGroup

    async def act(self, acting: asyncio.Event) -> None:
        """Take up what is unfinished and carry out what the log wants from then on, until cancelled.

        ``acting`` is set when all that was wanted is under way. ``permit`` is asked before anything is sent. Raises
        the FerryErrors of ``Follower.caught_up``.
        """
        await self._follower.caught_up()  # what another one did before us is known, and not asked for again
        async with asyncio.TaskGroup() as self._tasks:
            try:
                self._take_up()
                self._follower.actor = self._take
                acting.set()
                await asyncio.Event().wait()
            finally:  # before the group waits for its tasks: it takes no new ones then
                self._follower.actor = None
                for migration in tuple(self._timers):
                    self._stop_timer(migration)

    def _take_up(self) -> None:
        for placement in self._book.placements().values():
            self._tasks.create_task(self._write("place", placement.migration or "", self._placing(placement)))
        self._tasks.create_task(self._write("unlock", "", self._unlock_ended))
        for state in self._book.unfinished():
            log.info("migration_taken_up", id=state.request.id, phase=state.phase.value)
            for command in outstanding(state):
                self._give(state, command)

    def _take(self, taken: Taken) -> None:
        for command in taken.commands:
            self._give(taken.state, command)

    async def _unlock_ended(self) -> None:
        """Locks of migrations that ended while their coordinator did: nobody was left to give them back."""
        for lock in await self._registry.locks():
            state = self._book.state(lock.id)
            if state is not None and state.outcome is not None:
                await self._registry.unlock(state.request.service, lock.id)

    def _wanted(self, migration: str, command: Command) -> bool:
        state = self._book.state(migration)
        return state is not None and command in outstanding(state)

    def _give(self, state: State, command: Command) -> None:
        migration = state.request.id
        match command:
            case StartTimer():
                self._stop_timer(migration)
                loop = asyncio.get_running_loop()
                self._timers[migration] = loop.call_later(command.seconds, self._fire, migration, command)
            case StopTimer():
                self._stop_timer(migration)
            case CallAgent():
                self._tasks.create_task(self._call_agent(state, command))
            case ArmServer():
                self._tasks.create_task(self._arm_server(state, command))
            case Decide():
                self._tasks.create_task(self._decide(state, command))
            case Place():
                self._tasks.create_task(self._write("place", migration, self._placing(placement_of(state))))
            case Unlock():
                service = state.request.service
                self._tasks.create_task(
                    self._write("unlock", migration, lambda: self._registry.unlock(service, migration))
                )

    def _stop_timer(self, migration: str) -> None:
        if timer := self._timers.pop(migration, None):
            timer.cancel()

    def _fire(self, migration: str, command: StartTimer) -> None:
        self._timers.pop(migration, None)
        if self._wanted(migration, command):
            event = ev.TimedOut(id=migration, at_ms=now_ms(), phase=command.phase, attempt=command.attempt)
            self._tasks.create_task(self._append(event, command))

    async def _call_agent(self, state: State, command: CallAgent) -> None:
        request = state.request
        at_source = command.agent == "checkpoint"
        node = request.source.node if at_source else request.target.node
        subject = (subjects.checkpoint if at_source else subjects.restore)(node, command.verb)
        message = AgentRequest(
            id=request.id,
            service=request.service,
            epoch=request.epoch,
            source=request.source,
            target=request.target,
            options=request.options,
            round=command.round,
            attempt=command.attempt,
        )

        async def call() -> None:
            async with self._node_limits[node]:
                await self._permitted()
                if await faults.at(f"coordinator.{command.name}") == "twice":
                    await self._bus.request(subject, message, Accepted, timeout=CALL_SECONDS)
                await self._bus.request(subject, message, Accepted, timeout=CALL_SECONDS)

        await self._insist(state, command, call, CALL_SECONDS)

    async def _arm_server(self, state: State, command: ArmServer) -> None:
        request = state.request
        message = ArmRequest(
            id=request.id,
            epoch=request.epoch,
            target=None if command.disarm else request.target.address,
            options=request.options,
        )

        async def arm() -> None:
            subject = subjects.arm(request.service)
            seconds = DISARM_SECONDS if command.disarm else CALL_SECONDS
            await self._permitted()
            if await faults.at(f"coordinator.{command.name}") == "twice":
                await self._bus.request(subject, message, ArmReply, timeout=seconds)
            reply = await self._bus.request(subject, message, ArmReply, timeout=seconds)
            event: ev.AnyEvent = ev.Disarmed(id=request.id, at_ms=now_ms())
            if not command.disarm:
                event = ev.Armed(id=request.id, at_ms=now_ms(), clients=reply.clients)
            await self._append(event, command)

        # A server that does not listen any more is past being told: do not wait for it.
        await self._insist(state, command, arm, 0.0 if command.disarm else CALL_SECONDS)

    async def _permitted(self) -> None:
        """Before a request. What is sent while NATS is away goes out when it is back, and then we may not lead."""
        await self._bus.ready()
        self._permit()

    async def _insist(
        self,
        state: State,
        command: CallAgent | ArmServer,
        call: Callable[[], Awaitable[None]],
        seconds: float,
    ) -> None:
        """Call until it is taken, refused or no longer wanted; after ``seconds`` say in the log that it failed."""
        migration, attempt = state.request.id, command.attempt if isinstance(command, CallAgent) else 1
        began = asyncio.get_running_loop().time()
        told = False
        if not self._wanted(migration, command):
            return  # overtaken while we stood still: whoever did it may be done, and what we ask for would stay
        while True:
            try:
                await call()
                return
            except FerryError as failure:
                error = _as_unarmed(failure, state) if isinstance(command, ArmServer) else failure
            if error.code == "not_leading":
                log.info("call_left", id=migration, to=command.name)  # to the one that leads now
                return
            if not self._wanted(migration, command):
                return
            unheard = error.code in (*_UNHEARD, "server_unarmed")
            waited = asyncio.get_running_loop().time() - began
            over = waited >= seconds
            if (over or not unheard) and not told:
                log.warning("call_failed", id=migration, to=command.name, code=error.code, error=error.message)
                event = ev.CallFailed(
                    id=migration, at_ms=now_ms(), to=command.name, attempt=attempt, error=error.body()
                )
                await self._append(event, command)
                told = True
            if not unheard or (told and (isinstance(command, ArmServer) or state.phase not in _PERSISTENT)):
                return
            await asyncio.sleep(min(max(CALL_WAIT, waited * CALL_WAIT_SHARE), LONGEST_CALL_WAIT))

    async def _decide(self, state: State, command: Decide) -> None:
        decision = _decision(state.request.id, command)

        async def decide() -> None:
            # Both of one moment: what is still wanted follows from the decisions up to that one.
            if self._wanted(decision.id, command):
                await self._log.decide(decision, after=self._book.last_decision(decision.id))
                await faults.at(f"coordinator.decided.{command.decision}")

        await self._write(ev.kind(decision), decision.id, decide, command)

    async def _append(self, event: ev.AnyEvent, command: Command) -> None:
        async def append() -> None:
            await self._log.append(event)

        await self._write(ev.kind(event), event.id, append, command)

    def _placing(self, placement: Placement) -> Callable[[], Awaitable[None]]:
        async def place() -> None:
            known, revision = await self._registry.placement(placement.service)
            if known is None or known.epoch < placement.epoch:
                await self._registry.place(placement, revision)

        return place

    async def _write(
        self,
        what: str,
        migration: str,
        write: Callable[[], Awaitable[None]],
        command: Command | None = None,
    ) -> None:
        """Write to the log for as long as ``command`` is wanted and this coordinator leads: nobody else would.

        Without a ``command`` it is a bucket that is written, and that has an end.
        """
        wait = FIRST_WAIT
        for tries in itertools.count(1):
            try:
                await faults.at(f"coordinator.write.{what}")
                self._permit()
                await write()
                return
            except FerryError as error:
                if error.code == "not_leading":
                    log.info("write_left", id=migration, what=what)
                    return
                if error.code == "log_conflict" and command is not None:
                    # Another decision was first. Once it is read here, this one may be wanted still, or not.
                    log.debug("decided_elsewhere", id=migration, what=what)
                else:
                    log.warning("write_failed", id=migration, what=what, code=error.code, error=error.message)
            if command is None and tries == CACHE_TRIES:
                log.error("write_given_up", id=migration, what=what, tries=tries)
                return
            await asyncio.sleep(wait)
            wait = min(wait * 2, LONGEST_WAIT)
            if command is not None and not self._wanted(migration, command):
                return


def _decision(migration: str, command: Decide) -> ev.Decision:
    at_ms = now_ms()
    match command.decision:
        case "prepared":
            return ev.Prepared(id=migration, at_ms=at_ms)
        case "committed":
            return ev.Committed(id=migration, at_ms=at_ms)
        case "completed":
            return ev.Completed(id=migration, at_ms=at_ms, arrived=command.arrived)
        case "rolled_back" | "failed":
            kind = ev.RolledBack if command.decision == "rolled_back" else ev.Failed
            reason = command.reason or FerryError("internal", "The state machine gave no reason.").body()
            return kind(id=migration, at_ms=at_ms, reason=reason)


def _as_unarmed(error: FerryError, state: State) -> FerryError:
    if error.code != "no_answer":
        return error
    return FerryError(
        "server_unarmed",
        f"The server of {state.request.service!r} does not answer on NATS.",
        hint="Is it built on quicferry's serve(), with NATS_URL set, and has it reached NATS?",
    )

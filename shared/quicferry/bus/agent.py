"""What both agents have in common: verbs over NATS, each step a task, what came of it in the event log.

A request is accepted at once. Its step then runs as a task and yields events, which are published in order
without holding the step up. Repeats are harmless: a step that runs is not started again, one that is done
publishes its events again, one that failed runs again for a later attempt only.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from typing import Final, Literal

import structlog

from quicferry import faults, quiet
from quicferry.bus.connection import Bus
from quicferry.bus.endpoints import Endpoint, serve
from quicferry.bus.log import EventLog
from quicferry.bus.registry import Registry
from quicferry.bus.settings import NatsSettings
from quicferry.bus.tidying import Leftovers, tidy
from quicferry.protocol import subjects
from quicferry.protocol.agents import Accepted, AgentRequest
from quicferry.protocol.api import Berth, Options
from quicferry.protocol.errors import FerryError
from quicferry.protocol.events import AnyEvent, CheckpointFailed, RestoreFailed, kind

log = structlog.get_logger(__name__)

Step = Callable[[AgentRequest], AsyncGenerator[AnyEvent, None]]

BERTH_INTERVAL: Final = 2.0
"""Seconds between two looks at the berths when nothing happens."""
QUIET: Final = 5.0
"""Seconds after a migration's last step in which nobody looks at the berths: podman is busy for milliseconds then."""
OVERDUE: Final = 5.0
"""Seconds after which the berths are looked at all the same: there may always be a migration under way, and what was
not reported for 10 s is not counted on. No sooner, since the look may fall into a pause."""
LAST_VERBS: Final = frozenset({"release", "resume", "abort"})
MAX_RUNS: Final = 512
"""Steps remembered, so that their repeats are recognised."""
MAX_UNPUBLISHED: Final = 256
"""Events waiting for NATS; a step waits when there are more."""
STEP_PHASES: Final = 4
STEP_MARGIN: Final = 10.0
"""Of the longest step: how many of its phase's limits, and how many seconds more."""
STOP_SECONDS: Final = 1.2
"""For steps and events under way when the agent is stopped; below what a service is given to stop."""


def longest_step(verb: str, options: Options) -> float:
    """Seconds after which a step is stuck, beyond every limit of its own: a later attempt can run then."""
    if verb == "abort":
        return options.phase_timeout_ms / 1000 + STEP_MARGIN
    waits = (options.ack_timeout_ms + options.quiesce_timeout_ms) / 1000
    return waits + STEP_PHASES * options.phase_timeout_ms / 1000 + STEP_MARGIN


Key = tuple[str, str, int]


class _Run:
    """One step of one migration."""

    def __init__(self, attempt: int) -> None:
        self.attempt = attempt
        self.events: list[AnyEvent] = []
        self.failed = False
        self.task: asyncio.Task[None] | None = None

    @property
    def running(self) -> bool:
        return self.task is not None and not self.task.done()


class Agent:
    """The checkpoint or the restore agent of one node.

    ``steps``: one for each of the role's verbs. ``abort`` cancels what runs of the same migration, every other
    step waits for it. ``berths``: what to report to the registry; ``close``: let go of everything at the end;
    ``leftovers``: what an agent before this one, killed, may not have deleted.
    """

    def __init__(
        self,
        role: Literal["checkpoint", "restore"],
        node: str,
        steps: Mapping[str, Step],
        *,
        close: Callable[[], Awaitable[None]],
        berths: Callable[[], Awaitable[list[Berth]]] | None = None,
        leftovers: Leftovers | None = None,
    ) -> None:
        verbs = subjects.CHECKPOINT_VERBS if role == "checkpoint" else subjects.RESTORE_VERBS
        if set(steps) != set(verbs):
            raise ValueError(f"a {role} agent needs steps for {', '.join(verbs)}")
        self._role = role
        self._node = node
        self._steps = steps
        self._close = close
        self._berths = berths
        self._leftovers = leftovers
        self._runs: dict[Key, _Run] = {}
        self._unpublished: asyncio.Queue[AnyEvent] = asyncio.Queue(MAX_UNPUBLISHED)
        self._look = asyncio.Event()
        self._in_hand: dict[str, float] = {}
        """When the last step of each unfinished migration began or ended."""
        self._ready = asyncio.Event()

    async def ready(self) -> None:
        """Until requests are answered. Bound it with asyncio.timeout."""
        await self._ready.wait()

    async def run(self, settings: NatsSettings) -> None:
        """Serve until cancelled; waits for NATS as long as it takes.

        Raises the FerryErrors of ``Bus.ended`` (in a group) when NATS has thrown the agent out: it would be deaf.
        """
        try:
            async with Bus.connect(f"quicferry-{self._role}-agent", settings, wait=True) as bus:
                event_log = await EventLog.open(bus)
                registry = await Registry.open(bus) if self._berths else None
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._publish(event_log), name="publish")
                    if registry is not None:
                        group.create_task(self._report(registry), name="report")
                    async with self._served(bus):
                        log.info("agent_ready", role=self._role, node=self._node)
                        self._ready.set()
                        if self._leftovers is not None:
                            group.create_task(tidy(event_log, self._leftovers, self._works_on), name="tidy")
                        try:
                            await bus.ended()
                        finally:
                            await self._finish()
        finally:
            await self._cancel(list(self._runs.values()))
            await self._close()

    def accept(self, verb: str, request: AgentRequest) -> Accepted:
        """Start the step, or recognise the repeat. Raises FerryError ``too_late`` for any step after the abort.

        A request can be late, and what it opened then nobody would close.
        """
        if verb != "abort" and (request.id, "abort", 0) in self._runs:
            raise FerryError("too_late", f"The {self._role} agent has aborted {request.id}.")
        key = (request.id, verb, request.round)
        known = self._runs.get(key)
        if known is None or (known.failed and request.attempt > known.attempt and not known.running):
            self._start(key, request)
        elif not known.running:
            for event in known.events:
                self._offer(event)
        return Accepted(id=request.id)

    def _start(self, key: Key, request: AgentRequest) -> None:
        migration, verb, _ = key
        before = [run for (other, _, _), run in self._runs.items() if other == migration and run.running]
        self._in_hand[migration] = time.monotonic()
        run = _Run(request.attempt)
        run.task = asyncio.create_task(self._carry_out(run, before, verb, request), name=f"{verb} {migration}")
        self._runs.pop(key, None)
        self._runs[key] = run
        for old in [old for old, other in self._runs.items() if not other.running][:-MAX_RUNS]:
            del self._runs[old]

    async def _carry_out(self, run: _Run, before: list[_Run], verb: str, request: AgentRequest) -> None:
        start = time.monotonic()
        bound = log.bind(id=request.id, verb=verb, attempt=request.attempt)
        limit = asyncio.timeout(None)  # it begins once it is this step's turn
        try:
            if verb == "abort":
                await self._cancel(before)
            else:
                await asyncio.gather(*(other.task for other in before if other.task), return_exceptions=True)
            async with limit:
                limit.reschedule(asyncio.get_running_loop().time() + longest_step(verb, request.options))
                await faults.at(f"{self._role}.{verb}")
                async with contextlib.aclosing(self._steps[verb](request)) as happened:
                    async for event in happened:
                        await self._keep(run, event)
        except FerryError as error:
            bound.warning("step_failed", code=error.code, error=error.message, hint=error.hint)
            await self._keep(run, self._failure(verb, request, error), failed=True)
        except Exception:  # noqa: BLE001 - a defect of ours: the migration must learn of it, the agent must live on
            why = self._stuck(verb, request) if limit.expired() else self._defect(verb)
            bound.exception("step_failed", code=why.code)
            await self._keep(run, self._failure(verb, request, why), failed=True)
        else:
            bound.debug("step_done", took_ms=round((time.monotonic() - start) * 1e3, 1))
        finally:
            if verb in LAST_VERBS:
                self._in_hand.pop(request.id, None)
                self._look.set()
            else:
                self._in_hand[request.id] = time.monotonic()

    def _defect(self, verb: str) -> FerryError:
        return FerryError("internal", f"The {self._role} agent failed at {verb}.", hint="Its log has the details.")

    def _stuck(self, verb: str, request: AgentRequest) -> FerryError:
        return FerryError(
            "phase_timeout",
            f"The {self._role} agent's {verb} did not end within {longest_step(verb, request.options):g} s.",
            hint="Its log and `quicferry doctor` may tell what hangs: podman, CRIU, or the machine.",
        )

    def _failure(self, verb: str, request: AgentRequest, error: FerryError) -> AnyEvent:
        failed = CheckpointFailed if self._role == "checkpoint" else RestoreFailed
        now = time.time_ns() // 1_000_000
        return failed(id=request.id, at_ms=now, verb=verb, attempt=request.attempt, error=error.body())

    async def _keep(self, run: _Run, event: AnyEvent, *, failed: bool = False) -> None:
        run.failed = failed
        run.events.append(event)
        await self._unpublished.put(event)

    def _offer(self, event: AnyEvent) -> None:
        # When the queue is full, NATS is away; the next repeat will do.
        with contextlib.suppress(asyncio.QueueFull):
            self._unpublished.put_nowait(event)

    def _works_on(self, migration: str) -> bool:
        return any(run.running for (other, _, _), run in self._runs.items() if other == migration)

    async def _publish(self, event_log: EventLog) -> None:
        while True:
            event = await self._unpublished.get()
            try:
                if await faults.at(f"say.{kind(event)}") != "lost":
                    await event_log.append(event)
            except FerryError as error:
                # Not kept for ever: the coordinator repeats the request, and the repeat publishes again.
                log.error("event_unpublished", id=event.id, kind=kind(event), error=str(error))
            finally:
                self._unpublished.task_done()

    async def _report(self, registry: Registry) -> None:
        said, looked = "", -math.inf
        while self._berths is not None:
            self._look.clear()
            if not self._busy() or time.monotonic() - looked >= OVERDUE:
                looked = time.monotonic()
                said = await self._report_once(registry, self._berths, said)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(BERTH_INTERVAL):
                    await self._look.wait()

    async def _report_once(self, registry: Registry, berths: Callable[[], Awaitable[list[Berth]]], said: str) -> str:
        """Returns what is wrong, which is logged once."""
        try:
            for berth in await berths():
                await registry.put_berth(berth)
        except FerryError as error:
            if str(error) != said:
                log.warning("berths_unknown", code=error.code, error=error.message, hint=error.hint)
            return str(error)
        return ""

    def _busy(self) -> bool:
        """Whether a migration is under way, or its coordinator has not been gone for long."""
        now = time.monotonic()
        self._in_hand = {migration: at for migration, at in self._in_hand.items() if now - at < QUIET}
        return bool(self._in_hand)

    @contextlib.asynccontextmanager
    async def _served(self, bus: Bus) -> AsyncIterator[None]:
        subject_of = subjects.checkpoint if self._role == "checkpoint" else subjects.restore
        endpoints = [
            Endpoint(verb, subject_of(self._node, verb), AgentRequest, self._handler(verb)) for verb in self._steps
        ]
        async with serve(
            bus,
            name=f"quicferry-{self._role}-agent",
            description=f"quicferry: the {self._role} side of migrations on node {self._node}",
            endpoints=endpoints,
            metadata={"node": self._node},
        ):
            yield

    def _handler(self, verb: str) -> Callable[[AgentRequest], Awaitable[Accepted]]:
        async def handle(request: AgentRequest) -> Accepted:
            accepted = self.accept(verb, request)
            if verb == "resume":
                await asyncio.sleep(quiet.RESUME_ANSWERED)
            return accepted

        return handle

    async def _finish(self) -> None:
        """Give running steps and unpublished events a moment, then cancel the rest."""
        running = [run.task for run in self._runs.values() if run.task is not None and run.running]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_SECONDS / 2):
                await asyncio.gather(*running, return_exceptions=True)
        await self._cancel(list(self._runs.values()))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_SECONDS / 2):
                await self._unpublished.join()

    async def _cancel(self, runs: list[_Run]) -> None:
        tasks = [run.task for run in runs if run.task is not None and run.running]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

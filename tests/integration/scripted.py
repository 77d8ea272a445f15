"""A node whose agents and server follow a script: they stand in for the privileged half, CRIU, and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Literal

from quicferry.bus.connection import Bus
from quicferry.bus.endpoints import Endpoint, serve
from quicferry.bus.log import EventLog
from quicferry.bus.registry import Registry
from quicferry.bus.settings import NatsSettings
from quicferry.protocol import events as ev
from quicferry.protocol import subjects
from quicferry.protocol.agents import Accepted, AgentRequest, ArmReply, ArmRequest
from quicferry.protocol.api import Address, Berth
from quicferry.protocol.errors import ErrorBody, FerryError
from services.coordinator.service import coordinate
from tests.conftest import NatsServer

LIMIT = 20.0
"""Seconds after which a test has hung."""

Behaviour = Literal["work", "fail", "refuse", "silent", "mute"]
"""What becomes of a step: done, a failed event, an error reply, accepted and never done, not even answered."""

ADDRESSES = {"a": 14242, "b": 24242, "c": 34242}
BROKEN = ErrorBody(code="criu_failed", message="As the script says.")


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def berth(name: str, *, occupied: bool, service: str = "echo", seen_ms: int | None = None) -> Berth:
    return Berth(
        node="local",
        berth=name,
        service=service,
        address=Address(host="127.0.0.1", port=ADDRESSES.get(name, 44242)),
        port=4242,
        occupied=occupied,
        container=f"c-{name}",
        image="sha256:1",
        seen_ms=now_ms() if seen_ms is None else seen_ms,
    )


@contextlib.asynccontextmanager
async def coordinating(server: NatsServer, count: int = 1) -> AsyncIterator[list[asyncio.Task[None]]]:
    """``count`` coordinators, each in a task. No TaskGroup: a fixture's halves run in different tasks."""
    settings = NatsSettings.load(server.url)
    ready = [asyncio.Event() for _ in range(count)]
    running = [asyncio.create_task(coordinate(settings, event)) for event in ready]
    up = asyncio.gather(*(event.wait() for event in ready))
    try:
        await asyncio.wait([*running, up], timeout=LIMIT, return_when=asyncio.FIRST_COMPLETED)
        assert up.done()
        yield running
    finally:
        up.cancel()
        for task in running:
            task.cancel()
        for outcome in await asyncio.gather(*running, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome


class Node:
    """Both agents of the node ``local`` and the server of ``service``."""

    def __init__(self, bus: Bus, event_log: EventLog, registry: Registry, service: str = "echo") -> None:
        self.behave: dict[str, Behaviour] = {}
        self.before: dict[str, Callable[[], Awaitable[None]]] = {}
        """Called, by the step's name, after the step is accepted and before it is done."""
        self.calls: Counter[tuple[str, str]] = Counter()
        self.done: Counter[tuple[str, str]] = Counter()
        """Steps really carried out, by migration and name; a repeat is answered from memory."""
        self.occupied = "a"
        self.clients = ["car-1", "car-2"]
        self._recovered = asyncio.Event()
        self._dumped: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._bus = bus
        self._log = event_log
        self._registry = registry
        self._service = service
        self._tasks: set[asyncio.Task[None]] = set()

    def recover(self) -> None:
        """Everything works from now on; whoever was mute answers."""
        self.behave.clear()
        self._recovered.set()

    async def report(self, *names: str) -> None:
        for name in names or ("a", "b"):
            await self._registry.put_berth(berth(name, occupied=name == self.occupied, service=self._service))

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[Node]:
        checkpoint = [self._endpoint("checkpoint", verb) for verb in subjects.CHECKPOINT_VERBS]
        restore = [self._endpoint("restore", verb) for verb in subjects.RESTORE_VERBS]
        arm = Endpoint("arm", subjects.arm(self._service), ArmRequest, self._arm)
        await self.report()
        async with serve(self._bus, name="scripted", description="x", endpoints=[*checkpoint, *restore, arm]):
            yield self
            self.recover()
        for task in self._tasks:
            if not task.done():
                task.cancel()
        for outcome in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome

    def _endpoint(self, agent: str, verb: str) -> Endpoint:
        name = f"{agent}.{verb}"
        make = subjects.checkpoint if agent == "checkpoint" else subjects.restore

        async def handle(request: AgentRequest) -> Accepted:
            await self._accept(request.id, name)
            self._tasks.add(asyncio.create_task(self._step(request, agent, verb)))
            return Accepted(id=request.id)

        return Endpoint(f"{agent}_{verb}", make("local", verb), AgentRequest, handle)

    async def _accept(self, migration: str, name: str) -> None:
        self.calls[migration, name] += 1
        match self.behave.get(name, "work"):
            case "refuse":
                raise FerryError.of(BROKEN)
            case "mute":
                await self._recovered.wait()

    async def _arm(self, request: ArmRequest) -> ArmReply:
        name = "server.arm" if request.target else "server.disarm"
        await self._accept(request.id, name)
        if before := self.before.pop(name, None):
            await before()
        self.done[request.id, name] += 1
        return ArmReply(id=request.id, clients=len(self.clients))

    async def _step(self, request: AgentRequest, agent: str, verb: str) -> None:
        name = f"{agent}.{verb}"
        if name == "restore.restore":  # asked for ahead, it waits for the images
            await self._dumped[request.id].wait()
        if before := self.before.pop(name, None):
            await before()
        match self.behave.get(name, "work"):
            case "silent":
                return
            case "fail":
                kind = ev.CheckpointFailed if agent == "checkpoint" else ev.RestoreFailed
                attempt = request.attempt
                await self._log.append(kind(id=request.id, at_ms=now_ms(), verb=verb, attempt=attempt, error=BROKEN))
                return
        step = f"{name}.{request.round}" if request.round else name
        if not self.done[request.id, step]:
            self.done[request.id, step] += 1
            if name == "restore.resume":
                self.occupied = request.target.berth
        for kind, fields in self._events(name, request):
            await self._log.append(kind(id=request.id, at_ms=now_ms(), **fields))
        if name == "checkpoint.dump":
            self._dumped[request.id].set()
        if name in ("restore.resume", "checkpoint.release", "checkpoint.abort"):
            await self.report(request.source.berth, request.target.berth)

    def _events(self, name: str, request: AgentRequest) -> list[tuple[type[Any], dict[str, Any]]]:
        clients = self.clients
        script: dict[str, list[tuple[type[Any], dict[str, Any]]]] = {
            "checkpoint.prepare": [(ev.SourceReady, {"image": "sha256:1", "rss_bytes": 21_000_000})],
            "checkpoint.pre_dump": [
                (ev.PreDumped, {"round": request.round, "pages": 5000 // (request.round or 1), "took_ms": 1.0})
            ],
            "checkpoint.dump": [
                (ev.MigrateSent, {"clients": len(clients)}),
                *((ev.AckSeen, {"client": client, "after_ms": 1.0}) for client in clients),
                (ev.Quiesced, {"acks": len(clients), "clients": len(clients), "ready": 0, "closed": 0}),
                (ev.SourceHeld, {"waited_ms": 2.0}),
                (ev.Dumped, {"pages": 5000, "image_bytes": 20_000_000, "took_ms": 12.0}),
            ],
            "checkpoint.release": [(ev.SourceGone, {"frozen_ms": 10.0})],
            "checkpoint.abort": [(ev.SourceBack, {})],
            "restore.prepare": [(ev.TargetReady, {"image": "sha256:1"})],
            "restore.restore": [(ev.Restored, {"took_ms": 12.0})],
            "restore.resume": [
                (ev.Resumed, {"took_ms": 1.0, "queued": 100, "restore_ms": 10.0}),
                (ev.Adopted, {"outcome": "moved", "still_ms": 30.0}),
                *(
                    (ev.ClientArrived, {"client": client, "source": "wrapper", "interruption_ms": 30.0})
                    for client in clients
                ),
            ],
            "restore.abort": [(ev.TargetCleared, {})],
        }
        return script[name]

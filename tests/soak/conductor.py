"""A whole soak from its first berth to its report."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from pathlib import Path
from typing import Final

import msgspec

from tests.faults.checks import log_is_sound
from tests.faults.world import world
from tests.soak import report
from tests.soak.crowd import Crowd
from tests.soak.leaks import trends
from tests.soak.logs import Logs, defects
from tests.soak.moves import Service
from tests.soak.record import Result
from tests.soak.resources import Gauges
from tests.soak.stage import TROUBLES, Stage, insist, said_in
from tests.soak.trouble import Trouble
from tests.soak.words import Account, Ended, Gap

CLIENT_PROCESSES: Final = 2
NOT_OURS: Final = "nats-server"
"""Shown and not judged: its heap has a collector's rhythm, and its stream grows."""
PROGRESS_EVERY: Final = 30.0
SOURCES: Final = 2
"""Of trouble: so many faults may be at work at once."""
ROUGH: Final = 0.55
"""The part of a soak in which processes are ended; in the rest they grow old, and can be judged."""
GAUGES_EVERY: Final = 10.0
IMAGES_EVERY: Final = 0.1
CALM_SHARE: Final = 24
"""Calms in a soak, about; never more often than MIN_CALM and at least every MAX_CALM seconds."""
MIN_CALM: Final = 10.0
MAX_CALM: Final = 60.0
SETTLE: Final = 1.5
"""Seconds of calm before anything is read."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What to do."""

    seconds: float
    seed: int
    services: int
    clients: int
    interval_ms: float
    pause: float
    """Seconds between two moves of a service, on average."""
    faults: bool
    evidence: Path
    folder: Path

    @property
    def calm_every(self) -> float:
        return min(MAX_CALM, max(MIN_CALM, self.seconds / CALM_SHARE))


class Conductor:
    """Made by :func:`soak`."""

    def __init__(self, stage: Stage, plan: Plan) -> None:
        self._stage = stage
        self._plan = plan
        self._world = stage.world
        names = list(dict.fromkeys(berth.service for berth in stage.world.berths.values()))
        self._accounts: list[Account] = []
        self._services = {
            name: Service(stage, name, plan.clients, pause=plan.pause, mortal=len(names) > 1 and name == names[-1])
            for name in names
        }
        self._gauges = Gauges(stage, self._services.values())
        self._trouble = Trouble(stage, list(self._services.values()))
        self._logs = Logs(plan.folder)

    async def run(self) -> None:
        """Raises what only a defect of the soak itself can raise, or its world's beginning."""
        self._stage.crowd.on_gap, self._stage.crowd.on_ended = self._measured, self._session_ended
        for service in self._services.values():
            try:
                await service.dial()
            except TROUBLES as error:
                self._stage.wrong(f"it does not begin: {type(error).__name__}: {error}", service=service.name)
                await self._stage.written()
                return
        self._stage.begin()
        tasks = [asyncio.create_task(service.run(), name=service.name) for service in self._services.values()]
        if self._plan.faults:
            tasks += [asyncio.create_task(self._trouble.run(n), name=f"trouble {n}") for n in range(SOURCES)]
        tasks.append(asyncio.create_task(self._tell_progress(), name="progress"))
        tasks.append(asyncio.create_task(self._read_gauges(), name="gauges"))
        tasks.append(asyncio.create_task(self._watch_images(), name="images"))
        try:
            end = self._plan.seconds
            while (left := end - self._stage.now()) > 0:
                sleeping = asyncio.create_task(asyncio.sleep(min(self._plan.calm_every, left)))
                done, _ = await asyncio.wait({sleeping, *tasks}, return_when=asyncio.FIRST_COMPLETED)
                for task in done - {sleeping}:
                    task.result()  # a defect of the soak's own
                await self._calm()
                self._stage.rough = self._stage.now() < self._plan.seconds * ROUGH
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await self._look_back()
        await self._stage.written()
        self._stage.result.seconds = self._stage.now()

    async def _tell_progress(self) -> None:
        while True:
            await asyncio.sleep(PROGRESS_EVERY)
            print(report.progress(self._stage.result, self._stage.now()), flush=True)

    async def _read_gauges(self) -> None:
        while True:
            await asyncio.sleep(GAUGES_EVERY)
            self._gauges.read(calm=False)

    async def _watch_images(self) -> None:
        """They are there for a tenth of a second."""
        while True:
            await asyncio.sleep(IMAGES_EVERY)
            self._gauges.measure_images()

    # Calm.

    async def _calm(self) -> None:
        try:
            async with self._stage.calm():
                for program in self._world.programs.values():
                    await program.ready(program.starts)
                for service in self._services.values():
                    await service.look()
                await self._hear_clients()
                await asyncio.sleep(SETTLE)
                self._gauges.read(calm=True)
                for what in (*self._gauges.children(), *self._gauges.left_heaps(), *self._ends(), *self._logs.news()):
                    self._stage.wrong(f"in the calm: {what}")
                self._stage.result.calms += 1
                self._stage.crowd.go()
        except TROUBLES as error:
            self._stage.wrong(f"no calm: {type(error).__name__}: {error}")

    def _ends(self) -> list[str]:
        """Programs that ended without a fault's doing."""
        found = []
        for name, expected in self._trouble.ends_expected.items():
            restarts = self._world.programs[name].starts - 1
            self._stage.result.restarts[name] = restarts
            if restarts > expected:
                found.append(f"{name} ended {restarts} times, by faults {expected} times")
                self._trouble.ends_expected[name] = restarts
        return found

    async def _hear_clients(self) -> None:
        """Every echo has come, on one session each, from where the server is."""
        self._accounts = await self._stage.crowd.still()
        for service in self._services.values():
            service.hear([account for account in self._accounts if account.service == service.name])

    async def _look_back(self) -> None:
        """Every log once more: what came late must not have changed what it says."""
        result = self._stage.result
        result.sessions = self._stage.crowd.opened
        for account in self._accounts:
            result.echoes_sent += account.sent
            result.echoes_lost += account.sent - account.echoed
            result.handshakes += account.handshakes
        result.attribute()
        result.trends = [
            trend for life in result.lives if life.process != NOT_OURS for trend in trends(life.process, life.calm)
        ]
        for move in result.moves:
            if move.outcome not in ("", "refused"):
                for what in log_is_sound(await insist(functools.partial(self._world.events, move.id))):
                    self._stage.wrong(f"in the end: {what}", service=move.service, migration=move.id)

        for berth in self._world.berths.values():
            for what in defects(await asyncio.to_thread(said_in, self._world, berth)):
                self._stage.wrong(f"{berth.name}: {what}", service=berth.service)

    def _session_ended(self, said: Ended) -> None:
        self._services[said.service].session_ended(f"{said.session}: {said.why}")

    def _measured(self, gap: Gap) -> None:
        for move in reversed(self._stage.result.moves):
            if move.id == gap.migration:
                move.gaps_ms.append(gap.ms)
                return


async def soak(plan: Plan) -> Result:
    """All of it; afterwards nothing is left of it but the evidence."""
    result = Result(seed=plan.seed, seconds=0.0, services=plan.services, clients=plan.clients)
    async with contextlib.AsyncExitStack() as stack:
        made = await stack.enter_async_context(world(plan.folder, [f"soak{n + 1}" for n in range(plan.services)]))
        for service in list(dict.fromkeys(berth.service for berth in made.berths.values()))[::2]:
            await made.add_berth(service, with_server=False)
        crowd = Crowd(plan.folder, made.tls / "cert.pem", plan.interval_ms, processes=CLIENT_PROCESSES)
        stack.push_async_callback(crowd.close)
        await crowd.start()
        stage = Stage(made, crowd, result, plan.evidence)
        stack.push_async_callback(stage.written)
        await Conductor(stage, plan).run()
    return result

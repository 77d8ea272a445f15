"""Faults at random moments, by the same named points and from outside as the fault matrix has them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from random import Random
from typing import Final, NamedTuple

from quicferry import faults
from tests.faults.matrix import FAILS_AT, Case, cases
from tests.faults.parts import LOOK, Program, state_of
from tests.soak.moves import Service
from tests.soak.record import Fault
from tests.soak.stage import TROUBLES, Stage

BETWEEN: Final = 3.0
"""Seconds between two faults of one source of trouble, on average; there are two sources."""
PLANTED_SECONDS: Final = 8.0
"""For somebody to come to the point; then the fault is taken away."""
STOPPED: Final = (0.3, 3.0)
"""Seconds that a process stands still: up to more than a lease of the lead."""
CLIENTS_STOPPED: Final = (1.0, 3.0)
NATS_AWAY: Final = (0.5, 5.0)
SECOND_LIVES: Final = (2.0, 12.0)
TERM_SECONDS: Final = 10.0
"""For a coordinator to stop when it is told to."""
FOUND_SECONDS: Final = 5.0
"""For what was struck to be seen standing still, or started again."""
AFTERWARDS: Final = 1.0
"""Seconds for which what was just repaired still counts as a fault at work."""
ENDING: Final = ("kill", "exit")
PROGRAMS: Final = ("coordinator", "checkpoint_agent", "restore_agent")
SECOND: Final = "coordinator-2"


class Kind(NamedTuple):
    """One kind of fault."""

    weight: int
    """Of all together."""
    gentle: bool
    """Whether no process of ours ends by it."""
    strike: Callable[[Random], Awaitable[None]]


class Trouble:
    """Makes it, for as long as it is let."""

    def __init__(self, stage: Stage, services: list[Service]) -> None:
        self._stage = stage
        self._world = stage.world
        self._services = services
        self._mortal = next((service for service in services if service.mortal), None)
        self.ends_expected = dict.fromkeys(PROGRAMS, 0)
        """How often each program has been ended by a fault."""
        self._still: set[int] = set()
        """PIDs that stand still until they are let go again."""
        self._nats = asyncio.Lock()
        self._second = asyncio.Lock()
        planted = [case for case in cases() if case.fault in faults.FAULTS]
        self._planted = [case for case in planted if case.who in PROGRAMS]
        self._in_server = [case for case in planted if case.who == "server" and case.fault not in ENDING]
        self._kinds = [
            Kind(6, True, self._plant_gently),
            Kind(4, False, self._plant),
            Kind(3, True, self._plant_in_server),
            Kind(2, False, self._kill),
            Kind(2, True, self._stop),
            Kind(1, True, self._nats_away),
            Kind(1, True, self._second_coordinator),
            Kind(2, True, self._stop_clients),
        ]
        if self._mortal is not None:
            self._kinds.append(Kind(1, True, self._server_dies))

    async def run(self, source: int) -> None:
        """For ever. There may be several sources at once."""
        chance = self._stage.random(f"trouble {source}")
        while True:
            await self._stage.wait(chance, BETWEEN)
            async with self._stage.at_work():
                kinds = [kind for kind in self._kinds if kind.gentle or self._stage.rough]
                (kind,) = chance.choices(kinds, [kind.weight for kind in kinds])
                try:
                    await kind.strike(chance)
                except TROUBLES as error:
                    self._stage.wrong(
                        f"after {kind.strike.__name__.strip('_').replace('_', ' ')}: {type(error).__name__}: {error}"
                    )

    @contextlib.asynccontextmanager
    async def _striking(self, kind: str, detail: str) -> AsyncIterator[None]:
        """The fault is at work while the block runs, and a moment longer."""
        fault = Fault(kind=kind, detail=detail, began=self._stage.now())
        self._stage.result.faults.append(fault)
        try:
            yield
            await self._stage.pause(AFTERWARDS)
        finally:
            fault.ended = self._stage.now()

    # At a named point.

    async def _plant(self, chance: Random) -> None:
        await self._planting(chance.choice([case for case in self._planted if case.fault in ENDING]), chance)

    async def _plant_gently(self, chance: Random) -> None:
        await self._planting(chance.choice([case for case in self._planted if case.fault not in ENDING]), chance)

    async def _plant_in_server(self, chance: Random) -> None:
        service, case = chance.choice(self._services), chance.choice(self._in_server)
        if home := self._world.home(service.name):
            here = case.point.replace(".server.echo.", f".server.{service.name}.")
            await self._planting(case, chance, self._world.faults_in(self._world.berths[home]) / here)

    async def _planting(self, case: Case, chance: Random, file: Path | None = None) -> None:
        """Whoever comes by, of whichever service, meets it."""
        file = file or self._world.planted / case.point
        fails = self._world.planted / FAILS_AT[case.way] if case.way != "forward" else None
        if file.exists() or (fails and fails.exists()):
            return
        program = self._world.programs.get(case.who)
        starts = program.starts if program else 0
        seconds = chance.uniform(*STOPPED)
        file.write_text(case.fault)
        if fails:
            fails.write_text("error")
        try:
            if not await self._struck(file, fails):
                return
            async with self._striking(f"{case.fault} at a point of {_shown(case.who)}", case.shown):
                if case.fault == "stop":
                    await self._let_go(case.who, seconds)
                elif case.fault in ENDING and program:
                    self.ends_expected[case.who] += 1
                    await _again(program, starts)
        finally:
            for left in (file, fails):
                if left is not None:
                    with contextlib.suppress(OSError):
                        left.unlink()

    async def _struck(self, file: Path, fails: Path | None) -> bool:
        """Wait until somebody has come to the point; False if nobody did in time."""
        end = self._stage.now() + PLANTED_SECONDS
        async with contextlib.AsyncExitStack() as stack:
            while file.exists():
                if fails and not fails.exists():
                    await stack.enter_async_context(self._striking("error, to make a move go back", fails.name))
                    fails = None
                if self._stage.now() > end or self._stage.wants_calm:
                    with contextlib.suppress(FileNotFoundError):  # in the last moment
                        file.unlink()
                        return False
                await asyncio.sleep(LOOK)
        return file.parent.exists()  # else its berth is gone

    async def _let_go(self, who: str, seconds: float) -> None:
        """Find who has stopped at the point, and let it go on after a while."""
        pid = 0
        with contextlib.suppress(TimeoutError):  # another fault may have ended it
            async with asyncio.timeout(FOUND_SECONDS):
                while not (pid := self._stopped(who)):
                    await asyncio.sleep(LOOK)
        if pid:
            await self._stand_still(pid, seconds)

    def _stopped(self, who: str) -> int:
        if who == "server":
            pids = [berth.server_pid for service in self._services for berth in self._world.of(service.name)]
        else:
            pids = [program.pid for program in self._world.programs.values() if program.name == who]
        return next((pid for pid in pids if pid and pid not in self._still and state_of(pid) == "T"), 0)

    async def _stand_still(self, pid: int, seconds: float) -> None:
        self._still.add(pid)
        try:
            await asyncio.sleep(seconds)
        finally:
            self._still.discard(pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    # From outside.

    async def _kill(self, chance: Random) -> None:
        name, number = chance.choice(PROGRAMS), chance.choice((signal.SIGKILL, signal.SIGTERM))
        program = self._world.programs[name]
        if not (pid := program.pid) or pid in self._still:
            return
        starts = program.starts
        async with self._striking(f"{number.name} to {_shown(name)}", ""):
            with contextlib.suppress(ProcessLookupError):  # another fault has ended it, and counts it
                os.kill(pid, number)
                self.ends_expected[name] += 1
            await _again(program, starts)

    async def _stop(self, chance: Random) -> None:
        name = chance.choice(PROGRAMS)
        await self._stop_process(self._world.programs[name].pid, _shown(name), chance.uniform(*STOPPED))

    async def _stop_clients(self, chance: Random) -> None:
        process = chance.choice(self._stage.crowd.processes)
        await self._stop_process(process.pid, "clients", chance.uniform(*CLIENTS_STOPPED))

    async def _stop_process(self, pid: int, shown: str, seconds: float) -> None:
        if pid and pid not in self._still:
            async with self._striking(f"SIGSTOP to {shown}", f"{seconds:.1f} s"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP)
                    await self._stand_still(pid, seconds)

    async def _nats_away(self, chance: Random) -> None:
        seconds = chance.uniform(*NATS_AWAY)
        if self._nats.locked():
            return
        async with self._nats, self._striking("NATS killed", f"{seconds:.1f} s"):
            self._world.nats.stop(signal.SIGKILL)
            await asyncio.sleep(seconds)
            await self._world.nats.start()

    async def _second_coordinator(self, chance: Random) -> None:
        seconds, number = chance.uniform(*SECOND_LIVES), chance.choice((signal.SIGKILL, signal.SIGTERM))
        if self._second.locked():
            return
        async with self._second:
            program = self._world.add_program("coordinator", SECOND)
            program.start()
            await self._stage.pause(seconds)
            async with self._striking("a second coordinator ended", f"{number.name} after {seconds:.1f} s"):
                closing = asyncio.create_task(program.close(number))
                await asyncio.wait({closing}, timeout=TERM_SECONDS)
                if not closing.done():
                    self._stage.wrong(f"a coordinator goes on {TERM_SECONDS:.0f} s after {number.name}")
                while not closing.done():
                    if pid := program.pid:  # 0 would be all of us
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
                    await asyncio.wait({closing}, timeout=LOOK)
                await closing
                del self._world.programs[SECOND]

    async def _server_dies(self, chance: Random) -> None:
        """Of the one service that is there for it."""
        service, kind = self._mortal, chance.choice(("server killed", "its berth removed", "an empty berth removed"))
        assert service is not None
        if service.dying:
            return
        home = self._world.home(service.name)
        pid = self._world.berths[home].server_pid if home else 0
        empty = [berth.name for berth in self._world.of(service.name) if berth.name != home]
        if not pid:
            return
        service.dying = True
        try:
            async with self._striking(f"{kind}, of {service.name}", ""):
                if kind == "server killed":
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                    while self._world.berths[home].server_pid == pid:  # dying takes a moment
                        await asyncio.sleep(LOOK)
                else:
                    await self._world.remove_berth(home if kind == "its berth removed" else chance.choice(empty))
                await self._stage.pause(chance.uniform(0, 3))
                async with service.lock:  # whatever is under way has come to its end
                    await service.begin_anew()
                    service.dying = False
        finally:
            service.dying = False


def _shown(name: str) -> str:
    return name.replace("_", " ")


async def _again(program: Program, starts: int) -> None:
    """Until a program that was ended is there again. Another process of its name may have been struck instead."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(FOUND_SECONDS):
            while program.starts == starts:
                await asyncio.sleep(LOOK)
    await program.ready(program.starts)

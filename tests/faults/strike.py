"""One fault at its point: planted, waited for, and what comes from outside while a process stands still there."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import msgspec

from quicferry import faults
from quicferry.protocol.errors import FerryError
from tests.faults import deeds
from tests.faults.checks import outcome
from tests.faults.matrix import FAILS_AT, Case
from tests.faults.parts import LOOK, PATIENCE, Berth
from tests.faults.world import World

STANDS_STILL: Final = 2.6
"""Seconds that a stopped process stays stopped: longer than a phase's limit, and than the coordinator's lease."""
BEHIND_SECONDS: Final = 2.0
"""For points that lie behind the outcome."""
KILLED_FOR_MEMORY: Final = ("server killed for memory", "target killed for memory")


class NotReachedError(Exception):
    """The migration ended before it came to the point."""


def kills_the_server(case: Case) -> bool:
    """Whether the fault may end the process that the sessions live in: then they end with it."""
    if case.fault in KILLED_FOR_MEMORY or case.fault.endswith("berth removed"):
        return True
    return case.who in ("server", "target") and case.fault == "kill"


class Strike(msgspec.Struct, frozen=True, kw_only=True):
    """A case in one migration, from ``home`` to ``away``."""

    world: World
    case: Case
    migration: str
    home: Berth
    away: Berth
    car: asyncio.subprocess.Process | None = None
    """The client that the fault is for, if it is for one."""

    def plant(self) -> None:
        """What comes from outside comes while the process stands still at the point."""
        self._planted.write_text(self.case.fault if self.case.fault in faults.FAULTS else "stop")
        if self.case.way != "forward":
            (self.world.planted / FAILS_AT[self.case.way]).write_text("error")

    async def struck(self) -> None:
        """Wait until the fault has struck, and do what is to be done from outside. Raises NotReachedError."""
        async with asyncio.timeout(PATIENCE):
            while self._planted.exists():
                await self._look_on()
                await asyncio.sleep(LOOK)
            if self.case.fault == "kill" and self.case.who in ("server", "target"):
                while self._berth.server_pid:
                    await asyncio.sleep(LOOK)
        if self.case.fault in faults.FAULTS and self.case.fault != "stop":
            return
        pid = await deeds.stopped(self._pid)
        try:
            async with self._deed():
                _let_go(pid)
        finally:
            _let_go(pid)

    async def _look_on(self) -> None:
        with contextlib.suppress(FerryError):
            if outcome(await self.world.events(self.migration)) == "none":
                return
            end = asyncio.get_running_loop().time() + BEHIND_SECONDS
            while self._planted.exists():
                if asyncio.get_running_loop().time() > end:
                    with contextlib.suppress(FileNotFoundError):
                        self._planted.unlink()  # whoever takes it away has it
                        raise NotReachedError
                await asyncio.sleep(LOOK)

    @property
    def _berth(self) -> Berth:
        return self.away if self.case.who == "target" else self.home

    @property
    def _planted(self) -> Path:
        match self.case.who:
            case "client":
                return self.world.folder / "car" / self.case.point
            case "server" | "target":
                return self.world.faults_in(self._berth) / self.case.point
            case _:
                return self.world.planted / self.case.point

    def _pid(self) -> int:
        if self.car is not None:
            return self.car.pid
        if self.case.who in ("server", "target"):
            return self._berth.server_pid
        return self.world.programs[self.case.who].pid

    @contextlib.asynccontextmanager
    async def _deed(self) -> AsyncIterator[None]:
        """The block lets the process go on."""
        world = self.world
        match self.case.fault:
            case "stop":
                await asyncio.sleep(STANDS_STILL)
                yield
            case "cancelled":
                await world.cancel(self.migration)
                yield
            case "nats away":
                await deeds.nats_away(world)
                yield
            case "source berth removed":
                await world.remove_berth(self.home.name)
                yield
            case "target berth removed":
                await world.remove_berth(self.away.name)
                yield
                # As its restart policy would, while the migration goes on.
                await world.start_berth(self.away.name, with_server=False)
            case "server killed for memory":
                await deeds.oom_kill(self.home)
                yield
            case "target killed for memory":
                await deeds.oom_kill(self.away)
                yield
            case "disk full":
                async with deeds.disk_full(world.images):
                    yield
                    await asyncio.sleep(STANDS_STILL)
            case _:
                raise AssertionError(f"no such fault: {self.case.fault}")


def _let_go(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)

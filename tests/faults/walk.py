"""Walks through the matrix in one world: of each case one migration with the fault, the checks, and one without."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Final

import msgspec

from quicferry import faults
from quicferry.protocol import events as ev
from quicferry.protocol.api import MigrateRequest
from quicferry.protocol.errors import FerryError
from tests.e2e.berths import PORT
from tests.e2e.moving import Capture, Pinger
from tests.faults.car import car
from tests.faults.checks import log_is_sound, one_copy_sent, outcome, tidy
from tests.faults.matrix import Case
from tests.faults.parts import PATIENCE
from tests.faults.strike import NotReachedError, Strike, kills_the_server
from tests.faults.world import OPTIONS, World

SERVICE: Final = "echo"
TRIES: Final = 3
TROUBLE: Final = (TimeoutError, FerryError, AssertionError, OSError, subprocess.SubprocessError)
"""What costs a case, and not the walk."""
ECHO_SECONDS: Final = 20.0


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One case's result."""

    point: str
    fault: str
    outcome: str
    """``completed``, ``rolled_back: CODE``, ``failed: CODE``, or what became of it instead."""
    held: bool
    """Whether all that must hold did."""
    why: str
    """What did not; otherwise what became of server and session."""


class Walk:
    """One client's session through all cases; it is dialled again only when a fault killed the server itself."""

    def __init__(self, world: World, stack: contextlib.AsyncExitStack) -> None:
        self._world = world
        self._stack = stack
        self._client: Pinger | None = None
        self._session = contextlib.AsyncExitStack()
        self._mark = secrets.token_hex(3)
        self._number = 0
        self.sessions = 0

    async def client(self) -> Pinger:
        """The pinging client; dialled if there is none."""
        if self._client is None:
            session = self._world.client(SERVICE, f"walker-{self.sessions}")
            self._client = await self._session.enter_async_context(session)
            self.sessions += 1
        return self._client

    async def close(self) -> None:
        """Leave; a session that its server did not survive is given up without a word."""
        self._client = None
        with contextlib.suppress(Exception):
            async with asyncio.timeout(5):
                await self._session.aclose()
        self._session = contextlib.AsyncExitStack()

    async def case(self, case: Case) -> Row:
        """One migration with the fault in it, then one without. A migration that ended before it came to the point,
        as on a busy machine it may, says nothing: then again."""
        for _ in range(TRIES):
            with contextlib.suppress(NotReachedError):
                return await self._case(case)
        return Row(point=case.shown, fault=case.fault, outcome="none", held=False, why="nobody came to the point")

    async def _case(self, case: Case) -> Row:
        result, wrong, seen = "", list[str](), list[str]()
        try:
            await self.client()
            async with self._car(case) as process:
                result, wrong, seen = await self._with_fault(case, process)
        except TROUBLE as error:
            wrong.append(f"{type(error).__name__}: {error}")
        except NotReachedError:
            with contextlib.suppress(*TROUBLE):  # the next try shows it
                await self._repair()
            raise
        try:
            await self._repair()
            wrong += await self._clean_move()
        except TROUBLE as error:
            wrong.append(f"the next migration: {type(error).__name__}: {error}")
            with contextlib.suppress(*TROUBLE):  # the next case shows it
                await self._begin_anew()
        return Row(
            point=case.shown,
            fault=case.fault,
            outcome=result or "none",
            held=not wrong,
            why="; ".join(wrong or seen),
        )

    @contextlib.asynccontextmanager
    async def _car(self, case: Case) -> AsyncIterator[asyncio.subprocess.Process | None]:
        """A second client, where the fault is a client's."""
        if case.who != "client":
            yield None
            return
        placement = await self._world.serves(SERVICE)
        async with car(self._world, placement.place.address, comes_back=case.fault == "stop") as process:
            yield process

    async def _with_fault(
        self, case: Case, process: asyncio.subprocess.Process | None
    ) -> tuple[str, list[str], list[str]]:
        world = self._world
        before = (await world.serves(SERVICE)).epoch
        home = world.home(SERVICE)
        self._number += 1
        migration = f"case-{self._number}-{self._mark}"
        starts = {name: program.starts for name, program in world.programs.items()}
        (away,) = (berth for berth in world.of(SERVICE) if berth.name != home)
        strike = Strike(world=world, case=case, migration=migration, home=world.berths[home], away=away, car=process)
        strike.plant()
        asking = asyncio.create_task(world.ask(MigrateRequest(service=SERVICE, id=migration, options=OPTIONS)))
        with Capture(world.interface) as capture:
            try:
                await strike.struck()
                await asking
            finally:
                asking.cancel()
            if case.fault in ("kill", "exit") and (struck := world.programs.get(case.who)):
                await struck.ready(starts[case.who] + 1)
            for name, program in world.programs.items():
                if program.starts != starts[name] or not program.pid:
                    await program.ready(starts[name] + 1)
            events = await world.ended(migration)
            result, wrong = outcome(events), log_is_sound(events)
            wrong += await self._afterwards(case, home, before, events)
        wrong += one_copy_sent(capture.seen, world.berths[home].ip, moved=result == "completed")
        gone = not any(berth.server_pid for berth in world.of(SERVICE))
        seen = "the server died, and its sessions with it" if gone else f"in {world.home(SERVICE)}, same session"
        return result, wrong, [seen]

    async def _afterwards(self, case: Case, home: str, before: int, events: Sequence[ev.AnyEvent]) -> list[str]:
        world = self._world
        kinds = [ev.kind(event) for event in events]
        committed = "decision.committed" in kinds
        gone = not any(berth.server_pid for berth in world.of(SERVICE))
        may_go = kills_the_server(case)
        wrong = [] if may_go or not gone else ["the server is gone"]
        left: list[str] = []
        for _ in range(TRIES):  # a berth's init takes a moment to end behind its server
            for berth in world.of(SERVICE):
                if not world.lives(berth):
                    await world.start_berth(berth.name, with_server=False)
            left = await tidy(world, SERVICE, server=not gone)
            if all(world.lives(berth) for berth in world.of(SERVICE)):
                break
        wrong += left
        if not gone:
            wrong += await self._serves_on(home, before, committed=committed, completed="decision.completed" in kinds)
        return wrong

    async def _serves_on(self, home: str, before: int, *, committed: bool, completed: bool) -> list[str]:
        """The one live copy is where the log says, and the client's session is the same."""
        wrong = []
        try:
            placement = await self._world.serves(SERVICE)
        except TimeoutError:
            return ["the service is not served"]
        if placement.epoch != before + committed:
            wrong.append(f"epoch {before} became {placement.epoch}")
        if committed != completed:
            wrong.append("committed, not completed")
        if (placement.place.berth != home) != committed:
            wrong.append(f"the server is in {placement.place.berth}")
        client = await self.client()
        client.check()
        due = client.sent + 1
        try:
            async with asyncio.timeout(ECHO_SECONDS):
                await client.reaches(due)
        except TimeoutError:
            wrong.append(f"{due - client.echoed} echoes did not come")
        client.check()
        if client.connection.handshakes != 1:
            wrong.append(f"{client.connection.handshakes} handshakes")
        if client.connection.peer != f"{placement.place.address.host}:{PORT}":
            wrong.append(f"the client is at {client.connection.peer}")
        return wrong

    async def _repair(self) -> None:
        """As an operator would after a server's death: a new one, and the client dials again."""
        for folder in (self._world.planted, *(self._world.faults_in(berth) for berth in self._world.of(SERVICE))):
            for left in folder.glob("*"):  # none where the berth is gone
                if left.name != faults.PASSED:
                    left.unlink(missing_ok=True)
        if await self._world.see_to_berths(SERVICE):
            await self.close()

    async def _begin_anew(self) -> None:
        """After a case that left something: what was left must not be the next case's fault."""
        world = self._world
        for berth in world.of(SERVICE):
            await world.remove_berth(berth.name)
        with contextlib.suppress(FerryError):
            for lock in await world.registry.locks():
                await world.cancel(lock.id)
        for berth in world.of(SERVICE):
            await world.start_berth(berth.name, with_server=False)
        for program in world.programs.values():
            await program.anew()
        for left in world.images.iterdir():
            shutil.rmtree(left, ignore_errors=True)
        await world.see_to_berths(SERVICE)
        await self.close()

    async def _clean_move(self) -> list[str]:
        world = self._world
        before = (await world.serves(SERVICE)).epoch
        home = world.home(SERVICE)
        client = await self.client()
        self._number += 1
        migration = f"next-{self._number}-{self._mark}"
        end = asyncio.get_running_loop().time() + PATIENCE
        while True:
            try:
                await world.ask(MigrateRequest(service=SERVICE, id=migration))
                break
            except FerryError as error:
                if error.code not in ("service_busy", "no_target") or asyncio.get_running_loop().time() > end:
                    raise
            await asyncio.sleep(0.1)  # the last case may hold the service for a moment longer
        events = await world.ended(migration)
        if (result := outcome(events)) != "completed":
            return [f"the next migration: {result}"]
        wrong = await tidy(world, SERVICE)
        await client.echoes(5)
        wrong += await self._serves_on(home, before, committed=True, completed=True)
        return [f"the next migration: {text}" for text in wrong]


async def walk(world: World, chosen: Sequence[Case], say: Callable[[Row], None]) -> list[Row]:
    """All ``chosen`` cases one after another."""
    rows = []
    async with contextlib.AsyncExitStack() as stack:
        walking = Walk(world, stack)
        stack.push_async_callback(walking.close)
        for case in chosen:
            row = await walking.case(case)
            say(row)
            rows.append(row)
    return rows

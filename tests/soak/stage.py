"""What all parts of a soak share: the clock, chance, the moments of calm, and what was found wrong."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from random import Random
from typing import Final, TypeVar

import msgspec
import nats.errors

from quicferry.protocol.errors import FerryError
from tests.e2e.berths import environment
from tests.faults.parts import Berth
from tests.faults.world import World
from tests.soak.crowd import Crowd
from tests.soak.record import Result, Violation

T = TypeVar("T")

TROUBLES: Final = (FerryError, nats.errors.Error, TimeoutError, OSError, AssertionError)
"""What goes wrong in a world in which everything does; whoever meets one tries again, or says so."""
INSIST_SECONDS: Final = 30.0
AGAIN: Final = 0.2
IDLE_SECONDS: Final = 240.0
"""For everything that is under way to end: a migration that gives up last of all takes most of it."""
TAIL: Final = 30_000
"""Characters of each log that are kept with a violation."""
MOST_EVIDENCE: Final = 20
"""Files of evidence; what is found after so many has the same causes."""


class Stage:
    """The world, the crowd, and what is known of both."""

    def __init__(self, world: World, crowd: Crowd, result: Result, evidence: Path) -> None:
        self.world = world
        self.crowd = crowd
        self.result = result
        self.evidence = evidence
        self.rough = True
        """Whether processes may be ended; the last part of a soak is gentle, so that they grow old."""
        self._began = time.monotonic()
        self._open = asyncio.Event()
        self._open.set()
        self._wanted_calm = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._at_work = 0
        self._writing: set[asyncio.Task[None]] = set()

    def now(self) -> float:
        """Seconds since the soak began."""
        return round(time.monotonic() - self._began, 2)

    def begin(self) -> None:
        """Let the clock begin now."""
        self._began = time.monotonic()

    def random(self, name: str) -> Random:
        """Chance of one's own, from the soak's seed: what others do does not change it."""
        return Random(f"{self.result.seed} {name}")

    # Calm.

    async def pause(self, seconds: float) -> None:
        """Sleep, but not into a calm that others wait for."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wanted_calm.wait()

    async def wait(self, chance: Random, mean: float) -> None:
        """Sleep for about ``mean`` seconds outside of any calm: after one not everybody begins at once."""
        while True:
            await self._open.wait()
            await self.pause(chance.expovariate(1 / mean))
            if not self.wants_calm:
                return

    @property
    def wants_calm(self) -> bool:
        return self._wanted_calm.is_set()

    @contextlib.asynccontextmanager
    async def at_work(self) -> AsyncIterator[None]:
        """Something is under way; it does not begin in a calm."""
        await self._open.wait()
        self._at_work += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._at_work -= 1
            if not self._at_work:
                self._idle.set()

    @contextlib.asynccontextmanager
    async def calm(self) -> AsyncIterator[None]:
        """Nothing is under way while the block runs. Raises TimeoutError if something does not end."""
        self._open.clear()
        self._wanted_calm.set()
        try:
            async with asyncio.timeout(IDLE_SECONDS):
                await self._idle.wait()
            yield
        finally:
            self._wanted_calm.clear()
            self._open.set()

    # What is wrong.

    def wrong(self, what: str, *, service: str = "", migration: str = "") -> None:
        """Note a violation, keep the logs, and go on."""
        number = len(self.result.violations) + 1
        file = self.evidence / f"{number:02}-{migration or service or 'soak'}.txt"
        kept = number <= MOST_EVIDENCE
        violation = Violation(
            at=self.now(), what=what, service=service, migration=migration, evidence=str(file) if kept else ""
        )
        self.result.violations.append(violation)
        print(f"VIOLATION  {violation.at:.0f} s  {service} {migration}: {what}", flush=True)
        if kept:
            task = asyncio.create_task(self._keep(violation, file))
            self._writing.add(task)
            task.add_done_callback(self._writing.discard)

    async def _keep(self, violation: Violation, file: Path) -> None:
        """The migration's log and the ends of everybody else's."""
        recent = [*self.result.moves[-12:], *self.result.faults[-12:]]
        parts = [f"seed {self.result.seed}", *(_line(one) for one in (violation, *recent))]
        if violation.migration:
            parts.append(f"--- the log of {violation.migration}")
            with contextlib.suppress(*TROUBLES):
                parts += [_line(event) for event in await self.world.events(violation.migration)]
        parts += [f"--- {log.name}\n{_tail(log)}" for log in sorted(self.world.folder.glob("*.log"))]
        for berth in self.world.of(violation.service):
            told = await asyncio.to_thread(said_in, self.world, berth, 300)
            parts.append(f"--- {berth.name}\n{told[-TAIL:]}")
        self.evidence.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(parts) + "\n", encoding="utf-8")

    async def written(self) -> None:
        """Until all evidence is kept."""
        await asyncio.gather(*self._writing)


def _line(data: object) -> str:
    return msgspec.json.encode(data).decode()


def _tail(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-TAIL:]


async def insist(ask: Callable[[], Awaitable[T]]) -> T:
    """Ask again while everything around fails, for a while. Raises what came last."""
    end = asyncio.get_running_loop().time() + INSIST_SECONDS
    while True:
        try:
            return await ask()
        except TROUBLES:
            if asyncio.get_running_loop().time() > end:
                raise
        await asyncio.sleep(AGAIN)


def said_in(world: World, berth: Berth, lines: int = 0) -> str:
    """What the servers in a berth's container have printed; with ``lines`` only the last ones."""
    tail = ("--tail", str(lines)) if lines else ()
    done = subprocess.run(
        ["podman", "logs", *tail, f"{berth.name}-{world.mark}"],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=60,
        check=False,
    )
    return done.stdout.decode(errors="replace")

"""One service moved about at random, and looked at after each move."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Sequence
from typing import Final

import msgspec

from quicferry.protocol import events as ev
from quicferry.protocol import subjects
from quicferry.protocol.api import CancelReply, CancelRequest, MigrateReply, MigrateRequest, Placement
from quicferry.protocol.errors import FerryError
from tests.e2e.berths import PORT
from tests.faults.checks import log_is_sound, outcome, tidy
from tests.faults.parts import LOOK
from tests.faults.world import OPTIONS
from tests.soak.record import Move
from tests.soak.stage import TROUBLES, Stage, insist
from tests.soak.words import Account

CANCELLED: Final = 0.15
CANCEL_WITHIN: Final = 0.8
"""Seconds from the request, at most: a move alone takes about so long."""
BAD: Final = 0.08
HURRIED: Final = 0.25
"""The part of the moves after which nobody looks before the next one is asked for."""
ASK_SECONDS: Final = 40.0
TIDY_SECONDS: Final = 30.0
TRANSIENT: Final = ("no_answer", "not_leading", "nats_unreachable", "internal")
"""What a request may get while a fault is at work."""
REFUSALS: Final = (*TRANSIENT, "no_target", "berth_gone", "berth_busy", "service_busy")
"""What a proper request may get: berths may not have been reported for a while."""


class Service:
    """One service, its moves and its sessions."""

    def __init__(self, stage: Stage, name: str, sessions: int, *, pause: float, mortal: bool) -> None:
        self.name = name
        self.mortal = mortal
        """Whether its server may be killed, and its sessions with it."""
        self.dying = False
        """While it is."""
        self.generation = 1
        """Servers that were started for it so far."""
        self.lock = asyncio.Lock()
        """Held while something of it is under way."""
        self._stage = stage
        self._world = stage.world
        self._sessions = sessions
        self._pause = pause
        """Seconds between two moves, on average."""
        self._random = stage.random(name)
        self._number = 0
        self._epoch = 0
        self._broken = False

    # Its beginning, and its new beginning after something went wrong.

    async def dial(self) -> None:
        """Once it serves, all its clients come."""
        placement = await self._world.serves(self.name)
        self._epoch = placement.epoch
        await self._stage.crowd.dial(self.name, placement.place.address, self._sessions)

    async def begin_anew(self) -> None:
        """After its server was killed: berths and a server as an operator would start them; clients dial again."""
        result = self._stage.result
        await self._world.see_to_berths(self.name)
        self.generation += 1
        if wrong := await tidy(self._world, self.name, ids=self._ids, patience=TIDY_SECONDS):
            self._stage.wrong("after a new start: " + "; ".join(wrong), service=self.name)
            await self._clear_away()
        for account in await self._stage.crowd.leave(self.name):
            result.sessions_ended_with_their_server += 1
            result.handshakes += account.handshakes
            result.echoes_sent += account.sent
            result.echoes_unanswered += account.sent - account.echoed
        await self.dial()

    async def _clear_away(self) -> None:
        """Nothing of it stays, so that what was wrong is not found again and again."""
        for berth in self._world.of(self.name):
            await self._world.remove_berth(berth.name)
        with contextlib.suppress(*TROUBLES):
            for lock in await self._world.registry.locks():
                if lock.id.startswith(self._ids):
                    await self._world.cancel(lock.id)
                    await self._world.ended(lock.id)
        for folder in self._world.images.glob(f"{self._ids}*"):
            shutil.rmtree(folder, ignore_errors=True)
        for berth in self._world.of(self.name):
            await self._world.start_berth(berth.name, with_server=False)
        await self._world.see_to_berths(self.name)

    @property
    def _ids(self) -> str:
        """What its migrations' ids begin with."""
        return f"{self.name}-"

    def session_ended(self, why: str) -> None:
        """One that nobody closed."""
        if not self.dying and not self._broken:
            self._stage.wrong(f"a session ended: {why}", service=self.name)
            self._broken = True

    def hear(self, accounts: Sequence[Account]) -> None:
        """In a calm, what its sessions have to say."""
        home = self._world.home(self.name)
        peer = f"{self._world.berths[home].ip}:{PORT}" if home else "nowhere"
        wrong = []
        for account in accounts:
            if account.echoed != account.sent:
                wrong.append(f"{account.session}: {account.sent - account.echoed} echoes did not come")
            if account.handshakes != 1:
                wrong.append(f"{account.session}: {account.handshakes} handshakes")
            if account.peer != peer:
                wrong.append(f"{account.session}: sends to {account.peer}, the server is at {peer}")
        if wrong and not self._broken:
            self._stage.wrong("; ".join(wrong), service=self.name)
            self._broken = True

    # Moves.

    async def run(self) -> None:
        """For ever."""
        while True:
            await self._stage.wait(self._random, self._pause)
            async with self._stage.at_work(), self.lock:
                try:
                    await (self._repair() if self._broken else self._something())
                except TROUBLES as error:
                    if not self.dying:
                        await self._after_trouble(error)

    async def _after_trouble(self, error: Exception) -> None:
        self._stage.wrong(f"{type(error).__name__}: {error}", service=self.name)
        with contextlib.suppress(*TROUBLES):  # then it is tried again after the next one
            await self._repair()

    async def look(self) -> None:
        """In a calm: nothing is left of any migration, and the coordinator knows where the server is."""
        wrong = await tidy(self._world, self.name, ids=self._ids, patience=TIDY_SECONDS)
        if not wrong:
            try:
                placement = await self._world.serves(self.name)
                if placement.epoch != self._epoch:
                    wrong.append(f"epoch {placement.epoch}, not {self._epoch}")
            except TimeoutError:
                wrong.append("its server does not answer on NATS, or the coordinator does not know where it is")
        if wrong and not self._broken:
            self._stage.wrong(f"in the calm: {'; '.join(wrong)}", service=self.name)
            self._broken = True

    async def _repair(self) -> None:
        self._broken = True
        await self._clear_away()
        await self.begin_anew()
        self._broken = False

    async def _something(self) -> None:
        if self._random.random() < BAD:
            await self._ask_badly()
        else:
            await self._move()

    async def _move(self) -> None:
        self._number += 1
        move = Move(id=f"{self._ids}{self._number}", service=self.name, began=self._stage.now())
        self._stage.result.moves.append(move)
        home, mortal = self._world.home(self.name), self.dying
        others = [berth.name for berth in self._world.of(self.name) if berth.name != home]
        to = self._random.choice([None, self._random.choice(others)])
        cancel_after = self._random.uniform(0, CANCEL_WITHIN) if self._random.random() < CANCELLED else None
        hurried = self._random.random() < HURRIED
        request = MigrateRequest(service=self.name, id=move.id, to=to, options=OPTIONS)
        try:
            await self._world.ask(request, patience=ASK_SECONDS)
        except FerryError as error:
            move.code = error.code
        if move.code and not await insist(lambda: self._world.events(move.id)):
            move.outcome, move.ended = "refused", self._stage.now()
            if move.code not in REFUSALS and not (mortal or self.dying):
                self._stage.wrong(f"refused: {move.code}", service=self.name, migration=move.id)
            return
        cancelling = asyncio.create_task(self._cancel(move, cancel_after))
        try:
            events = await self._world.ended(move.id)
        finally:
            cancelling.cancel()
            await asyncio.gather(cancelling, return_exceptions=True)
        move.ended = self._stage.now()
        move.outcome, _, move.code = outcome(events).partition(": ")
        wrong = log_is_sound(events)
        if not (mortal or self.dying):
            wrong += await self._after(home, events, hurried=hurried)
        if wrong:
            self._broken = not self.dying
            self._stage.wrong("; ".join(wrong), service=self.name, migration=move.id)

    async def _cancel(self, move: Move, after: float | None) -> None:
        if after is not None:
            await asyncio.sleep(after)
            move.cancelled = True
            await self._world.cancel(move.id)

    async def _after(self, home: str, events: list[ev.AnyEvent], *, hurried: bool) -> list[str]:
        """What is not as the log says."""
        requested = events[0]
        assert isinstance(requested, ev.Requested)
        committed = any(isinstance(event, ev.Committed) for event in events)
        completed = any(isinstance(event, ev.Completed) for event in events)
        wrong = []
        if requested.epoch != self._epoch + 1:
            wrong.append(f"epoch {requested.epoch} after {self._epoch}")
        if home and requested.source.berth != home:
            wrong.append(f"from {requested.source.berth}, but the server was in {home}")
        if committed != completed:
            wrong.append("committed, not completed")
        self._epoch = requested.epoch if committed else self._epoch
        if hurried:
            return wrong
        left = await tidy(self._world, self.name, ids=self._ids, patience=TIDY_SECONDS)
        placed = await self._placed()
        if self.dying:
            return wrong
        place = requested.target if committed else requested.source
        if not left and self._world.home(self.name) != place.berth:
            wrong.append(f"the server is in {self._world.home(self.name)}, not in {place.berth}")
        if placed != self._epoch:
            wrong.append(f"the placement's epoch is {placed}, not {self._epoch}")
        return wrong + left

    async def _placed(self) -> int:
        """The placement's epoch; it is written, and tried again, once the log has the move's end."""
        end = self._stage.now() + TIDY_SECONDS
        while True:
            placed: Placement | None = (await insist(lambda: self._world.registry.placement(self.name))).placement
            epoch = placed.epoch if placed else 0
            if epoch == self._epoch or self.dying or self._stage.now() > end:
                return epoch
            await asyncio.sleep(LOOK)

    # Requests that must be refused.

    async def _ask_badly(self) -> None:
        name, message, expected = self._bad_request()
        try:
            if isinstance(message, CancelRequest):
                await self._world.bus.request(subjects.CANCEL, message, CancelReply, timeout=3)
            else:
                await self._world.bus.request(subjects.MIGRATE, message, MigrateReply, timeout=3)
        except FerryError as error:
            if error.code == expected:
                self._stage.result.bad_requests += 1
            elif error.code not in TRANSIENT and not self.dying:
                self._stage.wrong(f"{name}: {error.code} instead of {expected}", service=self.name)
        else:
            self._stage.wrong(f"{name} was accepted", service=self.name)

    def _bad_request(self) -> tuple[str, msgspec.Struct, str]:
        """What it is, the request, and the code that it must get."""
        name, ended = self.name, [move for move in self._stage.result.moves if move.outcome == "completed"]
        choices: list[tuple[str, msgspec.Struct, str]] = [
            ("a request of no form", Nonsense(), "bad_request"),
            ("a move of nobody", MigrateRequest(service="nobody"), "unknown_service"),
            ("a move to nowhere", MigrateRequest(service=name, to="nowhere"), "unknown_berth"),
            ("a cancel of nothing", CancelRequest(id="nothing"), "unknown_migration"),
        ]
        if home := self._world.home(name):
            choices.append(("a move to where it is", MigrateRequest(service=name, to=home), "same_berth"))
        if others := [move.id for move in ended if move.service != name]:
            choices.append(("an id of another", MigrateRequest(service=name, id=others[-1]), "id_in_use"))
        if ended:
            choices.append(("a cancel of what is over", CancelRequest(id=ended[-1].id), "too_late"))
        return self._random.choice(choices)


class Nonsense(msgspec.Struct):
    """A request of no form that anybody knows."""

    service: int = 7

"""The driver's patience: how often it asks again, for as long as somebody has to be waited for."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

import pytest

from quicferry.bus.log import Entry
from quicferry.migration.commands import CallAgent
from quicferry.protocol import events as ev
from quicferry.protocol.agents import Accepted
from quicferry.protocol.errors import FerryError
from services.coordinator.book import Book
from services.coordinator.driver import CALL_SECONDS, Driver
from tests.unit.skipping import run
from tests.unit.test_machine import COMMITTED, DUMPED, FAILURES, request

HOUR = 3600.0


class Nobody:
    """A bus on which nobody answers until ``back``, in seconds; and the log, of which it keeps what was written."""

    def __init__(self, back: float) -> None:
        self.back = back
        self.asked: list[float] = []
        self.written: list[ev.AnyEvent] = []

    async def ready(self) -> None:
        pass

    async def request(self, *_: Any, **__: Any) -> Accepted:
        now = asyncio.get_running_loop().time()
        self.asked.append(now)
        if now < self.back:
            raise FerryError("no_answer", "Nobody listens.")
        return Accepted(id="m1")

    async def append(self, event: ev.AnyEvent) -> None:
        self.written.append(event)


@pytest.mark.parametrize(
    ("events", "command"),
    [
        (COMMITTED, CallAgent(agent="restore", verb="resume")),
        ((*DUMPED, FAILURES[0]), CallAgent(agent="checkpoint", verb="abort")),
    ],
)
def test_an_agent_that_is_away_for_an_hour_is_used_within_a_second(
    events: tuple[ev.AnyEvent, ...], command: CallAgent
) -> None:
    nobody, book = Nobody(back=HOUR), Book()
    for seq, event in enumerate((request(), *events), start=1):
        taken = book.take(Entry(seq, event))
    assert taken is not None
    driver = Driver(nobody, nobody, None, book, None, permit=lambda: None)  # type: ignore[arg-type]
    run(driver._call_agent(taken.state, command))
    assert HOUR <= nobody.asked[-1] < HOUR + 1
    gaps = [later - earlier for earlier, later in pairwise(nobody.asked)]
    assert max(gaps) < 1.01
    assert max(later - earlier for earlier, later in pairwise(nobody.asked) if later < CALL_SECONDS) < 0.21
    assert len(nobody.asked) < HOUR * 1.02, "it asks as often as at first"
    assert [ev.kind(event) for event in nobody.written] == ["coordinator.call_failed"]

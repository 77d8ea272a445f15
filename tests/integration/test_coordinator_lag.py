"""The log has replicas, and the one that is read lags behind the one that was written."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import pytest

from quicferry.bus import consumer
from quicferry.bus.log import Entry, EventLog
from quicferry.bus.registry import Registry
from quicferry.protocol import events as ev
from quicferry.protocol.api import MigrateRequest
from quicferry.protocol.errors import FerryError
from services.coordinator import follower as follower_module
from services.coordinator.book import Book, Taken
from services.coordinator.follower import Follower
from services.coordinator.intake import Intake
from tests.integration.scripted import LIMIT, Node
from tests.unit.test_machine import ARRIVED, BASE, request

MOVE: tuple[ev.AnyEvent, ...] = (request(), *ARRIVED, ev.Completed(**BASE, arrived=1))


class Lagging:
    """In place of the consumer's replay: the first ``times`` see the log's first entries only."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
        self.left = times
        self._real = consumer.replay
        monkeypatch.setattr(consumer, "replay", self)

    async def __call__(self, *args: Any, **options: Any) -> AsyncGenerator[consumer.Message, None]:
        lags, self.left = self.left > 0, self.left - 1
        async for message in self._real(*args, **options):
            if lags and message.seq > 3:
                return
            yield message


@contextlib.asynccontextmanager
async def following(event_log: EventLog, book: Book) -> AsyncIterator[asyncio.Queue[Taken]]:
    """What comes once the past is in the book."""
    follower, came = Follower(event_log, book), asyncio.Queue[Taken]()
    follower.actor = came.put_nowait
    running = asyncio.create_task(follower.run())
    try:
        async with asyncio.timeout(LIMIT):
            await follower.ready.wait()
            yield came
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running


async def test_the_past_is_read_to_its_end(event_log: EventLog, monkeypatch: pytest.MonkeyPatch) -> None:
    for event in MOVE:
        await event_log.append(event)
    Lagging(monkeypatch, times=2)
    book = Book()
    async with following(event_log, book) as came:
        status = book.status("m1")
        assert status is not None
        assert status.outcome == "completed"
        assert came.empty()


async def test_what_lags_for_long_comes_later(event_log: EventLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passed over, it would be missing for good, and with it what was decided."""
    for event in MOVE:
        await event_log.append(event)
    monkeypatch.setattr(follower_module, "LAG_TRIES", 2, raising=False)
    Lagging(monkeypatch, times=2)
    async with following(event_log, Book()) as came:
        for seq in range(4, len(MOVE) + 1):
            assert (await came.get()).entry.seq == seq


async def test_a_purged_log_is_read_at_once(event_log: EventLog, monkeypatch: pytest.MonkeyPatch) -> None:
    await event_log.append(MOVE[0])
    await event_log._bus.js.purge_stream("quicferry_log")
    monkeypatch.setattr(follower_module, "AGAIN", 3600.0)
    book = Book()
    async with following(event_log, book) as came:
        await book.reached(await event_log.append(MOVE[1]))
        assert came.empty()  # it belongs to no migration any more


async def test_a_lock_is_not_taken_from_a_migration_that_is_not_read_yet(
    event_log: EventLog, registry: Registry, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.coordinator.intake.CAUGHT_UP_SECONDS", 0.01)
    await event_log.append(MOVE[0])
    assert await registry.lock("echo", "m1")

    async def lagging(log: EventLog, migration: str) -> list[Entry]:
        return []

    monkeypatch.setattr(EventLog, "read", lagging)
    with pytest.raises(FerryError) as caught:
        await Intake(event_log, registry, Book(), "x").migrate(MigrateRequest(service="echo", id="m1"))
    assert caught.value.code == "log_conflict"
    holder = await registry.lock_holder("echo")
    assert holder is not None
    assert holder.id == "m1"

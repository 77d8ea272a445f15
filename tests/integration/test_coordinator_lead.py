"""Two coordinators, each a process of its own: one acts, the other takes over, whatever happens to the first."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from quicferry.bus.connection import Bus
from quicferry.bus.lead import Claim, LeadLock
from quicferry.bus.log import EventLog
from quicferry.bus.registry import Registry
from quicferry.cli.session import ask
from quicferry.migration.replay import replay
from quicferry.protocol import events as ev
from quicferry.protocol import subjects
from quicferry.protocol.api import MigrateReply, MigrateRequest, StatusReply, StatusRequest
from quicferry.protocol.errors import FerryError
from tests.conftest import NatsServer
from tests.integration.scripted import LIMIT, Node
from tests.integration.test_cli import Command
from tests.integration.test_coordinator import BACK, HAPPY, decisions, ended, migrate, seen, unlocked
from tests.integration.test_coordinator_process import PATIENT, Process, process

NUMBERS = itertools.count(1)
SAID_SECONDS = 5.0
"""For a log line about what is known to have happened."""


@pytest_asyncio.fixture
async def pair(nats_server: NatsServer, node: Node) -> AsyncIterator[tuple[Process, Process]]:
    """The one that leads, and the one that stands by."""
    async with (
        process(nats_server, QUICFERRY_LOG_LEVEL="debug") as first,
        process(nats_server, says="standing_by", QUICFERRY_LOG_LEVEL="debug") as second,
    ):
        await node.report()  # again: two processes take their time to start
        yield first, second


async def name(coordinator: Process, event: str = "leading") -> str:
    found = re.search(r"name=(\S+)", await coordinator.says(event))
    assert found
    return found[1]


async def leader(bus: Bus) -> str | None:
    return (await ask(bus, subjects.STATUS, StatusRequest(), StatusReply)).leader


async def move(bus: Bus, event_log: EventLog, node: Node, leader: Process) -> None:
    """A whole move, each step asked for once."""
    await node.report()  # again: it may be long ago
    lapses, migration = Lapses(leader), f"m{next(NUMBERS)}"
    try:
        await migrate(bus, id=migration)
    except FerryError as error:
        if error.code not in ("not_leading", "no_answer") or not await lapses.any():
            raise
        await ask(bus, subjects.MIGRATE, MigrateRequest(service="echo", id=migration), MigrateReply)
    assert decisions(await ended(event_log, migration)) == HAPPY
    await once(node, migration, lapses)


async def move_when_led(bus: Bus, event_log: EventLog, node: Node, pair: tuple[Process, Process]) -> None:
    """The same, asked for until one of the two leads."""
    await node.report()
    lapses = Lapses(*pair)
    await ask(bus, subjects.MIGRATE, MigrateRequest(service="echo", id="led"), MigrateReply)
    assert decisions(await ended(event_log, "led")) == HAPPY
    await once(node, "led", lapses)


async def once(node: Node, migration: str, lapses: Lapses) -> None:
    """Each step was asked for once; again only after a lapse."""
    if {count for key, count in node.calls.items() if key[0] == migration} != {1}:
        assert await lapses.any(), node.calls


class Lapses:
    """Leases that run out from now on, as those who lead say: over a pause of the machine that is right."""

    def __init__(self, *leaders: Process) -> None:
        self._leaders = leaders
        self._before = self._count()

    def _count(self) -> int:
        return sum(len(leader.said("lead_lapsed")) for leader in self._leaders)

    async def any(self) -> bool:
        """Whether there was one; its line may be on its way."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SAID_SECONDS):
                while self._count() == self._before:  # noqa: ASYNC110 - either's will do
                    await asyncio.sleep(0.01)
        return self._count() > self._before


async def test_one_acts(bus: Bus, event_log: EventLog, node: Node, pair: tuple[Process, Process]) -> None:
    first, second = pair
    for _ in range(3):
        await move(bus, event_log, node, first)
    assert await leader(bus) == await name(first)
    assert f"leader={await name(first)}" in await second.says("standing_by")


@pytest.mark.parametrize(
    "step",
    [
        "checkpoint.prepare",
        "server.arm",
        "checkpoint.dump",
        "restore.restore",
        "restore.resume",
        "checkpoint.release",
    ],
)
async def test_the_leader_is_killed_in_a_move(
    bus: Bus, event_log: EventLog, registry: Registry, node: Node, pair: tuple[Process, Process], step: str
) -> None:
    first, second = pair
    node.before[step] = first.kill
    reply = await migrate(bus)
    history = await ended(event_log, reply.id)
    assert decisions(history) == HAPPY
    assert [step.differs for step in replay(history) if step.differs] == []
    await second.says("lead_expired")
    await unlocked(registry)
    assert {count for key, count in node.done.items() if key[1] != "server.arm"} == {1}
    await move(bus, event_log, node, second)
    assert await leader(bus) == await name(second)


async def test_the_leader_is_killed_on_the_way_back(
    bus: Bus, event_log: EventLog, node: Node, pair: tuple[Process, Process]
) -> None:
    node.behave["restore.restore"] = "fail"
    node.before["checkpoint.abort"] = pair[0].kill
    reply = await migrate(bus)
    assert decisions(await ended(event_log, reply.id)) == BACK


async def test_the_leader_is_stopped_and_the_standby_leads_at_once(
    bus: Bus, event_log: EventLog, node: Node, nats_server: NatsServer
) -> None:
    async with process(nats_server, code=PATIENT) as first, process(nats_server, says="standing_by") as second:
        await node.report()
        node.behave["checkpoint.dump"] = "silent"
        reply = await migrate(bus)
        await seen(event_log, reply.id, lambda event: isinstance(event, ev.Armed))
        assert await first.stop() == 0
        await first.says("lead_given_up")
        node.recover()
        assert decisions(await ended(event_log, reply.id)) == HAPPY
        await second.says("ready")
        assert not second.said("lead_expired")  # it did not wait for the lease to run out


@pytest.mark.parametrize("step", ["server.arm", "checkpoint.dump", "restore.restore", "restore.resume"])
async def test_a_leader_that_was_asleep_does_not_act(
    bus: Bus, event_log: EventLog, node: Node, pair: tuple[Process, Process], step: str
) -> None:
    """It wakes with entries, requests and timers waiting for it, all of them the new leader's by now."""
    first, second = pair

    async def sleep() -> None:
        first.pause()

    node.before[step] = sleep
    reply = await migrate(bus)
    assert decisions(await ended(event_log, reply.id)) == HAPPY
    await second.says("ready")
    # Both get these two requests; one is asleep.
    await move(bus, event_log, node, second)
    assert await leader(bus) == await name(second)
    calls_before, log_before = node.calls.copy(), await event_log.last_seq()
    first.resume()
    await first.says("request_passed_over")
    assert f"leader={await name(second)}" in await first.says("standing_by")
    assert node.calls == calls_before
    assert await event_log.last_seq() == log_before
    await move(bus, event_log, node, second)
    assert await leader(bus) == await name(second)


async def test_who_was_asleep_takes_over_again(
    bus: Bus, event_log: EventLog, node: Node, pair: tuple[Process, Process]
) -> None:
    first, second = pair
    first.pause()
    await second.says("ready")
    first.resume()
    await first.says("standing_by")
    await node.report()
    node.before["restore.restore"] = second.kill
    reply = await migrate(bus)
    assert decisions(await ended(event_log, reply.id)) == HAPPY
    await first.says("lead_expired")
    assert await leader(bus) == await name(first)


async def test_nats_is_restarted_under_both(
    bus: Bus, event_log: EventLog, node: Node, nats_server: NatsServer, pair: tuple[Process, Process]
) -> None:
    for step in ("checkpoint.dump", "restore.resume"):
        node.before[step] = nats_server.restart
        reply = await migrate(bus)
        history = await ended(event_log, reply.id)
        assert decisions(history)[-1] in ("decision.completed", "decision.rolled_back")
        assert [step.differs for step in replay(history) if step.differs] == []
    await move_when_led(bus, event_log, node, pair)
    assert [coordinator.status for coordinator in pair] == [None, None]


async def test_nats_is_away_for_longer_than_a_lease(
    bus: Bus, event_log: EventLog, node: Node, nats_server: NatsServer, pair: tuple[Process, Process]
) -> None:
    first, second = pair
    node.behave["checkpoint.dump"] = "silent"
    reply = await migrate(bus)
    await seen(event_log, reply.id, lambda event: isinstance(event, ev.Armed))
    nats_server.stop()
    await first.says("lead_lapsed")
    node.behave.clear()
    await nats_server.start()
    assert decisions(await ended(event_log, reply.id)) == HAPPY
    await move_when_led(bus, event_log, node, pair)
    assert await leader(bus) in (await name(first), await name(second, "standing_by"))
    assert (first.status, second.status) == (None, None)


async def test_a_stranger_takes_the_record(
    bus: Bus, event_log: EventLog, node: Node, pair: tuple[Process, Process]
) -> None:
    """The lead is over; once the stranger's lease has run out, one of the two leads again."""
    lock = await LeadLock.open(bus)
    stranger = Claim(holder="stranger", lease_ms=1)
    async with asyncio.timeout(LIMIT):
        while True:
            with contextlib.suppress(FerryError):  # renewed in between
                await lock.write(stranger, (await lock.read()).revision)
                break
    await pair[0].says("lead_taken", "lead_lapsed")  # this if it stood still meanwhile
    await move_when_led(bus, event_log, node, pair)
    assert [coordinator.status for coordinator in pair] == [None, None]


async def test_a_move_asked_for_while_none_leads(
    bus: Bus, event_log: EventLog, node: Node, nats_server: NatsServer, tmp_path: Path
) -> None:
    """The command asks until somebody does."""
    async with process(nats_server) as first:
        await first.kill()
    command = Command(nats_server.url, tmp_path)
    async with process(nats_server, says="standing_by"):  # until the lease of the first has run out
        await node.report()
        done = await command("migrate", "echo", "--id", "m1", "--json")
    assert done.code == 0, done
    assert done.result["outcome"] == "completed"
    assert decisions([entry.event for entry in await event_log.read("m1")]) == HAPPY

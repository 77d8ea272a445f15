"""The event log: order, repeats, conflicts, and readers that outlive the server."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from quicferry.bus.connection import Bus
from quicferry.bus.log import Entry, EventLog
from quicferry.bus.settings import NatsSettings
from quicferry.protocol import events as ev
from quicferry.protocol import subjects
from quicferry.protocol.errors import ErrorBody, FerryError
from tests.conftest import NatsServer


def timed_out(number: int, migration: str = "m1") -> ev.TimedOut:
    return ev.TimedOut(id=migration, at_ms=number, phase="preparing", attempt=number)


async def test_the_stream_is_made_once_by_many(bus: Bus) -> None:
    await asyncio.gather(*(EventLog.open(bus) for _ in range(8)))
    info = await bus.js.stream_info(subjects.LOG_STREAM)
    assert info.config.subjects == [subjects.LOG_ALL]
    assert info.config.max_bytes == 256 * 1024 * 1024
    assert str(info.config.storage) == "file"


async def test_append_and_read_back(event_log: EventLog) -> None:
    assert await event_log.last_seq() == 0
    assert await event_log.read("m1") == []
    seqs = [await event_log.append(timed_out(n)) for n in range(1, 6)]
    await event_log.append(timed_out(1, "m2"))
    found = [(entry.seq, entry.event) for entry in await event_log.read("m1")]
    assert found == [(seq, timed_out(n)) for n, seq in enumerate(seqs, 1)]
    assert await event_log.last_seq() == 6
    assert [entry.event.id async for entry in event_log.replay()] == ["m1"] * 5 + ["m2"]


async def test_more_than_a_batch_is_read_in_order(event_log: EventLog) -> None:
    async with asyncio.TaskGroup() as group:
        for number in range(1, 701):
            group.create_task(event_log.append(timed_out(number)))
    entries = await event_log.read("m1")
    assert [entry.seq for entry in entries] == list(range(1, 701))
    assert {entry.event for entry in entries} == {timed_out(number) for number in range(1, 701)}


async def test_the_same_event_twice_is_one_entry(event_log: EventLog) -> None:
    first = await event_log.append(timed_out(1))
    assert await event_log.append(timed_out(1)) == first
    assert await event_log.last_seq() == first


async def test_a_decision_is_written_by_one(event_log: EventLog) -> None:
    mine = ev.Prepared(id="m1", at_ms=1)
    seq = await event_log.decide(mine, after=0)
    assert await event_log.decide(mine, after=0) == seq  # repeated after a lost answer
    with pytest.raises(FerryError) as caught:
        await event_log.decide(ev.Prepared(id="m1", at_ms=2), after=0)  # another coordinator's
    assert caught.value.code == "log_conflict"
    cancelled = ErrorBody(code="cancelled", message="x")
    with pytest.raises(FerryError) as caught:
        await event_log.decide(ev.RolledBack(id="m1", at_ms=2, reason=cancelled), after=0)
    assert caught.value.code == "log_conflict"
    await event_log.append(timed_out(1))  # what was seen does not count
    assert await event_log.decide(ev.Committed(id="m1", at_ms=3), after=seq) > seq
    await event_log.decide(ev.Prepared(id="m2", at_ms=1), after=0)  # nor do other migrations


async def test_the_newest_decision(bus: Bus, event_log: EventLog) -> None:
    assert await event_log.newest_decision("m1") is None
    seq = await event_log.decide(ev.Prepared(id="m1", at_ms=1), after=0)
    await event_log.append(timed_out(1))
    await event_log.decide(ev.Committed(id="m2", at_ms=1), after=0)
    assert await event_log.newest_decision("m1") == ev.Prepared(id="m1", at_ms=1)
    await event_log.decide(ev.Committed(id="m1", at_ms=2), after=seq)
    assert await event_log.newest_decision("m1") == ev.Committed(id="m1", at_ms=2)
    for unreadable in (b"", b'{"kind":"decision.of_tomorrow","id":"m1","at_ms":3}'):
        await bus.js.publish(subjects.decision("m1"), unreadable)
        with pytest.raises(FerryError) as caught:
            await event_log.newest_decision("m1")
        assert caught.value.code == "log_unreadable"


async def test_two_race_for_a_decision(event_log: EventLog) -> None:
    reason = ErrorBody(code="cancelled", message="x")
    results = await asyncio.gather(
        event_log.decide(ev.Committed(id="m1", at_ms=1), after=0),
        event_log.decide(ev.RolledBack(id="m1", at_ms=1, reason=reason), after=0),
        return_exceptions=True,
    )
    assert sorted(type(result) for result in results if not isinstance(result, int)) == [FerryError]
    assert len(await event_log.read("m1")) == 1


async def collect(log: EventLog, count: int, into: list[Entry], started: asyncio.Event, **options: int) -> None:
    async with contextlib.aclosing(log.follow(**options)) as entries:  # type: ignore[arg-type]
        async for entry in entries:
            into.append(entry)
            started.set()
            if len(into) == count:
                return


async def test_follow_starts_in_the_past_and_goes_on(event_log: EventLog) -> None:
    for number in range(1, 4):
        await event_log.append(timed_out(number))
    got: list[Entry] = []
    started = asyncio.Event()
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        group.create_task(collect(event_log, 5, got, started, from_seq=2))
        await started.wait()
        for number in range(4, 7):
            await event_log.append(timed_out(number))
    assert [entry.event for entry in got] == [timed_out(number) for number in range(2, 7)]


async def test_follow_and_append_outlive_restarts_of_the_server(nats_server: NatsServer, event_log: EventLog) -> None:
    got: list[Entry] = []
    started = asyncio.Event()
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        group.create_task(collect(event_log, 60, got, started))
        number = 0
        for _ in range(3):
            for _ in range(10):
                number += 1
                await event_log.append(timed_out(number))
            await started.wait()
            nats_server.stop()
            restart = group.create_task(nats_server.start())
            for _ in range(10):  # written while the server is away
                number += 1
                await event_log.append(timed_out(number))
            await restart
    assert [entry.event for entry in got] == [timed_out(n) for n in range(1, 61)]
    assert [entry.seq for entry in got] == sorted({entry.seq for entry in got})


async def test_unreadable_and_misplaced_entries_are_passed_over(bus: Bus, event_log: EventLog) -> None:
    for subject, payload in (
        ("quicferry.log.m1.server.ack", b"\xff\xfe not json"),
        ("quicferry.log.m1.server.ack", b'{"kind":"server.ack","id":"m1"}'),
        ("quicferry.log.m1.server.ack", b'{"kind":"decision.committed","id":"m1","at_ms":1}'),
        ("quicferry.log.m1.decision", b'{"kind":"decision.committed","id":"m2","at_ms":1}'),
        ("quicferry.log.m1", b"{}"),
        ("quicferry.log.m1.server.ack", b""),
        ("quicferry.log.m1.new.thing", b'{"kind":"new.thing","id":"m1","at_ms":1}'),
    ):
        await bus.js.publish(subject, payload)
    await bus.js.publish("quicferry.log.m1.server.ack", b"x", headers={"Status": "409", "Description": "gone"})
    await event_log.append(timed_out(1))
    assert [entry.event for entry in await event_log.read("m1")] == [timed_out(1)]


async def test_follow_ends_when_the_log_is_another(bus: Bus, event_log: EventLog) -> None:
    await event_log.append(timed_out(1))
    async with contextlib.aclosing(event_log.follow()) as entries:
        assert (await anext(entries)).event == timed_out(1)
        await bus.js.delete_stream(subjects.LOG_STREAM)
        with pytest.raises(FerryError) as caught:
            async with asyncio.timeout(10):
                await anext(entries)
    assert caught.value.code == "nats_unreachable"


async def test_a_slow_reader_misses_nothing(nats_server: NatsServer, event_log: EventLog) -> None:
    settings = NatsSettings.load(nats_server.url)
    async with Bus.connect("slow", settings, wait=True) as other, asyncio.timeout(30):
        slow = await EventLog.open(other)
        async with contextlib.aclosing(slow.follow()) as entries:
            reading = asyncio.ensure_future(anext(entries))
            await event_log.append(timed_out(1))
            got = [await reading]
            for first in range(2, 1002, 100):  # several batches while nobody reads
                await asyncio.gather(*(event_log.append(timed_out(n)) for n in range(first, first + 100)))
            got += [await anext(entries) for _ in range(1000)]
    assert [entry.seq for entry in got] == list(range(1, 1002))

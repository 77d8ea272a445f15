"""The coordinator over a real nats-server, with agents that follow a script."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping

import pytest
import structlog
from msgspec.structs import replace

from quicferry.bus.connection import Bus
from quicferry.bus.log import EventLog
from quicferry.bus.registry import Registry
from quicferry.migration.replay import replay
from quicferry.protocol import events as ev
from quicferry.protocol import subjects
from quicferry.protocol.api import (
    CancelReply,
    CancelRequest,
    MigrateReply,
    MigrateRequest,
    Options,
    ServicesReply,
    ServicesRequest,
    StatusReply,
    StatusRequest,
)
from quicferry.protocol.errors import FerryError
from services.coordinator.leadership import Leadership
from services.coordinator.lease import LEASE, Tenure
from tests.conftest import NatsServer
from tests.integration.scripted import LIMIT, Behaviour, Node, berth, coordinating, now_ms
from tests.integration.test_bus_endpoints import BAD_MESSAGES

QUICK = Options(phase_timeout_ms=1_000, settle_timeout_ms=1_000, ack_timeout_ms=0, quiesce_timeout_ms=0)
HAPPY = ["decision.requested", "decision.prepared", "decision.committed", "decision.completed"]
BACK = ["decision.requested", "decision.prepared", "decision.rolled_back"]


async def migrate(bus: Bus, **fields: object) -> MigrateReply:
    request = MigrateRequest(service="echo", **fields)  # type: ignore[arg-type]
    return await bus.request(subjects.MIGRATE, request, MigrateReply, timeout=5)


async def seen(log: EventLog, migration: str, until: Callable[[ev.AnyEvent], bool]) -> list[ev.AnyEvent]:
    """The history of a migration up to an event."""
    history: list[ev.AnyEvent] = []
    async with asyncio.timeout(LIMIT), contextlib.aclosing(log.follow(migration=migration)) as entries:
        async for entry in entries:
            history.append(entry.event)
            if until(entry.event):
                break
    return history


async def ended(log: EventLog, migration: str) -> list[ev.AnyEvent]:
    """The whole history of a migration, once it has ended."""
    return await seen(log, migration, lambda event: isinstance(event, ev.Completed | ev.RolledBack | ev.Failed))


def decisions(history: list[ev.AnyEvent]) -> list[str]:
    return [ev.kind(event) for event in history if ev.kind(event).startswith("decision.")]


async def unlocked(registry: Registry) -> None:
    async with asyncio.timeout(LIMIT):
        while await registry.lock_holder("echo"):  # a bucket can only be asked, and asking takes its time
            pass


async def refused(call: Awaitable[object]) -> FerryError:
    with pytest.raises(FerryError) as caught:
        await call
    return caught.value


async def test_a_move_and_its_log(
    bus: Bus, event_log: EventLog, registry: Registry, node: Node, coordinator: None
) -> None:
    reply = await migrate(bus, id="m1")
    assert (reply.id, reply.source.berth, reply.target.berth, reply.epoch) == ("m1", "a", "b", 1)
    history = await ended(event_log, "m1")
    assert decisions(history) == HAPPY
    assert [step.differs for step in replay(history) if step.differs] == []
    assert all(count == 1 for count in node.calls.values()), node.calls
    last = history[-1]
    assert isinstance(last, ev.Completed)
    assert last.arrived == 2
    status = await bus.request(subjects.STATUS, StatusRequest(id="m1"), StatusReply, timeout=5)
    (told,) = status.migrations
    assert (told.outcome, told.acks, told.clients) == ("completed", 2, 2)
    await unlocked(registry)
    found = await bus.request(subjects.SERVICES, ServicesRequest(), ServicesReply, timeout=5)
    assert [(p.service, p.place.berth, p.epoch, p.migration) for p in found.services] == [("echo", "b", 1, "m1")]
    placement = (await registry.placement("echo")).placement
    assert placement is not None
    assert (placement.place.berth, placement.epoch) == ("b", 1)


async def test_a_decision_that_another_overtook_is_taken_while_it_is_wanted(
    bus: Bus, event_log: EventLog, node: Node, nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log refuses a decision made before one that it has; dropped, the migration would never end."""
    decide, refused_once = EventLog.decide, set[str]()

    async def decided(log: EventLog, event: ev.Decision, *, after: int) -> int:
        if isinstance(event, ev.Prepared | ev.Completed) and ev.kind(event) not in refused_once:
            refused_once.add(ev.kind(event))
            raise FerryError("log_conflict", "The log has another decision.")
        return await decide(log, event, after=after)

    monkeypatch.setattr(EventLog, "decide", decided)
    async with coordinating(nats_server):
        reply = await migrate(bus)
        assert decisions(await ended(event_log, reply.id)) == HAPPY
    assert refused_once == {"decision.prepared", "decision.completed"}


async def test_what_the_log_refuses_for_long_is_written_in_the_end(
    bus: Bus, event_log: EventLog, node: Node, nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that was full: whatever the migration waits for is written once it can be, by the one that leads."""
    refusals = Counter({"decision.prepared": 150, "coordinator.armed": 150, "coordinator.timeout": 150})
    real = EventLog._publish

    async def refusing(log: EventLog, event: ev.AnyEvent, headers: dict[str, str]) -> object:
        if refusals[ev.kind(event)]:
            refusals[ev.kind(event)] -= 1
            raise FerryError("nats_unreachable", "JetStream refused: insufficient storage resources available.")
        return await real(log, event, headers)

    monkeypatch.setattr(EventLog, "_publish", refusing)
    monkeypatch.setattr("services.coordinator.driver.FIRST_WAIT", 0.0)
    async with coordinating(nats_server):
        node.behave["restore.resume"] = "silent"
        reply = await migrate(bus, options=QUICK)
        await seen(event_log, reply.id, lambda event: isinstance(event, ev.TimedOut))
        node.recover()
        assert decisions(await ended(event_log, reply.id)) == HAPPY
    assert not +refusals


async def test_what_a_bucket_refused_is_written_by_the_next_leader(
    bus: Bus,
    event_log: EventLog,
    registry: Registry,
    node: Node,
    nats_server: NatsServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def refusing(*_: object) -> None:
        raise FerryError("nats_unreachable", "JetStream refused.")

    given_up: asyncio.Queue[str] = asyncio.Queue()

    def hear(logger: object, level: str, line: MutableMapping[str, object]) -> MutableMapping[str, object]:
        if line["event"] == "write_given_up":
            given_up.put_nowait(str(line["what"]))
        raise structlog.DropEvent

    structlog.configure(processors=[hear])
    with monkeypatch.context() as patched:
        patched.setattr("services.coordinator.driver.FIRST_WAIT", 0.0)
        patched.setattr(Registry, "place", refusing)
        patched.setattr(Registry, "unlock", refusing)
        async with coordinating(nats_server):
            assert decisions(await ended(event_log, (await migrate(bus)).id)) == HAPPY
            async with asyncio.timeout(LIMIT):
                assert {await given_up.get(), await given_up.get()} == {"place", "unlock"}
    assert (await registry.placement("echo")).placement is None
    assert await registry.lock_holder("echo")
    async with coordinating(nats_server):
        await unlocked(registry)
        async with asyncio.timeout(LIMIT):
            while (await registry.placement("echo")).placement is None:  # a bucket can only be asked
                pass


async def test_there_and_back_many_times(bus: Bus, event_log: EventLog, node: Node, coordinator: None) -> None:
    """At once after each end, when the berths' reports may still be those from before it."""
    for epoch in range(1, 11):
        reply = await migrate(bus)
        assert reply.epoch == epoch
        assert (reply.source.berth, reply.target.berth) == (("a", "b") if epoch % 2 else ("b", "a"))
        assert decisions(await ended(event_log, reply.id)) == HAPPY


async def test_garbage_in_the_log_delays_nobody(
    bus: Bus, event_log: EventLog, node: Node, nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks waits for what is in the log; what can't be read counts as read."""
    monkeypatch.setattr("services.coordinator.intake.CAUGHT_UP_SECONDS", 3600.0)
    await bus.js.publish("quicferry.log.x.server.ack", b"garbage before the start")
    async with coordinating(nats_server):
        await bus.request(subjects.STATUS, StatusRequest(), StatusReply, timeout=5)
        await bus.js.publish("quicferry.log.x.server.ack", b"garbage while it runs")
        await bus.request(subjects.STATUS, StatusRequest(), StatusReply, timeout=5)
        await bus.js.purge_stream(subjects.LOG_STREAM)
        await bus.request(subjects.STATUS, StatusRequest(), StatusReply, timeout=5)
    async with coordinating(nats_server):
        await bus.request(subjects.STATUS, StatusRequest(), StatusReply, timeout=5)
        assert decisions(await ended(event_log, (await migrate(bus)).id)) == HAPPY


async def test_stale_reports_do_not_mislead(
    bus: Bus, event_log: EventLog, registry: Registry, node: Node, coordinator: None
) -> None:
    before = now_ms()
    await ended(event_log, (await migrate(bus)).id)
    await registry.put_berth(berth("a", occupied=True, seen_ms=before))
    await registry.put_berth(berth("b", occupied=False, seen_ms=before))
    reply = await migrate(bus)
    assert (reply.source.berth, reply.target.berth) == ("b", "a")


@pytest.mark.parametrize("skew_ms", [-3_600_000, 3_600_000])
async def test_the_coordinators_clock_may_be_wrong(
    bus: Bus,
    event_log: EventLog,
    registry: Registry,
    node: Node,
    coordinator: None,
    monkeypatch: pytest.MonkeyPatch,
    skew_ms: int,
) -> None:
    """Neither how fresh a berth is nor what is older, a sighting or the log's verdict, is told by it."""
    for where in ("intake", "driver"):
        monkeypatch.setattr(f"services.coordinator.{where}.now_ms", lambda: now_ms() + skew_ms)
    before = now_ms()
    assert decisions(await ended(event_log, (await migrate(bus)).id)) == HAPPY
    await registry.put_berth(berth("a", occupied=True, seen_ms=before))
    await registry.put_berth(berth("b", occupied=False, seen_ms=before))
    reply = await migrate(bus)
    assert (reply.source.berth, reply.target.berth) == ("b", "a")
    await ended(event_log, reply.id)
    await node.report()
    found = await bus.request(subjects.SERVICES, ServicesRequest(), ServicesReply, timeout=5)
    assert [berth.occupied for berth in found.berths] == [True, False]


async def test_pre_copy_rounds(bus: Bus, event_log: EventLog, node: Node, coordinator: None) -> None:
    options = Options(pre_copy_rounds=3)
    reply = await migrate(bus, options=options)
    assert decisions(await ended(event_log, reply.id)) == HAPPY
    assert [node.done[reply.id, f"checkpoint.pre_dump.{n}"] for n in (1, 2, 3)] == [1, 1, 1]


@pytest.mark.parametrize("behaviour", ["fail", "refuse", "silent"])
@pytest.mark.parametrize("name", ["checkpoint.dump", "restore.restore", "server.arm", "checkpoint.pre_dump"])
async def test_a_failure_before_the_commit_leads_back(
    bus: Bus, event_log: EventLog, registry: Registry, node: Node, coordinator: None, name: str, behaviour: Behaviour
) -> None:
    if name == "server.arm":
        behaviour = {"fail": "refuse", "refuse": "refuse", "silent": "mute"}[behaviour]  # type: ignore[assignment]
    node.behave[name] = behaviour
    options = Options(ack_timeout_ms=0, quiesce_timeout_ms=0, pre_copy_rounds=1)
    if behaviour in ("silent", "mute"):
        options = replace(options, phase_timeout_ms=1_000)
    reply = await migrate(bus, options=options)
    history = await ended(event_log, reply.id)
    assert decisions(history) == BACK
    last = history[-1]
    assert isinstance(last, ev.RolledBack)
    assert last.reason.code == ("phase_timeout" if behaviour in ("silent", "mute") else "criu_failed")
    assert node.done[reply.id, "checkpoint.abort"] == 1
    assert node.done[reply.id, "restore.abort"] == 1
    assert node.done[reply.id, "restore.resume"] == 0
    assert [step.differs for step in replay(history) if step.differs] == []
    await unlocked(registry)
    node.recover()
    again = await migrate(bus)
    assert (again.source, again.epoch) == (reply.source, reply.epoch)
    assert decisions(await ended(event_log, again.id)) == HAPPY


@pytest.mark.parametrize("name", ["checkpoint.prepare", "restore.prepare"])
async def test_a_failed_preparation_ends_with_nothing_touched(
    bus: Bus, event_log: EventLog, node: Node, coordinator: None, name: str
) -> None:
    node.behave[name] = "fail"
    reply = await migrate(bus)
    history = await ended(event_log, reply.id)
    assert decisions(history) == ["decision.requested", "decision.failed"]
    assert node.calls[reply.id, "checkpoint.dump"] == 0
    assert node.calls[reply.id, "server.arm"] == 0


@pytest.mark.parametrize("behaviour", ["fail", "refuse", "silent", "mute"])
@pytest.mark.parametrize("name", ["restore.resume", "checkpoint.release"])
async def test_a_failure_after_the_commit_is_tried_again(
    bus: Bus, event_log: EventLog, node: Node, coordinator: None, name: str, behaviour: Behaviour
) -> None:
    node.behave[name] = behaviour
    reply = await migrate(bus, options=QUICK)
    await seen(event_log, reply.id, lambda event: isinstance(event, ev.TimedOut) and event.phase == "resuming")
    node.recover()
    assert decisions(await ended(event_log, reply.id)) == HAPPY
    assert node.done[reply.id, "restore.resume"] == 1


async def test_nobody_home_fails_within_its_limit(
    bus: Bus, nats_server: NatsServer, event_log: EventLog, registry: Registry
) -> None:
    """Berths in the bucket, and no agent behind them."""
    await registry.put_berth(berth("a", occupied=True))
    await registry.put_berth(berth("b", occupied=False))
    async with coordinating(nats_server):
        reply = await migrate(bus, options=Options(phase_timeout_ms=200))
        await bus.request(subjects.STATUS, StatusRequest(), StatusReply, timeout=5)  # it still answers
        history = await seen(event_log, reply.id, lambda event: isinstance(event, ev.TimedOut))
        last = history[-1]
        assert isinstance(last, ev.TimedOut)
        assert last.phase == "preparing"


async def test_cancel_before_the_commit(bus: Bus, event_log: EventLog, node: Node, coordinator: None) -> None:
    node.behave["restore.restore"] = "silent"
    reply = await migrate(bus)
    await seen(event_log, reply.id, lambda event: isinstance(event, ev.Dumped))
    answer = await bus.request(subjects.CANCEL, CancelRequest(id=reply.id), CancelReply, timeout=5)
    assert answer.phase in ("aborting", "rolled_back")
    history = await ended(event_log, reply.id)
    assert decisions(history) == BACK
    last = history[-1]
    assert isinstance(last, ev.RolledBack)
    assert last.reason.code == "cancelled"
    again = await bus.request(subjects.CANCEL, CancelRequest(id=reply.id), CancelReply, timeout=5)
    assert again.phase == "rolled_back"


async def test_cancel_after_the_commit_is_too_late(
    bus: Bus, event_log: EventLog, node: Node, coordinator: None
) -> None:
    node.behave["restore.resume"] = "silent"
    reply = await migrate(bus, options=QUICK)
    await seen(event_log, reply.id, lambda event: isinstance(event, ev.Committed))
    cancel = CancelRequest(id=reply.id)
    assert (await refused(bus.request(subjects.CANCEL, cancel, CancelReply, timeout=5))).code == "too_late"
    node.recover()
    assert decisions(await ended(event_log, reply.id)) == HAPPY
    assert (await refused(bus.request(subjects.CANCEL, cancel, CancelReply, timeout=5))).code == "too_late"


async def test_the_same_id_twice_is_one_migration(
    bus: Bus, event_log: EventLog, registry: Registry, node: Node, nats_server: NatsServer
) -> None:
    async with coordinating(nats_server, 2):
        replies = await asyncio.gather(*(migrate(bus, id="m1") for _ in range(10)))
        assert all(reply == replies[0] for reply in replies)
        history = await ended(event_log, "m1")
        assert decisions(history) == HAPPY
        assert await migrate(bus, id="m1") == replies[0]  # long after
        assert await migrate(bus, id="m1", to="b") == replies[0]
        error = await refused(migrate(bus, id="m1", to="a"))
        assert (error.code, error.path) == ("id_in_use", "$.id")
        other = MigrateRequest(service="other", id="m1")
        error = await refused(bus.request(subjects.MIGRATE, other, MigrateReply, timeout=5))
        assert error.code == "id_in_use"
        assert await event_log.read("m1") == await event_log.read("m1")
        assert decisions([entry.event for entry in await event_log.read("m1")]) == HAPPY
        await unlocked(registry)
        assert await registry.lock_holder("other") is None


async def no_lock_at_all(leadership: Leadership) -> None:
    """In place of winning the lead."""


async def never_over(leadership: Leadership) -> None:
    """In place of renewing it."""
    await asyncio.Event().wait()


async def test_two_coordinators_that_both_act_are_one(
    bus: Bus, event_log: EventLog, node: Node, nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last line of defence, with the lock out of order: what the log has decided can't be decided again."""
    monkeypatch.setattr(Leadership, "win", no_lock_at_all)
    monkeypatch.setattr(Leadership, "keep", never_over)
    monkeypatch.setattr(Tenure, "left", lambda tenure, now: LEASE)
    async with coordinating(nats_server, 2):
        for number in range(4):
            reply = await migrate(bus, id=f"m{number}")  # both answer; without an id, one would refuse
            assert decisions(await ended(event_log, reply.id)) == HAPPY
            assert {count for key, count in node.done.items() if key[0] == reply.id and "server" not in key[1]} == {1}
            assert max(count for key, count in node.calls.items() if key[0] == reply.id) > 1  # both did act
        node.behave["checkpoint.dump"] = "fail"
        reply = await migrate(bus, id="back")
        assert decisions(await ended(event_log, reply.id)) == BACK


async def test_a_lease_that_ran_out_unnoticed_stops_everything(
    bus: Bus, event_log: EventLog, node: Node, nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the lease's end and whoever notices it, what the log wants is not asked for, and nobody is answered."""
    left = [LEASE]
    monkeypatch.setattr(Leadership, "keep", never_over)
    monkeypatch.setattr(Tenure, "left", lambda tenure, now: left[0])
    async with coordinating(nats_server):
        first = await migrate(bus)
        asked = (await ended(event_log, first.id))[0]
        assert isinstance(asked, ev.Requested)
        said: asyncio.Queue[str] = asyncio.Queue()

        def hear(logger: object, level: str, line: MutableMapping[str, object]) -> MutableMapping[str, object]:
            said.put_nowait(str(line["event"]))
            raise structlog.DropEvent

        structlog.configure(processors=[hear])
        left[0] = 0.0
        await event_log.decide(replace(asked, id="late", source=asked.target, target=asked.source), after=0)
        await bus.nats.publish(subjects.MIGRATE, b'{"service":"echo","id":"later"}')
        due = Counter({"call_left": 2, "request_passed_over": 1})
        async with asyncio.timeout(LIMIT):
            while due:
                due -= Counter([await said.get()])
        assert [key for key in node.calls if key[0] != first.id] == []
        assert [entry.event.id for entry in await event_log.read("later")] == []


async def test_a_plain_publish_is_enough(bus: Bus, event_log: EventLog, node: Node, coordinator: None) -> None:
    await bus.nats.publish("quicferry.migrate", b'{"service":"echo"}')
    async with contextlib.aclosing(event_log.follow()) as entries:
        entry = await anext(entries)
    assert entry.event.id.startswith("echo-")
    assert decisions(await ended(event_log, entry.event.id)) == HAPPY


async def test_any_client_will_do(bus: Bus, event_log: EventLog, node: Node, coordinator: None) -> None:
    """What `nats req quicferry.migrate '{"service":"echo"}'` sends and shows."""
    request = b'{"service":"echo","to":"local/b","a field":"of tomorrow"}'
    answer = await bus.nats.request("quicferry.migrate", request, timeout=5)
    told = json.loads(answer.data)
    assert told["target"] == {"node": "local", "berth": "b", "address": {"host": "127.0.0.1", "port": 24242}}
    await ended(event_log, told["id"])


async def test_one_migration_of_a_service_at_a_time(
    bus: Bus, event_log: EventLog, node: Node, coordinator: None
) -> None:
    node.behave["restore.restore"] = "silent"
    reply = await migrate(bus, id="m1")
    error = await refused(migrate(bus, id="m2"))
    assert error.code == "service_busy"
    assert "m1" in error.message
    await bus.request(subjects.CANCEL, CancelRequest(id="m1"), CancelReply, timeout=5)
    await ended(event_log, reply.id)
    node.recover()
    assert decisions(await ended(event_log, (await migrate(bus, id="m2")).id)) == HAPPY


async def test_a_lock_left_behind_is_taken_over(
    bus: Bus, event_log: EventLog, registry: Registry, node: Node, coordinator: None
) -> None:
    await ended(event_log, (await migrate(bus, id="m1")).id)
    await unlocked(registry)
    assert await registry.lock("echo", "m1")  # its coordinator died before it gave it back
    assert (await migrate(bus, id="m2")).id == "m2"
    await ended(event_log, "m2")


async def test_a_lock_without_a_migration_is_taken_over(
    bus: Bus, event_log: EventLog, registry: Registry, node: Node, coordinator: None
) -> None:
    assert await registry.lock("echo", "m1")  # its coordinator died before the request was in the log
    assert (await migrate(bus, id="m2")).id == "m2"
    await ended(event_log, "m2")


async def test_a_lock_of_an_ended_migration_is_given_back_by_the_next_leader(
    bus: Bus, event_log: EventLog, registry: Registry, node: Node, nats_server: NatsServer
) -> None:
    async with coordinating(nats_server):
        await ended(event_log, (await migrate(bus, id="m1")).id)
        await unlocked(registry)
    assert await registry.lock("echo", "m1")  # as if it had been killed before it gave it back
    async with coordinating(nats_server):
        await unlocked(registry)


@pytest.mark.parametrize(
    ("fields", "code", "path"),
    [
        ({"service": "nothing"}, "unknown_service", "$.service"),
        ({"service": "echo", "to": "x"}, "unknown_berth", "$.to"),
        ({"service": "echo", "to": "other/b"}, "unknown_berth", "$.to"),
        ({"service": "echo", "to": "a"}, "same_berth", "$.to"),
        ({"service": "echo", "to": "c"}, "berth_gone", "$.to"),
        ({"service": "echo", "to": "d"}, "berth_busy", "$.to"),
        ({"service": "tight"}, "no_target", ""),
        ({"service": "gone"}, "server_gone", ""),
        ({"service": "echo/../x"}, "bad_request", "$.service"),
        ({"service": "echo", "to": "a.b"}, "bad_request", "$.to"),
        ({"service": "echo", "id": "a b"}, "bad_request", "$.id"),
        ({"service": "echo", "id": ""}, "bad_request", "$.id"),
        ({"service": "echo", "id": "*"}, "bad_request", "$.id"),
        ({"service": "echo", "id": "are-you-there"}, "bad_request", "$.id"),
        ({"service": "echo", "options": {"pre_copy_rounds": 9}}, "bad_request", "$.options.pre_copy_rounds"),
        ({"service": "echo", "options": {"ack_timeout_ms": -1}}, "bad_request", "$.options.ack_timeout_ms"),
        ({"service": "echo", "options": {"ack_timeout_ms": "1"}}, "bad_request", "$.options.ack_timeout_ms"),
        ({}, "bad_request", "$"),
    ],
)
async def test_bad_requests_get_code_path_and_sentence(
    bus: Bus,
    event_log: EventLog,
    registry: Registry,
    node: Node,
    coordinator: None,
    fields: dict[str, object],
    code: str,
    path: str,
) -> None:
    await registry.put_berth(berth("c", occupied=False, seen_ms=now_ms() - 60_000))
    await registry.put_berth(berth("d", occupied=True, seen_ms=now_ms() - 1_000))
    await registry.put_berth(berth("t", occupied=True, service="tight"))
    await registry.put_berth(berth("g", occupied=False, service="gone"))
    await node.report("a", "b")
    answer = await bus.nats.request("quicferry.migrate", json.dumps(fields).encode(), timeout=5)
    error = json.loads(answer.data)["error"]
    assert (error["code"], error.get("path", "")) == (code, path)
    assert error["message"].endswith(".")
    assert answer.headers is not None
    assert answer.headers["Nats-Service-Error-Code"] == code
    assert await event_log.last_seq() == 0  # nothing half-done
    assert await registry.lock_holder("echo") is None


@pytest.mark.parametrize("payload", BAD_MESSAGES)
@pytest.mark.parametrize("endpoint", ["migrate", "cancel", "status", "services"])
async def test_no_message_does_harm(bus: Bus, node: Node, coordinator: None, endpoint: str, payload: bytes) -> None:
    answer = await bus.nats.request(f"quicferry.{endpoint}", payload, timeout=5)
    if b"error" not in answer.data:
        assert endpoint in ("status", "services")  # they need no field, and unknown ones are ignored
        assert isinstance(json.loads(payload), dict)
        return
    error = json.loads(answer.data)["error"]
    assert error["code"] == "bad_request"
    assert error["message"]
    await bus.nats.publish(f"quicferry.{endpoint}", payload)
    await bus.request(subjects.STATUS, StatusRequest(), StatusReply, timeout=5)


async def test_hostile_log_entries_do_no_harm(bus: Bus, event_log: EventLog, node: Node, coordinator: None) -> None:
    """Events of no migration, of an ended one, out of any order, and of no form at all."""
    await event_log.append(ev.Committed(id="ghost", at_ms=1))
    await event_log.append(ev.AckSeen(id="ghost", at_ms=1, client="x", after_ms=1.0))
    await bus.js.publish("quicferry.log.ghost.server.ack", b"\x00")
    reply = await migrate(bus, id="m1")
    await ended(event_log, "m1")
    await event_log.append(ev.CancelAsked(id="m1", at_ms=1))
    await event_log.append(ev.AckSeen(id="m1", at_ms=1, client="late", after_ms=1.0))
    status = await bus.request(subjects.STATUS, StatusRequest(id="m1"), StatusReply, timeout=5)
    assert status.migrations[0].outcome == "completed"
    error = await refused(bus.request(subjects.STATUS, StatusRequest(id="ghost"), StatusReply, timeout=5))
    assert error.code == "unknown_migration"
    assert (await migrate(bus)).source == reply.target


async def test_status_newest_first(bus: Bus, event_log: EventLog, node: Node, coordinator: None) -> None:
    for number in range(3):
        await ended(event_log, (await migrate(bus, id=f"m{number}")).id)

    async def ids(**fields: object) -> list[str]:
        request = StatusRequest(**fields)  # type: ignore[arg-type]
        reply = await bus.request(subjects.STATUS, request, StatusReply, timeout=5)
        return [migration.id for migration in reply.migrations]

    assert await ids() == ["m2", "m1", "m0"]
    assert await ids(limit=2) == ["m2", "m1"]
    assert await ids(service="other") == []
    assert await ids(id="m1") == ["m1"]


async def test_it_outlives_restarts_of_nats(
    bus: Bus, event_log: EventLog, node: Node, coordinator: None, nats_server: NatsServer
) -> None:
    for name in ("checkpoint.dump", "restore.restore", "restore.resume"):
        node.before[name] = nats_server.restart
        reply = await migrate(bus)
        history = await ended(event_log, reply.id)
        assert decisions(history)[-1] in ("decision.completed", "decision.rolled_back")
        assert [step.differs for step in replay(history) if step.differs] == []
    assert decisions(await ended(event_log, (await migrate(bus)).id)) == HAPPY


Kill = Callable[[], Awaitable[None]]


@pytest.mark.parametrize(
    "name",
    [
        "checkpoint.prepare",
        "restore.prepare",
        "server.arm",
        "checkpoint.dump",
        "restore.restore",
        "restore.resume",
        "checkpoint.release",
    ],
)
async def test_cancelled_at_any_step_and_started_again(
    bus: Bus, event_log: EventLog, registry: Registry, node: Node, nats_server: NatsServer, name: str
) -> None:
    async with coordinating(nats_server) as running:

        async def stop() -> None:
            running[0].cancel()
            await asyncio.wait(running)

        node.before[name] = stop
        reply = await migrate(bus)
        await asyncio.wait(running)
    async with coordinating(nats_server):
        assert decisions(await ended(event_log, reply.id)) == HAPPY
        await unlocked(registry)
    assert node.done[reply.id, "checkpoint.dump"] == 1
    assert node.done[reply.id, "restore.resume"] == 1

"""What both agents share: accepted at once, repeated without harm, failures as events, abort before all else."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from quicferry.bus import agent as agent_module
from quicferry.bus.agent import Agent
from quicferry.bus.connection import Bus
from quicferry.bus.log import EventLog
from quicferry.bus.settings import NatsSettings
from quicferry.bus.tidying import UNKNOWN_AGE
from quicferry.host.images import OURS, Images, Leftovers
from quicferry.protocol import events, subjects
from quicferry.protocol.agents import Accepted, AgentRequest
from quicferry.protocol.api import Address, Berth, Place
from quicferry.protocol.errors import ErrorBody, FerryError
from quicferry.protocol.events import AnyEvent
from tests.conftest import NatsServer

PLACE = Place(node="n1", berth="a", address=Address(host="127.0.0.1", port=4242))
WAIT = 20.0


class Steps:
    """Steps that note their calls and do as they are told."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.running = asyncio.Event()
        self.go_on = asyncio.Event()
        self.failure: Exception | None = None
        self.closed = False

    def _of(self, verb: str) -> events.AnyEvent:
        kinds: dict[str, AnyEvent] = {
            "prepare": events.TargetReady(id="m1", at_ms=1, image="i"),
            "restore": events.Restored(id="m1", at_ms=1, took_ms=1.0),
            "resume": events.Resumed(id="m1", at_ms=1, took_ms=1.0, queued=0),
            "abort": events.TargetCleared(id="m1", at_ms=1),
        }
        return kinds[verb]

    def step(self, verb: str) -> AsyncGenerator[AnyEvent, None]:
        async def run() -> AsyncGenerator[AnyEvent, None]:
            self.calls.append(verb)
            if verb == "restore":
                self.running.set()
                try:
                    await self.go_on.wait()
                except asyncio.CancelledError:
                    self.calls.append("cancelled")
                    raise
            if self.failure is not None and verb == "prepare":
                raise self.failure
            yield self._of(verb)

        return run()

    async def close(self) -> None:
        self.closed = True


@pytest.fixture
def steps() -> Steps:
    return Steps()


@contextlib.asynccontextmanager
async def running(
    nats_server: NatsServer,
    steps: Steps,
    berths: Callable[[], Awaitable[list[Berth]]] | None = None,
    leftovers: Leftovers | None = None,
) -> AsyncIterator[Agent]:
    made = Agent(
        "restore",
        "n1",
        {verb: lambda _, verb=verb: steps.step(verb) for verb in subjects.RESTORE_VERBS},  # type: ignore[misc]
        close=steps.close,
        berths=berths,
        leftovers=leftovers,
    )
    task = asyncio.create_task(made.run(NatsSettings.load(nats_server.url)))
    try:
        async with asyncio.timeout(WAIT):
            await made.ready()
        yield made
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert steps.closed


@pytest_asyncio.fixture
async def agent(nats_server: NatsServer, steps: Steps) -> AsyncIterator[Agent]:
    async with running(nats_server, steps) as made:
        yield made


def request(*, attempt: int = 1) -> AgentRequest:
    return AgentRequest(id="m1", service="echo", epoch=1, source=PLACE, target=PLACE, attempt=attempt)


async def ask(bus: Bus, verb: str, *, attempt: int = 1) -> None:
    reply = await bus.request(subjects.restore("n1", verb), request(attempt=attempt), Accepted, timeout=5)
    assert reply == Accepted(id="m1")


async def seen(event_log: EventLog, *expected: str) -> list[AnyEvent]:
    """Wait until the log holds exactly these kinds."""
    found: list[AnyEvent] = []
    async with asyncio.timeout(WAIT), contextlib.aclosing(event_log.follow(migration="m1")) as entries:
        async for entry in entries:
            found.append(entry.event)
            if len(found) == len(expected):
                break
    assert [events.kind(event) for event in found] == list(expected)
    return found


@pytest.mark.usefixtures("agent")
async def test_repeats_while_it_runs_and_after_it_is_done_are_one_step(
    bus: Bus, event_log: EventLog, steps: Steps
) -> None:
    for _ in range(3):
        await ask(bus, "restore")
    await steps.running.wait()
    steps.go_on.set()
    await seen(event_log, "restore.restored")
    await ask(bus, "restore")
    await ask(bus, "restore", attempt=2)
    await ask(bus, "resume")
    await seen(event_log, "restore.restored", "restore.resumed")
    assert steps.calls == ["restore", "resume"]


@pytest.mark.usefixtures("agent")
async def test_a_failure_is_an_event_and_only_a_later_attempt_tries_again(
    bus: Bus, event_log: EventLog, steps: Steps
) -> None:
    steps.failure = FerryError("port_taken", "Taken.", hint="Free it.")
    await ask(bus, "prepare")
    (failed,) = await seen(event_log, "restore.failed")
    assert isinstance(failed, events.RestoreFailed)
    assert (failed.verb, failed.attempt, failed.error.code, failed.error.hint) == (
        "prepare",
        1,
        "port_taken",
        "Free it.",
    )
    await ask(bus, "prepare")
    steps.failure = None
    await ask(bus, "prepare", attempt=2)
    await seen(event_log, "restore.failed", "restore.prepared")
    assert steps.calls == ["prepare", "prepare"]


@pytest.mark.usefixtures("agent")
async def test_a_defect_is_told_without_its_insides(bus: Bus, event_log: EventLog, steps: Steps) -> None:
    steps.failure = RuntimeError("secret path")
    await ask(bus, "prepare")
    (failed,) = await seen(event_log, "restore.failed")
    assert isinstance(failed, events.RestoreFailed)
    assert failed.error.code == "internal"
    assert "secret" not in failed.error.message
    steps.failure = None
    await ask(bus, "prepare", attempt=2)
    await seen(event_log, "restore.failed", "restore.prepared")


@pytest.mark.usefixtures("agent")
async def test_abort_cancels_what_runs_and_other_steps_wait_for_it(
    bus: Bus, event_log: EventLog, steps: Steps
) -> None:
    await ask(bus, "restore")
    await steps.running.wait()
    await ask(bus, "resume")  # waits behind it
    await ask(bus, "abort")
    await seen(event_log, "restore.aborted")
    assert steps.calls == ["restore", "cancelled", "abort"]


@pytest.mark.usefixtures("agent")
async def test_a_step_that_comes_after_the_abort_is_refused(bus: Bus, event_log: EventLog, steps: Steps) -> None:
    """What it would open, a parked socket and a CRIU, nobody would close."""
    await ask(bus, "abort")
    await seen(event_log, "restore.aborted")
    with pytest.raises(FerryError) as caught:
        await ask(bus, "prepare")
    assert caught.value.code == "too_late"
    await ask(bus, "abort")  # that one may be repeated
    assert steps.calls == ["abort"]


async def test_nobody_looks_at_berths_in_the_middle_of_a_move(
    nats_server: NatsServer, bus: Bus, event_log: EventLog, steps: Steps
) -> None:
    """Podman would take the processor from the restore."""
    looks: asyncio.Queue[str] = asyncio.Queue()

    async def berths() -> list[Berth]:
        looks.put_nowait("look")
        return []

    async with running(nats_server, steps, berths):
        async with asyncio.timeout(WAIT):
            await looks.get()
        await ask(bus, "prepare")
        await seen(event_log, "restore.prepared")
        while not looks.empty():  # another round of them came before the move on a slow machine
            looks.get_nowait()
        steps.go_on.set()
        await ask(bus, "restore")
        await seen(event_log, "restore.prepared", "restore.restored")
        assert looks.empty()
        await ask(bus, "resume")
        async with asyncio.timeout(WAIT):
            await looks.get()


async def test_where_there_is_always_a_move_berths_are_reported_all_the_same(
    nats_server: NatsServer, bus: Bus, event_log: EventLog, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would pass for gone, and no service could be moved any more."""
    monkeypatch.setattr(agent_module, "BERTH_INTERVAL", 0.01)
    monkeypatch.setattr(agent_module, "QUIET", 3600.0)
    monkeypatch.setattr(agent_module, "OVERDUE", 0.1, raising=False)
    looks: asyncio.Queue[str] = asyncio.Queue()

    async def berths() -> list[Berth]:
        looks.put_nowait("look")
        return []

    async with running(nats_server, steps, berths):
        await ask(bus, "restore")
        await steps.running.wait()
        async with asyncio.timeout(WAIT):
            for _ in range(looks.qsize() + 3):
                await looks.get()
        steps.go_on.set()
        await seen(event_log, "restore.restored")


async def test_events_of_a_step_that_ended_without_nats_are_published_when_it_is_back(
    agent: Agent, nats_server: NatsServer, bus: Bus, event_log: EventLog, steps: Steps
) -> None:
    await ask(bus, "restore")
    await steps.running.wait()
    nats_server.stop()
    steps.go_on.set()
    agent.accept("resume", request())
    await nats_server.start()
    await seen(event_log, "restore.restored", "restore.resumed")


LOGIN = "authorization { users = [{ user: u, password: %s }] }"


@pytest_asyncio.fixture
async def rotating(tmp_path: Path) -> AsyncIterator[NatsServer]:
    """A server that knows the user ``u`` by the password ``old``."""
    server = NatsServer(tmp_path, LOGIN % "old")
    await server.start()
    yield server
    server.stop()


async def test_an_agent_that_nats_throws_out_ends(rotating: NatsServer, steps: Steps) -> None:
    """It would be deaf for ever: nats-py does not connect again after such an error."""
    made = Agent(
        "restore",
        "n1",
        {verb: lambda _, verb=verb: steps.step(verb) for verb in subjects.RESTORE_VERBS},  # type: ignore[misc]
        close=steps.close,
    )
    running = asyncio.create_task(made.run(NatsSettings.load(f"nats://u:old@127.0.0.1:{rotating.port}")))
    async with asyncio.timeout(WAIT):
        await made.ready()
        made.accept("restore", request())
        await steps.running.wait()
        rotating.reload(LOGIN % "new")
        with pytest.raises(ExceptionGroup) as caught:
            await running
    (error,) = caught.value.exceptions
    assert isinstance(error, FerryError)
    assert error.code == "nats_denied"
    assert "for good" in error.message
    assert error.hint
    assert steps.closed
    assert steps.calls == ["restore", "cancelled"]


async def test_a_step_that_is_stuck_ends_and_a_later_attempt_runs(
    nats_server: NatsServer, steps: Steps, bus: Bus, event_log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_module, "longest_step", lambda *_: 0.05)
    async with running(nats_server, steps):
        await ask(bus, "restore")
        (failed,) = await seen(event_log, "restore.failed")
        assert isinstance(failed, events.RestoreFailed)
        assert (failed.verb, failed.error.code) == ("restore", "phase_timeout")
        steps.go_on.set()
        await ask(bus, "restore", attempt=2)
        await seen(event_log, "restore.failed", "restore.restored")


def test_an_agent_without_a_verb_is_a_mistake() -> None:
    steps = Steps()
    with pytest.raises(ValueError, match="resume"):
        Agent("restore", "n1", {"prepare": lambda _: steps.step("prepare")}, close=steps.close)


REASON = ErrorBody(code="cancelled", message="x")
LAST: dict[str, list[events.Decision]] = {
    "completed": [events.Committed(id="completed", at_ms=1), events.Completed(id="completed", at_ms=1, arrived=0)],
    "rolled-back": [events.RolledBack(id="rolled-back", at_ms=1, reason=REASON)],
    "failed": [events.Failed(id="failed", at_ms=1, reason=REASON)],
    "begins": [events.Requested(id="begins", at_ms=1, service="echo", source=PLACE, target=PLACE, epoch=1)],
    "serves": [events.Committed(id="serves", at_ms=1)],
    "m1": [events.Committed(id="m1", at_ms=1)],
}


class Told(Leftovers):
    """What a killed restore agent has left; says what is deleted."""

    def __init__(self, root: Path, *migrations: str) -> None:
        super().__init__(root, "target")
        self.deleted: asyncio.Queue[str] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        for migration in migrations:
            images = Images(root, migration, "target")
            images.create()
            (images.path / "pages-1.img").touch()

    def delete(self, migration: str) -> None:
        super().delete(migration)
        self._loop.call_soon_threadsafe(self.deleted.put_nowait, migration)

    async def next(self, count: int = 1) -> list[str]:
        async with asyncio.timeout(WAIT):
            return sorted([await self.deleted.get() for _ in range(count)])


async def decide(event_log: EventLog, *decisions: events.Decision, after: int = 0) -> int:
    """The last one's number."""
    for decision in decisions:
        after = await event_log.decide(decision, after=after)
    return after


async def test_what_a_killed_agent_left_is_deleted_once_its_migration_has_ended(
    nats_server: NatsServer,
    bus: Bus,
    event_log: EventLog,
    steps: Steps,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("quicferry.bus.tidying.AGAIN", 0.01)
    root = tmp_path / "images"
    leftovers = Told(root, *LAST, "unreadable", "unknown", "unknown-for-long")
    Images(root, "completed", "source").create()  # the other agent's, which sees to it by itself
    (root / "file").touch()
    (root / "other").mkdir()
    long_ago = time.time() - UNKNOWN_AGE - 10
    os.utime(root / "unknown-for-long.target" / OURS, (long_ago, long_ago))
    seqs = {name: await decide(event_log, *decisions) for name, decisions in LAST.items()}
    await bus.js.publish(subjects.decision("unreadable"), b'{"kind":"decision.of_tomorrow"}')
    async with running(nats_server, steps, leftovers=leftovers):
        assert await leftovers.next(4) == ["completed", "failed", "rolled-back", "unknown-for-long"]
        left = {"begins", "serves", "m1", "unreadable", "unknown"}
        expected = {*left, *(f"{name}.target" for name in left), "completed.source", "file", "other"}
        assert set(os.listdir(root)) == expected
        Images(root, "later", "target").create()
        await decide(event_log, events.Failed(id="later", at_ms=1, reason=REASON))
        # A step of m1 runs here: it is not taken its images away, even if the log says that it is over.
        await ask(bus, "restore")
        await steps.running.wait()
        for name in ("m1", "serves"):
            await decide(event_log, events.Completed(id=name, at_ms=2, arrived=0), after=seqs[name])
        assert await leftovers.next() == ["serves"]
        assert (root / "m1").exists()
        steps.go_on.set()
        assert await leftovers.next() == ["m1"]
    assert (root / "later").exists(), "what came after the start is somebody's at work"
    assert not leftovers.deleted.qsize()


async def test_a_log_that_cannot_be_read_deletes_nothing_and_ends_nothing(
    nats_server: NatsServer,
    bus: Bus,
    event_log: EventLog,
    steps: Steps,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("quicferry.bus.tidying.AGAIN", 0.01)
    leftovers = Told(tmp_path / "images", "completed")
    await decide(event_log, *LAST["completed"])
    readable, tried, real = asyncio.Event(), asyncio.Event(), EventLog.newest_decision

    async def newest(log: EventLog, migration: str) -> AnyEvent | None:
        if not readable.is_set():
            tried.set()
            raise FerryError("nats_unreachable", "JetStream does not answer.")
        return await real(log, migration)

    monkeypatch.setattr(EventLog, "newest_decision", newest)
    async with running(nats_server, steps, leftovers=leftovers):
        async with asyncio.timeout(WAIT):
            await tried.wait()
        await ask(bus, "prepare")
        assert (tmp_path / "images" / "completed").exists()
        readable.set()
        assert await leftovers.next() == ["completed"]


async def test_a_root_that_is_gone_ends_nothing(
    nats_server: NatsServer, bus: Bus, steps: Steps, tmp_path: Path
) -> None:
    async with running(nats_server, steps, leftovers=Leftovers(tmp_path / "nothing", "target")):
        await ask(bus, "prepare")

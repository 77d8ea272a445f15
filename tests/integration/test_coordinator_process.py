"""The coordinator as a process of its own: killed at any moment, two at once, stopped, and without NATS."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from quicferry.bus.connection import Bus
from quicferry.bus.log import EventLog
from quicferry.bus.registry import Registry
from quicferry.migration.replay import replay
from quicferry.protocol import events as ev
from quicferry.service import STOP_SECONDS
from tests.conftest import NatsServer
from tests.integration.scripted import LIMIT, Node
from tests.integration.test_bus_agent import LOGIN
from tests.integration.test_coordinator import BACK, HAPPY, decisions, ended, migrate, seen, unlocked

ROOT = Path(__file__).parents[2]
PATIENT = f"""
import sys
from quicferry import service
from services.coordinator import leadership, lease
from services.coordinator.__main__ import NAME, work
service.STOP_SECONDS = {3 * LIMIT}
leadership.GIVE_UP_SECONDS = {LIMIT}
leadership.LEASE = {LIMIT / 2}
leadership.Tenure = lambda: lease.Tenure(leadership.LEASE)
sys.exit(service.main(NAME, work))
"""
"""The coordinator with other limits: a pause of the machine ends neither its lead nor its stopping, and what does not
stop by itself is not left where it is, but seen here."""


def _is(line: str, event: str) -> bool:
    return f"] {event} " in line or line.rstrip().endswith(f"] {event}")


class Process:
    """``python -m services.coordinator`` with its log lines."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.lines: list[str] = []
        self._ended = False
        self._more = asyncio.Condition()
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self._process.stderr is not None
        while line := (await self._process.stderr.readline()).decode():
            async with self._more:
                self.lines.append(line)
                self._more.notify_all()
        async with self._more:
            self._ended = True
            self._more.notify_all()

    @property
    def status(self) -> int | None:
        return self._process.returncode

    async def says(self, *events: str) -> str:
        """The first log line with one of ``events``, which may have come already."""
        async with asyncio.timeout(LIMIT), self._more:
            await self._more.wait_for(lambda: self._ended or self.said(*events))
        if not (said := self.said(*events)):
            pytest.fail(f"no {' or '.join(events)} in: {''.join(self.lines)}")
        return said[0]

    def said(self, *events: str) -> list[str]:
        """Its log lines with one of ``events`` so far."""
        return [line for line in self.lines if any(_is(line, event) for event in events)]

    def pause(self) -> None:
        """Stop it as a debugger or a busy host would: it notices nothing, not even that time goes on."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    async def kill(self) -> None:
        self._process.kill()
        await self._process.wait()

    async def stop(self) -> int:
        self._process.send_signal(signal.SIGTERM)
        return await self.wait()

    async def wait(self) -> int:
        async with asyncio.timeout(LIMIT):
            return await self._process.wait()

    async def close(self) -> None:
        """Kill it if it still runs, and read the last of it."""
        if self.status is None:
            await self.kill()
        await self._reading


@contextlib.asynccontextmanager
async def process(
    server: NatsServer, *, ready: bool = True, says: str = "ready", code: str = "", **environment: str
) -> AsyncIterator[Process]:
    """With ``ready``, waits until it ``says`` so. ``code`` in place of the module is PATIENT."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("NATS_", "QUICFERRY_"))}
    # A copy of the code that the caller put first stays first.
    path = os.pathsep.join([str(ROOT), *filter(None, [kept.get("PYTHONPATH")])])
    started = Process(
        await asyncio.create_subprocess_exec(
            sys.executable,
            *(("-c", code) if code else ("-m", "services.coordinator")),
            cwd=ROOT,
            env={**kept, "NATS_URL": server.url, "PYTHONPATH": path, **environment},
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
    )
    try:
        if ready:
            await started.says(says)
        yield started
    finally:
        await started.close()


@pytest.mark.parametrize(
    "name", ["checkpoint.prepare", "server.arm", "checkpoint.dump", "restore.restore", "restore.resume"]
)
async def test_killed_at_a_step_and_started_again(
    bus: Bus, event_log: EventLog, registry: Registry, node: Node, nats_server: NatsServer, name: str
) -> None:
    """It dies after it asked for the step and before it can learn what came of it."""
    async with process(nats_server) as first:
        node.before[name] = first.kill
        reply = await migrate(bus)
        assert await first.wait() == -signal.SIGKILL
    async with process(nats_server) as second:
        assert "id=" in await second.says("migration_ended")
        history = await ended(event_log, reply.id)
        assert decisions(history) == HAPPY
        assert [step.differs for step in replay(history) if step.differs] == []
        await unlocked(registry)
    assert {count for key, count in node.done.items() if key[1] != "server.arm"} == {1}


@pytest.mark.parametrize("kind", [ev.Requested, ev.Prepared, ev.Dumped, ev.Committed, ev.SourceGone])
async def test_killed_at_an_entry_and_started_again(
    bus: Bus, event_log: EventLog, registry: Registry, node: Node, nats_server: NatsServer, kind: type[ev.Event]
) -> None:
    """It dies at about the time it reads the entry: before, while or after it acts on it."""
    async with process(nats_server) as first:
        reply = await migrate(bus)
        await seen(event_log, reply.id, lambda event: isinstance(event, kind))
        await first.kill()
    async with process(nats_server):
        assert decisions(await ended(event_log, reply.id)) == HAPPY
        await unlocked(registry)
        again = await migrate(bus)
        assert (again.source, again.epoch) == (reply.target, reply.epoch + 1)
        assert decisions(await ended(event_log, again.id)) == HAPPY


async def test_killed_on_the_way_back(
    bus: Bus, event_log: EventLog, registry: Registry, node: Node, nats_server: NatsServer
) -> None:
    node.behave["restore.restore"] = "fail"
    async with process(nats_server) as first:
        node.before["checkpoint.abort"] = first.kill
        reply = await migrate(bus)
        await first.wait()
    async with process(nats_server):
        history = await ended(event_log, reply.id)
        assert decisions(history) == BACK
        assert history[-1].reason.code == "criu_failed"  # type: ignore[union-attr]


async def test_sigterm_is_a_clean_stop(nats_server: NatsServer) -> None:
    assert STOP_SECONDS < 2  # the promise
    async with process(nats_server) as running:
        assert await running.stop() == 0
        await running.says("stopped")


async def test_sigterm_in_the_middle_of_a_move(
    bus: Bus, event_log: EventLog, node: Node, nats_server: NatsServer
) -> None:
    async with process(nats_server, code=PATIENT) as first:
        node.behave["checkpoint.dump"] = "mute"
        reply = await migrate(bus)
        await seen(event_log, reply.id, lambda event: isinstance(event, ev.Armed))
        assert await first.stop() == 0
    node.recover()
    async with process(nats_server):
        assert decisions(await ended(event_log, reply.id)) == HAPPY


async def test_it_waits_for_nats_and_stops_while_it_waits(nats_server: NatsServer) -> None:
    nats_server.stop()
    async with process(nats_server, ready=False, code=PATIENT) as waiting:
        assert "Connect" in await waiting.says("nats_waiting")
        assert await waiting.stop() == 0
    async with process(nats_server, ready=False, code=PATIENT) as patient:
        await patient.says("nats_waiting")
        await nats_server.start()
        await patient.says("ready")
        nats_server.stop()
        await patient.says("nats_disconnected")
        assert await patient.stop() == 0


async def test_it_ends_when_nats_throws_it_out(tmp_path: Path) -> None:
    """Whoever supervises it starts it again; deaf, it would help nobody."""
    server = NatsServer(tmp_path, LOGIN % "old")
    await server.start()
    try:
        async with process(server, NATS_URL=f"nats://u:old@127.0.0.1:{server.port}") as running:
            server.reload(LOGIN % "new")
            assert "nats_denied" in await running.says("ended")
            assert await running.wait() == 1
    finally:
        server.stop()


@pytest.mark.parametrize("url", ["http://127.0.0.1:4222", "nats://127.0.0.1:port", "nats://"])
async def test_bad_settings_are_told(nats_server: NatsServer, url: str) -> None:
    async with process(nats_server, ready=False, NATS_URL=url) as wrong:
        assert "bad_settings" in await wrong.says("ended")
        assert await wrong.wait() == 1


async def test_it_logs_lines_that_read_well(
    bus: Bus, event_log: EventLog, node: Node, nats_server: NatsServer
) -> None:
    async with process(nats_server) as running:
        reply = await migrate(bus, id="m1")
        await ended(event_log, reply.id)
        last = await running.says("migration_ended")
    about = [line for line in running.lines if "migration_" in line]
    assert len(about) >= 5
    assert all("id=m1" in line for line in about)
    assert "outcome=completed" in last
    assert "\x1b" not in "".join(running.lines)
    assert all(line.startswith("20") and line.count("\n") == 1 for line in running.lines)

"""The two agents as processes, driven over a real NATS: moves, repeats, failures, and ends at bad moments."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TypeVar

import pytest
import pytest_asyncio

from quicferry.bus.connection import Bus
from quicferry.bus.log import Entry, EventLog
from quicferry.bus.registry import Registry
from quicferry.bus.settings import NatsSettings
from quicferry.host import processes
from quicferry.protocol import events, subjects
from quicferry.protocol.agents import Accepted, AgentRequest
from tests.conftest import NatsServer
from tests.e2e.berths import ECHO, PROJECT, EchoClient, Harbour, TestBerth, harbour, podman
from tests.e2e.moves_by_hand import a_move

pytestmark = pytest.mark.e2e

E = TypeVar("E", bound=events.Event)
WAIT = 30.0


class Node:
    """One node: its agents, and a coordinator's view of what they say."""

    def __init__(self, port: Harbour, nats: NatsServer, bus: Bus, event_log: EventLog) -> None:
        self.port = port
        self.nats = nats
        self.bus = bus
        self.log = event_log
        self._agents: dict[str, asyncio.subprocess.Process] = {}

    async def start(self, role: str) -> None:
        """Start an agent and wait until it answers."""
        with (self.port.folder / f"{role}.log").open("ab") as output:
            self._agents[role] = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", f"services.{role}_agent"),
                cwd=PROJECT,
                env={
                    **os.environ,
                    "PYTHONPATH": f"{PROJECT}:{PROJECT}/shared",
                    "NATS_URL": self.nats.url,
                    "CONTAINER_HOST": self.port.url,
                    "QUICFERRY_IMAGES": str(self.port.images),
                },
                stderr=output,
            )
        async with asyncio.timeout(WAIT):
            while "agent_ready" not in self.said(role):
                assert self._agents[role].returncode is None, self.said(role)
                await asyncio.sleep(0.02)  # polls the log file

    def said(self, role: str) -> str:
        return (self.port.folder / f"{role}.log").read_text()

    async def end(self, role: str, number: signal.Signals) -> int:
        """Signal an agent; its exit status. Its log is set aside."""
        agent = self._agents.pop(role)
        agent.send_signal(number)
        async with asyncio.timeout(WAIT):
            status = await agent.wait()
        (self.port.folder / f"{role}.log").rename(self.port.folder / f"{role}.{agent.pid}.log")
        return status

    async def close(self) -> None:
        for agent in self._agents.values():
            if agent.returncode is None:
                agent.kill()
            await agent.wait()

    async def ask(self, step: str, request: AgentRequest) -> None:
        """Send one step, as ``role.verb``; it must be accepted."""
        role, verb = step.split(".")
        subject = (subjects.checkpoint if role == "checkpoint" else subjects.restore)("local", verb)
        reply = await self.bus.request(subject, request, Accepted, timeout=5)
        assert reply.id == request.id

    async def event(self, migration: str, kind: type[E]) -> E:
        """Wait for an event of the kind; a failure that was not asked for fails the test."""
        async with asyncio.timeout(WAIT), contextlib.aclosing(self.log.follow(migration=migration)) as entries:
            async for _, event, _ in entries:
                if isinstance(event, kind):
                    return event
                assert not isinstance(event, events.CheckpointFailed | events.RestoreFailed), event
        raise AssertionError("the log ended")

    async def failure(self, migration: str) -> events.CheckpointFailed | events.RestoreFailed:
        """Wait until a step has failed."""
        async with asyncio.timeout(WAIT), contextlib.aclosing(self.log.follow(migration=migration)) as entries:
            async for _, event, _ in entries:
                if isinstance(event, events.CheckpointFailed | events.RestoreFailed):
                    return event
        raise AssertionError("the log ended")

    async def upto(self, request: AgentRequest, last: str) -> None:
        """All steps up to ``last``, each when the one before is done."""
        steps: dict[str, type[events.Event]] = {
            "checkpoint.prepare": events.SourceReady,
            "restore.prepare": events.TargetReady,
            "checkpoint.dump": events.Dumped,
            "restore.restore": events.Restored,
            "restore.resume": events.Resumed,
            "checkpoint.release": events.SourceGone,
        }
        for step, kind in steps.items():
            await self.ask(step, request)
            await self.event(request.id, kind)
            if step == last:
                return


@pytest_asyncio.fixture
async def node(tmp_path: Path, nats_server: NatsServer) -> AsyncIterator[Node]:
    async with (
        harbour(tmp_path) as port,
        Bus.connect("test", NatsSettings.load(nats_server.url), wait=True) as bus,
    ):
        made = Node(port, nats_server, bus, await EventLog.open(bus))
        try:
            await made.start("checkpoint")
            await made.start("restore")
            yield made
        finally:
            await made.close()
            for log in sorted(tmp_path.glob("*.log")):  # noqa: ASYNC240 - shown when the test fails
                print(f"--- {log.name}\n{log.read_text()}")


async def test_a_move_there_and_back_with_every_request_repeated(node: Node) -> None:
    here, there = await node.port.berth("a", ECHO), await node.port.berth("b")
    steps = [
        ("checkpoint.prepare", events.SourceReady),
        ("restore.prepare", events.TargetReady),
        ("checkpoint.dump", events.Dumped),
        ("restore.restore", events.Restored),
        ("restore.resume", events.Resumed),
        ("checkpoint.release", events.SourceGone),
    ]
    with EchoClient() as client:
        for number in (1, 2):
            request = a_move(here, there, number)
            for step, kind in steps:
                await node.ask(step, request)
                await node.ask(step, request)  # while it runs
                await node.event(request.id, kind)
                await node.ask(step, request)  # after it is done
            assert await client.ask(there, "moved") == number
            kinds = [events.kind(entry.event) for entry in await node.log.read(request.id)]
            assert kinds == [
                "checkpoint.prepared",
                "restore.prepared",
                "checkpoint.held",
                "checkpoint.dumped",
                "restore.restored",
                "restore.resumed",
                "checkpoint.released",
            ]
            here, there = there, here
    async with asyncio.timeout(WAIT):
        while os.listdir(node.port.images):  # noqa: ASYNC110
            await asyncio.sleep(0.02)  # the agent deletes them when the target has answered for a while


async def test_the_berths_are_reported_with_who_is_in_them(node: Node) -> None:
    here, there = await node.port.berth("a", ECHO), await node.port.berth("b")
    registry = await Registry.open(node.bus)

    async def ours() -> dict[str, bool]:
        """Others may have berths on this machine."""
        found = await registry.berths()
        return {berth.berth: berth.occupied for berth in found if berth.berth in (here.name, there.name)}

    async def occupied(expected: TestBerth) -> None:
        async with asyncio.timeout(WAIT):
            while await ours() != {here.name: expected is here, there.name: expected is there}:  # noqa: ASYNC110
                await asyncio.sleep(0.05)  # polls the registry, as its readers do

    await occupied(here)
    (berth,) = [berth for berth in await registry.berths() if berth.berth == there.name]
    assert (berth.node, berth.service, berth.port, berth.container) == ("local", "echo", 4242, there.container)
    await node.upto(a_move(here, there), "checkpoint.release")
    await occupied(there)


async def test_a_step_that_fails_says_why_and_a_later_attempt_may_succeed(node: Node) -> None:
    here, there = await node.port.berth("a", ECHO), await node.port.berth("b")
    request = a_move(there, here)  # the wrong way round
    await node.ask("checkpoint.prepare", request)
    failed = await node.failure(request.id)
    assert (failed.verb, failed.attempt, failed.error.code) == ("prepare", 1, "server_gone")
    await node.ask("checkpoint.prepare", request)  # a repeat is no new attempt
    await node.ask("checkpoint.prepare", a_move(here, there, 1, attempt=2))
    async with asyncio.timeout(WAIT), contextlib.aclosing(node.log.follow(migration=request.id)) as entries:
        seen = [events.kind(event) async for event in _until(entries, events.SourceReady)]
    assert seen == ["checkpoint.failed", "checkpoint.prepared"]


async def test_a_berth_that_podman_wrongly_takes_for_running_is_in_nobodys_way(node: Node) -> None:
    here, there, gone = await node.port.berth("a", ECHO), await node.port.berth("b"), await node.port.berth("c")
    conmon, state = podman("inspect", "-f", "{{.State.ConmonPid}}", gone.container), "{{.State.Status}}"
    with processes.Process(gone.init_pid) as init:
        for pid in (int(conmon), gone.init_pid):  # as an out-of-memory killer, or a careless one, does
            os.kill(pid, signal.SIGKILL)
        assert await init.exited(WAIT)
    assert podman("inspect", "-f", state, gone.container) == "running"
    for role in ("checkpoint", "restore"):
        assert await node.end(role, signal.SIGTERM) == 0
        await node.start(role)
    warned = [line for line in node.said("checkpoint").splitlines() if f"container={gone.container[:12]}" in line]
    assert len(warned) == 1, node.said("checkpoint")
    assert "berth_gone" in warned[0]

    request = a_move(here, gone)
    await node.ask("restore.prepare", request)
    failed = await node.failure(request.id)
    assert failed.error.code == "berth_gone"
    assert failed.error.hint == f"Remove it with: podman rm -f {gone.container[:12]}"
    await node.upto(a_move(here, there, 2), "checkpoint.release")


async def _until(entries: AsyncIterator[Entry], last: type[events.Event]) -> AsyncIterator[events.Event]:
    async for _, event, _ in entries:
        yield event
        if isinstance(event, last):
            return


async def test_abort_in_the_middle_of_a_dump_brings_the_server_back(node: Node) -> None:
    here = await node.port.berth("a", ECHO, env={"ECHO_BALLAST_MIB": "64"})
    there = await node.port.berth("b")
    request = a_move(here, there)
    await node.upto(request, "restore.prepare")
    await node.ask("checkpoint.dump", request)
    await node.event(request.id, events.SourceHeld)
    await node.ask("checkpoint.abort", request)
    await node.ask("restore.abort", request)
    await node.event(request.id, events.SourceBack)
    await node.event(request.id, events.TargetCleared)
    with EchoClient() as client:
        assert await client.ask(here, "still here") == 1
    assert os.listdir(node.port.images) == []


async def test_a_checkpoint_agent_killed_after_the_dump_is_replaced_and_aborts(node: Node) -> None:
    here, there = await node.port.berth("a", ECHO), await node.port.berth("b")
    request = a_move(here, there)
    await node.upto(request, "checkpoint.dump")
    await node.end("checkpoint", signal.SIGKILL)
    await node.start("checkpoint")
    await node.ask("checkpoint.abort", request)
    await node.event(request.id, events.SourceBack)
    with EchoClient() as client:
        assert await client.ask(here, "back") == 1


async def test_a_restore_agent_killed_after_the_commit_is_replaced_and_resumes(node: Node) -> None:
    here, there = await node.port.berth("a", ECHO), await node.port.berth("b")
    request = a_move(here, there)
    await node.upto(request, "restore.restore")
    await node.end("restore", signal.SIGKILL)
    await node.start("restore")
    await node.ask("restore.resume", request)
    await node.ask("checkpoint.release", request)
    await node.event(request.id, events.Resumed)
    await node.event(request.id, events.SourceGone)
    with EchoClient() as client:
        assert await client.ask(there, "forward") == 1
    assert processes.occupant(here.init_pid) is None


async def test_agents_stop_cleanly_and_never_give_a_dumped_source_its_socket(node: Node) -> None:
    here, there = await node.port.berth("a", ECHO), await node.port.berth("b")
    request = a_move(here, there)
    await node.upto(request, "checkpoint.dump")
    assert await node.end("checkpoint", signal.SIGTERM) == 0
    assert await node.end("restore", signal.SIGTERM) == 0
    # Whether it was committed, only the log can tell: until somebody asks it, the source is mute.
    server = processes.occupant(here.init_pid)
    assert server is not None
    with server:
        assert processes.is_held(server.pid)


async def test_an_agent_stopped_while_a_server_is_about_to_park_leaves_it_serving(node: Node) -> None:
    here, there = await node.port.berth("a", ECHO, env={"ECHO_STUBBORN": "1"}), await node.port.berth("b")
    request = a_move(here, there)
    await node.upto(request, "restore.prepare")
    await node.ask("checkpoint.dump", request)
    await node.port.log_line(here, "stubborn")
    assert await node.end("checkpoint", signal.SIGTERM) == 0
    with EchoClient() as client:
        assert await client.ask(here, "still here") == 1

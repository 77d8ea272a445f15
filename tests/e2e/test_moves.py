"""Whole moves: real podman, real CRIU, real NATS, real QUIC."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from quicferry.host.command import attempt, run
from quicferry.host.compose import Stack
from quicferry.migration.replay import replay
from quicferry.migration.report import report
from quicferry.protocol import events as ev
from quicferry.protocol import subjects
from quicferry.protocol.api import CancelReply, CancelRequest, MigrateReply, MigrateRequest, Options
from quicferry.protocol.errors import FerryError
from tests.e2e.moving import PATIENCE, Capture, System
from tests.readme import python_blocks

PROJECT = Path(__file__).resolve().parents[2]
INDEPENDENT = PROJECT / "tests" / "independent_client.py"


@pytest.fixture
def system(stack: Stack, stack_variables: dict[str, str]) -> System:
    return System(stack, stack_variables)


def container(stack: Stack, service: str) -> str:
    (found,) = [item.id for item in stack.containers() if item.service == service]
    return found


def inspect(stack: Stack, service: str, what: str) -> str:
    command = ["podman", "inspect", "--format", what, container(stack, service)]
    return run(command, timeout=30, doing="inspecting", env=stack.environment).strip()


def decisions(events: list[ev.AnyEvent]) -> list[str]:
    return [ev.kind(event) for event in events if ev.kind(event).startswith("decision.")]


FORWARD = ["decision.requested", "decision.prepared", "decision.committed", "decision.completed"]


async def test_a_session_survives_its_server_going_there_and_back(system: System) -> None:
    async with system.client("solo", interval=0.005) as client:
        for _ in range(2):
            before = client.connection.peer
            told, events = await system.move()
            await client.echoes(20)
            assert decisions(events) == FORWARD
            assert (told.outcome, told.clients, told.acks) == ("completed", 1, 1)
            assert client.connection.peer != before
            assert client.connection.peer == f"{told.target.address.host}:{told.target.address.port}"
            (migration,) = [past for past in client.connection.migrations if past.id == told.id]
            window_before, window_after = client.connection.windows_around(migration)
            assert window_before == window_after > 0
            assert told.frozen_ms
            assert told.restore_ms
            kinds = Counter(ev.kind(event) for event in events)
            assert kinds["server.migrate"] == kinds["server.ack"] == 1
            assert not [step.differs for step in replay(events) if step.differs]


async def test_fifty_clients_at_once_lose_nothing(system: System) -> None:
    async with contextlib.AsyncExitStack() as clients:
        pingers = [await clients.enter_async_context(system.client(f"car-{n}", interval=0.1)) for n in range(50)]
        told, events = await system.move(ack_timeout_ms=20_000)
        assert (told.outcome, told.clients, told.acks) == ("completed", 50, 50)
        acked = {event.client for event in events if isinstance(event, ev.AckSeen)}
        assert acked == {f"car-{n}" for n in range(50)}
        for pinger in pingers:
            await pinger.echoes(3)
            assert pinger.connection.peer.endswith(f":{told.target.address.port}")


async def test_ten_moves_there_and_back(system: System) -> None:
    async with system.client("commuter", interval=0.01) as client:
        epochs = []
        for _ in range(10):
            told, events = await system.move()
            assert told.outcome == "completed"
            epochs += [event.epoch for event in events if isinstance(event, ev.Requested)]
            await client.echoes(5)
        assert epochs == list(range(epochs[0], epochs[0] + 10))
        assert len(client.connection.migrations) == 10


async def test_no_datagram_leaves_the_source_after_the_targets_first(system: System) -> None:
    stack = system.stack
    network = run(
        ["podman", "network", "inspect", "--format", "{{.NetworkInterface}}", f"{stack.name}_default"],
        timeout=30,
        doing="inspecting the network",
        env=stack.environment,
    ).strip()
    addresses = {
        berth: inspect(stack, f"berth-{berth}", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}")
        for berth in ("a", "b")
    }
    async with system.client("watched", interval=0.002) as client:
        with Capture(network) as capture:
            await client.echoes(20)
            told, _ = await system.move()
            await client.echoes(50)
    source, target = addresses[told.source.berth], addresses[told.target.berth]
    senders = [datagram.source for datagram in capture.seen if datagram.source_port == 4242]
    first = senders.index(target)
    assert source in senders[:first]
    assert source not in senders[first:]
    # No proxy: nothing passes between the berths, and after the move the source is not even sent to.
    assert not [d for d in capture.seen if {d.source, d.destination} == {source, target}]


@contextlib.asynccontextmanager
async def talker(command: list[str], **environment: str) -> AsyncIterator[Talker]:
    """A client as a process of its own that prints JSON lines; killed at the latest when the block is left."""
    process = await asyncio.create_subprocess_exec(
        *command, cwd=PROJECT, env={**os.environ, **environment}, stdout=asyncio.subprocess.PIPE
    )
    try:
        yield Talker(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


class Talker:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def says(self, event: str) -> dict[str, Any]:
        """Its next line about ``event``; what comes before is passed over."""
        assert self.process.stdout is not None
        async with asyncio.timeout(PATIENCE):
            async for line in self.process.stdout:
                said: dict[str, Any] = json.loads(line)
                if said["event"] == event:
                    return said
        pytest.fail(f"it ended without saying {event}")

    async def ends(self) -> dict[str, Any]:
        """Ctrl-C; returns its summary once it has said goodbye and gone."""
        self.process.send_signal(signal.SIGINT)
        summary = await self.says("summary")
        async with asyncio.timeout(PATIENCE):
            await self.process.wait()
        return summary


@contextlib.asynccontextmanager
async def car(system: System, name: str) -> AsyncIterator[Talker]:
    """The car client, connected."""
    host, port = await system.address()
    command = [sys.executable, "-m", "tests.patient_car", "--json", "--cafile", system.cafile, "--name", name]
    settings = {"TARGET_ADDR": f"{host}:{port}", "TRANSPARENT": "1", "QUICFERRY_LOG_LEVEL": "error"}
    async with talker([*command, "--interval-ms", "10"], **settings) as one:
        await one.says("connected")
        yield one


@contextlib.asynccontextmanager
async def independent(system: System, *more: str) -> AsyncIterator[Talker]:
    """The client that has nothing of ours, connected."""
    host, port = await system.address()
    async with talker([sys.executable, str(INDEPENDENT), host, str(port), "--cafile", system.cafile, *more]) as one:
        await one.says("connected")
        yield one


async def test_a_client_that_never_acks_holds_up_nobody_and_is_served_when_it_comes_back(system: System) -> None:
    async with car(system, "asleep") as sleeper:
        async with system.client("awake", interval=0.01) as client:
            sleeper.process.send_signal(signal.SIGSTOP)
            told, _ = await system.move(ack_timeout_ms=2_000)
            assert (told.outcome, told.clients, told.acks) == ("completed", 2, 1)
            await client.echoes(10)
        sleeper.process.send_signal(signal.SIGCONT)
        # It hears what was sent to it before the freeze, and follows late.
        said = await sleeper.says("move")
        assert (said["outcome"], said["id"]) == ("arrived", told.id)
        summary = await sleeper.ends()
        assert (summary["handshakes"], summary["echoes_lost"]) == (1, 0)


async def test_a_cancelled_move_rolls_back_with_every_session(system: System) -> None:
    async with (
        system.client("awake", interval=0.005) as client,
        car(system, "asleep") as sleeper,
        system.bus() as bus,
    ):
        sleeper.process.send_signal(signal.SIGSTOP)  # the server waits for its ack: time to cancel in
        request = MigrateRequest(
            service="echo", id=f"cancelled-{os.getpid()}", options=Options(ack_timeout_ms=20_000)
        )
        reply = await bus.request(subjects.MIGRATE, request, MigrateReply, timeout=5)
        async with asyncio.timeout(PATIENCE):
            await client.connection.migrate_seen.wait()
        await bus.request(subjects.CANCEL, CancelRequest(id=reply.id), CancelReply, timeout=5)
        events = await system.followed(bus, reply.id)
        assert decisions(events) == ["decision.requested", "decision.prepared", "decision.rolled_back"]
        told = report(events)
        assert told.reason is not None
        assert told.reason.code == "cancelled"
        assert client.connection.migrations[-1].outcome == "rolled_back"
        assert client.connection.peer == f"{told.source.address.host}:{told.source.address.port}"
        sleeper.process.send_signal(signal.SIGCONT)
        assert (await sleeper.ends())["handshakes"] == 1
        await client.echoes(20)
        told, _ = await system.move()
        assert told.outcome == "completed"


async def test_an_independent_client_comes_along(system: System) -> None:
    async with independent(system) as other:
        for _ in range(2):
            told, _ = await system.move()
            assert (told.outcome, told.acks) == ("completed", 1)
            assert (await other.says("target"))["id"] == told.id
        summary = await other.ends()
        assert summary["echoed"] == summary["sent"] > 0
        assert summary["handshakes"] == 1


async def test_a_client_without_hello_is_served_and_told_when_its_server_leaves(system: System) -> None:
    async with system.client("beside") as client, independent(system, "--no-hello") as stranger:
        told, events = await system.move()
        assert (told.outcome, told.clients) == ("completed", 1)
        assert [event.closed for event in events if isinstance(event, ev.Quiesced)] == [1]
        assert "moving" in (await stranger.says("summary"))["reason"]
        await client.echoes(5)


async def test_the_api_takes_any_nats_client(system: System) -> None:
    """No library of ours: plain nats-py, as in the README."""
    import nats

    await system.services()
    client = await nats.connect(system.nats)
    try:
        wrong = await client.request("quicferry.migrate", b'{"service": 7}', timeout=5)
        error = json.loads(wrong.data)["error"]
        assert error["code"] == "bad_request"
        assert error["path"] == "$.service"
        assert error["message"]
        # Without a reply the id is found in the log; the same id twice is one migration.
        request = json.dumps({"service": "echo", "id": f"plain-{os.getpid()}"}).encode()
        await client.publish("quicferry.migrate", request)
        again = json.loads((await client.request("quicferry.migrate", request, timeout=5)).data)
        assert again["id"] == f"plain-{os.getpid()}"
        async with system.bus() as bus:
            events = await system.followed(bus, again["id"])
        assert decisions(events) == FORWARD
    finally:
        await client.close()


@pytest.mark.parametrize("phase_timeout_ms", [1, 25, 50, 75])
async def test_a_move_that_is_too_slow_rolls_back_with_every_session(system: System, phase_timeout_ms: int) -> None:
    async with system.client("patient", interval=0.005) as client:
        told, events = await system.move(phase_timeout_ms=phase_timeout_ms)
        if told.outcome != "completed":
            # How far it came depends on the machine; wherever that was, the source serves on.
            assert told.reason is not None
            assert "decision.committed" not in decisions(events)
            assert client.connection.peer.endswith(f":{told.source.address.port}")
        assert not [step.differs for step in replay(events) if step.differs]
        await client.echoes(20)
        told, _ = await system.move()
        assert told.outcome == "completed"
        await client.echoes(20)


async def test_the_ten_lines_of_the_readme_move_a_server(system: System) -> None:
    await system.services()
    lines = python_blocks()[0].replace("nats://127.0.0.1:4222", system.nats)
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", lines, stdout=asyncio.subprocess.PIPE)
    async with asyncio.timeout(PATIENCE):
        said, _ = await process.communicate()
    assert process.returncode == 0
    assert b"decision.requested" in said.splitlines()[0]
    assert b"decision.completed" in said.splitlines()[-1]


async def test_the_servers_log_follows_it_and_images_are_gone(system: System) -> None:
    stack = system.stack
    told, _ = await system.move()
    async with system.client("after", interval=0.01):
        pass
    target = stack.logs(f"berth-{told.target.berth}", lines=50)
    assert "client_hello" in target or "after" in target
    command = ["podman", "exec", container(stack, "restore-agent"), "ls", "/var/lib/quicferry/images"]
    async with asyncio.timeout(PATIENCE):  # they are deleted when the target has answered for a while
        while run(command, timeout=30, doing="listing images", env=stack.environment).split():  # noqa: ASYNC110
            await asyncio.sleep(0)


async def test_the_services_stop_cleanly_and_the_system_goes_on(system: System) -> None:
    stack = system.stack
    async with system.client("steady", interval=0.02) as client:
        for service in ("coordinator", "checkpoint-agent", "restore-agent"):
            one = container(stack, service)
            assert attempt(["podman", "stop", "--time", "8", one], timeout=30, env=stack.environment).ok
            assert inspect(stack, service, "{{.State.ExitCode}}") == "0"
            assert attempt(["podman", "start", one], timeout=30, env=stack.environment).ok
        told = None
        async with asyncio.timeout(PATIENCE):
            while told is None or told.reason is not None:  # until all of them are up again
                with contextlib.suppress(FerryError):
                    told, _ = await system.move()
        assert told.outcome == "completed"
        await client.echoes(10)


async def test_sigterm_unarmed_is_a_graceful_stop(system: System) -> None:
    stack = system.stack
    if (await system.services()).services[0].place.berth != "a":
        await system.move(to="a")
    berth = container(stack, "berth-a")
    async with independent(system) as other:
        try:
            assert attempt(["podman", "stop", "--time", "8", berth], timeout=30, env=stack.environment).ok
            assert inspect(stack, "berth-a", "{{.State.ExitCode}}") == "0"
            assert "stopping" in (await other.says("summary"))["reason"]  # told, not left to time out
        finally:
            assert attempt(["podman", "start", berth], timeout=30, env=stack.environment).ok
    await system.services()


def test_demo_proves_itself(stack: Stack, stack_variables: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "demo.json"
    environment = {**os.environ, **stack.environment}
    done = subprocess.run(
        [Path(sys.executable).parent / "quicferry", "demo", "--json", file],
        env=environment,
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    assert result["ok"] is True
    assert [move["outcome"] for move in result["moves"]] == ["completed"] * 2
    for move in result["moves"]:
        assert (move["handshakes"], move["echoes_lost"], move["acks"]) == (1, 0, 1)
        assert move["cwnd_before"] == move["cwnd_after"] > 0
        assert move["echoes_sent"] > 0
        assert 0 < move["interruption_ms"] >= move["frozen_ms"]
    assert len(done.stdout.splitlines()) == 3
    assert all(len(line) <= 80 for line in done.stdout.splitlines())

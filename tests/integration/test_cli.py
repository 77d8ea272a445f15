"""The command as users run it: a process of its own, a real nats-server, the real coordinator, scripted agents."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import pytest_asyncio
from msgspec.structs import replace
from nats.aio.msg import Msg

from quicferry.bus.connection import Bus
from quicferry.bus.log import EventLog
from quicferry.bus.registry import Registry
from quicferry.cli import demo, lifecycle, logfile, session
from quicferry.cli.exits import Exit
from quicferry.protocol import events as ev
from quicferry.protocol import subjects
from quicferry.protocol.api import Address, Placement, ServicesReply, ServicesRequest, StatusReply, StatusRequest
from quicferry.protocol.errors import FerryError
from tests.conftest import NatsServer
from tests.integration.scripted import BROKEN, Behaviour, Node, berth, coordinating, now_ms
from tests.unit.test_cli_output import ID, at, completed, rolled_back

ROOT = Path(__file__).parents[2]
COMMAND_SECONDS = 25


class Done(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def result(self) -> dict[str, Any]:
        result = self.records[-1]["result"]
        assert isinstance(result, dict)
        return result


class Command:
    """Runs ``quicferry`` against one nats-server, found through NATS_URL."""

    def __init__(self, url: str, home: Path) -> None:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("NATS_", "QUICFERRY_"))}
        self.environment = {**kept, "NATS_URL": url, "XDG_CONFIG_HOME": str(home), "TERM": "xterm", "NO_COLOR": "1"}
        self.environment.pop("COLUMNS", None)

    async def start(self, *arguments: str, output: int = asyncio.subprocess.PIPE) -> asyncio.subprocess.Process:
        errors = asyncio.subprocess.PIPE if output == asyncio.subprocess.PIPE else output
        command = [sys.executable, "-m", "quicferry.cli.main", *arguments]
        return await asyncio.create_subprocess_exec(*command, env=self.environment, stdout=output, stderr=errors)

    async def __call__(self, *arguments: str) -> Done:
        process = await self.start(*arguments)
        reading = asyncio.ensure_future(process.communicate())
        await asyncio.wait([reading], timeout=COMMAND_SECONDS)
        if process.returncode is None:
            process.send_signal(signal.SIGINT)
            pytest.fail(f"quicferry {' '.join(arguments)} does not end; it printed {await reading}")
        out, err = await reading
        assert b"Traceback" not in err
        return Done(process.returncode, out.decode(), err.decode())


@pytest.fixture
def command(nats_server: NatsServer, tmp_path: Path) -> Command:
    return Command(nats_server.url, tmp_path)


@pytest_asyncio.fixture
async def logged(event_log: EventLog) -> AsyncIterator[None]:
    """A completed migration in the log, between entries of another."""
    for event in completed():
        await event_log.append(event)
        await event_log.append(ev.TimedOut(id="other", at_ms=event.at_ms, phase="x", attempt=event.at_ms))
    yield


# Reading back.


@pytest.mark.usefixtures("logged")
async def test_events_replay_and_export_agree(command: Command, tmp_path: Path) -> None:
    file = str(tmp_path / "log.jsonl")
    events, replayed, exported = await asyncio.gather(
        command("events", ID), command("replay", ID), command("export", ID, "-o", file)
    )
    assert (events.code, replayed.code, exported.code) == (0, 0, 0)
    assert f"21 entries of {ID} written" in exported.out
    assert "every decision is the machine's" in replayed.out
    from_file, again, piped, written_again = await asyncio.gather(
        command("events", file), command("replay", file), command("export", ID), command("export", ID, "-o", "-")
    )
    assert (from_file.out, again.out) == (events.out, replayed.out)
    assert piped.out == written_again.out
    assert piped.out.splitlines() == [line.decode().rstrip() for line in logfile.encode(*logfile.read(Path(file)))]
    migration, entries = logfile.read(Path(file))
    assert migration == ID
    assert [entry.event for entry in entries] == completed()


@pytest.mark.usefixtures("logged")
async def test_an_export_overwrites_only_by_force(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "kept"
    file.write_text("mine")
    refused = await command("export", ID, "-o", str(file), "--json")
    assert (refused.code, json.loads(refused.err)["error"]["code"]) == (Exit.ERROR, "file_refused")
    assert file.read_text() == "mine"
    forced = await command("export", ID, "-o", str(file), "--json", "--force")
    assert (forced.code, forced.result["entries"]) == (0, 21)


async def test_a_forged_decision_in_the_log(command: Command, event_log: EventLog) -> None:
    for event in [*rolled_back()[:-1], at(491, ev.Committed)]:
        await event_log.append(event)
    done = await command("replay", ID)
    assert done.code == Exit.DIFFERS
    assert "DIFFERS" in done.out
    assert "replay_differs" in done.err


async def test_a_migration_that_is_not_there(command: Command, event_log: EventLog) -> None:
    for name in ("events", "replay", "export"):
        done = await command(name, "nope", "--json")
        assert (done.code, done.out) == (Exit.ERROR, "")
        assert json.loads(done.err)["error"]["code"] == "unknown_migration"


# Moving.


@pytest.mark.usefixtures("coordinator")
async def test_migrate_shows_the_phases(command: Command, event_log: EventLog) -> None:
    done = await command("migrate")
    lines = done.out.splitlines()
    assert (done.code, done.err) == (0, "")
    assert lines[0].endswith("echo from local/a to local/b")
    phases = [line.split()[0] for line in lines[1:-1]]
    assert phases == ["preparing", "arming", "dumping", "restoring", "committing", "resuming", "settling"]
    assert lines[-1].startswith("completed in ")
    assert lines[-1].endswith("interruption 30 ms, acks 2/2, frozen 10 ms, restore 10 ms")
    status = await command("status")
    assert lines[0].split()[0] in status.out
    assert "completed" in status.out


@pytest.mark.usefixtures("coordinator")
async def test_migrate_as_json(command: Command, event_log: EventLog) -> None:
    done = await command("--json", "migrate", "echo", "--to", "local/b", "--id", "m1", "--pre-copy", "2")
    assert (done.code, done.err) == (0, "")
    log = await event_log.read("m1")
    assert [record["seq"] for record in done.records[:-1]] == [entry.seq for entry in log[: len(done.records) - 1]]
    assert done.records[0]["event"]["options"] == {"pre_copy_rounds": 2}
    assert (done.result["id"], done.result["outcome"], done.result["acks"]) == ("m1", "completed", 2)
    again = await command("--json", "migrate", "echo", "--id", "m1")
    assert (again.code, again.result["id"]) == (0, "m1")
    assert len(await event_log.read("m1")) == len(log)


@pytest.mark.usefixtures("coordinator")
async def test_migrate_detached(command: Command, event_log: EventLog) -> None:
    done = await command("migrate", "--detach", "--json")
    assert done.code == 0
    assert (done.result["service"], done.result["epoch"]) == ("echo", 1)
    migration = str(done.result["id"])
    async with contextlib.aclosing(event_log.follow(migration=migration)) as entries:
        async for entry in entries:
            if isinstance(entry.event, ev.Completed):
                break
    status = await command("status", migration, "--json")
    assert status.records[0]["migrations"][0]["outcome"] == "completed"


@pytest.mark.usefixtures("coordinator")
@pytest.mark.parametrize(
    ("behaviour", "code", "outcome"),
    [
        ({"restore.restore": "fail"}, Exit.ROLLED_BACK, "rolled_back"),
        ({"restore.prepare": "refuse"}, Exit.FAILED, "failed"),
    ],
)
async def test_how_it_ended_is_the_exit_code(
    command: Command, node: Node, behaviour: dict[str, Behaviour], code: Exit, outcome: str
) -> None:
    node.behave.update(behaviour)
    done = await command("migrate", "echo")
    assert done.code == code
    assert outcome.replace("_", " ") in done.out
    assert BROKEN.message in done.out


@pytest.mark.usefixtures("coordinator")
async def test_it_stops_waiting_and_says_so(command: Command, node: Node) -> None:
    node.behave["checkpoint.dump"] = "silent"
    done = await command("migrate", "--id", "m1", "--timeout", "1", "--phase-timeout-ms", "60000")
    assert done.code == Exit.STILL_RUNNING
    assert "code: still_running" in done.err
    assert "quicferry cancel m1" in done.err
    busy = await command("migrate", "--json")
    assert (busy.code, json.loads(busy.err)["error"]["code"]) == (Exit.ERROR, "service_busy")
    cancelled = await command("cancel", "m1")
    assert cancelled.code == 0
    watched = await command("migrate", "echo", "--id", "m1")
    assert watched.code == Exit.ROLLED_BACK
    plain, as_json = await asyncio.gather(command("cancel", "m1"), command("cancel", "m1", "--json"))
    assert plain.code == as_json.code == Exit.ROLLED_BACK
    assert plain.out.startswith("m1 has ended, there is nothing to call off: rolled back\n")
    assert as_json.result == {"id": "m1", "phase": "rolled_back"}


@pytest.mark.usefixtures("coordinator")
async def test_a_demo_s_move_that_does_not_end(bus: Bus, node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.behave["checkpoint.dump"] = "silent"
    monkeypatch.setattr(demo, "MOVE_SECONDS", 0.5)
    with pytest.raises(FerryError) as caught:
        await demo._move(bus, "echo")
    assert caught.value.code == "still_running"
    [status] = (await session.ask(bus, subjects.STATUS, StatusRequest(), StatusReply)).migrations
    assert status.id in caught.value.message
    assert f"quicferry status {status.id}" in caught.value.hint


@pytest.mark.usefixtures("coordinator")
async def test_ctrl_c_leaves_it_running(command: Command, node: Node, event_log: EventLog) -> None:
    node.behave["checkpoint.dump"] = "silent"
    process = await command.start("migrate", "--id", "m1", "--phase-timeout-ms", "60000")
    assert process.stdout is not None
    async with asyncio.timeout(20):
        while b"arming" not in await process.stdout.readline():
            pass
        process.send_signal(signal.SIGINT)
        _, err = await process.communicate()
    assert process.returncode == Exit.INTERRUPTED
    assert b"the migration m1 goes on" in err
    assert b"Traceback" not in err
    kinds = [ev.kind(entry.event) for entry in await event_log.read("m1")]
    assert "coordinator.cancel" not in kinds
    await event_log.append(ev.CancelAsked(id="m1", at_ms=now_ms()))


@pytest.mark.usefixtures("coordinator")
async def test_on_a_terminal(command: Command) -> None:
    ours, theirs = os.openpty()
    process = await command.start("migrate", "--id", "m1", output=theirs)
    os.close(theirs)
    text = await asyncio.to_thread(drain, ours)
    assert await process.wait() == 0
    assert "completed in " in text.splitlines()[-1]
    assert text.count("dumping  ") >= 1


def drain(terminal: int) -> str:
    """All that was written to a terminal until its last writer closed it."""
    parts = []
    with contextlib.suppress(OSError):  # EIO is how a terminal says so
        while part := os.read(terminal, 65536):
            parts.append(part)
    os.close(terminal)
    return b"".join(parts).decode()


@pytest.mark.usefixtures("coordinator")
async def test_refusals(command: Command, node: Node) -> None:
    wrong = {
        ("migrate", "nope"): "unknown_service",
        ("migrate", "echo", "--to", "z"): "unknown_berth",
        ("migrate", "echo", "--to", "a"): "same_berth",
        ("cancel", "nope"): "unknown_migration",
        ("status", "nope"): "unknown_migration",
    }
    await node.report()  # five commands at once take their time to start
    answers = await asyncio.gather(*(command(*arguments, "--json") for arguments in wrong))
    for done, code in zip(answers, wrong.values(), strict=True):
        assert (done.code, done.out) == (Exit.ERROR, "")
        assert json.loads(done.err)["error"]["code"] == code


@pytest.mark.usefixtures("coordinator")
async def test_services(command: Command) -> None:
    plain, as_json = await asyncio.gather(command("services"), command("services", "--json"))
    assert (plain.code, as_json.code) == (0, 0)
    assert "a server" in plain.out
    [record] = as_json.records
    assert record["services"][0]["place"]["berth"] == "a"
    assert [berth["occupied"] for berth in record["berths"]] == [True, False]


async def test_a_service_that_is_gone_stands_in_nobody_s_way(
    command: Command, nats_server: NatsServer, bus: Bus, event_log: EventLog, registry: Registry, node: Node
) -> None:
    """The log goes on to know where they were: one that was cleared away, one whose berths no agent sees any more."""
    for service in ("bench-copied", "old"):
        here, there = berth(f"{service}-a", occupied=False).place, berth(f"{service}-b", occupied=True).place
        fields = {"id": f"{service}-1", "at_ms": now_ms()}
        await event_log.append(ev.Requested(**fields, service=service, source=here, target=there, epoch=1))
        for kind in (ev.Prepared, ev.Committed):
            await event_log.append(kind(**fields))
        await event_log.append(ev.Completed(**fields, arrived=0))
    await registry.put_berth(berth("old-b", occupied=True, service="old", seen_ms=now_ms() - 60_000))
    async with coordinating(nats_server):
        reply = await session.ask(bus, subjects.SERVICES, ServicesRequest(), ServicesReply)
        assert {one.service for one in reply.services} == {"bench-copied", "echo", "old"}  # or this tests nothing
        seen = await lifecycle._until_seen(argparse.Namespace(nats=nats_server.url, context=None))
        assert [one.service for one in seen.services] == ["echo"]
        plain, as_json = await asyncio.gather(command("services"), command("services", "--json"))
        assert "bench-copied" not in plain.out
        assert [one["service"] for one in as_json.records[0]["services"]] == ["echo", "old"]
        moved = await command("migrate")
        assert moved.code == 0, moved.err


async def test_without_any_report_what_is_known_has_to_do(bus: Bus, registry: Registry, node: Node) -> None:
    async def answer(message: Msg) -> None:
        await message.respond(msgspec.json.encode(ServicesReply(services=known, berths=[])))

    here = berth("a", occupied=True).place
    known = [Placement(service="echo", place=here)]
    await bus.nats.subscribe("quicferry.services", cb=answer)
    assert (await session.the_service(bus, None)).place == here
    known.append(Placement(service="other", place=here))
    with pytest.raises(FerryError) as caught:
        await session.the_service(bus, None)
    assert (caught.value.code, caught.value.hint) == ("usage", "One of: echo, other.")
    assert (await session.the_service(bus, "other")).service == "other"


@pytest.mark.usefixtures("coordinator")
async def test_the_client_finds_the_server(command: Command, registry: Registry, node: Node, tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **command.environment,
        "QUICFERRY_CERT": str(tmp_path / "cert.pem"),
        "QUICFERRY_KEY": str(tmp_path / "key.pem"),
        "QUICFERRY_HOST": "127.0.0.1",
        "QUICFERRY_PORT": str(port),
    }
    server = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.echo_server", env=environment, stderr=asyncio.subprocess.PIPE, cwd=ROOT
    )
    assert server.stderr is not None
    try:
        async with asyncio.timeout(20):
            while b"serving" not in await server.stderr.readline():
                assert server.returncode is None
        here = berth("a", occupied=True)
        await registry.put_berth(replace(here, address=Address(host="127.0.0.1", port=port)))
        done = await command("client", "--json", "--cafile", str(tmp_path / "cert.pem"), "--", "--count", "5")
    finally:
        server.terminate()
        await server.communicate()
    assert done.code == 0, done.err
    assert (done.records[0]["event"], done.records[-1]["event"]) == ("connected", "summary")
    assert (done.records[-1]["echoes_sent"], done.records[-1]["handshakes"]) == (5, 1)


# Nobody there.


async def test_no_nats(tmp_path: Path) -> None:
    command = Command("nats://127.0.0.1:1", tmp_path)
    answers = await asyncio.gather(*(command(*line) for line in (["status"], ["events", "m1"], ["migrate", "echo"])))
    for done in answers:
        assert (done.code, done.out) == (Exit.ERROR, "")
        assert done.err.startswith("error: NATS at nats://127.0.0.1:1 does not answer")
        assert "code: nats_unreachable" in done.err
        assert "what to do: " in done.err


async def test_no_coordinator(command: Command) -> None:
    done = await command("services")
    assert done.code == Exit.ERROR
    assert "code: no_answer" in done.err
    assert "Is a coordinator running?" in done.err


async def test_a_move_that_nobody_answered_may_have_been_asked_for(command: Command, bus: Bus) -> None:
    async def hear(message: Msg) -> None:
        heard.append(json.loads(message.data)["id"])

    heard: list[str] = []
    await bus.nats.subscribe("quicferry.migrate", cb=hear)
    await bus.sync()
    done = await command("migrate", "echo", "--detach")
    assert (done.code, done.out) == (Exit.ERROR, "")
    assert "code: no_answer" in done.err
    [migration] = set(heard)
    assert f"may have been heard all the same: `quicferry status {migration}` tells" in done.err


async def test_flag_goes_before_context_goes_before_environment(command: Command, tmp_path: Path) -> None:
    url = command.environment["NATS_URL"]
    folder = tmp_path / "nats" / "context"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "here.json").write_text(json.dumps({"url": url}))
    command.environment["NATS_URL"] = "nats://127.0.0.1:1"
    by_flag, by_context, by_environment, missing = await asyncio.gather(
        command("events", "m1", "--nats", url),
        command("--context", "here", "events", "m1"),
        command("events", "m1"),
        command("events", "m1", "--context", "there"),
    )
    assert "code: unknown_migration" in by_flag.err
    assert "code: unknown_migration" in by_context.err
    assert "code: nats_unreachable" in by_environment.err
    assert "code: bad_settings" in missing.err

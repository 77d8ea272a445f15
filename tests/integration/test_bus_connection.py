"""Connecting, waiting and refusing, against a real nats-server."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import structlog
from nats.aio.client import Client

from quicferry.bus.connection import CLOSE_SECONDS, FAIL_FAST, Bus
from quicferry.bus.log import EventLog
from quicferry.bus.settings import NatsSettings
from quicferry.protocol import events as ev
from quicferry.protocol.api import StatusReply, StatusRequest
from quicferry.protocol.errors import FerryError
from tests.conftest import NatsServer

RESTRICTED = """
authorization { users = [
  { user: all, password: pw }
  { user: reader, password: pw, permissions: {
      publish: { allow: ["$JS.API.>", "_INBOX.>"], deny: ["$JS.API.STREAM.CREATE.>"] }, subscribe: ["_INBOX.>"] } }
  { user: deaf, password: pw, permissions: { publish: ">", subscribe: ["nothing"] } }
] }
"""


async def refused_at(port: int, *, wait: bool = False) -> FerryError:
    assert FAIL_FAST + CLOSE_SECONDS < 2.5  # the promise; the limit below is for a product without an end
    with pytest.raises(FerryError) as caught:
        async with Bus.connect("test", NatsSettings.load(f"nats://127.0.0.1:{port}"), wait=wait):
            pass
    return caught.value


async def test_impatient_connect_fails_with_what_to_do(nats_server: NatsServer) -> None:
    nats_server.stop()
    async with asyncio.timeout(20):
        error = await refused_at(nats_server.port)
    assert error.code == "nats_unreachable"
    assert str(nats_server.port) in error.message
    assert "the given URL" in error.hint


async def test_impatient_connect_to_a_silent_port_fails_too() -> None:
    """A port that accepts and never speaks, as a load balancer with nothing behind it."""
    writers: list[asyncio.StreamWriter] = []
    server = await asyncio.start_server(lambda _, writer: writers.append(writer), "127.0.0.1", 0)
    async with server, asyncio.timeout(20):
        assert (await refused_at(server.sockets[0].getsockname()[1])).code == "nats_unreachable"
        for writer in writers:
            writer.close()
            await writer.wait_closed()
    assert writers


@pytest.mark.parametrize("variable", ["NATS_CREDS", "NATS_NKEY"])
@pytest.mark.parametrize("wait", [False, True])
async def test_credentials_that_are_none_are_a_bad_setting(
    variable: str, wait: bool, nats_server: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that can't be read ends it before nats-py begins; without nkeys installed, that is what is wrong."""
    monkeypatch.setenv(variable, str(tmp_path))
    assert (await refused_at(nats_server.port, wait=wait)).code == "bad_settings"
    (tmp_path / "garbage").write_text("no seed\n")
    monkeypatch.setenv(variable, str(tmp_path / "garbage"))
    assert (await refused_at(nats_server.port, wait=wait)).code == "bad_settings"

    async def broken(*_: object, **__: object) -> None:
        raise TypeError("object of type 'NoneType' has no len()")  # nkeys' own words for it

    monkeypatch.setattr(Client, "connect", broken)
    error = await refused_at(nats_server.port, wait=wait)
    assert error.code == "bad_settings"
    assert "has no len()" in error.message
    monkeypatch.delenv(variable)
    with pytest.raises(TypeError):  # without credentials it is a defect
        await refused_at(nats_server.port, wait=wait)


async def test_patient_connect_waits_for_the_server(nats_server: NatsServer) -> None:
    nats_server.stop()
    waiting = asyncio.Event()

    def watch(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        if event["event"] == "nats_waiting":
            waiting.set()
        raise structlog.DropEvent

    structlog.configure(processors=[watch])
    try:

        async def connect() -> None:
            async with Bus.connect("test", NatsSettings.load(nats_server.url), wait=True) as bus:
                await bus.nats.flush()

        async with asyncio.timeout(20), asyncio.TaskGroup() as group:
            group.create_task(connect())
            await waiting.wait()
            await nats_server.start()
    finally:
        structlog.reset_defaults()


async def test_a_wrong_password_is_told_as_such(tmp_path: Path) -> None:
    server = NatsServer(tmp_path, RESTRICTED)
    await server.start()
    try:
        settings = NatsSettings.load(f"nats://all:wrong@127.0.0.1:{server.port}")
        with pytest.raises(FerryError) as caught:
            async with Bus.connect("test", settings, wait=False):
                pass
        assert caught.value.code == "nats_denied"
        assert "wrong" not in str(caught.value)
    finally:
        server.stop()


async def test_refused_permissions_are_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = NatsServer(tmp_path, RESTRICTED)
    await server.start()
    try:
        full = NatsSettings.load(f"nats://all:pw@127.0.0.1:{server.port}")
        async with Bus.connect("full", full, wait=False) as bus:
            await EventLog.open(bus)
        reader = NatsSettings.load(f"nats://reader:pw@127.0.0.1:{server.port}")
        async with Bus.connect("reader", reader, wait=False) as bus:
            log = await EventLog.open(bus)
            within = Bus.within
            monkeypatch.setattr("quicferry.bus.log.PUBLISH_SECONDS", 60.0)
            monkeypatch.setattr(Bus, "within", lambda bus, _, subject, what: within(bus, 60.0, subject, what))
            async with asyncio.timeout(20):  # below every timeout of the exchanges themselves
                for attempt in (
                    log.append(ev.CancelAsked(id="M1", at_ms=1)),
                    bus.request("quicferry.Status", StatusRequest(), StatusReply, timeout=60),
                    bus.publish("quicferry.migrate", StatusRequest()),
                ):
                    with pytest.raises(FerryError) as caught:
                        await attempt
                    assert caught.value.code == "nats_denied"
            monkeypatch.undo()
        deaf = NatsSettings.load(f"nats://deaf:pw@127.0.0.1:{server.port}")
        async with Bus.connect("deaf", deaf, wait=False) as bus:
            with pytest.raises(FerryError) as caught:
                await EventLog.open(bus)
            assert caught.value.code == "nats_denied"
    finally:
        server.stop()


async def test_nobody_listens(bus: Bus) -> None:
    with pytest.raises(FerryError) as caught:
        await bus.request("quicferry.status", StatusRequest(), StatusReply, timeout=5)
    assert caught.value.code == "no_answer"
    assert "quicferry.status" in caught.value.message


async def test_a_listener_that_never_answers(bus: Bus) -> None:
    await bus.nats.subscribe("quicferry.status")
    with pytest.raises(FerryError) as caught:
        await bus.request("quicferry.status", StatusRequest(), StatusReply, timeout=0.05)
    assert caught.value.code == "no_answer"
    assert "within" in caught.value.message


def _fails(_: object) -> None:
    raise TypeError("'NoneType' object is not callable")  # asyncio's writelines() on a lost connection, 3.12 and 3.13


async def test_a_connection_lost_before_it_is_closed_is_closed_whole(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nats-py writes once more what it has to send, which on a lost connection is a TypeError from Python 3.12 on."""
    async with Bus.connect("test", NatsSettings.load(nats_server.url), wait=True) as bus:
        subscription = await bus.nats.subscribe("quicferry.status", cb=_ignore)
        nats_server.stop()
        async with asyncio.timeout(5):
            while bus.nats.is_connected:  # noqa: ASYNC110 - nats-py tells nobody but the Bus
                await asyncio.sleep(0.005)
        await bus.nats.publish("quicferry.status", b"waits")
        assert bus.nats.pending_data_size > 0
        monkeypatch.setattr(bus.nats._transport, "writelines", _fails)
    assert bus.nats.is_closed
    assert subscription._wait_for_msgs_task is not None
    assert subscription._wait_for_msgs_task.cancelling() or subscription._wait_for_msgs_task.done()


async def test_the_end_is_told_even_if_something_was_still_to_be_sent(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nats-py fails over that half-way, and whoever waits for the end would wait for ever."""
    async with Bus.connect("test", NatsSettings.load(nats_server.url), wait=True) as bus:
        monkeypatch.setattr(bus.nats._transport, "writelines", _fails)
        await bus.nats._process_err("'Maximum Connections Exceeded'")  # as if it had come from the server
        bus.nats._pending, bus.nats._pending_data_size = [b"PUB x 1\r\nx\r\n"], 12
        async with asyncio.timeout(5):
            with pytest.raises(FerryError) as caught:
                await bus.ended()
    assert caught.value.code == "nats_unreachable"
    assert "Maximum Connections Exceeded" in caught.value.message


async def _ignore(message: object) -> None:
    """Nobody sends it anything."""


async def test_without_jetstream_the_reason_is_told(tmp_path: Path) -> None:
    server = NatsServer(
        tmp_path,
        """
        accounts {
          A { users = [{user: a, password: a}] }
          B { jetstream: enabled, users = [{user: b, password: b}] }
        }
        """,
    )
    await server.start()
    try:
        settings = NatsSettings.load(f"nats://a:a@127.0.0.1:{server.port}")
        async with Bus.connect("test", settings, wait=False) as bus:
            bus.patience = 0.0
            with pytest.raises(FerryError) as caught:
                await EventLog.open(bus)
        assert caught.value.code == "nats_unreachable"
        assert "JetStream" in caught.value.message
    finally:
        server.stop()

"""Applications on ``serve`` and ``connect``: the echo server and the car client as processes, NATS for real."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import stat
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, cast

import pytest

from quicferry.app import BusHerald
from quicferry.bus import endpoints
from quicferry.bus.connection import Bus
from quicferry.bus.log import EventLog
from quicferry.bus.settings import NatsSettings
from quicferry.protocol import events, subjects
from quicferry.protocol.agents import ARE_YOU_THERE, ArmReply, ArmRequest
from quicferry.protocol.api import Address
from quicferry.protocol.errors import FerryError
from quicferry.quic import qlog
from tests.conftest import NatsServer
from tests.integration.lossy import Relay, Weather
from tests.integration.test_wrappers_move import ip_sockets
from tests.integration.wrapper_kit import LIMIT, Agent, Tls, dial, make_tls, parked, ping, serving

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tls(tmp_path: Path) -> Tls:
    return make_tls(tmp_path)


class Program:
    """A service as a process; its output in lines."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[str] = []

    @classmethod
    @contextlib.asynccontextmanager
    async def start(cls, module: str, *arguments: str, environment: Mapping[str, str] = {}) -> AsyncIterator[Program]:
        ours = ("NATS_", "QUICFERRY_", "MIGRATE_", "TARGET_ADDR", "TRANSPARENT")
        clean = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", module, *arguments),
            cwd=ROOT,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**clean, "PYTHONUNBUFFERED": "1", **environment},
        )
        program = cls(process)
        try:
            yield program
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def until(self, text: str) -> str:
        """The first further line with ``text`` in it."""
        assert self.process.stdout is not None
        async with asyncio.timeout(LIMIT):
            while raw := await self.process.stdout.readline():
                line = raw.decode().rstrip()
                self.lines.append(line)
                if text in line:
                    return line
        pytest.fail(f"ended without {text!r}:\n" + "\n".join(self.lines))

    async def said(self, event: str) -> dict[str, Any]:
        said: dict[str, Any] = json.loads(await self.until(f'"event": "{event}"'))
        return said

    async def exit_code(self) -> int:
        async with asyncio.timeout(LIMIT):
            return await self.process.wait()


def free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def echo_environment(tls: Tls, port: int, **more: str) -> dict[str, str]:
    return {
        "QUICFERRY_CERT": tls.certificate,
        "QUICFERRY_KEY": tls.private_key,
        "QUICFERRY_HOST": "127.0.0.1",
        "QUICFERRY_PORT": str(port),
        **more,
    }


async def test_echo_server_and_car_client_move_with_nats(
    tls: Tls, nats_server: NatsServer, bus: Bus, tmp_path: Path
) -> None:
    port = free_port()
    environment = echo_environment(
        tls, port, QUICFERRY_SERVICE="echo", NATS_URL=nats_server.url.replace("127.0.0.1", "localhost")
    )
    folder = tmp_path / "qlog"
    car_arguments = (
        "--json",
        "--interval-ms",
        "5",
        "--cafile",
        tls.certificate,
        "--name",
        "car",
        "--qlog",
        str(folder),
    )
    car_environment = {"TARGET_ADDR": f"127.0.0.1:{port}", "TRANSPARENT": "1"}
    async with Program.start("services.echo_server", environment=environment) as server:
        await server.until("heralding")
        async with Program.start("tests.patient_car", *car_arguments, environment=car_environment) as car:
            connected = await car.said("connected")
            with Agent(port) as agent:
                target = parked()
                new_port = target.getsockname()[1]
                request = ArmRequest(id="m1", epoch=1, target=Address(host="127.0.0.1", port=new_port))
                reply = await bus.request(subjects.arm("echo"), request, ArmReply, timeout=5)
                assert reply.clients == 1
                server.process.send_signal(signal.SIGTERM)
                _, source = await agent.take()
                source.close()
                # Held: no UDP, no TCP to NATS, and no thread left from looking up its name.
                assert ip_sockets(server.process.pid) == set()
                assert len(os.listdir(f"/proc/{server.process.pid}/task")) == 1
                server.process.send_signal(signal.SIGUSR2)
                await agent.give(target, "m1", "moved")
            move = await car.said("move")
            assert (move["id"], move["outcome"], move["target"]) == ("m1", "arrived", f"127.0.0.1:{new_port}")
            assert any('"migrate_seen"' in line for line in car.lines)
            await server.until("heralding")
            log = await EventLog.open(bus)
            written = await until_logged(log, "m1", "server.client/car/application")
            car.process.send_signal(signal.SIGINT)
            summary = await car.said("summary")
            assert await car.exit_code() == 0
        assert written == {
            "server.migrate",
            "server.ack/car",
            "server.quiesced",
            "server.adopted",
            "server.client/car/wrapper",
            "server.client/car/application",
        }
        assert summary["echoes_lost"] == 0
        assert summary["handshakes"] == 1
        assert summary["odcid"] == connected["odcid"]
        (pause,) = summary["moves"]
        assert pause["cwnd_after"] >= pause["cwnd_before"] > 0
        (trace,) = folder.iterdir()
        assert qlog.read(trace).handshakes == 1
        # Unarmed again: SIGTERM stops it.
        server.process.send_signal(signal.SIGTERM)
        assert await server.exit_code() == 0


async def until_logged(log: EventLog, migration: str, last: str) -> set[str]:
    """What the log holds of a migration once ``last`` is in it, without the migration's id."""
    found: set[str] = set()
    async with asyncio.timeout(LIMIT), contextlib.aclosing(log.follow(migration=migration)) as entries:
        async for entry in entries:
            found.add(events.message_id(entry.event).partition("/")[2])
            if last in found and len(found) >= 6:
                break
    return found


async def test_without_nats_the_server_serves_and_stops(tls: Tls) -> None:
    port = free_port()
    environment = echo_environment(tls, port, QUICFERRY_SERVICE="echo", NATS_URL="nats://127.0.0.1:1")
    async with Program.start("services.echo_server", environment=environment) as server:
        await server.until("serving")
        async with dial(tls, port) as connection:
            assert await ping(connection) == b"ping"
            await server.until("nats_waiting")
            assert await ping(connection) == b"ping"
        server.process.send_signal(signal.SIGTERM)
        assert await server.exit_code() == 0


async def test_events_wait_for_nats_and_travel_with_the_process(tls: Tls, nats_server: NatsServer) -> None:
    port = free_port()
    environment = echo_environment(
        tls, port, QUICFERRY_SERVICE="echo", NATS_URL=nats_server.url, MIGRATE_ADDR=f"127.0.0.1:{port}"
    )
    async with Program.start("services.echo_server", environment=environment) as server:
        await server.until("heralding")
        nats_server.stop()
        server.process.send_signal(signal.SIGTERM)
        line = await server.until("acks_gathered")
        migration = line.partition("id=")[2].split()[0]
        await nats_server.start()
        async with Bus.connect("test", NatsSettings.load(nats_server.url), wait=True) as late:
            log = await EventLog.open(late)
            async with asyncio.timeout(LIMIT), contextlib.aclosing(log.follow(migration=migration)) as entries:
                async for entry in entries:
                    assert isinstance(entry.event, events.MigrateSent)
                    break


@pytest.mark.parametrize("error", [None, TypeError("one of nats-py's own")])
async def test_a_herald_that_loses_nats_while_it_begins_begins_again(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    """Found by the soak: NATS was killed between connection and service, and nobody could arm the server any more."""
    real, begun = endpoints.add_service, []

    async def add_service(client: Any, config: Any) -> Any:
        begun.append(config)
        if len(begun) > 1:
            return await real(client, config)
        if error is not None:
            raise error
        nats_server.stop()
        adding = asyncio.create_task(real(client, config))
        await nats_server.start()
        return await adding

    monkeypatch.setattr(endpoints, "add_service", add_service)
    herald = BusHerald("echo", NatsSettings.load(nats_server.url))
    herald.start(cast(Any, object()))
    try:
        async with asyncio.timeout(LIMIT):
            await herald._connected.wait()
        assert len(begun) == 2
    finally:
        await herald.suspend()


async def test_a_suspension_that_is_given_up_leaves_a_herald_that_can_be_reached(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closing took longer than the move had: a server that is not on NATS again can never be moved."""

    class Server:
        async def arm(self, request: ArmRequest) -> ArmReply:
            return ArmReply(id=request.id, clients=0)

    async def slowly(bus: Bus) -> None:
        closing.set()
        await may_close.wait()
        await close(bus)

    close, closing, may_close = Bus._close, asyncio.Event(), asyncio.Event()
    settings = NatsSettings.load(nats_server.url)
    async with (
        Bus.connect("test", settings, wait=True) as bus,
        contextlib.AsyncExitStack() as stack,
        asyncio.timeout(LIMIT),
    ):
        herald = BusHerald("echo", settings)
        herald.start(cast(Any, Server()))
        stack.push_async_callback(herald.suspend)
        await herald._connected.wait()
        with monkeypatch.context() as patched:
            patched.setattr(Bus, "_close", slowly)
            suspending = asyncio.create_task(herald.suspend())
            await closing.wait()
            suspending.cancel()
            await asyncio.wait([suspending])
            await herald.resume()
        await herald._connected.wait()
        may_close.set()
        await asyncio.gather(*herald._ending, return_exceptions=True)
        assert (await bus.request(subjects.arm("echo"), ARE_YOU_THERE, ArmReply, timeout=5)).clients == 0
        await herald.publish(events.MigrateSent(id="m1", at_ms=1, clients=0))
        assert len(await (await EventLog.open(bus)).read("m1")) == 1
        await herald.suspend()
        with pytest.raises(FerryError) as refused:
            await bus.request(subjects.arm("echo"), ARE_YOU_THERE, ArmReply, timeout=5)
        assert refused.value.code == "no_answer"


async def test_the_echo_server_makes_its_own_certificate(tmp_path: Path) -> None:
    port = free_port()
    tls = Tls(str(tmp_path / "new" / "cert.pem"), str(tmp_path / "new" / "key.pem"))
    environment = echo_environment(tls, port, QUICFERRY_SAN="192.0.2.9 berth.example")
    async with Program.start("services.echo_server", environment=environment) as server:
        await server.until("serving")
        assert stat.S_IMODE(os.stat(tls.private_key).st_mode) == 0o600
        for name in ("127.0.0.1", "localhost", "192.0.2.9", "berth.example"):
            async with dial(tls, port, server_name=name) as connection:
                assert await ping(connection) == b"ping"


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"QUICFERRY_PORT": "seventy"}, "is not a port"),
        ({"MIGRATE_ADDR": "nowhere"}, "is not an address"),
        ({"MIGRATE_ADDR": "localhost:4242"}, "is not an address"),
        ({"MIGRATE_ADDR": "0.0.0.0:4242"}, "is not an address"),
        ({"QUICFERRY_SERVICE": "no spaces"}, "can't name a service"),
        ({"QUICFERRY_HOST": "192.0.2.1"}, "Can't listen"),
        ({"QUICFERRY_CERT": "/dev/null", "QUICFERRY_KEY": "/dev/null"}, "can't be used"),
        ({"QUICFERRY_CERT": "/proc/none/cert.pem"}, "is there but"),
    ],
)
async def test_the_echo_server_says_what_is_wrong(tls: Tls, environment: dict[str, str], sentence: str) -> None:
    async with Program.start("services.echo_server", environment=echo_environment(tls, 4242) | environment) as server:
        assert sentence in await server.until("echo-server: ")
        assert await server.exit_code() == 2


async def test_a_timeout_ends_the_car_clients_session(tls: Tls) -> None:
    async with serving(tls) as (server, _), Relay(("127.0.0.1", server.port), Weather(), 1) as relay:
        arguments = ("--json", "--timeout-ms", "100", "--target", f"127.0.0.1:{relay.port}")
        async with Program.start("services.car_client", *arguments, "--cafile", tls.certificate) as car:
            await car.said("connected")
            relay.weather.loss = 1.0
            assert (await car.said("ended"))["reason"] == "no echo in time"
            assert (await car.said("summary"))["echoes_lost"] >= 1
            assert await car.exit_code() == 1


async def test_staying_connected_outlives_timeouts_on_the_same_session(tls: Tls) -> None:
    async with serving(tls) as (server, _), Relay(("127.0.0.1", server.port), Weather(), 1) as relay:
        arguments = (
            "--json",
            "--timeout-ms",
            "60",
            "--target",
            f"127.0.0.1:{relay.port}",
            "--cafile",
            tls.certificate,
        )
        async with Program.start("tests.patient_car", *arguments, environment={"TRANSPARENT": "1"}) as car:
            await car.said("connected")
            relay.weather.loss = 1.0
            for _ in range(3):
                await car.said("timeout")
            relay.weather.loss = 0.0
            car.lines.clear()
            await asyncio.wait_for(_echoes(server, 10), LIMIT)
            car.process.send_signal(signal.SIGTERM)
            summary = await car.said("summary")
            assert await car.exit_code() == 0
            assert summary["handshakes"] == 1
            assert summary["echoes_lost"] == 0  # they came late, on streams given up
            assert len(server.clients) <= 1


async def _echoes(server: Any, count: int) -> None:
    """Until the server has had so many more datagrams."""
    before = server.udp.counters.received
    while server.udp.counters.received < before + count:  # noqa: ASYNC110 - a counter raises no event
        await asyncio.sleep(0.005)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--target", "nowhere"), "HOST:PORT"),
        # Too long for DNS (RFC 1035, 3.1), so that no resolver is asked, which may not answer for long.
        (("--target", "x." * 126 + "invalid:1"), "was not found"),
        (("--cafile", "/none.pem"), "can't be read"),
        (("--cafile", __file__), "can't be read"),
        (("--cafile", "/"), "can't be read"),
        (("--target", "127.0.0.1:99999"), "is no UDP port"),
        (("--name", "a b"), "can't name a client"),
        (("--interval-ms", "0"), "above 0"),
    ],
)
async def test_the_car_client_says_what_is_wrong(arguments: tuple[str, ...], sentence: str) -> None:
    async with Program.start("services.car_client", *arguments) as car:
        assert sentence in await car.until("car-client: ")
        assert await car.exit_code() == 2

"""Whole moves of a real server process over real UDP, without CRIU: the process stays, its socket changes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from quicferry.protocol.api import Options
from quicferry.quic import internals
from quicferry.quic.addresses import shown
from quicferry.quic.client import Connection
from quicferry.quic.follower import Follower
from quicferry.quic.meter import Meter, Pause
from quicferry.quic.policy import Policy
from tests.integration.wrapper_kit import LIMIT, Agent, ServerProcess, Tls, dial, make_tls, parked, ping


@pytest.fixture
def tls(tmp_path: Path) -> Tls:
    return make_tls(tmp_path)


class Traffic:
    """Pings on one stream until stopped; every echo counted."""

    def __init__(self, connection: Connection, every: float = 0.005) -> None:
        self.connection = connection
        self.every = every
        self.sent = self.echoed = 0
        self.pauses: list[Pause] = []
        self.meter = Meter(connection)
        self._stop = asyncio.Event()
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        reader, writer = await self.connection.open_stream()
        while not self._stop.is_set():
            self.sent += 1
            writer.write(b"%d\n" % self.sent)
            assert await reader.readline() == b"%d\n" % self.sent
            self.echoed += 1
            self.pauses += self.meter.good()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.every):
                    await self._stop.wait()

    async def stop(self) -> None:
        self._stop.set()
        async with asyncio.timeout(LIMIT):
            await self._task


async def a_move(
    server: ServerProcess, agent: Agent, migration: str, epoch: int, options: Options | None = None
) -> int:
    """Arm, SIGTERM, park, adopt another port; the new port."""
    target = parked()
    port: int = target.getsockname()[1]
    assert (await server.arm(migration, port, epoch=epoch, options=options))["kind"] == "armed"
    server.signal(signal.SIGTERM)
    park, source = await agent.take()
    assert park.id == migration
    source.close()
    server.signal(signal.SIGUSR2)
    await agent.give(target, migration, "moved", epoch=epoch)
    await server.until("server.adopted", migration=migration)
    return port


async def test_a_session_survives_moves_there_and_back(tls: Tls) -> None:
    async with ServerProcess.start(tls) as server, dial(tls, server.port, name="car") as connection:
        with Agent(server.port) as agent:
            traffic = Traffic(connection)
            odcid = connection.odcid
            for number in range(1, 6):
                port = await a_move(server, agent, f"m{number}", number)
                migration = connection.migrations[-1]
                assert await migration.arrived(LIMIT) == "arrived"
                assert connection.peer == f"127.0.0.1:{port}"
                assert not connection.migrate_seen.is_set()  # one-shot: the next move's is a fresh one
                await server.until("server.client", 2, migration=f"m{number}")
            await traffic.stop()
            assert traffic.echoed == traffic.sent
            assert [pause.id for pause in traffic.pauses] == ["m1", "m2", "m3", "m4", "m5"]
            for pause in traffic.meter.pauses:
                assert pause.cwnd_after >= pause.cwnd_before > 0
            assert connection.handshakes == 1
            assert connection.odcid == odcid
            assert len(connection.traces.all) == 1
        kinds = [event["kind"] for event in server.events if event.get("id") == "m1"]
        assert kinds[:3] == ["server.migrate", "server.ack", "server.quiesced"]
        assert {event["source"] for event in server.of("server.client", "m1")} == {"wrapper", "application"}
        assert server.of("server.ack", "m1")[0]["client"] == "car"


async def test_fifty_clients_with_traffic_lose_nothing(tls: Tls) -> None:
    async with ServerProcess.start(tls) as server, contextlib.AsyncExitStack() as stack:
        connections = [
            await stack.enter_async_context(dial(tls, server.port, name=f"car-{number}")) for number in range(50)
        ]
        traffic = [Traffic(connection, every=0.05) for connection in connections]
        with Agent(server.port) as agent:
            port = await a_move(server, agent, "many", 1, Options(ack_timeout_ms=10_000))
        outcomes = [await connection.migrations[-1].arrived(LIMIT) for connection in connections]
        assert outcomes == ["arrived"] * 50
        for one in traffic:
            await one.stop()
        assert all(one.sent == one.echoed for one in traffic)
        assert {connection.peer for connection in connections} == {f"127.0.0.1:{port}"}
        assert {connection.handshakes for connection in connections} == {1}
        assert server.of("server.quiesced")[0]["acks"] == 50
        assert len(await server.until("server.client", 50)) >= 50


async def test_who_has_just_connected_comes_along(tls: Tls, monkeypatch: pytest.MonkeyPatch) -> None:
    """The handshake is done and the hello still on its way when SIGTERM comes."""
    hellos: list[Callable[[], None]] = []
    start = Follower.start
    async with ServerProcess.start(tls, "--hello-grace", "10") as server, contextlib.AsyncExitStack() as stack:
        with Agent(server.port) as agent:
            monkeypatch.setattr(
                Follower, "start", lambda follower, name: hellos.append(lambda: start(follower, name))
            )
            connection = await stack.enter_async_context(dial(tls, server.port, name="late"))
            move = asyncio.create_task(a_move(server, agent, "just-now", 1))
            await server.until("server.migrate", migration="just-now")
            hellos.pop()()
            await move
            assert await connection.migrations[-1].arrived(LIMIT) == "arrived"
            assert await ping(connection) == b"ping"
        assert server.of("server.quiesced")[0]["acks"] == 1
        assert server.of("server.quiesced")[0]["closed"] == 0


async def test_an_idle_client_arrives_too(tls: Tls) -> None:
    """It sends nothing of its own: only the wrapper's probes give the target something to answer."""
    async with ServerProcess.start(tls) as server, dial(tls, server.port) as connection:
        with Agent(server.port) as agent:
            await a_move(server, agent, "idle", 1)
        assert await connection.migrations[-1].arrived(LIMIT) == "arrived"
        assert await ping(connection) == b"ping"


async def test_a_rollback_leaves_everybody_where_they_were(tls: Tls) -> None:
    async with ServerProcess.start(tls) as server, dial(tls, server.port) as connection:
        traffic = Traffic(connection)
        target = parked()
        with Agent(server.port) as agent, target:
            await server.arm("back", target.getsockname()[1])
            server.signal(signal.SIGTERM)
            _, source = await agent.take()
            server.signal(signal.SIGUSR2)
            await agent.give(source, "back", "rolled_back", epoch=0)
            adopted = await server.until("server.adopted")
            assert adopted[0]["outcome"] == "rolled_back"
        assert await connection.migrations[-1].arrived(LIMIT) == "rolled_back"
        await traffic.stop()
        assert traffic.echoed == traffic.sent
        assert connection.peer == f"127.0.0.1:{server.port}"
        assert await ping(connection) == b"ping"
        # A move after it, with the same epoch as the one that failed, goes through.
        with Agent(server.port) as agent:
            await a_move(server, agent, "again", 1)
        assert await connection.migrations[-1].arrived(LIMIT) == "arrived"


async def test_after_a_rollback_that_lost_the_queue_no_timer_is_waited_for(tls: Tls) -> None:
    """The agent with the source's socket died, and what was in it too. A client's timer has backed off by then."""
    async with ServerProcess.start(tls) as server, dial(tls, server.port) as connection:
        assert await ping(connection) == b"ping"
        with Agent(server.port) as agent, parked() as target:
            await server.arm("lossy", target.getsockname()[1])
            server.signal(signal.SIGTERM)
            _, source = await agent.take()
            with source:
                asked = asyncio.create_task(ping(connection, bytes(1000)))
                async with asyncio.timeout(LIMIT):
                    while len(await asyncio.get_running_loop().sock_recv(source, 2048)) < 1000:
                        pass  # an acknowledgement, or a probe
            connection._wire._quic._loss._pto_count = 30  # it would fire in a year
            internals.stop_timer(connection._wire)
            server.signal(signal.SIGUSR2)
            await agent.give(parked(server.port), "lossy", "rolled_back", epoch=0)
            await server.until("server.adopted")
        assert await connection.migrations[-1].arrived(LIMIT) == "rolled_back"
        assert await asked == bytes(1000)


async def test_a_held_server_takes_no_socket_of_another_migration(tls: Tls) -> None:
    """It could be the other copy's that serves: whoever is held waits for its own migration's end."""
    async with ServerProcess.start(tls) as server, dial(tls, server.port) as connection:
        with Agent(server.port) as agent:
            target = parked()
            port = target.getsockname()[1]
            await server.arm("own", port)
            server.signal(signal.SIGTERM)
            _, source = await agent.take()
            source.close()
            server.signal(signal.SIGUSR2)
            await agent.give(parked(), "another", "moved")
            server.signal(signal.SIGUSR2)
            asked = await agent.give(target, "own", "moved")
            assert asked.id == "own", "it serves with another's socket, and takes any"
        assert [event["outcome"] for event in await server.until("server.adopted")] == ["moved"]
        assert await connection.migrations[-1].arrived(LIMIT) == "arrived"
        assert connection.peer == f"127.0.0.1:{port}"
        assert len(ip_sockets(server.process.pid)) == 1


async def test_without_an_agent_the_move_is_called_off(tls: Tls) -> None:
    async with ServerProcess.start(tls) as server, dial(tls, server.port) as connection:
        with parked() as target:
            await server.arm("nobody", target.getsockname()[1])
            server.signal(signal.SIGTERM)
            await server.until("resumed")
            assert await connection.migrations[-1].arrived(LIMIT) == "rolled_back"
        assert await ping(connection) == b"ping"
        assert server.of("server.adopted") == []


async def test_a_server_whose_every_client_refuses_the_address_stays(tls: Tls) -> None:
    """Otherwise a mistyped address would close every session, and the move would count as completed."""
    async with (
        ServerProcess.start(tls) as server,
        dial(tls, server.port, policy=Policy.only("192.0.2.0/24")) as connection,
    ):
        assert await ping(connection) == b"ping"
        with Agent(server.port):
            await server.arm("astray", 9, epoch=1)
            server.signal(signal.SIGTERM)
            await server.until("resumed")
        assert server.of("server.quiesced") == []
        assert await ping(connection) == b"ping"
        assert connection.migration is None


async def test_a_disarmed_server_stops_on_sigterm(tls: Tls) -> None:
    async with ServerProcess.start(tls) as server:
        await server.arm("never", 4242)
        await server.arm("never", None)
        server.signal(signal.SIGTERM)
        assert await server.exit_code() == 0


async def test_a_move_under_way_can_be_disarmed(tls: Tls) -> None:
    """A client that never acks keeps it waiting; the coordinator calls it off meanwhile."""
    async with ServerProcess.start(tls) as server, dial(tls, server.port) as connection:
        mute(connection)
        with parked() as target:
            await server.arm("off", target.getsockname()[1], options=Options(ack_timeout_ms=60_000))
            server.signal(signal.SIGTERM)
            await server.until("server.migrate")
            busy = await server.arm("other", 4242)
            assert busy["code"] == "service_busy"
            await server.arm("off", None)
            await server.until("resumed")
        assert await ping(connection) == b"ping"
        server.signal(signal.SIGTERM)
        assert await server.exit_code() == 0


def mute(connection: Connection) -> None:
    """The client hears nothing on its control stream any more, and so acks nothing."""
    connection._follower._migrate = lambda message: None  # type: ignore[method-assign]


async def test_a_client_that_never_acks_holds_nobody_up_and_is_served_afterwards(tls: Tls) -> None:
    async with (
        ServerProcess.start(tls) as server,
        dial(tls, server.port, name="good") as good,
        dial(tls, server.port, name="deaf") as deaf,
    ):
        assert await ping(deaf) == b"ping"
        mute(deaf)
        with Agent(server.port) as agent:
            target = parked()
            port = target.getsockname()[1]
            await server.arm("deaf", port, options=Options(ack_timeout_ms=1_000))
            server.signal(signal.SIGTERM)
            _, source = await agent.take()
            source.close()
            server.signal(signal.SIGUSR2)
            await agent.give(target, "deaf", "moved")
        quiesced = (await server.until("server.quiesced"))[0]
        assert (quiesced["acks"], quiesced["clients"]) == (1, 2)
        assert await good.migrations[-1].arrived(LIMIT) == "arrived"
        # It finds the way by itself, later: its connection was carried along.
        deaf._seam.begin(("127.0.0.1", port))
        deaf._seam.pin()
        assert await ping(deaf) == b"ping"
        assert deaf.handshakes == 1


async def test_both_sides_quiesce_before_the_hold(tls: Tls) -> None:
    quiet = asyncio.Event()
    let_go = asyncio.Event()

    async def on_quiesce(_: object) -> None:
        quiet.set()
        await let_go.wait()

    async with (
        ServerProcess.start(tls, "--quiesce") as server,
        dial(tls, server.port, on_quiesce=on_quiesce) as connection,
    ):
        with Agent(server.port) as agent:
            target = parked()
            await server.arm("calm", target.getsockname()[1], options=Options(quiesce_timeout_ms=10_000))
            server.signal(signal.SIGTERM)
            async with asyncio.timeout(LIMIT):
                await quiet.wait()
            await server.until("quiesce")
            await server.until("server.ack")
            assert server.of("server.quiesced") == []  # acked, not ready
            assert await ping(connection) == b"ping"  # and still served
            let_go.set()
            _, source = await agent.take()
            source.close()
            server.signal(signal.SIGUSR2)
            await agent.give(target, "calm", "moved")
        assert (await server.until("server.quiesced"))[0]["ready"] == 1
        assert (await server.until("resume"))[0]["outcome"] == "moved"
        assert await connection.migrations[-1].arrived(LIMIT) == "arrived"


async def test_an_application_that_never_gets_quiet_is_moved_as_it_stands(tls: Tls) -> None:
    async def on_quiesce(_: object) -> None:
        await asyncio.Event().wait()

    async with ServerProcess.start(tls) as server, dial(tls, server.port, on_quiesce=on_quiesce) as connection:
        with Agent(server.port) as agent:
            target = parked()
            await server.arm("loud", target.getsockname()[1], options=Options(quiesce_timeout_ms=50))
            server.signal(signal.SIGTERM)
            _, source = await agent.take()
            source.close()
            server.signal(signal.SIGUSR2)
            await agent.give(target, "loud", "moved")
        assert (await server.until("server.quiesced"))[0]["ready"] == 0
        assert await connection.migrations[-1].arrived(LIMIT) == "arrived"


async def test_a_held_server_has_no_socket_says_nothing_and_dies_of_sigterm(tls: Tls) -> None:
    async with ServerProcess.start(tls) as server, dial(tls, server.port) as connection:
        with Agent(server.port) as agent, parked() as target:
            assert len(ip_sockets(server.process.pid)) == 1
            await server.arm("held", target.getsockname()[1])
            server.signal(signal.SIGTERM)
            _, source = await agent.take()
            assert ip_sockets(server.process.pid) == set()
            connection._wire.probe()  # something it would answer if it could
            server.signal(signal.SIGTERM)
            assert await server.exit_code() == 0
            source.close()


def ip_sockets(pid: int) -> set[str]:
    """Inodes of a process's UDP and TCP sockets."""
    folder = Path(f"/proc/{pid}")
    links = []
    for fd in (folder / "fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            links.append(os.readlink(fd))
    open_sockets = {link.removeprefix("socket:[").removesuffix("]") for link in links}
    tables = [(folder / "net" / name).read_text().splitlines()[1:] for name in ("udp", "udp6", "tcp", "tcp6")]
    return open_sockets & {row.split()[9] for rows in tables for row in rows}


@pytest.mark.parametrize("arguments", [(), ("--thread",)], ids=["alone", "with a thread of the application's"])
async def test_early_and_repeated_signals_do_no_harm(tls: Tls, arguments: tuple[str, ...]) -> None:
    async with ServerProcess.start(tls, *arguments) as server, dial(tls, server.port) as connection:
        mute(connection)
        with Agent(server.port) as agent:
            target = parked()
            await server.arm("twice", target.getsockname()[1], options=Options(ack_timeout_ms=2_000))
            server.signal(signal.SIGTERM)
            await server.until("server.migrate")
            server.signal(signal.SIGTERM)
            server.signal(signal.SIGUSR2)
            _, source = await agent.take()
            source.close()
            server.signal(signal.SIGUSR2)
            server.signal(signal.SIGUSR2)
            await agent.give(target, "twice", "moved")
            await server.until("server.adopted")
            late = await server.arm("twice", 4242)
            assert late["code"] == "too_late"


async def test_unarmed_sigterm_stops_cleanly_and_tells_clients(tls: Tls) -> None:
    async with ServerProcess.start(tls) as server, dial(tls, server.port) as connection:
        assert await ping(connection) == b"ping"
        server.signal(signal.SIGTERM)
        async with asyncio.timeout(LIMIT):
            await connection.wait_closed()
        assert connection.close_reason == "the server is stopping"
        assert await server.exit_code() == 0


async def test_by_hand_with_migrate_addr(tls: Tls) -> None:
    """The source document's way: SIGTERM tells the clients, SIGUSR2 rebinds; nobody parks anything."""
    with parked() as target:
        address = shown(target.getsockname())
        async with (
            ServerProcess.start(tls, environment={"MIGRATE_ADDR": address}) as server,
            dial(tls, server.port, name="car") as connection,
        ):
            server.signal(signal.SIGTERM)
            acks = await server.until("server.ack")
            assert acks[0]["client"] == "car"
            assert connection.migration is not None
            assert connection.migrate_seen.is_set()
            assert await ping(connection) == b"ping"  # by the old address, which still answers
            assert target.recv(2048)  # and everything goes to the new one too
            server.signal(signal.SIGUSR2)
            for _ in range(20):
                assert await ping(connection) == b"ping"


async def test_a_client_that_joins_during_the_move_comes_along(tls: Tls) -> None:
    async with ServerProcess.start(tls) as server, dial(tls, server.port, name="first") as first:
        mute(first)
        with Agent(server.port) as agent:
            target = parked()
            await server.arm("join", target.getsockname()[1], options=Options(ack_timeout_ms=2_000))
            server.signal(signal.SIGTERM)
            await server.until("server.migrate")
            async with dial(tls, server.port, name="second") as second:
                await server.until("server.ack")
                _, source = await agent.take()
                source.close()
                server.signal(signal.SIGUSR2)
                await agent.give(target, "join", "moved")
                assert await second.migrations[-1].arrived(LIMIT) == "arrived"
                assert await ping(second) == b"ping"
